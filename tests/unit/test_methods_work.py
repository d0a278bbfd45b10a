"""The work that a method says it is, what a worker says it has done, and what hooks have seen."""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from reference.models import CHANNELS, MODELS, PREPROCESSING, build, picture
from test_methods_cost import SPECS, convolutional, transformer
from torch import nn

from camserve import Engine
from camserve.finalise.finish import ranking_of
from camserve.methods import (
    METHODS,
    AblationCam,
    Cam,
    EigenCam,
    GradCam,
    GroupCam,
    IntegratedGradCam,
    IntegratedGradients,
    LeGrad,
    MethodSpec,
    Occlusion,
    ReciproCam,
    ScoreCam,
    SmoothGrad,
    SmoothGradCamPlusPlus,
    SsCam,
    Xrai,
)
from camserve.methods.spec import GRADIENTS
from camserve.methods.work import KINDS, Work
from camserve.saliency import masks as saliency_masks
from camserve.saliency.registry import REGISTRY
from camserve.types import Item, ItemResult, Layer, MapCurves, Target, Task
from camserve.worker.executor import MEMORY_BYTES, Executor
from camserve.worker.network import Network

TARGETS = (3, 1)
LAYER = Layer("layer", 40, 7, 7)


def home(spec: MethodSpec) -> Engine:
    if spec.needs == "GAP head":
        return Engine(build("pooled", 2), preprocessing=PREPROCESSING)
    return transformer() if spec.needs == "ViT" else convolutional()


def item(spec: MethodSpec, queries: int, targets=TARGETS, image: int = 2, start: int = 0) -> Item:
    return Item(picture(image), tuple(map(Target, targets)), (Task(0, spec, start, queries),))


def images_times_targets(gradients: torch.Tensor, options: dict[str, bool]) -> int:
    """Returns how many gradients a call of `torch.autograd.grad` made: of images, times scores if these are batched."""
    return gradients.shape[0] * (gradients.shape[1] if options.get("is_grads_batched") else 1)


@contextmanager
def watched(network: Network, monkeypatch) -> Iterator[Counter[str]]:
    """Counts rows that reach the last linear layer, and gradients made, each of them for one image and one score."""
    seen: Counter[str] = Counter()
    differentiate = torch.autograd.grad

    def grad(*given, **options):
        found = differentiate(*given, **options)
        if isinstance(given[0], torch.Tensor):  # the rules for ReLUs send the call on to itself, with a tuple
            seen["gradients"] += images_times_targets(found[0], options)
        return found

    def count(_module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        seen["rows"] += inputs[0].numel() // inputs[0].shape[-1]

    with monkeypatch.context() as patch, network.classifier.register_forward_pre_hook(count):
        patch.setattr(torch.autograd, "grad", grad)
        yield seen


# What a spec says


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (Cam(), Work("closed_form", 1)),
        (EigenCam(), Work("closed_form", 1)),
        (GradCam(), Work("layer_gradient", 3)),
        (SmoothGradCamPlusPlus(), Work("layer_gradient", 75)),
        (IntegratedGradCam(), Work("layer_gradient", 60)),
        (SmoothGrad(samples=10), Work("pixel_gradient", 30)),
        (IntegratedGradients(), Work("pixel_gradient", 150)),
        (Xrai(steps=4), Work("pixel_gradient", 24)),
        (ScoreCam(), Work("masked_forward", 40)),
        (SsCam(), Work("masked_forward", 1400)),
        (GroupCam(groups=8), Work("masked_forward", 24)),
        (Occlusion(), Work("masked_forward", 196)),
        (AblationCam(), Work("tail", 40)),
        (ReciproCam(), Work("tail", 49)),
        (LeGrad(), Work("pixel_gradient", 3)),
    ],
    ids=str,
)
def test_work(spec, expected):
    assert spec.work(LAYER, 3) == expected


def test_ablation_is_a_formula_behind_a_pooled_head():
    assert AblationCam().work(Layer("layer", 40, 7, 7, pooled_head=True), 3) == Work("closed_form", 40)


