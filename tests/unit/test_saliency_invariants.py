"""What may not change a map: micro-batch size, neighbours, sharding, order. And what a run may not leave behind."""

import copy
import functools
import io
import itertools
import threading
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from PIL import Image
from reference.models import CHANNELS, CLASSES, HEIGHT, MODELS, PREPROCESSING, WIDTH, build, picture, silence
from scipy.stats import spearmanr
from torch import nn

from camserve import Engine
from camserve.errors import INTERNAL_MESSAGE, CamserveError, Internal, InvalidImage, InvalidOption, Unsupported
from camserve.methods import Cam, GradCam, GroupCam, MethodSpec, ScoreCam
from camserve.types import Item, ItemResult, Target, Task
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
FLOAT32 = {"rtol": 1e-4, "atol": 1e-5}
"""Convolutions of another batch size add in another order, behind them a softmax of logits of up to 20."""


def executor(name: str = "perceptron", dtype=torch.float64, micro_batch: int = 8, **options) -> Executor:
    return Executor(Network(build(name, 2, dtype), preprocessing=PREPROCESSING, micro_batch=micro_batch, **options))


def item(method: MethodSpec, image=None, targets=(5,), layer="", span=None, position=0, **options) -> Item:
    image = picture(2) if image is None else image
    start, stop = span or (0, 10_000 if method.queries(10_000, 1) else 0)
    return Item(image, tuple(map(Target, targets)), (Task(position, method, start, stop),), layer, **options)


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_map_does_not_depend_on_the_micro_batch(method, dtype):
    results = [
        sums(alone(executor(dtype=dtype, micro_batch=size), item(METHODS[method], targets=(5, 1))))
        for size in (64, 1, 3)
    ]
    assert np.abs(results[0]).max() > 0
    scale = np.abs(results[0]).max()
    for other in results[1:]:
        tolerance = FLOAT64 if dtype == torch.float64 else FLOAT32
        np.testing.assert_allclose(other / scale, results[0] / scale, **tolerance)


NEIGHBOURS = [
    item(GradCam(), picture(1), layer="features.2"),
    item(ScoreCam(), picture(3), (0, 1, 2)),
    item(GroupCam(groups=12), encoded(4), (6,), layer="features.5"),
    item(GroupCam(groups=3, variant="reference"), encoded(5), (2, 4)),
    item(GradCam(), picture(6), (3, 0, 1, 2)),
    item(ScoreCam(), picture(7), layer="features.5", precision="bfloat16"),
    item(GroupCam(groups=1), picture(8), precision="bfloat16"),
]


@pytest.mark.parametrize("place", [0, 3, 7])
@pytest.mark.parametrize("method", METHODS)
def test_map_does_not_depend_on_its_neighbours_in_the_step(method, place):
    one, runner = item(METHODS[method], targets=(5, 1)), executor()
    expected = sums(alone(runner, one))
    outcomes = runner.execute([*NEIGHBOURS[:place], one, *NEIGHBOURS[place:]]).outcomes
    assert len(outcomes) == 8
    np.testing.assert_allclose(sums(outcomes[place]), expected, **FLOAT64)


def test_every_item_of_a_step_is_what_it_is_alone():
    runner = executor()
    for one, outcome in zip(NEIGHBOURS, runner.execute(NEIGHBOURS).outcomes, strict=True):
        expected = alone(runner, one)
        # Where items ask for bfloat16, rounding to 8 bits depends on where in a micro-batch a query stands.
        tolerance = FLOAT64 if one.precision == "exact" else {"rtol": 0.05, "atol": 0.05 * np.abs(sums(expected)).max()}
        np.testing.assert_allclose(sums(outcome), sums(expected), **tolerance)
        assert outcome.layer == expected.layer
        assert outcome.view == expected.view
        assert [t.index for t in outcome.targets] == [t.index for t in expected.targets]
        np.testing.assert_allclose(
            [p.probability for p in outcome.predictions], [p.probability for p in expected.predictions], rtol=1e-9
        )


