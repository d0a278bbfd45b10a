"""Has a network run as fast as it can on this machine: runtime, size of a pass and precision, found by measuring."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from camserve.errors import Unsupported
from camserve.methods import GroupCam, ScoreCam
from camserve.queries.pack import ask
from camserve.runtimes.choice import (
    BUDGET_S,
    FAST,
    SIZES,
    TITLES,
    Choice,
    Measured,
    RuntimeName,
    choose,
    fastest,
    measure,
    ready,
)
from camserve.runtimes.compiled import SIZE, Compiled
from camserve.runtimes.cuda_graphs import CudaGraphs
from camserve.runtimes.kept import Kept
from camserve.runtimes.modes import exact_float32
from camserve.runtimes.precision import Auto, auto_precision, why_no_bfloat16
from camserve.runtimes.runtime import Eager, Runtime
from camserve.saliency import group_cam, score_cam
from camserve.saliency.features import Features
from camserve.saliency.layers import FoundLayer
from camserve.saliency.locality import pictures
from camserve.saliency.masks import Masks
from camserve.saliency.run import dtype_of
from camserve.types import Precision
from camserve.types.model import RuntimeInfo
from camserve.types.target_forms import sample_target

if TYPE_CHECKING:
    from camserve.worker.network import Network

log = logging.getLogger(__name__)

CALIBRATION_QUERIES = 64
"""Number of Score-CAM's queries of each calibration image."""


def tune(
    network: Network,
    wanted: RuntimeName,
    micro_batch: int | None = None,
    folder: Path | None = None,
    calibration: Sequence[np.ndarray] = (),
) -> None:
    """Has a network run by the fastest runtime from now on, whose weights must stay as they are.

    Args:
        network: the network; where "eager" is wanted it stays as it is.
        wanted: which runtime; "auto": the one that measuring finds fastest.
        micro_batch: queries of a pass; None: as many as measuring says.
        folder: where is kept what was measured; None: nowhere.
        calibration: images (H, W, C) as the network sees them, on which precision "auto" is found out.

    Raises:
        Unsupported: the runtime that is wanted cannot run the network.
    """
    if wanted == Eager.name:
        return
    if reason := network.runtime.fixed:
        network.adopt(network.runtime, RuntimeInfo(network.runtime.name, network.micro_batch, "exact", reason))
        return
    layer, threads = network.info.default_layer, torch.get_num_threads()
    kept = Kept(folder, network.info.weights, layer, threads, network.device)
    with network.evaluating(), exact_float32():
        if reason := _why_eager(network):
            if wanted != "auto":
                raise Unsupported(f"{TITLES[wanted]} cannot run the network: {reason}")
            choice = Choice(network.runtime, _micro_batch(network, micro_batch, kept), 0.0, reason)
        else:
            exact = "auto" if wanted == Compiled.name else wanted
            choice = choose(network.module, _site(network), _pictures(network), exact, threads, micro_batch, kept)
        half: Runtime = Eager(network.module, bfloat16=True)
        if wanted == Compiled.name:
            half, slower = _faster(network, Compiled(network.module, _pictures(network)[:1], micro_batch or SIZE), half)
            choice = replace(choice, reason="; ".join(filter(None, (choice.reason, slower))))
        try:
            half = choice.runtime.in_bfloat16() if isinstance(choice.runtime, CudaGraphs) else half
            auto, size = _precision(network, choice, half, micro_batch, kept, calibration)
        except Unsupported as error:
            auto, size = Auto("exact", str(error)), choice.micro_batch
            log.warning("nothing is asked in bfloat16 unless a request says so: %s", error)
    if isinstance(choice.runtime, CudaGraphs):  # which cuts passes that are too large for it, in either precision
        size = max(size, choice.micro_batch)
    info = RuntimeInfo(choice.runtime.name, size, auto.precision, "; ".join(filter(None, (choice.reason, auto.reason))))
    network.adopt(choice.runtime, info, half if wanted == Compiled.name or auto.precision == "bfloat16" else None)
    log.info("%s is run by %s, %d queries a pass; auto is %s", network.info.name, info.name, size, info.precision)


def _faster(network: Network, compiled: Compiled, eager: Runtime) -> tuple[Runtime, str]:
    """Returns what asks a network faster in bfloat16, and the reason where that is not the compiled code."""
    image, sizes = _pictures(network)[:1], (compiled.size,)
    code, own = (next(measure(each, image, sizes, BUDGET_S / 4)).seconds for each in (compiled, eager))
    if code <= own:
        return compiled, ""
    reason = f"PyTorch's own bfloat16 takes {own * 1e3:.3g} ms a query, compiled code {code * 1e3:.3g}"
    log.warning("compiled code is not used: %s", reason)
    return eager, reason


def _why_eager(network: Network) -> str:
    """Returns why PyTorch alone can run the network; "" where others may."""
    if network.device.type not in FAST:
        return f"it runs on {network.device}"
    if dtype_of(network.module) != torch.float32:
        return f"it computes in {str(dtype_of(network.module)).removeprefix('torch.')}"
    if network.tokeniser is not None:
        return "it takes a text beside the image, and a graph would hold one text"
    if not network.survey.layers:
        return "it has no layer whose activations could come with its outputs"
    return "pictures of a batch change each other's scores" if network.survey.alone else ""