@pytest.mark.parametrize("name", METHODS)
def test_a_query_is_as_many_units_as_it_weighs(name):
    spec = METHODS[name]() if name != "group_cam" else GroupCam(groups=8)
    for targets in (1, 2, 5):
        queries, work = spec.queries(LAYER, targets), spec.work(LAYER, targets)
        assert work.kind in KINDS
        assert spec.weight(targets) == (targets if work.kind in GRADIENTS else 1)
        assert work.units == max(queries, 1) * spec.weight(targets)
        assert spec.passes(LAYER, targets) in ((queries, queries + 1) if queries else (0, 1))  # and a baseline


# What a worker does


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_worker_reports_the_work_that_hooks_see(spec, monkeypatch):
    """In one step with all queries: what the spec says, the opening, and baselines."""
    network = home(spec).network
    layer, executor = network.info.layer(""), Executor(network)
    queries, work = spec.queries(layer, 2), spec.work(layer, 2)
    executor.execute([item(spec, queries)])  # now the network has been traced for its tail
    with watched(network, monkeypatch) as seen:
        made = Counter(executor.execute([item(spec, queries)]).made)
    expected = Counter({"opening": 1, work.kind: work.units})
    if isinstance(spec, (GroupCam, Occlusion, AblationCam)):
        expected[work.kind] += 1
    elif isinstance(spec, IntegratedGradCam) and spec.variant == "paper":
        expected["masked_forward"] += 1
    if REGISTRY[type(spec)].needs_gradients and work.kind != "layer_gradient":
        expected["layer_gradient"] += 2
    assert made == expected
    assert seen["gradients"] == made["layer_gradient"] + made["pixel_gradient"]
    of_the_opening = work.kind == "layer_gradient" and not queries  # those of altered images have passes of their own
    altered = work.units // 2 if work.kind in GRADIENTS and not of_the_opening else 0
    if isinstance(spec, LeGrad):
        altered *= 2  # the head is asked about the tokens of both blocks
    assert seen["rows"] == made["opening"] + made["masked_forward"] + made["tail"] + altered


def test_what_is_remembered_is_not_made_again():
    executor = Executor(convolutional().network, MEMORY_BYTES)
    assert executor.execute([item(GradCam(), 0)]).made == {"opening": 1, "layer_gradient": 2}
    assert executor.execute([item(GradCam(), 0)]).made == {}
    assert executor.execute([item(ScoreCam(), 5)]).made == {"masked_forward": 5}


def test_the_work_of_a_step_is_that_of_all_its_items():
    executor = Executor(convolutional().network)
    items = [item(ScoreCam(), 4), item(SmoothGrad(samples=3), 3, targets=(1,)), item(GradCam(), 0, targets=(0, 1, 2))]
    made = executor.execute(items).made
    # The three share a pass, and as many gradients are made of each image as the one with most targets needs.
    assert made == {"opening": 3, "masked_forward": 4, "pixel_gradient": 3, "layer_gradient": 3}


def test_targets_of_who_needs_no_gradients_make_none():
    """Two images share a pass: one explains three classes without gradients, the other one class with them."""
    executor = Executor(convolutional().network)
    made = executor.execute([item(ScoreCam(), 2, targets=(0, 1, 2)), item(GradCam(), 0, targets=(1,), image=3)]).made
    assert made == {"opening": 2, "masked_forward": 2, "layer_gradient": 2}


def test_curves_are_masked_forwards_and_a_ranking_is_a_unit_for_each_target():
    executor = Executor(convolutional().network)
    first = item(Xrai(steps=2), 4)
    _, result = executor.answer(first)
    ranking = ranking_of(Xrai(steps=2), result.partials[0])
    assert ranking is not None
    assert executor.execute([replace(first, tasks=(Task(0, ranking, 0, 1),))]).made == {"opening": 1, "ranking": 2}
    curves = MapCurves(ranking.attribution[0], Target(index=3), steps=4)
    asked = Item(picture(2), (), (Task(0, curves, 0, curves.queries(None, 1)),))
    assert executor.execute([asked]).made == {"opening": 1, "masked_forward": 10}


