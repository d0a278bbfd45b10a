"""Builds archives and loads them."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from camserve.archive.calibration import calibration_images, calibration_members
from camserve.archive.card import ModelCard, as_json, card_members, check_name, read_card
from camserve.archive.checkpoints import misfit
from camserve.archive.class_names import read_labels
from camserve.archive.prompts import PromptsLike, given_prompts
from camserve.archive.references import Given, given_references, reference_members
from camserve.archive.sources import (
    Weights,
    build_module,
    count_classes,
    default_name,
    file_names,
    find_weights,
    fit_names,
    sha256_of,
)
from camserve.archive.surveyed import survey_members
from camserve.archive.untrusted import ARCHIVE, is_file, read_member, read_text, reading, short
from camserve.errors import InvalidInput, InvalidOption, NotFound, Unsupported
from camserve.types import Preprocessing
from camserve.types.model import OF_VECTORS

if TYPE_CHECKING:
    import torch

    from camserve.saliency.layers import Survey
    from camserve.types import Outputs
    from camserve.types.model import Decoding
    from camserve.types.references import References
    from camserve.worker.network import Network

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
    detections: Decoding | None = None,
    layer: str | None = None,
    preprocessing: Preprocessing | None = None,
    licence: str | None = None,
    evaluation: Path | None = None,
    calibration: Path | None = None,
    references: Path | None = None,
    prompts: PromptsLike | None = None,
) -> Path:
    """Packs a model as `<store>/<name>.mar`, replaces an older one at once, and returns the path.

    Args:
        source: `efficientnet-lite0`, `digits` or another network of digit scenes, `torchvision:NAME`, `timm:NAME`,
            `hf:DIRECTORY`, `onnx:FILE`, `export:FILE` or `package.module:function`.
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
        detections: what those of outputs "boxes" are made of, see `camserve.scores.decoding`; None: what is known of
            the weights, else the network gives them as they are.
        layer: default layer: a module's name, or `name:relu` for a function applied to its output; None: found
            automatically. The one layer of an ONNX graph: a tensor's name; None: it has none.
        preprocessing: None: that of the weights; for weights from a file that of the default weights; for a function of
            one's own and for a graph of RGB images that of torchvision's ResNets; a graph of outputs "boxes" or
            "segmentation" sees all of an image, stretched.
        licence: licence of the weights; None: what is known of them.
        evaluation: `report.json` of `camserve evaluate` on this model; a server's `auto` goes by it.
        calibration: folder of images, 16 at most, on which a worker finds out whether bfloat16 leaves maps as they are.
        references: pictures or vectors that outputs "embedding" are compared to, as `references.given_references` takes
            them; the network makes vectors of pictures here. `labels` are then the names of the rows of an `.npy` file.
        prompts: texts that outputs "text-image" are compared to, as `prompts.given_prompts` takes them; the network's
            text encoder makes vectors of them here. None: those known of the weights, if there are some.

    Raises:
        InvalidOption: a bad name or version; an unknown source, weights, output or layer; outputs, units, labels or
            references that do not fit the network; a network of one output whose kind is not said.
        InvalidInput: the weights do not fit the source or their SHA-256; references cannot be read, or have no
            direction.
        NotFound: a file or a package is missing.
        Unavailable: the download of the weights failed.
        Unsupported: the network cannot be explained; the text says what was wanted and what came.
    """
    if name is not None:
        check_name("model name", name)  # before the work of finding weights
    if outputs is not None:  # before the work of finding weights
        _check_compared(references, prompts, labels, outputs)
    found = find_weights(source, weights, "boxes" if detections is not None and outputs is None else outputs)
    _check_sha256(found, weights_sha256)
    found = fit_names(source, found)
    outputs, units = outputs or found.outputs, units or found.units
    detections = detections or (found.detections if outputs == "boxes" else None)
    if detections is not None and outputs is None:
        outputs = "boxes"
    if detections is not None and outputs != "boxes":
        raise InvalidOption(f"detections are made for outputs boxes, got {outputs}")
    _check_compared(references, prompts, labels, outputs)
    named = _labels(source, found, labels, outputs)
    preprocessing = preprocessing or found.preprocessing
    if preprocessing is None:
        raise InvalidOption(
            f"nothing tells how {short(source)} is shown images: say --resize, --crop, --mean and --std"
        )
    given: Given | None = None
    if references is not None:
        given = given_references(references, named)
    elif prompts is not None or (outputs == "text-image" and found.prompts):
        given = given_prompts(found.prompts if prompts is None else prompts)
    card = ModelCard(
        name=name or default_name(source),
        version=version,
        architecture=found.architecture or source,
        preprocessing=preprocessing,
        labels=named if given is None else tuple(given),
        layer=layer,
        source="; ".join((found.origin, *found.taken)),
        licence=found.licence if licence is None else licence,
        evaluation={} if evaluation is None else _evaluation(evaluation),
        outputs=outputs or "softmax",
        output=output,
        units=(units,) if isinstance(units, str) else tuple(units),
        detections=detections,
    )
    try:
        module = _filled_module(card, found.state, found.files)
    except InvalidInput as error:
        if labels is None:
            raise
        raise type(error)(f"{error}; the labels file has {len(card.labels)} names") from None
    network, card = _checked(module, card, outputs, given)
    path = store / f"{card.name}.mar"
    members = _members(card, module) | dict(found.files) | reference_members(network.references)
    members |= survey_members(network.survey, _hash(module, card, network.references, found.files))
    if calibration is not None:
        members |= calibration_members(calibration_images(calibration, card.preprocessing))
    _write_zip(path, members, lambda written: _check_same(written, network, card, given))
    if found.taken:
        _log.warning("%s: %s", short(found.file), "; ".join(found.taken))
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

    The network is in eval mode, frozen, of the precision in which its source builds it, on the CPU.

    Raises:
        NotFound: there is no such archive, or a package is missing.
        InvalidInput: not a camserve archive, or its weights do not fit.
    """
    card = read_card(path)
    return _filled_module(card, read_weights(path), read_files(path, card)), card