def _micro_batch(network: Network, micro_batch: int | None, kept: Kept) -> int:
    """Returns how many queries of a pass suit a network that PyTorch runs; on CPUs that of one with layers is not
    measured."""
    device = network.device.type
    if micro_batch or network.survey.alone or device not in FAST or (network.survey.layers and device == "cpu"):
        return network.micro_batch
    known = Measured.read(kept.read().get("exact"))
    if known is None:
        known = fastest(list(measure(network.runtime, _pictures(network)[:1], SIZES[device], BUDGET_S / 4)))
        kept.write(exact=asdict(known))
    return known.micro_batch


def _site(network: Network) -> FoundLayer:
    (found,) = (each for each in network.survey.layers if each.layer.name == network.info.default_layer)
    return found


def _pictures(network: Network) -> Tensor:
    size = (1, *network.preprocessing.crop_px, network.preprocessing.channels)
    return pictures(network.normalise(torch.zeros(size)))


def _precision(
    network: Network,
    choice: Choice,
    half: Runtime,
    micro_batch: int | None,
    kept: Kept,
    calibration: Sequence[np.ndarray],
) -> tuple[Auto, int]:
    """Returns what precision "auto" is, and the number of queries of a pass that suits it.

    Raises:
        Unsupported: what asks in bfloat16 cannot.
    """
    if reason := why_no_bfloat16(network.device):
        return Auto("exact", reason), choice.micro_batch
    if network.survey.alone or dtype_of(network.module) != torch.float32:
        return Auto("exact", "bfloat16 is for networks in float32 that take pictures together"), choice.micro_batch
    if not network.survey.layers:
        return Auto("exact", "the maps by which bfloat16 is judged are of a layer"), choice.micro_batch
    if not calibration:
        return auto_precision(1.0, 0.0, list), choice.micro_batch
    found, about = kept.read().get("auto"), {"images": _digest(calibration), "runtime": half.name}
    if isinstance(found, dict) and micro_batch is None and found.items() >= about.items():
        precision: Precision = "bfloat16" if found.get("precision") == "bfloat16" else "exact"
        size = int(found.get("micro_batch", choice.micro_batch))
        return Auto(precision, str(found.get("reason", ""))), ready(half, size) if precision == "bfloat16" else size
    image = _pictures(network)[:1]
    sizes = (micro_batch,) if micro_batch else SIZES[network.device.type]
    sizes = (half.size,) if isinstance(half, Compiled) else sizes
    best = fastest(list(measure(half, image, sizes, BUDGET_S / 4)))
    seconds = choice.seconds or next(measure(choice.runtime, image, (choice.micro_batch,), BUDGET_S / 4)).seconds
    size = best.micro_batch

    def maps() -> list[tuple[np.ndarray, np.ndarray]]:
        nonlocal size
        size = ready(half, size)
        return list(_maps(network, half, calibration))

    auto = auto_precision(seconds, best.seconds, maps)
    size = size if auto.precision == "bfloat16" else choice.micro_batch
    if not micro_batch:
        kept.write(auto={**about, **asdict(auto), "micro_batch": size})
    return auto, size


def _digest(images: Sequence[np.ndarray]) -> str:
    found = hashlib.blake2b(digest_size=16)
    for image in images:
        found.update(f"{image.dtype} {image.shape} ".encode() + image.tobytes())
    return found.hexdigest()


def _maps(network: Network, half: Runtime, images: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields maps of Group-CAM and Score-CAM at the layer's resolution, of PyTorch in float32 and in bfloat16."""
    exact, end = Eager(network.module), time.perf_counter() + BUDGET_S
    for index, image in enumerate(images):
        if (
            index and time.perf_counter() > end
        ):  # some images tell less than all, and a worker that never starts tells nothing
            return
        features = _features(network, torch.tensor(image))
        asked: list[tuple[Masks, GroupCam | ScoreCam]] = []
        if features.gradients is not None:
            group = GroupCam(groups=min(GroupCam.groups, len(features.activations)))
            asked.append((group_cam.masks(features, group, torch.arange(group.groups)), group))
        channels = features.activations.mean(dim=(1, 2)).argsort(descending=True)[:CALIBRATION_QUERIES]
        asked.append((score_cam.masks(features, ScoreCam(), channels), ScoreCam()))
        for masks, spec in asked:
            reduce = group_cam.reduce if isinstance(spec, GroupCam) else score_cam.reduce
            expected, came = (
                reduce(ask(runtime.outputs, [masks], network.micro_batch)[0], masks, spec)[0].relu().cpu().numpy()  # type: ignore[arg-type]
                for runtime in (exact, half)
            )
            yield expected, came


def _features(network: Network, pixels: Tensor) -> Features:
    layer = network.info.default_layer
    captured = network.capture(network.normalise(pixels[None]), layer)
    wanted = network.score.resolved(sample_target(network.info), captured.logits[0])
    targets = network.score.targets(wanted[:1], network.device)
    return Features(
        input=network.normalise(pixels[None])[0],
        activations=captured.activations[0],
        logits=captured.logits[0],
        targets=targets,
        gradients=None if _site(network).cut else captured.gradients(targets)[0],
        classifier=network.classifier,
        passes=network.passes(layer),
    )
