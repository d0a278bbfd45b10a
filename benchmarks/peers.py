"""Explains with the libraries that camserve is compared to: grad-cam, torchcam, Captum, PAIR's saliency, a plain loop.

Each is called as its own documentation says, on the normalised tensor. What is not installed is left out: `offered`
returns the reason in place of the call. torchcam and Captum return the maps of layers at the layer's resolution, the
others at the input's.

A call that takes too long is stopped while it runs, by a hook on the network that counts images (`at_most`). What the
whole call would have taken is then the time taken, times all images over those counted; what comes after the last pass
is not in it, so such a figure is too small rather than too large.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import common
import naive
import numpy as np
import torch
from subjects import Bench
from torch import Tensor, nn

IG_STEPS = 50
PACKAGES = {"grad-cam": "pytorch_grad_cam", "torchcam": "torchcam", "Captum": "captum", "saliency": "saliency"}
"""Module to import by the name in the tables."""


@dataclass(frozen=True)
class Peer:
    """Describes one way to make a map without camserve."""

    call: Callable[[], object]
    images: int = 0
    """Number of images that the whole call sends through the network; 0 where it is never cut short."""


@dataclass(frozen=True)
class Stopped:
    """Tells that a call was stopped before its end."""

    share: float
    """Share of its images that it was through with."""
    whole_s: float
    """Seconds that the whole call would have taken."""


class _EnoughError(Exception):
    pass


def at_most(seconds: float, peer: Peer, network: nn.Module) -> object:
    """Returns what a call returns, or `Stopped` where it was still sending images after so many seconds.

    It is stopped where a pass begins, because only then all is done with the images before: their gradients, too. What
    is missing would have taken as long for an image as all passes but the first, behind which a method may set up what
    it does once: a Score-CAM its masks.
    """
    if not peer.images:
        return peer.call()
    began_s, passes = time.perf_counter(), list[tuple[float, int]]()

    def begins(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        done, late = sum(images for _, images in passes), time.perf_counter() - began_s > seconds
        ends = late and len(passes) > 1 and done < peer.images
        if ends:
            common.wait_for(inputs[0].device)  # not at each pass, which would take from the others what they overlap
        passes.append((time.perf_counter(), len(inputs[0])))
        if ends:
            raise _EnoughError

    with network.register_forward_pre_hook(begins):
        try:
            return peer.call()
        except _EnoughError:
            (_, first), (second_s, _), *_, (last_s, missing) = passes
            done = sum(images for _, images in passes) - missing
            each_s = (last_s - second_s) / (done - first)
            return Stopped(done / peer.images, last_s - began_s + (peer.images - done) * each_s)


def offered(bench: Bench, method: str) -> dict[str, Peer | str]:
    """Returns the ways to make a method's map by what the tables call them, or the reasons why there is none.

    A name that ends in "batch N" is a call with the batch size at which this network is fastest; else sizes are the
    library's defaults.
    """
    found: dict[str, Peer | str] = dict(_MAKERS[method](bench)) if method in _MAKERS else {}
    for name in found:
        package = PACKAGES.get(name.split(",")[0])
        if package and find_spec(package) is None:
            found[name] = "not installed"
    return found


# grad-cam


def _grad_cam(bench: Bench, method: str, targets: tuple[int, ...], batch: int | None = None) -> np.ndarray:
    """Returns the maps (targets, H, W) of a class of pytorch-grad-cam."""
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    layer = bench.theirs.get_submodule(bench.their_layer)
    options = {"reshape_transform": _as_picture} if bench.subject.tokens else {}
    quiet = contextlib.redirect_stderr(io.StringIO())  # progress bars
    try:
        with quiet, getattr(pytorch_grad_cam, method)(bench.theirs, [layer], **options) as extractor:
            if batch is not None:
                extractor.batch_size = batch
            x = bench.x.repeat(len(targets), 1, 1, 1)
            maps: np.ndarray = extractor(x, [ClassifierOutputTarget(target) for target in targets])
            return maps
    finally:
        bench.theirs.set_submodule(
            bench.their_layer, layer
        )  # AblationCAM puts another there, and a stopped one leaves it


def _as_picture(tokens: Tensor) -> Tensor:
    side = round((tokens.shape[1] - 1) ** 0.5)
    return tokens[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)


# torchcam and Captum


def _torchcam(bench: Bench, method: str, **options: Any) -> np.ndarray:
    import torchcam.methods

    with getattr(torchcam.methods, method)(bench.theirs, bench.their_layer, **options) as extractor:
        outputs = bench.theirs(bench.x)
        return extractor(bench.targets[0], outputs)[0][0].detach().cpu().numpy()


def _torchcam_five(bench: Bench) -> list[Tensor]:
    import torchcam.methods

    with torchcam.methods.GradCAM(bench.theirs, bench.their_layer) as extractor:
        outputs = bench.theirs(bench.x)
        return [extractor(target, outputs, retain_graph=True)[0] for target in bench.targets]


def _captum_grad_cam(bench: Bench, targets: tuple[int, ...]) -> Tensor:
    from captum.attr import LayerGradCam

    explainer = LayerGradCam(bench.theirs, bench.theirs.get_submodule(bench.their_layer))
    x = bench.x.repeat(len(targets), 1, 1, 1)
    return explainer.attribute(x, target=list(targets), relu_attributions=True)


def _captum_integrated(bench: Bench, batch: int | None = None) -> Tensor:
    from captum.attr import IntegratedGradients

    explainer = IntegratedGradients(bench.theirs)
    return explainer.attribute(bench.x, target=bench.targets[0], n_steps=IG_STEPS, internal_batch_size=batch)


# PAIR's saliency


def _gradients(
    bench: Bench, images: np.ndarray, call_model_args: object = None, expected_keys: object = None
) -> dict[str, np.ndarray]:
    """Returns what `saliency` asks of a network: the gradients (n, H, W, 3) of the class's probability."""
    x = torch.from_numpy(np.asarray(images)).float().permute(0, 3, 1, 2).to(bench.device).requires_grad_()
    score = bench.theirs(x).softmax(dim=1)[:, bench.targets[0]].sum()
    (gradients,) = torch.autograd.grad(score, x)
    return {"INPUT_OUTPUT_GRADIENTS": gradients.permute(0, 2, 3, 1).cpu().numpy()}


