"""Steps of many items, good and bad; modes, threads, cost. What holds for every method is in `test_saliency_every`."""

import copy
import io
import threading
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from asked import BFLOAT16
from PIL import Image
from reference.models import CHANNELS, CLASSES, HEIGHT, PREPROCESSING, WIDTH, build, picture, silence
from scipy.stats import spearmanr
from torch import nn

from camserve import Engine
from camserve.errors import CamserveError, Internal, InvalidImage, InvalidOption, Unsupported
from camserve.methods import Cam, GradCam, GroupCam, MethodSpec, ScoreCam
from camserve.types import Item, ItemResult, Layer, Target, Task
from camserve.worker.executor import Executor
from camserve.worker.network import Network, exact_float32

METHODS: dict[str, MethodSpec] = {
    "grad_cam": GradCam(),
    "group_cam": GroupCam(groups=6),
    "group_cam_reference": GroupCam(groups=6, variant="reference"),
    "score_cam": ScoreCam(),
}
FLOAT64 = {"rtol": 1e-9, "atol": 1e-12}
"""The order of a few hundred float64 additions."""
FLOAT32 = {"rtol": 0, "atol": 1e-4}
"""Of the map's range: convolutions of another batch size add in another order, behind them is a softmax of logits of up
to 20, and Group-CAM takes differences of close probabilities."""


def executor(name: str = "perceptron", dtype=torch.float64, micro_batch: int = 8, **options) -> Executor:
    return Executor(Network(build(name, 2, dtype), preprocessing=PREPROCESSING, micro_batch=micro_batch, **options))


def item(method: MethodSpec, image=None, targets=(5,), layer="", span=None, position=0, **options) -> Item:
    image = picture(2) if image is None else image
    start, stop = span or (0, 10_000 if method.queries(Layer("layer", 10_000, 7, 7), 1) else 0)
    return Item(image, tuple(map(Target, targets)), (Task(position, method, start, stop, layer),), **options)


def sums(outcome: ItemResult | CamserveError) -> np.ndarray:
    assert isinstance(outcome, ItemResult), outcome
    (partial,) = outcome.partials
    assert np.isfinite(partial.sums).all()
    return partial.sums


def alone(runner: Executor, one: Item) -> ItemResult | CamserveError:
    (outcome,) = runner.execute([one]).outcomes
    return outcome


def encoded(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(seed, 90, 120)).save(buffer, "JPEG")
    return buffer.getvalue()


# Maps


@pytest.mark.parametrize("method", METHODS)
def test_map_hardly_depends_on_the_micro_batch_in_float32(method):
    results = [
        sums(alone(executor(dtype=torch.float32, micro_batch=size), item(METHODS[method], targets=(5, 1))))
        for size in (64, 1, 3)
    ]
    scale = np.abs(results[0]).max()
    assert scale > 0
    for other in results[1:]:
        np.testing.assert_allclose(other / scale, results[0] / scale, **FLOAT32)


NEIGHBOURS = [
    item(GradCam(), picture(1), layer="features.2"),
    item(ScoreCam(), picture(3), (0, 1, 2)),
    item(GroupCam(groups=12), encoded(4), (6,), layer="features.5"),
    item(GroupCam(groups=3, variant="reference"), encoded(5), (2, 4)),
    item(GradCam(), picture(6), (3, 0, 1, 2)),
    item(ScoreCam(), picture(7), layer="features.5", precision=BFLOAT16),
    item(GroupCam(groups=1), picture(8), precision=BFLOAT16),
]


def test_every_item_of_a_step_is_what_it_is_alone():
    runner = executor()
    for one, outcome in zip(NEIGHBOURS, runner.execute(NEIGHBOURS).outcomes, strict=True):
        expected = alone(runner, one)
        # Where items ask for bfloat16, rounding to 8 bits depends on where in a micro-batch a query stands.
        tolerance = FLOAT64 if one.precision == "exact" else {"rtol": 0.05, "atol": 0.05 * np.abs(sums(expected)).max()}
        np.testing.assert_allclose(sums(outcome), sums(expected), **tolerance)
        assert outcome.view == expected.view
        assert [t.target for t in outcome.targets] == [t.target for t in expected.targets]
        np.testing.assert_allclose(
            [p.probability for p in outcome.predictions], [p.probability for p in expected.predictions], rtol=1e-9
        )