@pytest.mark.parametrize("shards", [1, 2, 7])
@pytest.mark.parametrize("method", ["score_cam", "group_cam", "group_cam_reference"])
def test_map_does_not_depend_on_sharding(method, shards):
    spec, runner, targets = METHODS[method], executor(), (5, 1)
    total = spec.queries(CHANNELS, len(targets))
    whole = alone(runner, item(spec, targets=targets, span=(0, total)))
    cuts = np.linspace(0, total, shards + 1).round().astype(int).tolist()
    items = [item(spec, targets=targets, span=span) for span in itertools.pairwise(cuts)]
    outcomes = [alone(runner, one) for one in items]
    merged = functools.reduce(lambda a, b: a.merge(b), [outcome.partials[0] for outcome in reversed(outcomes)])
    np.testing.assert_allclose(merged.sums, sums(whole), **FLOAT64)
    baselines = shards - 1 if isinstance(spec, GroupCam) else 0  # each shard measures the blurred image again
    assert merged.queries == whole.partials[0].queries + baselines


def test_an_empty_shard_adds_nothing():
    for spec in (ScoreCam(), GroupCam(groups=6)):
        assert not sums(alone(executor(), item(spec, span=(3, 3)))).any()


@pytest.mark.parametrize("method", METHODS)
def test_maps_do_not_depend_on_the_order_of_targets(method):
    runner, order = executor(), (5, 1, 3, 0)
    expected = {target: sums(alone(runner, item(METHODS[method], targets=(target,))))[0] for target in order}
    for targets in (order, order[::-1]):
        outcome = alone(runner, item(METHODS[method], targets=targets))
        assert [target.index for target in outcome.targets] == list(targets)
        for found, target in zip(sums(outcome), targets, strict=True):
            np.testing.assert_allclose(found, expected[target], **FLOAT64)


def test_methods_of_one_item_do_not_touch_each_other():
    specs = [*METHODS.values()]
    tasks = tuple(Task(place, spec, 0, 10_000) for place, spec in enumerate(specs))
    runner = executor()
    together = alone(runner, Item(picture(2), (Target(5),), tasks))
    assert [partial.position for partial in together.partials] == [0, 1, 2, 3]
    for partial, spec in zip(together.partials, specs, strict=True):
        np.testing.assert_allclose(partial.sums, sums(alone(runner, item(spec))), **FLOAT64)


@pytest.mark.parametrize("name", ["pooled", "reused"])
@pytest.mark.parametrize("seed", range(3))
def test_cam_is_grad_cam_on_pooled_linear_heads(name, seed):
    engine = Engine(build(name, seed), preprocessing=PREPROCESSING, layer=MODELS[name][1])
    maps = engine.explain(picture(seed), methods=["cam", "grad_cam"], targets=[Target(top_k=CLASSES)]).maps
    assert len(maps) == 2 * CLASSES
    for cam, grad_cam in zip(maps[:CLASSES], maps[CLASSES:], strict=True):
        assert cam.target == grad_cam.target
        np.testing.assert_allclose(cam.array, grad_cam.array, rtol=0, atol=2e-6)  # float32 sums in another order


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


# Nothing to see


@pytest.mark.parametrize("value", [0.0, 0.7, -1.0])
@pytest.mark.parametrize("method", [*METHODS, "cam"])
def test_a_constant_layer_gives_zeros_and_says_so(method, value):
    """All zero, all the same, and nowhere positive before the ReLU."""
    module = silence(build("pooled", 2), "features.7", slice(None), value)
    engine = Engine(module, preprocessing=PREPROCESSING)
    spec = METHODS.get(method, Cam())
    for size in ("input", "layer", "original"):
        answer = engine.explain(picture(2), methods=[spec], targets=[0, 5], layer="features.8", size=size)
        for result in answer.maps:
            assert result.degenerate
            assert result.complete
            assert not result.array.any()
            assert np.isfinite(result.value_range).all()


@pytest.mark.parametrize("pixels", [0, 255])
def test_a_blank_image_gives_no_nan(pixels):
    engine = Engine(build("perceptron", 2), preprocessing=PREPROCESSING)
    blank = np.full((HEIGHT, WIDTH, 3), pixels, dtype=np.uint8)
    for result in engine.explain(blank, methods=list(METHODS.values()), targets=[Target(top_k=CLASSES)]).maps:
        assert np.isfinite(result.array).all()


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

    calls_left = 0

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


