"""Builds archives and loads them."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from camserve.archive.card import ModelCard, as_json, card_members, check_name, read_card
from camserve.archive.sources import (
    Weights,
    build_module,
    count_classes,
    default_name,
    find_weights,
    read_labels,
    sha256_of,
)
from camserve.archive.surveyed import survey_members
from camserve.archive.untrusted import ARCHIVE, is_file, read_member, read_text, reading, short
from camserve.errors import InvalidInput, InvalidOption, NotFound
from camserve.types import Preprocessing

if TYPE_CHECKING:
    import torch

    from camserve.saliency.layers import Survey
    from camserve.types import Outputs

_log = logging.getLogger(__name__)

HANDLER = "saliency_handler.py"
MANIFEST = "MAR-INF/MANIFEST.json"
CONFIG = "model-config.yaml"
WEIGHTS = "weights.safetensors"

# Workers, devices and batching are the server's to say (`camserve serve`), not the archive's.
MODEL_CONFIG = b"""\
# Seconds. Above the longest step; a worker that takes longer is killed and restarted.
responseTimeout: 120
startupTimeout: 300
"""

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip file can hold


def build_archive(
    source: str,
    *,
    name: str | None = None,
    version: str = "1.0",
    store: Path,
    weights: str | None = None,
    weights_sha256: str | None = None,
    labels: Path | None = None,
    outputs: Outputs | None = None,
    output: str | None = None,
    units: Sequence[str] = (),
    layer: str | None = None,
    preprocessing: Preprocessing | None = None,
    licence: str | None = None,
    evaluation: Path | None = None,
) -> Path:
    """Packs a model as `<store>/<name>.mar`, replaces an older one at once, and returns the path.

    Args:
        source: `efficientnet-lite0`, `digits` or another network of digit scenes, `torchvision:NAME`, `timm:NAME` or
            `package.module:function`.
        name: name of the served model; None: that of the source.
        version: version of the served model.
        store: directory of the archive; made when missing.
        weights: the weights, as `sources.find_weights` takes them.
        weights_sha256: SHA-256 that the file of the weights must have, in hexadecimal; None: not checked.
        labels: file of class names; None: those known of the weights, else "class 0", "class 1", ...
        outputs: kind of the network's outputs, see `camserve.scores`; None: that known of the weights, else found,
            where the numbers tell.
        output: name or index of the tensor that is explained, among those that the network returns; None: `logits`, or
            else the first that fits.
        units: unit of each number of outputs "value"; one is that of all.
        layer: default layer: a module's name, or `name:relu` for a function applied to its output; None: found
            automatically.
        preprocessing: None: that of the weights; for weights from a file that of the default weights; for a function of
            one's own that of torchvision's ResNets.
        licence: licence of the weights; None: what is known of them.
        evaluation: `report.json` of `camserve evaluate` on this model; a server's `auto` goes by it.

    Raises:
        InvalidOption: a bad name or version; an unknown source, weights, output or layer; outputs, units or labels that
            do not fit the network; a network of one output whose kind is not said.
        InvalidInput: the weights do not fit the source or their SHA-256.
        NotFound: a file or a package is missing.
        Unavailable: the download of the weights failed.
        Unsupported: the network cannot be explained; the text says what was wanted and what came.
    """
    if name is not None:
        check_name("model name", name)  # before the work of finding weights
    found = find_weights(source, weights)
    _check_sha256(found, weights_sha256)
    outputs, units = outputs or found.outputs, units or found.units
    card = ModelCard(
        name=name or default_name(source),
        version=version,
        architecture=source,
        preprocessing=preprocessing or found.preprocessing,
        labels=_labels(source, found, labels, outputs),
        layer=layer,
        source=found.origin,
        licence=found.licence if licence is None else licence,
        evaluation={} if evaluation is None else _evaluation(evaluation),
        outputs=outputs or "softmax",
        output=output,
        units=(units,) if isinstance(units, str) else tuple(units),
    )
    module = _filled_module(card, found.state)
    card, surveyed = _checked(module, card, outputs)
    path = store / f"{card.name}.mar"
    _write_zip(path, _members(card, module) | survey_members(surveyed, _hash(module, card)))
    return path


def _evaluation(report: Path) -> dict[str, float]:
    """Returns the overall score by method title, of the first protocol in a report of `camserve evaluate`."""
    what = "a report.json of camserve evaluate"
    if not is_file(report):
        raise NotFound(f"there is no report {short(report)}")
    with reading(report, what):
        found = json.loads(read_text(report, what))
        column = f"{next(iter(found['settings']['protocols']))}_overall"
        return {row["title"]: float(row[column]) for row in found["methods"] if row[column] is not None}


def load_package(path: Path) -> tuple[torch.nn.Module, ModelCard]:
    """Returns the network and the card of a `.mar` file or of an unpacked archive directory.

    The network is in eval mode, frozen, float32, on the CPU.

    Raises:
        NotFound: there is no such archive, or a package is missing.
        InvalidInput: not a camserve archive, or its weights do not fit.
    """
    card = read_card(path)
    return _filled_module(card, read_weights(path)), card


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Returns the state dict of a `.mar` file or of an unpacked archive directory.

    Raises:
        NotFound: there is no such archive.
        InvalidInput: not a camserve archive, or its weights are none.
    """
    from safetensors.torch import load

    weights = read_member(path, WEIGHTS)
    with reading(path, f"{ARCHIVE} with weights"):
        return load(weights)


