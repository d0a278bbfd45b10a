"""The order in which a request's queries are asked: those that matter most first, each exactly once."""

import itertools

import numpy as np
import pytest
import torch
from reference.models import PREPROCESSING, build, picture
from scipy.stats import spearmanr

from camserve.errors import InvalidOption
from camserve.methods import AblationCam, GroupCam, IsCam, MethodSpec, Rise, ScoreCam, SsCam
from camserve.saliency.registry import REGISTRY, Direct
from camserve.types import Item, ItemResult, Target, Task
from camserve.worker.executor import Executor
from camserve.worker.network import Network

ORDERED = {
    "score_cam": ScoreCam(),
    "ss_cam": SsCam(samples=2),
    "is_cam": IsCam(samples=2),
    "group_cam": GroupCam(groups=7),
    "ablation_cam": AblationCam(),
}
TARGETS = (5, 1)


@pytest.fixture(scope="module")
def executor() -> Executor:
    return Executor(Network(build("perceptron", 2, torch.float64), preprocessing=PREPROCESSING, micro_batch=8))


def answer(executor: Executor, spec: MethodSpec, start=0, stop=10_000, image=2, **options) -> ItemResult:
    task = Task(0, spec, start, stop, **options)
    (outcome,) = executor.execute([Item(picture(image), tuple(map(Target, TARGETS)), (task,))]).outcomes
    if not isinstance(outcome, ItemResult):
        raise outcome
    return outcome


def test_every_method_with_an_order_is_here():
    assert {type(spec) for spec in ORDERED.values()} == {
        kind for kind, method in REGISTRY.items() if not isinstance(method, Direct) and method.energies
    }


@pytest.mark.parametrize("name", ORDERED)
def test_an_order_has_every_query_once_and_changes_nothing_in_the_end(executor, name):
    spec = ORDERED[name]
    plain = answer(executor, spec).partials[0]
    assert plain.order == ()
    first = answer(executor, spec, 0, 3, ordered=True).partials[0]
    order = first.order
    queries = spec.queries(executor.network.info.layer(""), len(TARGETS))
    assert sorted(order) == list(range(queries // spec.block))
    total = first
    for start, stop in itertools.pairwise([3, 4, 9, queries]):
        numbers = spec.numbers(order, start, stop)
        total = total.merge(answer(executor, spec, start, stop, numbers=numbers).partials[0])
    np.testing.assert_allclose(total.sums, plain.sums, rtol=1e-9, atol=1e-12)  # float64 sums in another order
    assert total.order == order


@pytest.mark.parametrize("name", ["ss_cam", "is_cam"])
def test_a_block_of_queries_has_one_place_in_an_order(executor, name):
    """All samples of the channel that matters most, then those of the next one."""
    spec = ORDERED[name]
    order = answer(executor, spec, 0, 3, ordered=True).partials[0].order
    first, second, third, *_ = (2 * channel for channel in order)
    assert spec.numbers(order, 0, 5) == (first, first + 1, second, second + 1, third)
    asked = answer(executor, spec, 0, 3, ordered=True).partials[0].sums[-1]
    assert {channel: asked[channel] for channel in asked.nonzero()[0]} == {order[0]: 2, order[1]: 1}


@pytest.mark.parametrize("name", ["score_cam", "group_cam"])
def test_an_early_map_is_better_with_the_order_than_without(executor, name):
    """Rank correlation with the final map after a quarter of the queries, on average over pictures and classes."""
    spec = ORDERED[name]
    gained = []
    for image in range(6):
        final = answer(executor, spec, image=image).partials[0].sums
        total = spec.queries(executor.network.info.layer(""), len(TARGETS))
        for ordered in (True, False):
            early = answer(executor, spec, 0, total // 4, image=image, ordered=ordered).partials[0].sums
            for one, other in zip(early, final, strict=True):
                found = spearmanr(one.ravel(), other.ravel()).statistic if one.std() > 0 else 0.0
                gained.append(found if ordered else -found)
    assert np.sum(gained) > 0


@pytest.mark.parametrize("name", ["score_cam", "ss_cam", "is_cam", "ablation_cam"])
def test_channels_are_asked_by_their_energy(executor, name):
    """Mean of |A_k| over space, the largest first, at a convolution, which has values of both signs."""
    layer = "features.7"
    context = answer(executor, SsCam(samples=1), 0, 0, layer=layer).partials[0].context
    assert context is not None
    assert context.min() < 0 < context.max()
    energy = [sum(abs(value) for value in channel.ravel()) / channel.size for channel in context]
    partial = answer(executor, ORDERED[name], 0, 1, ordered=True, layer=layer).partials[0]
    order = partial.order
    assert list(order) == sorted(range(len(energy)), key=lambda channel: -energy[channel])
    np.testing.assert_allclose(partial.energies, sorted(energy, reverse=True), rtol=1e-12)  # float64, 120 cells


@pytest.mark.parametrize("name", ["score_cam", "ss_cam", "is_cam", "ablation_cam"])
def test_an_order_of_channels_takes_no_gradient(executor, name):
    task = Task(0, ORDERED[name], 0, 1, ordered=True)
    made = executor.execute([Item(picture(2), tuple(map(Target, TARGETS)), (task,))]).made
    assert not {"layer_gradient", "pixel_gradient"} & set(made)


def test_a_method_without_order_goes_by_its_numbers(executor):
    assert answer(executor, Rise(masks=9), 0, 3, ordered=True).partials[0].order == ()


def test_numbers_that_do_not_exist_are_refused(executor):
    with pytest.raises(InvalidOption, match="number 99 was asked"):
        answer(executor, GroupCam(groups=7), 0, 2, numbers=(3, 99))
    with pytest.raises(InvalidOption, match="2 queries, 1 numbers"):
        Task(0, GroupCam(), 0, 2, numbers=(3,))
