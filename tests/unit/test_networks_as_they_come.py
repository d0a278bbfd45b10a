"""Networks as people have them: what their forward does to gradients, views of the picture, precision, heads.

The right maps come from plain networks of the same weights, differentiated here in float64 or float32 by hand.
"""

from __future__ import annotations

import json
import math
import re
import threading
import zipfile
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from camserve import Engine
from camserve.archive import build_archive, load_package, surveyed
from camserve.archive.surveyed import SURVEY
from camserve.errors import CamserveError, InvalidInput, InvalidOption, Unsupported
from camserve.gateway.pool.readiness import canary
from camserve.methods import METHODS
from camserve.saliency.layers import survey
from camserve.types import Preprocessing
from camserve.worker import network as network_module
from camserve.worker.executor import Executor
from camserve.worker.network import load_network

SIDE = 64
PREPROCESSING = Preprocessing(SIDE, (SIDE, SIDE), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "bilinear")
TARGET = 2
FEW = {"groups": 4, "masks": 20, "samples": 2, "steps": 2}
CLOSE = 2e-3
"""Difference of maps in [0, 1] made from the same gradients in another order, and upsampled by another function."""


def picture(seed: int = 0) -> np.ndarray:
    """Coarse colours with a bright blob off the centre, uint8."""
    coarse = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    pixels = F.interpolate(coarse, (SIDE, SIDE), mode="bilinear")[0].permute(1, 2, 0).numpy()
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    blob = np.exp(-(((y - 0.25) / 0.12) ** 2) - ((x - 0.7) / 0.12) ** 2)
    return ((pixels * 0.6 + blob[..., None] * 0.4) * 255).round().astype(np.uint8)


def as_input(pixels: np.ndarray) -> Tensor:
    return ((torch.from_numpy(pixels).float() / 255 - 0.5) / 0.25).permute(2, 0, 1)[None]


class Plain(nn.Module):
    """Three convolutions with norms and ReLUs, then two linear layers; the last feature layer is `features.8`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        widths = (3, 8, 16, 24)
        steps = [(nn.Conv2d(low, high, 3, 2, 1), nn.BatchNorm2d(high), nn.ReLU()) for low, high in pairwise(widths)]
        self.features = nn.Sequential(*(layer for step in steps for layer in step))
        self.hidden, self.fc = nn.Linear(24, 20), nn.Linear(20, 5)
        for norm in (layer for layer in self.features if isinstance(layer, nn.BatchNorm2d)):
            norm.running_mean.normal_(0, 0.2)
            norm.running_var.uniform_(0.5, 1.5)

    def head(self, maps: Tensor) -> Tensor:
        return self.fc(self.hidden(maps.mean(dim=(2, 3))).relu())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def grad_cam(maps: Tensor, score) -> np.ndarray:
    """Grad-CAM by its formula, of maps (1, C, u, v) and a function from maps to one score; scaled to [0, 1]."""
    leaf = maps.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(score(leaf), leaf)
    small = (gradient.mean(dim=(2, 3), keepdim=True) * leaf).sum(dim=1, keepdim=True).relu().detach()
    large = F.interpolate(small, (SIDE, SIDE), mode="bilinear")[0, 0]
    return ((large - large.min()) / (large.max() - large.min())).numpy()


def expected(plain: Plain) -> np.ndarray:
    return grad_cam(plain.features(as_input(picture())), lambda maps: plain.head(maps)[0, TARGET])


def engine(module: nn.Module, **options) -> Engine:
    return Engine(module.eval(), preprocessing=PREPROCESSING, **options)


def explained(found: Engine, method: str = "grad_cam") -> np.ndarray:
    known = {parameter.name for parameter in METHODS[method].parameters()}
    options = {name: value for name, value in FEW.items() if name in known}
    (one,) = found.explain(picture(), [(method, options)], [TARGET]).maps
    return one.array


# Kind 1: the gradient's way inside forward


class WithBlock(Plain):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            maps = self.features(x)
        return self.head(maps)


class UnlessTraining(Plain):
    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.training):
            maps = self.features(x)
        return self.head(maps)


class SwitchedOff(Plain):
    """Switched off without a block, and never on again."""

    def forward(self, x: Tensor) -> Tensor:
        before = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        scores = self.head(self.features(x))
        torch.set_grad_enabled(before)
        return scores


class Decorated(Plain):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class InferenceForward(Plain):
    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class InferenceBlock(Plain):
    """Inference mode ends before the head, and with it what it had set."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            maps = self.features(x)
        return self.head(maps.clone())