def handler_source() -> bytes:
    """Returns the handler as it goes into an archive: that of the installed package, else of the source tree."""
    packaged = files("camserve.archive").joinpath(HANDLER)
    return packaged.read_bytes() if packaged.is_file() else (source_tree() / "handlers" / HANDLER).read_bytes()


def source_tree() -> Path:
    """Returns the root of the source tree, which has the files that a wheel carries inside the package."""
    return Path(__file__).resolve().parents[3]


def _check_sha256(weights: Weights, expected: str | None) -> None:
    if expected is None:
        return
    got = sha256_of(weights.file) if weights.file else "none: there is no file"
    if got != expected:
        raise InvalidInput(f"the weights ({weights.origin}) must have sha256 {expected}, got {got}")


def _labels(source: str, weights: Weights, path: Path | None, outputs: Outputs | None) -> tuple[str, ...]:
    """Returns the labels as far as they are known before the network runs; where they are not, as many as it needs."""
    if path is not None:
        return read_labels(path)
    if weights.labels and (outputs == weights.outputs or outputs not in ("binary", "embedding")):
        return weights.labels
    if outputs in ("binary", "embedding"):
        return ()
    from camserve.scores import make_score

    numbers = count_classes(source, weights.state)
    return make_score(outputs or "softmax").names(numbers) if numbers else ()


def _filled_module(card: ModelCard, state: Mapping[str, torch.Tensor] | None) -> torch.nn.Module:
    module = build_module(card.architecture, card.head)
    if state is not None:
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:400]  # it lists every key, which can be hundreds
            raise InvalidInput(f"the weights do not fit {card.architecture}, {card.head} outputs: {reason}") from None
    return module.eval().requires_grad_(False)


def _checked(module: torch.nn.Module, card: ModelCard, outputs: Outputs | None) -> tuple[ModelCard, Survey]:
    """Returns the card with what the network says of its outputs, and what is found out about its layers.

    The network has been seen to fit the card, and to explain a picture.
    """
    from camserve.worker.dry_run import dry_run
    from camserve.worker.network import Network

    network = Network(
        module,
        preprocessing=card.preprocessing,
        labels=card.labels,
        outputs=outputs,
        output=card.output,
        units=card.units,
    )
    if card.layer is not None:
        _check_layer(network.survey, card)
    dry_run(network)
    found = network.info
    if outputs is None and found.outputs != "softmax":
        _log.warning("%s: the outputs sum to 1: they are packed as probabilities (--outputs probabilities)", card.name)
    if card.output is None and network.other_outputs:
        others = ", ".join(map(repr, network.other_outputs))
        _log.warning("%s: output %r is explained; --output may name another: %s", card.name, network.output, others)
    said = replace(card, labels=found.labels, outputs=found.outputs, output=network.output or None, units=found.units)
    return said, network.survey


def _check_layer(found: Survey, card: ModelCard) -> None:
    names = [each.layer.name for each in found.layers]
    if reason := found.refused.get(card.layer or ""):
        raise InvalidOption(f"layer {short(repr(card.layer))} is not offered: {reason}")
    if card.layer not in names:
        raise InvalidOption(f"{card.architecture} has no spatial layer {card.layer!r}; it has {', '.join(names)}")


def _members(card: ModelCard, module: torch.nn.Module) -> dict[str, bytes]:
    from safetensors.torch import save

    state = {key: value.contiguous() for key, value in module.state_dict().items()}
    return {
        MANIFEST: as_json(_manifest(card)),
        HANDLER: handler_source(),
        CONFIG: MODEL_CONFIG,
        **card_members(card),
        WEIGHTS: save(state),
    }


def _hash(module: torch.nn.Module, card: ModelCard) -> str:
    from camserve.worker.network import weights_hash

    return weights_hash(module, card.preprocessing, card.outputs, card.output)


def _manifest(card: ModelCard) -> dict[str, object]:
    return {
        "archiverVersion": "0.12.0",
        "runtime": "python",
        "model": {
            "modelName": card.name,
            "modelVersion": card.version,
            "handler": HANDLER,
            "configFile": CONFIG,
        },
    }


def _write_zip(path: Path, members: Mapping[str, bytes]) -> None:
    """Writes a zip file beside its goal and renames it.

    Nothing is compressed, because deflated bytes differ between versions of zlib.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=".mar")
    try:
        with os.fdopen(handle, "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for member, content in members.items():
                archive.writestr(_entry(member), content)
        os.chmod(partial, 0o644)  # mkstemp makes files that only their owner reads
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def _entry(member: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(member, _EPOCH)
    entry.create_system = 3  # Unix, whatever builds it
    entry.external_attr = 0o644 << 16
    return entry