def test_work_that_was_done_in_vain_is_work():
    """A pass of two items fails and is repeated one by one; the one that fails alone has an error."""
    network = convolutional().network

    def fail(_module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if len(inputs[0]) > 1:
            raise RuntimeError("no two together")

    with network.module.register_forward_pre_hook(fail):
        step = Executor(network).execute([item(ScoreCam(), 1), item(ScoreCam(), 1, image=3)])
    assert all(isinstance(outcome, ItemResult) for outcome in step.outcomes)
    assert step.made == {"opening": 2, "masked_forward": 2}


# What a network says of its heads


@pytest.mark.parametrize("name", MODELS)
def test_a_layer_says_whether_a_formula_is_all_that_ablation_needs(name):
    network = Network(build(name, 2), preprocessing=PREPROCESSING)
    for layer in network.info.layers:
        task = Task(0, AblationCam(), 0, layer.channels, layer.name)
        step = Executor(network).execute([Item(picture(2), (Target(3),), (task,))])
        assert ("closed_form" in step.made) == layer.pooled_head
        assert AblationCam().work(layer, 1).kind in step.made


def test_some_layers_have_a_pooled_head_and_some_have_none():
    layers = Network(build("pooled", 2), preprocessing=PREPROCESSING).info.layers
    assert {layer.name: layer.pooled_head for layer in layers if layer.channels == CHANNELS}["features.8"]
    assert not all(layer.pooled_head for layer in layers)


# Memory


@pytest.mark.parametrize(
    "spec",
    [
        SmoothGrad(samples=4),
        SmoothGradCamPlusPlus(samples=4),
        IntegratedGradients(steps=4),
        IntegratedGradCam(),
        Xrai(steps=2),
    ],
    ids=str,
)
def test_gradients_of_many_targets_are_not_in_memory_together(spec, monkeypatch):
    """At most the one that is being added up and the next one, of a micro-batch each."""
    engine, targets, differentiate = convolutional(), tuple(range(5)), torch.autograd.grad
    kept: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def grad(*given, **options):
        nonlocal most
        found = differentiate(*given, **options)
        kept.append(weakref.ref(found[0]))
        most = max(most, sum(len(tensor) for ref in kept if (tensor := ref()) is not None))
        return found

    monkeypatch.setattr(torch.autograd, "grad", grad)
    engine.explain(picture(2), methods=[spec], targets=targets)
    assert len(kept) >= len(targets)
    assert most <= 2 * engine.network.micro_batch


@pytest.mark.parametrize("micro_batch", [1, 4, 8])
def test_images_times_targets_of_a_pass_with_gradients_are_bounded_by_the_micro_batch(micro_batch, monkeypatch):
    network = Network(build("perceptron", 2), preprocessing=PREPROCESSING, micro_batch=micro_batch)
    sizes: list[int] = []
    differentiate = torch.autograd.grad

    def grad(*given, **options):
        found = differentiate(*given, **options)
        sizes.append(images_times_targets(found[0], options))
        return found

    monkeypatch.setattr(torch.autograd, "grad", grad)
    items = [item(GradCam(), 0, targets=tuple(range(1 + number % 4)), image=number) for number in range(9)]
    for together in (items, items[3:4] * 5):
        sizes.clear()
        outcomes = Executor(network).execute(together).outcomes
        assert all(isinstance(outcome, ItemResult) for outcome in outcomes)
        most = max(len(one.targets) for one in together)
        assert max(sizes) <= max(1, micro_batch)
        assert sum(sizes) <= sum(len(one.targets) for one in together) * most
    assert max(sizes) == micro_batch  # all of them explain four classes


def test_a_part_of_a_channel_upsamples_no_mask_of_another(monkeypatch):
    """Queries 4..6 of two samples a channel, two in a pass: both of channel 2, and one of channel 3."""
    counts: list[int] = []
    enlarge = saliency_masks.upsample

    def upsample(maps, size):
        counts.append(len(maps))
        return enlarge(maps, size)

    monkeypatch.setattr(saliency_masks, "upsample", upsample)
    network = Network(build("perceptron", 2), preprocessing=PREPROCESSING, layer="features.1", micro_batch=2)
    partial = Executor(network).answer(item(SsCam(samples=2), 7, start=4))[1].partials[0]
    assert partial.sums[-1, :5].tolist() == [0, 0, 2, 1, 0]
    assert partial.queries == 3
    assert [count for count in counts if count] == [1, 1]