def read_files(path: Path, card: ModelCard) -> dict[str, bytes]:
    """Returns the files, by name, that the network of a `.mar` file or of an unpacked archive directory is built of.

    Raises:
        NotFound: there is no such archive.
        InvalidInput: not a camserve archive, or it lacks one.
    """
    return {name: read_member(path, name) for name in file_names(card.architecture)}


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


def _check_compared(
    references: Path | None, prompts: PromptsLike | None, labels: Path | None, outputs: Outputs | None
) -> None:
    """Raises InvalidOption where what vectors are compared to does not go with the outputs, or is given twice."""
    told = outputs or "none: say --outputs"
    if references is not None and outputs not in OF_VECTORS:
        raise InvalidOption(f"references are for outputs {' and '.join(OF_VECTORS)}, got {told}")
    if prompts is not None and outputs != "text-image":
        raise InvalidOption(f"prompts are for outputs text-image, got {told}")
    if prompts is not None and (references is not None or labels is not None):
        raise InvalidOption("prompts have names of their own: give them without references and labels")


def _labels(source: str, weights: Weights, path: Path | None, outputs: Outputs | None) -> tuple[str, ...]:
    """Returns the labels as far as they are known before the network runs; where they are not, as many as it needs."""
    if path is not None:
        return read_labels(path)
    if weights.labels and (outputs == weights.outputs or outputs not in ("binary", *OF_VECTORS)):
        return weights.labels
    if outputs in ("binary", *OF_VECTORS):
        return ()
    from camserve.scores import make_score

    numbers = count_classes(source, weights.state)
    return make_score(outputs or "softmax", shape=(numbers, 1, 1)).names(numbers) if numbers else ()