@pytest.mark.parametrize("method", ["score_cam", "group_cam", "group_cam_reference"])
def test_shards_ask_no_query_twice_but_group_cams_blurred_image(method):
    spec, runner = METHODS[method], executor()
    total = spec.queries(Layer("layer", CHANNELS, 7, 7), 2)
    spans = [(0, total), (0, 4), (4, 9), (9, total)]
    whole, *parts = (alone(runner, item(spec, targets=(5, 1), span=span)).partials[0].queries for span in spans)
    assert sum(parts) == whole + (2 if isinstance(spec, GroupCam) else 0)


class SquaredMean(nn.Module):
    """Looks like a pooled linear head, but squares in between; its logits are small and nearly all bias."""

    def __init__(self) -> None:
        super().__init__()
        self.features = build("pooled").features
        self.head = nn.Linear(CHANNELS, CLASSES)
        with torch.no_grad():
            self.head.weight *= 1e-3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(-(self.features(x).mean(dim=(2, 3)) ** 2))


def test_cam_is_not_fooled_by_a_head_whose_logits_hardly_differ():
    engine = Engine(SquaredMean(), preprocessing=PREPROCESSING, layer="features.8")
    with pytest.raises(Unsupported, match="CAM needs"):
        engine.explain(picture(), methods=[Cam()])


# Bad pixels


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_no_numbers_are_refused(value):
    image = np.full((HEIGHT, WIDTH, 3), 0.5, dtype=np.float32)
    image[3, 4, 1] = value
    assert isinstance(alone(executor(), item(GradCam(), image)), InvalidImage)


# One bad item among eight


