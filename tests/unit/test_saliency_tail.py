"""The tail behind a layer, and altered activations run through it."""

import threading
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from asked import asked
from reference.models import CHANNELS, CLASSES, MODELS, PREPROCESSING, build, picture
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer

from camserve import Engine
from camserve.methods import AblationCam, ReciproCam
from camserve.saliency import passes
from camserve.saliency.ablation import ablation_cam, lost_by_running
from camserve.saliency.capture import capture, with_output
from camserve.saliency.features import Features
from camserve.saliency.gradient import pooled_linear_rows
from camserve.saliency.tail import find_tail
from camserve.types import Item, Target, Task
from camserve.worker.executor import Executor
from camserve.worker.network import Network


class Small(nn.Module):
    """A convolution, `layer`, and something behind it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.layer = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.head(self.behind(x, self.layer(x)).mean(dim=(2, 3)))

    def behind(self, x: Tensor, found: Tensor) -> Tensor:
        return F.relu(found, inplace=True)


class Shortcut(Small):
    def behind(self, x, found):
        return x + found


class InPlace(Small):
    def behind(self, x, found):
        return x.add_(found.tanh()).mul_(2)


class Sides(Small):
    """Two things are carried around the layer, one of them made after it ran."""

    def behind(self, x, found):
        return found.tanh() * x + (x * 2).sigmoid()


class AroundTwice(Small):
    """The layer's own input goes around it, and its size is asked there."""

    def behind(self, x, found):
        return (found * x.mean(dim=(2, 3)).view(found.shape[0], -1, 1, 1)).relu() - x


class Both(Small):
    """Runs the layer twice, and both calls count, as in a network that runs once for each of several texts."""

    def forward(self, x):
        x = self.first(x)
        return self.head((self.layer(x).tanh() * 2 + self.layer(x.flip(-1))).mean(dim=(2, 3)))


class Checks(Small):
    """Looks at values, which a trace has none of."""

    def behind(self, x, found):
        return found if found.sum() > 1e9 else found.tanh()


class Counts(Small):
    """Keeps the number of images from before the layer."""

    def behind(self, x, found):
        return found.reshape(x.shape[0], 4, -1, 1).tanh()


class MeetsTensors(Small):
    def behind(self, x, found):
        return found.tanh() * torch.tensor([2.0, 1.0, 0.5, -1.0])[:, None, None]


class AsksSizes(Small):
    """What is behind the layer asks how many images there are, and how large, but not what they show."""

    def forward(self, x: Tensor) -> Tensor:
        found = self.layer(self.first(x)).relu()
        large = nn.functional.interpolate(found, size=x.shape[-2:])
        weighted = large.mean(dim=(2, 3)).view(x.size(0), -1) * (x.shape[0] / x.shape[0]) + x.dim() * 0.1
        return self.head(weighted.view(x.shape[0], -1))


class ShapeOfWhatItShows(Small):
    """A size of something made of the image is not the image's own."""

    def forward(self, x: Tensor) -> Tensor:
        found = self.layer(self.first(x)).relu()
        return self.head(found.mean(dim=(2, 3)).view((x * 2).size(0), -1))