class Checkpointed(Plain):
    reentrant = True

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.features[:4], x, use_reentrant=self.reentrant)
        # The last feature layer runs inside a checkpoint together with what follows it.
        return checkpoint(lambda maps: self.head(self.features[4:](maps)), x, use_reentrant=self.reentrant)


class CheckpointedOtherwise(Checkpointed):
    reentrant = False


class LogsAnArray(Plain):
    """It could not make the array if the tensor had a graph."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            maps = self.features(x)
            self.seen = maps.numpy().mean()
        return self.head(maps)


class ScalesItsWeights(Plain):
    """Changes a parameter in place, which autograd forbids for one that is trained."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.fc.weight.mul_(1.0)
            maps = self.features(x)
        return self.head(maps)


KEPT = [
    WithBlock,
    UnlessTraining,
    SwitchedOff,
    Decorated,
    InferenceForward,
    InferenceBlock,
    Checkpointed,
    CheckpointedOtherwise,
    LogsAnArray,
    ScalesItsWeights,
]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of the reentrant checkpoint in the twin
@pytest.mark.parametrize("kind", KEPT, ids=lambda kind: kind.__name__)
def test_a_forward_that_switches_gradients_off_gets_the_map_of_the_plain_network(kind):
    found = engine(kind())
    assert found.info.default_layer == "features.8"
    np.testing.assert_allclose(explained(found), expected(Plain().eval()), atol=CLOSE)


def test_parameters_are_frozen_inside_and_as_they_were_afterwards():
    """So that no graph of them is made, and what a forward does to them in place is allowed."""
    seen = []

    class Looks(Plain):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(self.fc.weight.requires_grad)
            return super().forward(x)

    module = Looks()
    module.hidden.requires_grad_(False)
    explained(engine(module))
    assert set(seen) == {False}
    assert [layer.weight.requires_grad for layer in (module.fc, module.hidden)] == [True, False]


@pytest.mark.parametrize("kind", [WithBlock, InferenceForward, CheckpointedOtherwise], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("method", ["integrated_gradients", "guided_backprop", "smooth_grad_cam_plus_plus"])
def test_gradients_of_the_input_are_kept_on_too(kind, method):
    np.testing.assert_allclose(explained(engine(kind()), method), explained(engine(Plain()), method), atol=CLOSE)


def test_checkpoints_of_other_threads_stay_checkpoints():
    """While one thread explains, another one trains: its segment must run twice, forward and again for backward."""
    runs, inside, done = [], threading.Event(), threading.Event()

    def segment(x: Tensor) -> Tensor:
        runs.append(1)
        return x.exp()

    class Waits(CheckpointedOtherwise):
        def forward(self, x: Tensor) -> Tensor:
            inside.set()
            assert done.wait(60)
            return super().forward(x)

    def train() -> None:
        assert inside.wait(60)
        x = torch.ones(3, requires_grad=True)
        for reentrant in (True, False):
            checkpoint(segment, x, use_reentrant=reentrant).sum().backward()
        done.set()

    other = threading.Thread(target=train)
    other.start()
    survey(Waits().eval(), torch.zeros(1, 3, SIDE, SIDE))
    other.join()
    assert len(runs) == 4


class Detached(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).detach())


class TakesData(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).data)