def _filled_module(
    card: ModelCard, state: Mapping[str, torch.Tensor] | None, files: Mapping[str, bytes]
) -> torch.nn.Module:
    module = build_module(card.architecture, card.head, files, card.layer)
    if state is not None:
        try:
            _fill(module, state)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:400]
            raise InvalidInput(f"the weights do not fit {card.architecture}, {card.head} outputs: {reason}") from None
    return module.eval().requires_grad_(False)


def _fill(module: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Loads a state dict in which tensors in common may be saved once; raises RuntimeError where it does not fit."""
    import torch

    own = module.state_dict()
    for names in tied_names(own):
        there = [name for name in names if name in state]
        for name in there[1:]:
            if not torch.equal(state[there[0]], state[name]):
                raise RuntimeError(f"the network has {there[0]} and {name} in common, and they differ")
    found = module.load_state_dict(state, strict=False)
    loaded = [own[name] for name in state if name in own]
    missing = [name for name in found.missing_keys if not any(_lies_in(own[name], value) for value in loaded)]
    if missing or found.unexpected_keys:
        raise RuntimeError(misfit(state, missing, found.unexpected_keys))


def _lies_in(part: torch.Tensor, whole: torch.Tensor) -> bool:
    """Tells whether all memory of a tensor belongs to another one, too, so that both were loaded at once."""
    start, end = _extent(part)
    return whole.is_contiguous() and _extent(whole)[0] <= start and end <= _extent(whole)[1]


def _extent(value: torch.Tensor) -> tuple[int, int]:
    """Returns the addresses of a tensor's first element and of the one behind its last."""
    last = sum((size - 1) * step for size, step in zip(value.shape, value.stride(), strict=True))
    return value.data_ptr(), value.data_ptr() + (last + 1) * value.element_size()


def tied_names(state: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Returns for each tensor of a state dict all of its names: several for tensors that the network has in common."""
    found: dict[object, list[str]] = {}
    for name, value in state.items():
        where = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else name
        found.setdefault(where, []).append(name)
    return list(found.values())


def _checked(
    module: torch.nn.Module, card: ModelCard, outputs: Outputs | None, given: Given | None
) -> tuple[Network, ModelCard]:
    """Returns the network, and the card with what the network says of its outputs.

    The network has been seen to fit the card, and to explain a picture.
    """
    from camserve.types.offered import offered
    from camserve.worker.dry_run import dry_run
    from camserve.worker.network import Network
    from camserve.worker.references import made_references

    network = Network(
        module,
        preprocessing=card.preprocessing,
        labels=card.labels if given is None else (),
        outputs=outputs,
        output=card.output,
        units=card.units,
        detections=card.detections,
    )
    if card.layer is not None:
        _check_layer(network.survey, card)
    if given is not None:
        network = network.with_references(made_references(network, given))
    dry_run(network)
    found = network.info
    for reason in dict.fromkeys(found.lacks.values()):
        _log.warning("%s: %s; the methods that work: %s", card.name, reason, ", ".join(offered(found)))
    if outputs is None and found.outputs != "softmax":
        _log.warning("%s: the outputs sum to 1: they are packed as probabilities (--outputs probabilities)", card.name)
    if card.output is None and network.other_outputs:
        others = ", ".join(map(repr, network.other_outputs))
        _log.warning("%s: output %r is explained; --output may name another: %s", card.name, network.output, others)
    output = network.output or None
    return network, replace(card, labels=found.labels, outputs=found.outputs, output=output, units=found.units)


def _check_layer(found: Survey, card: ModelCard) -> None:
    if reason := found.lacks.get("layer"):
        raise InvalidOption(f"there is no layer {short(repr(card.layer))}: {reason}")
    names = [each.layer.name for each in found.layers]
    if reason := found.refused.get(card.layer or ""):
        raise InvalidOption(f"layer {short(repr(card.layer))} is not offered: {reason}")
    if card.layer not in names:
        raise InvalidOption(f"{card.architecture} has no spatial layer {card.layer!r}; it has {', '.join(names)}")


def _members(card: ModelCard, module: torch.nn.Module) -> dict[str, bytes]:
    from safetensors.torch import save

    return {
        MANIFEST: as_json(_manifest(card)),
        HANDLER: handler_source(),
        CONFIG: MODEL_CONFIG,
        **card_members(card),
        WEIGHTS: save(_saved_once(module.state_dict())),
    }


def _hash(module: torch.nn.Module, card: ModelCard, references: References | None, files: Mapping[str, bytes]) -> str:
    from camserve.worker.network import weights_hash

    return weights_hash(module, card.preprocessing, card.outputs, card.output, references, files, card.detections)


def _saved_once(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns a state dict with each tensor under its first name alone, as memory that no two of them share."""
    kept = {names[0]: state[names[0]].contiguous() for names in tied_names(state)}
    return {
        name: value if value.untyped_storage().nbytes() == value.nbytes else value.clone()
        for name, value in kept.items()
    }


def _check_same(path: Path, network: Network, card: ModelCard, given: Given | None) -> None:
    """Raises Unsupported where an archive that was written gives another network than the one that was packed."""
    import torch

    from camserve.worker.network import load_network

    if read_card(path) != card:
        raise Unsupported(f"the card of {card.name} is another one when it is read again")
    loaded = load_network(path, device="cpu", runtime="eager")
    if network.references is not None and not _has_same_vectors(network.references, loaded.references):
        raise Unsupported(f"the references of {card.name} are other ones when they are read again")
    _check_same_texts(network, loaded, card, given)
    ours, theirs = network.module.state_dict(), loaded.module.state_dict()
    differing = sorted(ours.keys() ^ theirs.keys()) or [
        name for name, value in ours.items() if not _is_same(value, theirs[name])
    ]
    if differing:
        raise Unsupported(f"{card.architecture} loads other numbers than were packed: {', '.join(differing[:5])}")
    size = (1, *card.preprocessing.crop_px, card.preprocessing.channels)
    probe = network.normalise(torch.rand(size, generator=torch.Generator().manual_seed(1)))
    with torch.no_grad(), network.evaluating(), loaded.evaluating():
        first, again = (one.scores(probe, "exact").float() for one in (network, loaded))
    # Two modules' memory may lie differently, so that a processor adds in another order.
    if not torch.allclose(first, again, rtol=1e-3, atol=1e-3 * float(first.abs().max())):
        raise Unsupported(
            f"{card.architecture} answers a picture otherwise when it is loaded again, with the same weights: "
            "it holds numbers that are neither parameters nor buffers, or draws new ones"
        )


def _check_same_texts(network: Network, loaded: Network, card: ModelCard, given: Given | None) -> None:
    """Raises Unsupported where the text encoder of a loaded network makes another vector of the first prompt."""
    from camserve.worker.references import made_references

    first = {name: content for name, content in list((given or {}).items())[:1] if isinstance(content[0], str)}
    if first:
        one, other = (made_references(each, first).vectors[0] for each in (network, loaded))
        if float(one @ other) < 1 - 1e-4:  # both of length 1; rounding of float32 is far less
            raise Unsupported(
                f"the text encoder of {card.architecture} makes another vector of a text when it is loaded again: it "
                "holds numbers that are neither parameters nor buffers, or numbers tokens otherwise in each process"
            )


def _has_same_vectors(packed: References, loaded: References | None) -> bool:
    return loaded is not None and packed.vectors.tobytes() == loaded.vectors.tobytes()


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and bool(one.eq(other).logical_or(one.ne(one) & other.ne(other)).all())


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


def _write_zip(path: Path, members: Mapping[str, bytes], check: Callable[[Path], None]) -> None:
    """Writes a zip file beside its goal, and renames it once `check`, which raises if not, has found it good.

    Nothing is compressed, because deflated bytes differ between versions of zlib.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=".mar")
    try:
        with os.fdopen(handle, "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for member, content in members.items():
                archive.writestr(_entry(member), content)
        check(Path(partial))
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