def bad_items() -> dict[str, tuple[Item, type[CamserveError], str]]:
    jpeg = encoded(0)
    return {
        "truncated image": (item(GradCam(), jpeg[: len(jpeg) // 2]), InvalidImage, "truncated"),
        "no image": (item(GradCam(), b"hello"), InvalidImage, "JPEG, PNG, WEBP"),
        "zero bytes": (item(GradCam(), b""), InvalidImage, "zero bytes"),
        "array of another type": (item(GradCam(), np.zeros((4, 4, 3))), InvalidImage, "float64"),
        "float image of another size": (item(GradCam(), np.zeros((4, 4, 3), np.float32)), InvalidImage, "40 x 48"),
        "unknown layer": (item(GradCam(), layer="features.88"), InvalidOption, "features.8"),
        "class out of range": (item(GradCam(), targets=(7,)), InvalidOption, r"0\.\.6, got 7"),
        "label": (Item(encoded(0), (Target(label="zebra"),), ()), InvalidOption, "zebra"),
        "too many groups": (item(GroupCam(groups=21)), InvalidOption, r"1\.\.20 at this layer, got 21"),
        "CAM without its head": (item(Cam()), Unsupported, "CAM needs"),
    }


@pytest.mark.parametrize("what", bad_items())
def test_one_bad_item_of_eight_leaves_seven_right_answers(what):
    bad, kind, text = bad_items()[what]
    runner = executor()
    expected = [sums(alone(runner, neighbour)) for neighbour in NEIGHBOURS if neighbour.precision == "exact"]
    outcomes = runner.execute([*NEIGHBOURS[:4], bad, *NEIGHBOURS[4:]]).outcomes
    assert type(outcomes[4]) is kind
    with pytest.raises(kind, match=text):
        raise outcomes[4]
    found = [
        sums(outcome)
        for outcome, neighbour in zip(outcomes[:4] + outcomes[5:], NEIGHBOURS, strict=True)
        if neighbour.precision == "exact"
    ]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, **FLOAT64)


def test_all_bad_items_at_once_have_each_their_own_error():
    bad = bad_items()
    outcomes = executor().execute([one for one, _, _ in bad.values()]).outcomes
    assert [type(outcome) for outcome in outcomes] == [kind for _, kind, _ in bad.values()]


class Picky(nn.Module):
    """Fails, from its nth call on, as soon as one image of the batch has a full blue pixel."""

    calls_left = 1000

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls_left -= 1
        if self.calls_left <= 0 and x[:, 2].max() > 2:  # (1 - 0.55) / 0.2 = 2.25 after normalising
            raise RuntimeError("secret detail")
        return x


@pytest.mark.parametrize("call", [1, 2], ids=["first forward", "queries"])
def test_a_network_that_fails_on_one_image_fails_for_its_item_alone(call):
    module, picky = build("perceptron", 2, torch.float64), Picky()
    module.features.insert(0, picky)
    runner = Executor(Network(module, preprocessing=PREPROCESSING))
    items = [item(ScoreCam(), picture(seed).clip(0, 200)) for seed in range(8)]
    expected = [sums(alone(runner, one)) for one in items]
    items[3].image[5, 5, 2] = items[3].image[35, 40, 2] = 255
    picky.calls_left = call
    outcomes = runner.execute(items).outcomes
    assert isinstance(outcomes[3], Internal)
    for place in (0, 1, 2, 4, 5, 6, 7):
        np.testing.assert_allclose(sums(outcomes[place]), expected[place], **FLOAT64)


def test_an_empty_step_is_answered():
    assert executor().execute([]).outcomes == ()


# Modes


def test_a_module_in_training_mode_is_explained_in_eval_mode():
    module = build("perceptron", 2)
    answers = [
        Engine(module.train(training), preprocessing=PREPROCESSING).explain(picture(2)) for training in (True, False)
    ]
    np.testing.assert_array_equal(answers[0].maps[0].array, answers[1].maps[0].array)


def test_eval_mode_lasts_until_the_last_of_overlapping_runs_ends():
    network = Network(build("perceptron", 2).train(), preprocessing=PREPROCESSING)
    with ExitStack() as first, ExitStack() as second:
        first.enter_context(network.evaluating())
        second.enter_context(network.evaluating())
        first.close()
        assert not any(child.training for child in network.module.modules())
        second.close()
        assert all(child.training for child in network.module.modules())


def test_exact_float32_lasts_until_the_last_of_overlapping_runs_ends():
    backend = torch.backends.cudnn.conv
    before = backend.fp32_precision
    backend.fp32_precision = "tf32"
    try:
        with ExitStack() as first, ExitStack() as second:
            first.enter_context(exact_float32())
            second.enter_context(exact_float32())
            first.close()
            assert backend.fp32_precision == "ieee"
            second.close()
        assert backend.fp32_precision == "tf32"
    finally:
        backend.fp32_precision = before


@pytest.mark.parametrize("asked", ["high", "medium"])
def test_exact_float32_holds_whatever_precision_the_caller_has_asked_for(asked):
    """Programs that train ask for it once, at their beginning; CPUs with bfloat16 then use that as well."""
    backends = (*(getattr(torch.backends.mkldnn, name) for name in ("conv", "matmul")), torch.backends.cuda.matmul)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(asked)
        wanted = [backend.fp32_precision for backend in backends]
        assert "ieee" not in wanted
        with exact_float32():
            assert {backend.fp32_precision for backend in backends} == {"ieee"}
        assert [backend.fp32_precision for backend in backends] == wanted
        assert torch.get_float32_matmul_precision() == asked
    finally:
        torch.set_float32_matmul_precision(before)


# Several threads


def test_two_threads_explain_one_module_at_once_with_different_layers():
    """Each forward pass waits for one of the other thread, so that the hooks of both are on the module together."""
    module = build("perceptron", 2, torch.float64)
    jobs = [("features.2", ScoreCam()), ("features.8", GroupCam(groups=7))]
    one_layer = [item(spec, layer=layer) for layer, spec in jobs]
    quiet = Executor(Network(copy.deepcopy(module), preprocessing=PREPROCESSING, micro_batch=4))
    expected = [sums(alone(quiet, one)) for one in one_layer]

    network = Network(module.train(), preprocessing=PREPROCESSING, micro_batch=4)
    runner, handover = Executor(network), threading.Barrier(2)
    module.head.register_forward_pre_hook(lambda _module, _inputs: _meet(handover))
    found: list = [None, None]

    def work(row: int) -> None:
        found[row] = [sums(alone(runner, one_layer[row])) for _ in range(5)]
        handover.abort()  # the other one need not wait any more

    threads = [threading.Thread(target=work, args=(row,)) for row in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for row in range(2):
        for result in found[row]:
            np.testing.assert_allclose(result, expected[row], **FLOAT64)
    assert all(child.training for child in module.modules())
    assert not any(child._forward_hooks for child in module.modules())


def _meet(handover: threading.Barrier) -> None:
    try:
        handover.wait(timeout=30)
    except threading.BrokenBarrierError:
        return


# Memory and cost


def test_queries_of_all_items_share_micro_batches():
    runner = executor(dtype=torch.float32, micro_batch=8)
    items = [item(GroupCam(groups=2), picture(seed)) for seed in range(5)]
    sizes: list[int] = []
    runner.network.module.register_forward_pre_hook(lambda _module, inputs: sizes.append(len(inputs[0])))
    step = runner.execute(items)
    queries = sum(outcome.partials[0].queries for outcome in step.outcomes)
    assert sum(sizes) == len(items) + queries
    assert sizes[-2:] == [8, queries - 8]


def test_constant_channels_are_not_asked():
    module = silence(build("pooled", 2), "features.7", slice(0, 12), value=0.0)
    runner = Executor(Network(module, preprocessing=PREPROCESSING))
    live = int((torch.from_numpy(_activations(module)).amax(dim=(1, 2)) > 0).sum())
    assert 0 < live <= CHANNELS - 12
    assert alone(runner, item(ScoreCam(), layer="features.8")).partials[0].queries == live


def _activations(module: nn.Module) -> np.ndarray:
    mean, std = np.array(PREPROCESSING.mean), np.array(PREPROCESSING.std)
    x = torch.from_numpy(((picture(2) / 255 - mean) / std).transpose(2, 0, 1)[None]).float()
    with torch.no_grad():
        return module.features(x)[0].numpy()


def test_progress_counts_up_to_all_queries_of_the_step():
    seen: list[tuple[int, int]] = []
    items = [item(ScoreCam(), picture(seed)) for seed in (2, 3)]
    step = executor(micro_batch=7).execute(items, on_progress=lambda done, total: seen.append((done, total)))
    total = sum(outcome.partials[0].queries for outcome in step.outcomes)
    done = [count for count, _ in seen]
    assert done == sorted(set(done))
    assert seen[-1] == (total, total)


def test_bfloat16_is_close_and_leaves_predictions_alone(monkeypatch):
    monkeypatch.setattr("camserve.worker.network.why_no_bfloat16", lambda device: "")  # without instructions it is slow
    engine = Engine(build("perceptron", 2), preprocessing=PREPROCESSING)
    exact, fast = (
        engine.explain(picture(2), methods=["score_cam"], targets=[5], precision=precision)
        for precision in ("exact", "bfloat16")
    )
    assert (exact.cost.precision, fast.cost.precision) == ("exact", "bfloat16")
    assert exact.predictions == fast.predictions
    assert np.abs(exact.maps[0].array - fast.maps[0].array).max() > 0  # it did compute in bfloat16
    assert spearmanr(exact.maps[0].array.ravel(), fast.maps[0].array.ravel()).statistic > 0.95