def _saliency_integrated(bench: Bench, batch: int = 1) -> np.ndarray:
    from saliency.core import IntegratedGradients

    image = bench.x[0].permute(1, 2, 0).cpu().numpy()
    call = partial(_gradients, bench)
    maps: np.ndarray = IntegratedGradients().GetMask(image, call, x_steps=IG_STEPS, batch_size=batch)
    return maps


def _saliency_xrai(bench: Bench, batch: int = 1) -> np.ndarray:
    from saliency.core import XRAI

    image = bench.x[0].permute(1, 2, 0).cpu().numpy()
    maps: np.ndarray = XRAI().GetMask(image, partial(_gradients, bench), batch_size=batch)
    return maps


# What each method is compared to


def _pictures_only(bench: Bench, ways: Mapping[str, Peer]) -> Iterator[tuple[str, Peer | str]]:
    """Yields ways that need a layer of pictures, for one of tokens the reason why there are none."""
    for name, peer in ways.items():
        yield name, "takes no layer of tokens" if bench.subject.tokens else peer


def _grad_cams(bench: Bench) -> Iterator[tuple[str, Peer | str]]:
    first = bench.targets[:1]
    yield "grad-cam", Peer(partial(_grad_cam, bench, "GradCAM", first))
    others = {
        "torchcam": Peer(partial(_torchcam, bench, "GradCAM")),
        "Captum": Peer(partial(_captum_grad_cam, bench, first)),
    }
    yield from _pictures_only(bench, others)


def _five_targets(bench: Bench) -> Iterator[tuple[str, Peer | str]]:
    yield "grad-cam", Peer(partial(_grad_cam, bench, "GradCAM", bench.targets))
    others = {
        "torchcam": Peer(partial(_torchcam_five, bench)),
        "Captum": Peer(partial(_captum_grad_cam, bench, bench.targets)),
    }
    yield from _pictures_only(bench, others)


def _group_cams(bench: Bench) -> Iterator[tuple[str, Peer | str]]:
    loop = Peer(lambda: naive.group_cam(bench.theirs, bench.x, bench.their_layer, bench.targets[0]).cpu().numpy())
    yield from _pictures_only(bench, {"one by one": loop})


def _score_cams(bench: Bench) -> Iterator[tuple[str, Peer | str]]:
    images, best, first = bench.channels + 1, f", batch {bench.batch}", bench.targets[:1]
    yield "grad-cam", Peer(partial(_grad_cam, bench, "ScoreCAM", first), images)
    yield f"grad-cam{best}", Peer(partial(_grad_cam, bench, "ScoreCAM", first, bench.batch), images)
    others = {
        "torchcam": Peer(partial(_torchcam, bench, "ScoreCAM"), images),
        f"torchcam{best}": Peer(partial(_torchcam, bench, "ScoreCAM", batch_size=bench.batch), images),
    }
    yield from _pictures_only(bench, others)


def _ablation_cams(bench: Bench) -> Iterator[tuple[str, Peer | str]]:
    images, first = bench.channels + 2, bench.targets[:1]
    if bench.subject.tokens:
        yield "grad-cam", "its AblationLayer takes no layer of tokens"
        return
    yield "grad-cam", Peer(partial(_grad_cam, bench, "AblationCAM", first), images)
    yield f"grad-cam, batch {bench.batch}", Peer(partial(_grad_cam, bench, "AblationCAM", first, bench.batch), images)


def _eigen_cams(bench: Bench) -> Iterator[tuple[str, Peer | str]]:
    yield "grad-cam", Peer(partial(_grad_cam, bench, "EigenCAM", bench.targets[:1]))


def _integrated(bench: Bench) -> Iterator[tuple[str, Peer | str]]:
    best = f", batch {bench.batch}"
    yield "Captum", Peer(partial(_captum_integrated, bench), IG_STEPS)
    yield f"Captum{best}", Peer(partial(_captum_integrated, bench, bench.batch), IG_STEPS)
    yield "saliency", Peer(partial(_saliency_integrated, bench), IG_STEPS)
    yield f"saliency{best}", Peer(partial(_saliency_integrated, bench, bench.batch), IG_STEPS)


def _xrais(bench: Bench) -> Iterator[tuple[str, Peer | str]]:
    # They are never cut short: ranking regions, after the last pass, takes up to a third of the time.
    yield "saliency", Peer(partial(_saliency_xrai, bench))
    yield f"saliency, batch {bench.batch}", Peer(partial(_saliency_xrai, bench, bench.batch))


_MAKERS: Mapping[str, Callable[[Bench], Iterator[tuple[str, Peer | str]]]] = {
    "grad_cam": _grad_cams,
    "five_targets": _five_targets,
    "group_cam": _group_cams,
    "score_cam": _score_cams,
    "ablation_cam": _ablation_cams,
    "integrated_gradients": _integrated,
    "xrai": _xrais,
    "eigen_cam": _eigen_cams,
}