class DetachedBeforePooling(Plain):
    """Only a linear layer follows the pooling, so there is a closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(24, 5)

    def head(self, maps: Tensor) -> Tensor:
        return self.last(maps.mean(dim=(2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).detach())


@pytest.mark.parametrize("kind", [Detached, TakesData], ids=lambda kind: kind.__name__)
def test_a_forward_that_detaches_is_explained_without_gradients(kind):
    found = engine(kind())
    assert found.info.default_layer == "features.8"
    for method in ("grad_cam", "group_cam", "layer_cam", "integrated_gradients"):
        with pytest.raises(Unsupported, match=r"forward cuts it.*score_cam.*rise"):
            explained(found, method)
    for method in ("score_cam", "ss_cam", "is_cam", "ablation_cam", "recipro_cam", "eigen_cam", "rise", "occlusion"):
        np.testing.assert_allclose(explained(found, method), explained(engine(Plain()), method), atol=CLOSE)


def test_the_closed_form_needs_no_gradients():
    module = DetachedBeforePooling().eval()
    want = grad_cam(module.features(as_input(picture())), lambda maps: module.head(maps)[0, TARGET])
    np.testing.assert_allclose(explained(engine(module)), want, atol=CLOSE)


# Kind 2: a place of the layer is a place of the picture


class Views(Plain):
    """Sees the picture in two views, and takes the mean of the scores."""

    def views(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        first, second = (super(Views, self).forward(view) for view in self.views(x))
        return (first + second) / 2


class Flipped(Views):
    def views(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x.flip(-1)


class UpsideDown(Views):
    def views(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.flip(-2), x


class Cropped(Views):
    def views(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, F.interpolate(x[..., 16:48, 16:48], (SIDE, SIDE), mode="bilinear")


class TwoScales(Views):
    def views(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, F.interpolate(x, scale_factor=2, mode="bilinear")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Flipped, "calls 1 and 2: the places of 2 are"),
        (UpsideDown, "calls 1 and 2: the places of 1 are"),
        (Cropped, "calls 1 and 2: the places of 2 are"),
        (TwoScales, r"calls 1 and 2, whose sizes differ \(24x8x8 and 24x16x16\)"),
    ],
)
def test_views_that_do_not_lie_on_each_other_leave_no_layer_and_the_reason_has_their_calls(kind, said):
    info = engine(kind()).info
    assert not info.layers
    assert re.search(said, info.lacks["layer"])


class Brighter(Views):
    def views(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, 1.3 * x + 0.2


def test_views_that_lie_on_each_other_are_summed():
    module = Brighter().eval()
    pair = [module.features(view) for view in module.views(as_input(picture()))]

    def score(maps: Tensor) -> Tensor:
        return sum(module.head(half)[0, TARGET] for half in maps.chunk(2, dim=1)) / 2

    found = engine(module)
    assert (found.info.default_layer, found.info.layer("").channels) == ("features.8", 48)
    np.testing.assert_allclose(explained(found), grad_cam(torch.cat(pair, dim=1), score), atol=CLOSE)
    for method in ("score_cam", "ablation_cam", "group_cam"):
        assert np.ptp(explained(found, method)) == 1


class Shuffled(Plain):
    """Its patches come in another order before the last layer, as Hiera's units do."""

    def __init__(self) -> None:
        super().__init__()
        self.order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
        self.last = nn.Conv2d(24, 24, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.features(x)
        return self.head(self.last(maps.flatten(2)[..., self.order].view_as(maps)).relu())


def test_a_layer_whose_places_are_others_is_not_offered_and_says_why():
    found = engine(Shuffled())
    assert found.info.default_layer == "features.8"
    assert "not found at its place" in found.info.refused["last"]
    with pytest.raises(InvalidOption, match="'last' is not offered: a patch of the picture"):
        found.explain(picture(), layer="last")
    with pytest.raises(InvalidOption, match="'last' is not offered"):
        engine(Shuffled(), layer="last")


class Fades(Plain):
    """In its last layers the picture is less than what rounding does to numbers about 1."""

    def __init__(self) -> None:
        super().__init__()
        self.fade, self.last = nn.Conv2d(24, 24, 1), nn.Conv2d(24, 24, 3, padding=1)
        with torch.no_grad():
            self.fade.weight *= 3e-8
            self.fade.bias.uniform_(0.5, 1.5)

    def head(self, maps: Tensor) -> Tensor:
        gate = maps.mean(dim=(2, 3), keepdim=True)  # as squeeze and excitation have it: it changes every place
        return super().head(self.last(self.fade(maps + 100 * gate)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_whose_changes_may_be_rounding_is_judged_by_those_before_it(dtype):
    found = engine(Fades().to(dtype)).info
    assert found.default_layer == "last"
    assert not found.refused


class Tokens(nn.Module):
    """A transformer of 8 x 8 patches, with tokens of its own at some positions of the sequence."""

    def __init__(self, own: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.own, self.length = own, 64 + len(own)
        self.patches, self.tokens = nn.Conv2d(3, 24, 8, 8), nn.Parameter(torch.randn(1, len(own), 24))
        self.first, self.attention = nn.LayerNorm(24), nn.MultiheadAttention(24, 2, batch_first=True)
        self.second, self.fc = nn.LayerNorm(24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).mT
        places = [place for place in range(self.length) if place not in self.own]
        sequence = torch.zeros(len(x), self.length, 24, dtype=x.dtype)
        sequence = sequence.index_add(1, torch.tensor(places), patches)
        sequence = sequence.index_add(1, torch.tensor(self.own), self.tokens.expand(len(x), -1, -1))
        normed = self.first(sequence)
        sequence = sequence + self.attention(normed, normed, normed, need_weights=False)[0]
        return self.fc(self.second(sequence).mean(dim=1))


@pytest.mark.parametrize("own", [(0,), (0, 1), (64,), (0, 65), (32,)], ids=str)
def test_the_networks_own_tokens_are_found_where_they_are(own):
    module = Tokens(own).eval()
    found = survey(module, torch.zeros(1, 3, SIDE, SIDE))
    site = next(site for site in found.layers if site.layer.name == "first")
    assert site.arrangement.own == own
    assert (site.layer.height, site.layer.width) == (8, 8)
    kept: list[Tensor] = []
    handle = module.first.register_forward_hook(lambda _m, _x, output: kept.append(output))
    module(as_input(picture()))
    handle.remove()
    places = [place for place in range(64 + len(own)) if place not in own]
    maps = site.arrangement.maps(kept[0])
    torch.testing.assert_close(maps[0, :, 3, 5], kept[0][0, places[3 * 8 + 5]])
    torch.testing.assert_close(site.arrangement.raw(maps, kept[0]), kept[0], rtol=0, atol=0)


class Weights(nn.Module):
    """An attention whose weights (heads, N, N) pass through a module of their own, and one between channels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.patches, self.qkv = nn.Conv2d(3, 16, 8, 8), nn.Linear(16, 48)
        self.weights, self.channels, self.fc = nn.Dropout(0.1), nn.Dropout(0.1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).mT
        query, key, value = self.qkv(tokens).unflatten(2, (2, 24)).transpose(1, 2).chunk(3, dim=-1)
        tokens = tokens + (self.weights((query @ key.mT).softmax(-1)) @ value).transpose(1, 2).flatten(2)
        mixing = self.channels((tokens.mT @ tokens)[:, None].softmax(-1))
        return self.fc((tokens @ mixing[:, 0]).mean(dim=1))


def test_weights_of_attentions_are_no_layers():
    found = survey(Weights().eval(), torch.zeros(1, 3, SIDE, SIDE))
    assert not {"weights", "channels"} & {site.layer.name for site in found.layers}
    assert found.default in {"patches", "qkv"}


# Kind 3: the default layer


class WithDecoder(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Sequential(nn.ConvTranspose2d(24, 8, 2, 2), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        maps = self.features(x)
        scores = self.head(maps)
        self.mask = self.decoder(maps)
        return scores


class Cosine(Plain):
    """ArcFace's head: no linear layer at all."""

    def __init__(self) -> None:
        super().__init__()
        del self.hidden, self.fc
        self.centres = nn.Parameter(torch.randn(5, 24))

    def head(self, maps: Tensor) -> Tensor:
        return 16 * F.linear(F.normalize(maps.mean(dim=(2, 3))), F.normalize(self.centres))


class CosineOfEmbedding(Plain):
    """A linear layer to the embedding, and a cosine behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(5, 20))

    def head(self, maps: Tensor) -> Tensor:
        return 16 * F.linear(F.normalize(self.hidden(maps.mean(dim=(2, 3)))), F.normalize(self.centres))


class ConvolutionHead(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(24, 5, 1)

    def head(self, maps: Tensor) -> Tensor:
        return self.last(maps).mean(dim=(2, 3))


class TwoConvolutionHeads(ConvolutionHead):
    """Two heads side by side: neither is part of the features."""

    def __init__(self) -> None:
        super().__init__()
        self.beside = nn.Conv2d(24, 5, 1)

    def head(self, maps: Tensor) -> Tensor:
        return self.last(maps).mean(dim=(2, 3)) + self.beside(maps).amax(dim=(2, 3))


class NoHead(Plain):
    def head(self, maps: Tensor) -> Tensor:
        return maps.mean(dim=(2, 3))


class GatedFeatures(Plain):
    """A linear layer inside a gate beside the trunk is the last one called, and no head."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.centres = nn.Linear(24, 24), nn.Parameter(torch.randn(5, 24))
        self.last = nn.ReLU()

    def head(self, maps: Tensor) -> Tensor:
        maps = self.last(maps * self.gate(maps.mean(dim=(2, 3))).sigmoid()[..., None, None])
        return F.linear(F.normalize(maps.mean(dim=(2, 3))), F.normalize(self.centres))


@pytest.mark.parametrize(
    ("kind", "layer"),
    [
        (WithDecoder, "features.8"),
        (Cosine, "features.8"),
        (CosineOfEmbedding, "features.8"),
        (ConvolutionHead, "features.8"),
        (TwoConvolutionHeads, "features.8"),
        (NoHead, "features.8"),
        (GatedFeatures, "last"),
    ],
)
def test_the_default_layer_is_the_last_one_that_the_scores_depend_on(kind, layer):
    module = kind().eval()
    found = engine(module)
    assert found.info.default_layer == layer
    if layer == "features.8":
        want = grad_cam(module.features(as_input(picture())), lambda maps: module.head(maps)[0, TARGET])
        np.testing.assert_allclose(explained(found), want, atol=CLOSE)


def test_a_layer_that_the_scores_do_not_depend_on_is_not_offered():
    found = engine(WithDecoder())
    assert {name for name in found.info.refused if name.startswith("decoder")} == {
        "decoder",
        "decoder.0",
        "decoder.1",
        "decoder.2",
    }
    with pytest.raises(InvalidOption, match=r"'decoder.1' is not offered: the scores do not depend on it"):
        found.explain(picture(), ["score_cam"], [TARGET], layer="decoder.1")


# Kind 5: numbers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_network_in_half_precision_has_every_map_of_the_same_network_in_float32(method, dtype):
    found = engine(Plain().to(dtype))
    try:
        half = explained(found, method)
    except Unsupported:
        with pytest.raises(Unsupported):
            explained(engine(Plain()), method)
        return
    assert half.dtype == np.float32
    assert np.isfinite(half).all()
    single = explained(engine(Plain()), method)
    if not single.any():  # no positive evidence, in either precision
        assert not half.any()
        return
    if method == "recipro_cam" and dtype == torch.bfloat16:
        return  # one place of 120 changes what is pooled by less than three digits tell
    # bfloat16 has three digits, and a query that hides little of the picture changes the fourth.
    assert np.corrcoef(half.ravel(), single.ravel())[0, 1] > (0.9 if dtype == torch.float16 else 0.7)


def test_predictions_of_a_network_in_half_precision_add_up_to_one():
    (found,) = [engine(Plain().to(torch.bfloat16)).explain(picture())]
    assert math.isclose(sum(each.probability for each in found.predictions), 1, abs_tol=1e-6)


def with_batch_statistics(kind: type[Plain] = Plain) -> Plain:
    module = kind()
    for index in (1, 4, 7):
        module.features[index] = nn.BatchNorm2d(module.features[index].num_features, track_running_stats=False)
    return module


class AcrossTheBatch(Plain):
    """No norm says so, but each picture sees the mean of all."""

    def head(self, maps: Tensor) -> Tensor:
        return super().head(maps - maps.mean(dim=0, keepdim=True) / 2)


class OneAtATime(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(1, 3, SIDE, SIDE))


class AtMostTwo(Plain):
    """Has memory for two pictures, which it asks for itself."""

    def forward(self, x: Tensor) -> Tensor:
        room = x.new_empty(2, *x.shape[1:])
        room[: len(x)] = x
        return super().forward(room[: len(x)])


@pytest.mark.parametrize("make", [with_batch_statistics, AcrossTheBatch, AtMostTwo])
@pytest.mark.parametrize("method", ["occlusion", "score_cam", "integrated_gradients"])
def test_pictures_that_change_each_others_scores_are_asked_one_by_one(make, method):
    one, many = (engine(make(), micro_batch=size) for size in (1, 8))
    assert many.network.micro_batch == 1
    np.testing.assert_array_equal(explained(one, method), explained(many, method))


class Large(Plain):
    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(x)


def test_a_lack_of_memory_does_not_make_a_network_one_that_is_asked_one_by_one():
    with pytest.raises(torch.OutOfMemoryError):
        engine(Large())


def test_other_networks_are_asked_together():
    assert engine(Plain(), micro_batch=8).network.micro_batch == 8


class Random(Plain):
    """`F.dropout` drops in eval mode too, unless it is told not to."""

    def head(self, maps: Tensor) -> Tensor:
        return super().head(F.dropout(maps, 0.5))


def test_a_network_that_answers_at_random_is_refused():
    with pytest.raises(Unsupported, match=r"another answer each time.*training=self\.training"):
        engine(Random())


# Kinds 7 and 8: compiled and scripted modules, and the dry run


def compiled_whole() -> nn.Module:
    return torch.compile(Plain().eval(), backend="aot_eager")


def compiled_part() -> nn.Module:
    module = Plain().eval()
    module.features = torch.compile(module.features, backend="aot_eager")
    return module


def compiled_in_place() -> nn.Module:
    module = Plain().eval()
    module.compile(backend="aot_eager")
    return module


@pytest.mark.parametrize("make", [compiled_whole, compiled_part, compiled_in_place])
@pytest.mark.parametrize("ran", [False, True], ids=["fresh", "ran before"])
def test_a_compiled_network_has_the_map_of_the_original(make, ran):
    module = make()
    if ran:  # so that there is code for these very shapes, which knows no hooks
        module(as_input(picture()))
    before = [type(child) for child in module.modules()], module._compiled_call_impl
    found = engine(module)
    assert found.info.default_layer == "features.8"
    np.testing.assert_allclose(explained(found), expected(Plain().eval()), atol=CLOSE)
    assert np.ptp(explained(found, "rise")) == 1
    assert before == ([type(child) for child in module.modules()], module._compiled_call_impl)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("make", [torch.jit.script, lambda module: torch.jit.trace(module, as_input(picture()))])
def test_a_torchscript_module_is_refused_with_the_way_out(make):
    with pytest.raises(Unsupported, match=r"TorchScript.*give the nn\.Module"):
        engine(make(Plain().eval()))


class NeedsAnother(Plain):
    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return super().forward(x) + other


class Volumes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv3d(1, 4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).mean(dim=(2, 3, 4)))


class Videos(Volumes):
    """Takes (images, channels, frames, height, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, (1, 3, 3))


class TwoInputs(Plain):
    """Takes an image and a table of measurements."""

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        image, measured = inputs
        return super().forward(image) + measured


class NotANumber(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 0 * 0


class Asserts(Plain):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] == 224, "wrong size"
        return super().forward(x)


class LooksUp(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return {}[int(x.shape[0])]


@pytest.mark.parametrize(
    ("make", "came"),
    [
        (NeedsAnother, "missing 1 required positional argument: 'other'"),
        (Volumes, "expected input.1, 2, 3, 64, 64. to have 1 channels"),
        (Asserts, "AssertionError: wrong size"),
        (LooksUp, "KeyError"),
        (OneAtATime, "shape '.1, 3, 64, 64.' is invalid"),
    ],
)
def test_the_dry_run_says_what_was_wanted_and_what_came(make, came):
    with pytest.raises(Unsupported, match=came) as caught:
        engine(make())
    assert isinstance(caught.value, CamserveError)
    assert "must take a batch of images alone, 2 x 3 x 64 x 64 (float32)" in str(caught.value)


class OutsideOfTorch(Plain):
    """Scales its input in numpy, which takes no tensor that has a graph."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.from_numpy(np.from_dlpack(x.detach()) * np.float32(1.5)))


def test_a_forward_that_leaves_torch_where_graphs_begin_is_explained_without_gradients():
    found = engine(OutsideOfTorch())
    assert found.info.default_layer == "features.8"
    for method in ("score_cam", "rise"):
        assert np.ptp(explained(found, method)) == 1


def test_outputs_that_are_no_numbers_are_told_as_that_when_the_engine_is_made():
    with pytest.raises(Unsupported, match="cannot be explained: the network's outputs are not finite for this image"):
        engine(NotANumber())


class Standardises(Plain):
    """Divides by the image's own deviation, which a plain image has none of."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x - x.mean(dim=(1, 2, 3), keepdim=True)) / x.std(dim=(1, 2, 3), keepdim=True))


def test_a_network_that_divides_by_the_images_deviation_is_explained_and_answers_its_canary():
    found = engine(Standardises())
    assert np.ptp(explained(found, "score_cam")) == 1
    Executor(found.network).answer(canary(found.info))
    with pytest.raises(Unsupported, match="not finite for this image"):
        found.explain(np.full((SIDE, SIDE, 3), 128, np.uint8))


@pytest.mark.parametrize("make", [WithBlock, with_batch_statistics, compiled_part, Brighter, lambda: Plain().half()])
def test_nothing_is_changed_on_the_module(make):
    module = make().train()

    def state() -> list:
        return [
            (name, type(child), child.training, len(child._forward_hooks), len(child._forward_pre_hooks))
            for name, child in module.named_modules()
        ] + [(name, weight.requires_grad, weight.grad, weight.dtype) for name, weight in module.named_parameters()]

    before = state()
    found = Engine(module, preprocessing=PREPROCESSING)
    explained(found)
    assert state() == before
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


# What is kept with an archive


def packed(tmp_path, monkeypatch, text: str, **options):
    """Packs what the function `build` of a module with this text returns, and returns the archive's path."""
    name = "asked_" + re.sub(r"\W", "_", tmp_path.name)  # another one for each test, since modules stay imported
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    return build_archive(f"{name}:build", store=tmp_path, preprocessing=PREPROCESSING, name="asked", **options)


def make(kind: str) -> str:
    return f"import unit.test_networks_as_they_come as here\n\n\ndef build():\n    return here.{kind}()\n"


@pytest.mark.parametrize("kind", ["WithBlock", "Brighter", "Detached", "with_batch_statistics", "Flipped"])
def test_what_was_found_out_is_kept_with_the_archive(kind, tmp_path, monkeypatch):
    path = packed(tmp_path, monkeypatch, make(kind))
    asked = []
    monkeypatch.setattr(network_module, "survey", lambda *given: asked.append(given))
    kept = load_network(path)
    assert not asked
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(tmp_path))
    module, _ = load_package(path)
    assert kept.survey == survey(module, torch.zeros(1, 3, SIDE, SIDE))


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (lambda content: content, False),
        (lambda content: content | {"versions": {"torch": "0.1"}}, True),
        (lambda content: content | {"weights": "0" * 32}, True),
        (None, True),
    ],
    ids=["as it was", "another torch", "other weights", "an archive of an earlier version"],
)
def test_it_is_found_out_anew_where_it_does_not_hold(change, again, tmp_path, monkeypatch):
    path = rewritten(packed(tmp_path, monkeypatch, make("Plain")), change)
    asked = []

    def watched(*given):
        asked.append(given)
        return survey(*given)

    monkeypatch.setattr(network_module, "survey", watched)
    assert load_network(path).info.default_layer == "features.8"
    assert bool(asked) == again