class Twice(Small):
    """The layer runs twice, and a third time on what has no space."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(self.layer(self.first(x)).relu()).tanh()
        return self.head(self.layer(x.mean(dim=(2, 3), keepdim=True)).flatten(1))


def example(n: int = 1) -> Tensor:
    return torch.rand(n, 3, 10, 12, generator=torch.Generator().manual_seed(0))


def captured(module: nn.Module, layer: str, x: Tensor | None = None, call: int = 1):
    return capture(module, example() if x is None else x, layer, (call,))


def assert_same(module: nn.Module, layer: str, x: Tensor, call: int = 1) -> None:
    """The tail is found, and makes of altered activations what the whole network makes of them."""
    found = captured(module, layer, x, call)
    tail = find_tail(module, layer, found, x[0], (call,))
    assert tail is not None
    altered = torch.cat([found.activations * factor for factor in (1, 0, -0.7, 3)])
    expected = with_output(module, x.expand(4, -1, -1, -1), layer, (call,), found.arrangement, altered.clone())
    around = tail.around(x[0])
    for _ in range(2):  # what the tail does in place leaves no trace
        torch.testing.assert_close(tail(altered.clone(), around), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(expected[:1], found.logits, rtol=1e-4, atol=1e-5)
    assert (expected[1] - expected[0]).abs().max() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_the_tail_is_the_rest_of_the_network(name):
    network = Network(build(name, 2), preprocessing=PREPROCESSING)
    x = network.normalise(torch.from_numpy(picture(2))[None])
    assert_same(network.module, MODELS[name][1], x, {"reused": 3}.get(name, 1))


@pytest.mark.parametrize("layer", ["layer", "layer:relu", "first"])
def test_a_functional_activation_and_a_layer_before_others(layer):
    assert_same(Small().eval(), layer, example())


def test_a_container_is_kept_whole():
    module = nn.Sequential(build("pooled").features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, 3))
    assert_same(module.eval(), "0", example())


def test_the_last_spatial_call_counts():
    assert_same(Twice().eval(), "layer", example(), call=2)


def test_tensors_that_the_forward_makes_are_part_of_the_tail():
    assert_same(MeetsTensors().eval(), "layer", example())


@pytest.mark.parametrize("kind", [Shortcut, InPlace, Sides, AroundTwice])
def test_what_goes_around_the_layer_is_the_images_own(kind):
    module = kind().eval()
    assert_same(module, "layer", example())
    other = torch.rand(1, 3, 10, 12, generator=torch.Generator().manual_seed(5))
    tail = find_tail(module, "layer", captured(module, "layer"), example()[0])
    found = captured(module, "layer", other)  # the tail serves images other than the one that it was found with
    torch.testing.assert_close(tail(found.raw.repeat(3, 1, 1, 1), tail.around(other[0])), module(other).expand(3, -1))


@pytest.mark.parametrize("silent", [False, True])
def test_what_goes_around_the_layer_must_not_be_the_layer_itself(silent):
    """Nor for an image that the layer sees nothing in, such as the black one that a worker warms up with."""
    module = Both().eval()
    if silent:
        nn.init.zeros_(module.layer.weight)
        nn.init.zeros_(module.layer.bias)
    assert find_tail(module, "layer", capture(module, example(), "layer"), example()[0]) is None


@pytest.mark.parametrize("kind", [Shortcut, InPlace, Sides, AroundTwice])
def test_the_network_before_the_layer_is_run_once_for_all_queries(kind):
    module, ran = kind().eval(), []
    features = features_of(module, "layer")
    lost_by_running(features, torch.arange(1))  # finds the tail
    module.first.register_forward_hook(lambda _module, _inputs, output: ran.append(len(output)))
    expected = [lost_alone(module, features, channel) for channel in range(4)]
    ran.clear()
    found = lost_by_running(features, torch.arange(4))
    assert ran == [1]
    torch.testing.assert_close(found[0], torch.stack(expected), rtol=1e-4, atol=1e-6)


def transformer() -> nn.Module:
    torch.manual_seed(3)
    module = VisionTransformer(
        image_size=40, patch_size=10, num_layers=3, num_heads=2, hidden_dim=12, mlp_dim=24, num_classes=CLASSES
    )
    nn.init.normal_(module.heads.head.weight)
    return module.eval()


@pytest.mark.parametrize("method", ["ablation_cam", "recipro_cam"])
def test_queries_of_a_transformer_are_run_through_its_last_block_alone(method):
    engine = Engine(transformer(), preprocessing=replace(PREPROCESSING, crop_px=(40, 40)))
    first, last = (engine.network.module.encoder.layers[index].self_attention for index in (0, -1))
    whole = Engine(transformer(), preprocessing=replace(PREPROCESSING, crop_px=(40, 40)))
    whole.network._openings[whole.network.info.default_layer]._tail.append(None)
    expected = whole.explain(picture(2), methods=[method], targets=[1])
    engine.explain(picture(2), methods=[method], targets=[1])  # finds the tail
    ran = []
    for name, block in (("first", first), ("last", last)):
        block.register_forward_hook(lambda _m, inputs, _o, name=name: ran.append((name, len(inputs[0]))))
    found = engine.explain(picture(2), methods=[method], targets=[1])
    # The opening, and the pass that makes what goes around the layer.
    assert [size for name, size in ran if name == "first"] == [1, 1]
    assert sum(size for name, size in ran if name == "last") >= found.cost.queries
    np.testing.assert_allclose(found.maps[0].array, expected.maps[0].array, atol=1e-4)


def test_what_goes_around_the_layer_is_made_once_for_all_steps_of_an_image():
    network = Network(transformer(), preprocessing=replace(PREPROCESSING, crop_px=(40, 40)), micro_batch=4)
    ran = []
    asked = [
        Item(picture(seed), (Target(1),), (Task(0, ReciproCam(), start, start + 4),))
        for seed in (0, 1)
        for start in (0, 4, 8, 12)
    ]
    forgetful, kept = Executor(network, 0), Executor(network, 2**24)
    expected = [forgetful.answer(item)[1].partials[0].sums for item in asked]  # finds the tail as well
    attention = network.module.encoder.layers[0].self_attention
    attention.register_forward_hook(lambda _module, inputs, _output: ran.append(len(inputs[0])))
    found = [kept.answer(item)[1].partials[0].sums for item in asked]
    assert ran == [1, 1] * 2  # of each image its opening, and what goes around the layer
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("images", [1, 3])
def test_sizes_of_the_image_may_be_asked_behind_the_layer(images):
    """As EfficientNet-Lite does: `x.view(inputs.size(0), -1)`."""
    module, x = AsksSizes().eval(), example(images)
    tail = find_tail(module, "layer", captured(module, "layer", x[:1]), x[0])
    assert tail is not None
    assert tail.before is None
    found = captured(module, "layer", x)
    torch.testing.assert_close(tail.module(found.raw.clone()), module(x), rtol=1e-4, atol=1e-6)
    assert_same(module, "layer", example())


@pytest.mark.parametrize("kind", [Checks, Counts, ShapeOfWhatItShows])
def test_where_there_is_no_tail_the_whole_network_is_run(kind):
    module = kind().eval()
    assert find_tail(module, "layer", captured(module, "layer"), example()[0]) is None
    features = features_of(module, "layer")
    expected = [lost_alone(module, features, channel) for channel in range(4)]
    torch.testing.assert_close(
        lost_by_running(features, torch.arange(4))[0], torch.stack(expected), rtol=1e-4, atol=1e-6
    )


def lost_alone(module: nn.Module, features: Features, channel: int) -> Tensor:
    def ablate(_module, _inputs, output):
        output = output.clone()
        output[:, channel] = 0
        return output

    with torch.no_grad():
        whole = module(features.input[None])
        with module.layer.register_forward_hook(ablate):
            return features.targets.value(whole - module(features.input[None]))[0, 0]


def features_of(module: nn.Module, layer: str, micro_batch: int = 3) -> Features:
    network = Network(module, preprocessing=PREPROCESSING, micro_batch=micro_batch)
    x = network.normalise(torch.from_numpy(picture(2))[None])
    found = network.capture(x, layer)
    return Features(
        x[0], found.activations[0], found.logits[0], asked([5, 1]), None, network.classifier, network.passes(layer)
    )


@pytest.mark.parametrize(("name", "layer"), [("pooled", "features.8"), ("reused", "act")])
def test_the_closed_form_is_what_running_the_tail_gives(name, layer):
    features = features_of(build(name, 2, torch.float64), layer)
    closed = pooled_linear_rows(features) * features.activations.mean(dim=(1, 2))
    run = lost_by_running(features, torch.arange(CHANNELS))
    torch.testing.assert_close(run, closed, rtol=1e-9, atol=1e-12)
    made = features.passes.made
    sums = ablation_cam(features, AblationCam(), torch.arange(CHANNELS))
    assert features.passes.made == made  # and asks nothing
    signs = features.logits[[5, 1]].sign()
    expected = torch.einsum("k,kc,cuv->kuv", signs, run, features.activations)
    torch.testing.assert_close(sums, expected, rtol=1e-9, atol=1e-12)


def test_a_network_is_traced_once_and_only_the_tail_is_run_then():
    network = Engine(build("perceptron", 2), preprocessing=PREPROCESSING)
    ran = []
    network.network.module.features[0].register_forward_hook(lambda _m, _i, output: ran.append(len(output)))
    for expected in ([1, 1], [1], [1]):  # the image, and what the tail is compared with
        ran.clear()
        assert network.explain(picture(2), methods=["ablation_cam"]).cost.queries == CHANNELS + 1
        assert ran == expected


class Timed:
    """A clock that only passes of a network's last layer move."""

    def __init__(self, monkeypatch, engine: Engine, seconds: Callable[[int], float]) -> None:
        self.now_s, self.sizes = 0.0, []
        monkeypatch.setattr(passes, "time", SimpleNamespace(perf_counter=lambda: self.now_s))

        def ran(_module: nn.Module, _inputs: tuple[Tensor], output: Tensor) -> None:
            self.sizes.append(len(output))
            self.now_s += seconds(len(output))

        engine.network.classifier.register_forward_hook(ran)

    def explained(self, engine: Engine, method: str, times: int = 6) -> tuple[list[int], list[np.ndarray]]:
        """Returns the sizes of all passes but openings and those in which the tail is found, and the maps."""
        maps = [engine.explain(picture(2), methods=[method], targets=[1]).maps[0].array for _ in range(times)]
        return [size for size in self.sizes if size > 1], maps