# Nothing is left on the model


def state(module: nn.Module) -> list:
    """Everything that a run could leave on a module, its weights and statistics included."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")
    settings: list = [
        (name, child.training, *(len(getattr(child, hook)) for hook in hooks)) for name, child in module.named_modules()
    ]
    settings += [(name, p.requires_grad, p.grad is None, p._version) for name, p in module.named_parameters()]
    settings += [(name, value.sum().item()) for name, value in module.state_dict().items()]
    settings.append((torch.is_grad_enabled(), torch.backends.cudnn.conv.fp32_precision))
    return settings


class Trouble(nn.Module):
    """Raises at the nth call from now, once `calls_left` says so."""

    calls_left = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls_left -= 1
        if self.calls_left == 0:
            raise RuntimeError("secret detail")
        return x


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("place", [0, 5, 9], ids=["before the layer", "between", "behind the layer"])
@pytest.mark.parametrize("call", [1, 2, 3], ids=["first forward", "first queries", "middle of the queries"])
def test_nothing_is_left_after_a_failing_forward(call, place, training):
    module, trouble = build("perceptron", 2).train(training), Trouble()
    module.features[1].eval()  # one module is in another mode than the rest, and must stay so
    module.features.insert(place, trouble)
    runner = Executor(Network(module, preprocessing=PREPROCESSING, micro_batch=2))
    before = state(module)
    trouble.calls_left = call
    outcome = alone(runner, item(ScoreCam(), layer="features.4"))
    assert isinstance(outcome, Internal)
    assert str(outcome) == INTERNAL_MESSAGE
    assert state(module) == before
    assert isinstance(alone(runner, item(ScoreCam(), layer="features.4")), ItemResult)  # and all is well again


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_left_after_success(name, training, frozen):
    module = build(name, 2).train(training).requires_grad_(not frozen)
    before = state(module)
    engine = Engine(module, preprocessing=PREPROCESSING, layer=MODELS[name][1])
    assert state(module) == before
    engine.explain(picture(2), methods=list(METHODS.values()), targets=[0, 1])
    assert state(module) == before


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


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode], ids=lambda c: c.__name__)
def test_the_callers_grad_mode_does_not_matter(context):
    engine = Engine(build("perceptron", 2), preprocessing=PREPROCESSING)
    methods = list(METHODS.values())
    expected = engine.explain(picture(2), methods=methods).maps
    with context():
        found = engine.explain(picture(2), methods=methods).maps
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.array, other.array)


def test_the_callers_autocast_does_not_make_exact_inexact():
    engine = Engine(build("perceptron", 2), preprocessing=PREPROCESSING)
    methods = list(METHODS.values())
    expected = engine.explain(picture(2), methods=methods).maps
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = engine.explain(picture(2), methods=methods).maps
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.array, other.array)


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


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_no_forward_pass_is_larger_than_the_micro_batch(micro_batch):
    """However many queries, targets and items are asked."""
    runner = executor(dtype=torch.float32, micro_batch=micro_batch)
    sizes: list[int] = []
    runner.network.module.register_forward_pre_hook(lambda _module, inputs: sizes.append(len(inputs[0])))
    outcomes = runner.execute([item(ScoreCam(), picture(seed), (0, 1, 2)) for seed in range(10)]).outcomes
    assert all(isinstance(outcome, ItemResult) for outcome in outcomes)
    assert max(sizes) == micro_batch


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


def test_bfloat16_is_close_and_leaves_predictions_alone():
    engine = Engine(build("perceptron", 2), preprocessing=PREPROCESSING)
    exact, fast = (
        engine.explain(picture(2), methods=["score_cam"], targets=[5], precision=precision)
        for precision in ("exact", "bfloat16")
    )
    assert (exact.cost.precision, fast.cost.precision) == ("exact", "bfloat16")
    assert exact.predictions == fast.predictions
    assert np.abs(exact.maps[0].array - fast.maps[0].array).max() > 0  # it did compute in bfloat16
    assert spearmanr(exact.maps[0].array.ravel(), fast.maps[0].array.ravel()).statistic > 0.95