def test_a_package_that_is_not_installed_has_no_say(tmp_path, monkeypatch):
    monkeypatch.setattr(surveyed, "PACKAGES", (*surveyed.PACKAGES, "no-such-package"))
    path = packed(tmp_path, monkeypatch, make("Plain"))
    monkeypatch.setattr(network_module, "survey", None)
    assert load_network(path).info.default_layer == "features.8"


@pytest.mark.parametrize(
    "change",
    [
        lambda content: [],
        lambda content: content | {"found": {}},
        lambda content: content | {"found": content["found"] | {"default": "elsewhere"}},
        lambda content: content | {"found": content["found"] | {"scores": -1}},
        lambda content: content | {"found": content["found"] | {"scores": True}},
        lambda content: content | {"found": content["found"] | {"layers": [{"layer": None}]}},
    ],
)
def test_what_cannot_be_read_of_it_is_a_typed_error(change, tmp_path, monkeypatch):
    with pytest.raises(InvalidInput, match="archive"):
        load_network(rewritten(packed(tmp_path, monkeypatch, make("Plain")), change))


def rewritten(path, change):
    """Returns an archive whose survey is another, or which has none."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    content = json.loads(members.pop(SURVEY))
    if change is not None:
        members[SURVEY] = json.dumps(change(content)).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


ONE_BATCH = r"must take a batch of images alone, 2 x 3 x 64 x 64 \(float32\)"


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("Random", "another answer each time"),
        ("NeedsAnother", f"{ONE_BATCH}; it fails with TypeError: .*missing 1 required positional argument: 'other'"),
        ("TwoInputs", f"{ONE_BATCH}; it fails with "),
        ("Volumes", f"{ONE_BATCH}; it fails with RuntimeError: .*have 1 channels, but got 2 channels"),
        ("Videos", f"{ONE_BATCH}; it fails with RuntimeError: .*have 3 channels, but got 2 channels"),
        ("NotANumber", "the network cannot be explained: the network's outputs are not finite"),
    ],
)
def test_a_network_that_cannot_be_explained_is_refused_when_packed(kind, said, tmp_path, monkeypatch):
    with pytest.raises(Unsupported, match=said):
        packed(tmp_path, monkeypatch, make(kind))
    assert not list(tmp_path.glob("*.mar"))


def test_a_layer_that_is_not_offered_is_refused_when_packed(tmp_path, monkeypatch):
    with pytest.raises(InvalidOption, match="'last' is not offered: a patch"):
        packed(tmp_path, monkeypatch, make("Shuffled"), layer="last")