def always(images: int) -> float:
    return 1.0


def each(images: int) -> float:
    return float(images)


@pytest.mark.parametrize(("method", "queries"), [("ablation_cam", CHANNELS + 1), ("recipro_cam", 120)])
def test_passes_of_a_tail_get_larger_while_that_pays(monkeypatch, method, queries):
    expected = Engine(build("perceptron", 2), preprocessing=PREPROCESSING, micro_batch=4)
    expected = expected.explain(picture(2), methods=[method], targets=[1]).maps[0].array
    for seconds, largest in ((always, min(64, queries)), (each, 8)):
        engine = Engine(build("perceptron", 2), preprocessing=PREPROCESSING)
        sizes, maps = Timed(monkeypatch, engine, seconds).explained(engine, method)
        assert sizes[:2] == [4, 4]
        assert max(sizes) == largest, sizes
        assert seconds is always or sizes.count(8) == 2
        for one in maps:  # products of another number of rows are rounded otherwise
            np.testing.assert_allclose(one, expected, atol=1e-5)


def test_passes_of_a_size_that_somebody_named_or_that_is_kept_stay_so(monkeypatch):
    named = Engine(build("perceptron", 2), preprocessing=PREPROCESSING, micro_batch=3)
    assert max(Timed(monkeypatch, named, always).explained(named, "ablation_cam")[0]) == 3
    kept = Engine(build("perceptron", 2), preprocessing=PREPROCESSING)
    clock = Timed(monkeypatch, kept, always)
    task = Task(0, AblationCam(), 0, CHANNELS + 1)
    for _ in range(3):
        kept._executor.answer(Item(picture(2), (Target(1),), (task,), reproducible=True))
    assert max(clock.sizes) == kept.network.reproducible_pass


