"""What a worker answers to reproducible items: the same bits, whatever is in the step, was before, or was tuned."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from reference.models import PREPROCESSING, build, picture
from restless import Restless
from torch import Tensor, nn

from camserve.errors import Unavailable
from camserve.methods import GradCam, MethodSpec, Rise, ScoreCam, SmoothGrad
from camserve.scores import make_score
from camserve.types import InputView, Item, ItemResult, Ranking, Target, Task
from camserve.worker.executor import MEMORY_BYTES, Executor
from camserve.worker.forward import Wanted
from camserve.worker.memory import Passed, Seen
from camserve.worker.network import Network

METHODS: tuple[MethodSpec, ...] = (GradCam(), Rise(masks=32, grid=4), ScoreCam(), SmoothGrad(samples=16))
VIEW = InputView((40, 48), (0.0, 0.0, 48.0, 40.0), (40, 48))


def network(micro_batch: int = 5, module: nn.Module | None = None) -> Network:
    made = nn.Sequential(Restless(), build("perceptron", 2), Restless()).eval()
    return Network(module or made, preprocessing=PREPROCESSING, micro_batch=micro_batch)


def item(
    seed: int, start: int = 0, stop: int = 18, targets: tuple[int, ...] = (3, 1), reproducible: bool = True
) -> Item:
    ranges = [(0, 0) if isinstance(method, GradCam) else (start, stop) for method in METHODS]
    tasks = tuple(Task(at, method, *ranges[at]) for at, method in enumerate(METHODS))
    wanted = tuple(Target(index=one) for one in targets)
    return Item(picture(seed), wanted, tasks, digest=bytes([seed]), reproducible=reproducible)


def sums(executor: Executor, *items: Item) -> list[bytes]:
    """Of the first item."""
    (outcome, *_) = executor.execute(items).outcomes
    assert isinstance(outcome, ItemResult)
    return [partial.sums.tobytes() for partial in outcome.partials]


@pytest.fixture(scope="module")
def expected() -> list[bytes]:
    return sums(Executor(network()), item(1))


def others(seed: int = 2) -> list[Item]:
    return [item(seed + number, 0, 11, reproducible=bool(number % 2)) for number in range(4)]


def test_neighbours_do_not_change_a_bit(expected: list[bytes]):
    assert sums(Executor(network()), item(1), *others()) == expected
    found = Executor(network(4)).execute([*others(), item(1)]).outcomes[-1]
    assert isinstance(found, ItemResult)
    assert [partial.sums.tobytes() for partial in found.partials] == expected


def test_tasks_of_one_item_do_not_change_a_bit_of_each_other(expected: list[bytes]):
    """How the queries of a request are spread over steps is a matter of load."""
    whole = item(1)
    alone = [sums(Executor(network()), replace(whole, tasks=(task,)))[0] for task in whole.tasks]
    assert alone == expected
    assert sums(Executor(network()), replace(whole, tasks=whole.tasks[::-1])) == expected[::-1]


def test_the_size_of_other_passes_does_not_change_a_bit(expected: list[bytes]):
    for micro_batch in (1, 3, 16):
        assert sums(Executor(network(micro_batch)), item(1)) == expected


def test_what_is_remembered_does_not_change_a_bit(expected: list[bytes]):
    executor = Executor(network(), MEMORY_BYTES)
    executor.execute([item(1, reproducible=False), *others()])
    assert sums(executor, item(1)) == expected
    executor = Executor(network(), MEMORY_BYTES)
    executor.execute([item(1, targets=(1,))])
    executor.execute([item(1, targets=(1, 3, 0))])
    assert sums(executor, item(1)) == expected
    assert sums(executor, item(1)) == expected


def test_other_items_depend_on_all_of_these():
    """Else the tests above would show nothing."""
    plain = item(1, reproducible=False)
    found = [
        sums(Executor(network()), plain),
        sums(Executor(network()), plain, *others()),
        sums(Executor(network(3)), plain),
    ]
    assert len({found[0][2], found[1][2], found[2][2]}) == 3  # Score-CAM's
    assert found[0][0] != found[1][0]  # Grad-CAM's


class Narrow(nn.Module):
    """Has no memory for more pictures than `most`."""

    most = 1000

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.most:
            raise torch.OutOfMemoryError("out of memory")
        return x


def test_no_pass_gets_smaller_where_memory_runs_out():
    """A map that cannot be made again is none of an evidence record."""
    narrow = Narrow()
    executor = Executor(network(5, nn.Sequential(narrow, build("perceptron", 2)).eval()))
    narrow.most = 2
    asked = replace(item(1), tasks=(Task(0, ScoreCam(), 0, 16),))
    (outcome,) = executor.execute([asked]).outcomes
    assert isinstance(outcome, Unavailable)
    assert executor.micro_batch.size == 5  # that of others is not touched either
    (outcome,) = executor.execute([replace(asked, reproducible=False)]).outcomes
    assert isinstance(outcome, ItemResult)


def test_a_step_tells_what_it_was_computed_with():
    told = json.loads(Executor(network()).execute([item(1)]).environment)
    assert told["torch"] == torch.__version__.partition("+")[0] or told["torch"] == torch.__version__
    assert told["numpy"] == np.__version__
    assert told["device"] == "cpu"
    assert told["threads"] == str(torch.get_num_threads())
    assert told["pass"] == "4"
    assert told["instructions"] == torch.backends.cpu.get_cpu_capability()
    assert told["preprocessing"]["mean"] == list(PREPROCESSING.mean)
    assert told["processor"]


def test_gradients_beside_others_are_not_taken_from_memory():
    """The closed form of several targets is one matrix product, whose rounding depends on how many there are."""
    one, other, nothing = Target(index=3), Target(index=1), torch.zeros(1)
    score = make_score("softmax", shape=(5,))
    for asked, alone in (((one,), False), ((one, other), True), ((other, one), False)):
        seen = Wanted(
            b"", Seen(nothing, VIEW), lambda logits, asked=asked: score.targets(asked), gradients=True, alone=True
        )
        remembered = Passed(nothing, nothing, nothing, {one: nothing, other: nothing})
        assert seen.suffices(remembered) == alone
        assert replace(seen, alone=False).suffices(remembered)
        assert replace(seen, gradients=False).suffices(remembered)


@pytest.mark.parametrize(("dtype", "alike"), [(torch.float32, True), (torch.float64, False)], ids=str)
def test_a_ranking_is_the_same_whether_its_attribution_has_travelled_or_not(dtype: torch.dtype, alike: bool):
    """On its way an attribution is rounded to float32. An engine of a float64 network keeps all digits."""
    executor = Executor(Network(build("perceptron", 2).to(dtype), preprocessing=PREPROCESSING))
    here = np.random.default_rng(0).standard_normal((2, 40, 48))
    wanted = tuple(Target(index=one) for one in (3, 1))
    found = []
    for attribution in (here, here.astype(np.float32)):
        (outcome,) = executor.execute([Item(picture(1), wanted, (Task(0, Ranking(attribution), 0, 1),))]).outcomes
        assert isinstance(outcome, ItemResult)
        found.append(outcome.partials[0].sums.tobytes())
    assert (found[0] == found[1]) == alike