def test_where_memory_runs_out_in_a_larger_pass_they_get_smaller(monkeypatch):
    expected = Engine(build("perceptron", 2), preprocessing=PREPROCESSING)
    expected = expected.explain(picture(2), methods=["recipro_cam"], targets=[1])
    engine = Engine(build("perceptron", 2), preprocessing=PREPROCESSING)
    clock, most = Timed(monkeypatch, engine, always), 16

    def scarce(_module, inputs):
        if len(inputs[0]) > most:
            raise torch.OutOfMemoryError("no more memory")

    engine.network.classifier.register_forward_pre_hook(scarce)
    found = engine.explain(picture(2), methods=["recipro_cam"], targets=[1])
    assert max(clock.sizes) == 16
    clock.sizes.clear()
    again = engine.explain(picture(2), methods=["recipro_cam"], targets=[1])
    assert max(clock.sizes) == engine.network.micro_batch // 2  # not only the pass that failed: memory stays scarce
    for one in (found, again):
        np.testing.assert_allclose(one.maps[0].array, expected.maps[0].array, atol=1e-5)


def test_without_a_tail_passes_are_of_the_micro_batch(monkeypatch):
    module = Checks().eval()
    engine = Engine(module, preprocessing=PREPROCESSING, layer="layer")
    assert (
        engine.network._openings["layer"].tail(engine.network.normalise(torch.from_numpy(picture(2))[None])[0]) is None
    )
    assert max(Timed(monkeypatch, engine, always).explained(engine, "ablation_cam")[0]) == 4


def test_weights_stay_the_networks_own():
    module = Small().eval()
    found = captured(module, "layer")
    tail = find_tail(module, "layer", found, example()[0])
    with torch.no_grad():
        module.head.bias += 1
    torch.testing.assert_close(tail(found.raw.clone(), tail.around(example()[0])), found.logits + 1)


@pytest.mark.parametrize("kind", [Small, Shortcut, InPlace, Checks, Counts, MeetsTensors])
def test_nothing_is_left_on_the_module(kind):
    module = kind().eval()
    before = [(name, dict(vars(child))) for name, child in module.named_modules()]
    find_tail(module, "layer", captured(module, "layer"), example()[0])
    assert [name for name, _ in before] == [name for name, _ in module.named_modules()]
    for (_, settings), child in zip(before, module.modules(), strict=True):
        assert list(settings) == list(vars(child))


def test_other_threads_go_on_while_one_traces():
    other, x, answers = build("pooled", 1), torch.rand(2, 3, 40, 48), []

    class Waits(Small):
        def behind(self, x, found):
            if isinstance(found, fx.Proxy):
                thread = threading.Thread(target=lambda: answers.append(other(example_of_other)))
                thread.start()
                thread.join()
            return found.relu()

    example_of_other = x
    module = Waits().eval()
    assert find_tail(module, "layer", captured(module, "layer"), example()[0]) is not None
    (answer,) = answers
    torch.testing.assert_close(answer, other(x))
