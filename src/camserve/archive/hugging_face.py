"""Reads image classifiers that Hugging Face's `save_pretrained` wrote; no other file knows the ways of transformers.

A directory has config.json, weights as safetensors, and preprocessor_config.json. Networks and preprocessors are those
of the installed package transformers: nothing is downloaded, and no code of the directory or of the Hub is run. So what
could name such code is refused (`auto_map`, attention kernels by name, quantisers), in archives as well.

How images become input is not believed: what camserve makes of a few pictures is compared with what the preprocessor
makes of them, and a preprocessor that does something else is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from camserve.archive.card import MAX_INPUT_PX
from camserve.archive.checkpoints import some
from camserve.archive.untrusted import is_file, parse_json, read_bytes, reading, short
from camserve.errors import InvalidInput, InvalidOption, NotFound
from camserve.images import seen
from camserve.types import Outputs, Preprocessing

if TYPE_CHECKING:
    import torch

HUGGING_FACE = "hf:"
CONFIG = "config.json"
PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")
"""Names under which preprocessors are saved, the second one by newer versions for several at once."""
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")

_WHAT = "a Hugging Face image classifier"
_WANTED = f"{_WHAT} as save_pretrained writes it: {CONFIG}, {WEIGHTS[0]} and {PREPROCESSORS[0]}"
_RESAMPLING = {0: "nearest", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers of the ways to resize that a card can have."""
_RUNS_CODE = re.compile(r"auto_map|quantization_config|\w*_implementation\w*|use_kernels")
"""Keys of a configuration that can name code, or kernels that transformers would download and run."""
_MOST_MODULES = 10_000
"""Bound of each number of layers: the deepest networks have some hundreds."""
_MOST_PARAMETERS = 2**32
_COUNTS = re.compile(r"\w*(?:layers|depths?|blocks|stages|repeats)")
_SAME = 1e-5
"""Share of the largest number of the input by which two ways of making it may differ: ten times float32's rounding."""


@dataclass(frozen=True)
class Found:
    """Holds what a directory has."""

    architecture: str
    """Name of the network's class in transformers."""
    config: bytes
    """Content of config.json."""
    state: dict[str, torch.Tensor]
    """The state dict, by the names that the installed transformers has for them."""
    file: Path | None
    """The file of the weights; None where there are several."""
    preprocessing: Preprocessing
    labels: tuple[str, ...]
    outputs: Outputs


def read_directory(directory: Path) -> Found:
    """Returns the image classifier that a directory has.

    Raises:
        NotFound: there is no such directory, it lacks a file, or transformers is not installed.
        InvalidOption: the network is no image classifier, or its preprocessing cannot be expressed.
        InvalidInput: the directory has code, pickled weights alone, or files that cannot be read or do not fit.
    """
    transformers = _transformers()
    _check_files(directory)
    config = read_bytes(directory / CONFIG, _WHAT)
    _check_config(directory / CONFIG, config)
    for name in PREPROCESSORS:
        if is_file(directory / name):
            _check_runs_nothing(directory / name, _parsed(directory / name))
    with reading(directory, _WHAT), _quiet(transformers):
        processor = transformers.AutoImageProcessor.from_pretrained(
            directory, backend="pil", local_files_only=True, trust_remote_code=False
        )
        preprocessing = _preprocessing(processor)
        network, report = transformers.AutoModelForImageClassification.from_pretrained(
            directory,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype="float32",
            ignore_mismatched_sizes=True,  # they are told, with their names
            output_loading_info=True,
        )
    _check_complete(directory, report)
    labels = network.config.id2label
    return Found(
        architecture=type(network).__name__,
        config=config,
        state=network.state_dict(),
        file=directory / WEIGHTS[0] if is_file(directory / WEIGHTS[0]) else None,
        preprocessing=preprocessing,
        labels=tuple(str(labels[index]) for index in range(len(labels))),
        outputs=_outputs(network.config),
    )


def build_network(config: bytes) -> torch.nn.Module:
    """Returns the network that a config.json describes, with random weights, on the CPU, in float32.

    Raises:
        InvalidInput: it describes none, or could have code run.
        InvalidOption: it describes other than an image classifier.
        NotFound: transformers is not installed.
    """
    transformers = _transformers()
    content = _check_config(Path(CONFIG), config)
    with reading(Path(CONFIG), f"the configuration of {_WHAT}"), _quiet(transformers):
        import torch

        def make() -> torch.nn.Module:
            made = transformers.CONFIG_MAPPING[content["model_type"]].from_dict(content)
            network = transformers.AutoModelForImageClassification.from_config(
                made, trust_remote_code=False, dtype=torch.float32
            )
            return cast("torch.nn.Module", network)

        with torch.device("meta"):
            numbers = sum(weight.numel() for weight in make().parameters())
        if numbers > _MOST_PARAMETERS:
            raise ValueError(f"a network has at most {_MOST_PARAMETERS} parameters, got {numbers}")
        return make()


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise NotFound(
            f"{HUGGING_FACE}DIRECTORY needs more packages ({error}): pip install 'camserve[transformers]'"
        ) from None
    return transformers


def _check_files(directory: Path) -> None:
    if not directory.is_dir():
        raise NotFound(
            f"there is no directory {short(directory)}: {_WANTED}; nothing is downloaded from the Hub, "
            "`hf download NAME --local-dir DIRECTORY` does it"
        )
    names = sorted(path.name for path in directory.iterdir())
    code = [name for name in names if name.endswith(".py")]
    if code:
        raise InvalidInput(f"{short(directory)} has code of its own ({some(dict.fromkeys(code))}), and no code is run")
    if "adapter_config.json" in names:
        raise InvalidInput(f"{short(directory)} has an adapter alone: save the merged network with save_pretrained")
    if not set(WEIGHTS) & set(names):
        pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))]
        if pickled:
            raise InvalidInput(
                f"{short(directory)} has pickled weights alone ({some(dict.fromkeys(pickled))}), which may hold code; "
                "where they can be trusted: from_pretrained(...).save_pretrained(DIRECTORY) writes safetensors"
            )
        raise NotFound(f"{short(directory)} has no {WEIGHTS[0]}; it must be {_WANTED}")
    if CONFIG not in names:
        raise NotFound(f"{short(directory)} has no {CONFIG}; it must be {_WANTED}")
    if not set(PREPROCESSORS) & set(names):
        raise NotFound(f"{short(directory)} has no {PREPROCESSORS[0]}; it must be {_WANTED}")
    if WEIGHTS[1] in names:
        parts = _parsed(directory / WEIGHTS[1]).get("weight_map", {})
        with reading(directory / WEIGHTS[1], "an index of weights"):
            strange = [name for name in set(parts.values()) if Path(name).name != name or name not in names]
            if strange:
                raise ValueError(f"the weights lie in the directory itself, and it names {short(repr(strange[0]))}")


def _parsed(path: Path) -> dict[str, Any]:
    return _an_object(path, read_bytes(path, _WHAT))


def _an_object(path: Path, data: bytes) -> dict[str, Any]:
    content = parse_json(path, data, _WHAT)
    if not isinstance(content, dict):
        raise InvalidInput(f"{short(path)} must be an object, got {type(content).__name__}")
    return content


def _check_config(path: Path, data: bytes) -> dict[str, Any]:
    """Returns a configuration that describes an image classifier of transformers, and names no code."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as KNOWN

    content = _an_object(path, data)
    _check_runs_nothing(path, content)
    kind, classes = content.get("model_type"), content.get("architectures")
    if kind == "timm_wrapper":
        raise InvalidOption(f"{short(path)} is a network of timm: pack it as timm:NAME, with this file's weights")
    known = KNOWN.get(kind, ()) if isinstance(kind, str) else ()
    name = classes[0] if isinstance(classes, list) and classes else None
    if name not in ((known,) if isinstance(known, str) else known):
        raise InvalidOption(
            f"{short(path)} must describe a network for image classification, as ViTForImageClassification, "
            f"got {short(repr(name or kind))}"
        )
    return content


def _check_runs_nothing(path: Path, content: Any) -> None:
    """Raises InvalidInput where a configuration, or one inside of it, names code, or has far too many layers."""
    if isinstance(content, list):
        for value in content:
            _check_runs_nothing(path, value)
    if not isinstance(content, dict):
        return
    for key, value in content.items():
        if _RUNS_CODE.fullmatch(key) and value is not None:
            raise InvalidInput(
                f"{short(path)} says {key}, by which code outside of the package transformers is run, and none is: "
                "save the network without it"
            )
        counts = value if isinstance(value, list) else [value]
        if _COUNTS.fullmatch(key) and any(isinstance(n, int | float) and n > _MOST_MODULES for n in counts):
            raise InvalidInput(f"{short(path)} says {key} {short(value)}, at most {_MOST_MODULES} are allowed")
        _check_runs_nothing(path, value)


def _check_complete(directory: Path, report: Any) -> None:
    """Raises InvalidInput where a network was loaded without some of its weights: transformers makes random ones."""
    missing = sorted(map(str, report["missing_keys"]))
    differing = sorted(str(key[0] if isinstance(key, tuple) else key) for key in report["mismatched_keys"])
    if missing or differing:
        raise InvalidInput(
            f"the weights in {short(directory)} do not fit its {CONFIG}: "
            + "; ".join(
                f"{what} {some(dict.fromkeys(names))}"
                for what, names in (("missing:", missing), ("of another shape:", differing))
                if names
            )
        )


def _outputs(config: Any) -> Outputs:
    """Returns what the network's numbers are, as transformers' own pipeline takes them."""
    if config.problem_type == "regression":
        return "value"
    if config.problem_type == "multi_label_classification" or config.num_labels == 1:
        return "sigmoid"
    return "softmax"


def _preprocessing(processor: Any) -> Preprocessing:
    """Returns the preprocessing that makes of pictures what a preprocessor does.

    Raises:
        InvalidOption: there is none.
    """
    name = type(processor).__name__.removesuffix("Pil")
    found = list(_candidates(processor))
    for preprocessing in found:
        if all(_makes_same(processor, preprocessing, picture) for picture in _pictures(preprocessing.crop_px)):
            return preprocessing
    settings = {key: value for key, value in processor.to_dict().items() if key in _SETTINGS}
    raise InvalidOption(
        f"the preprocessing of {name} cannot be expressed: images are resized to a shorter side or to a height and "
        "width, cropped to their centre, scaled and normalised; it says "
        + short(json.dumps(settings, default=str, sort_keys=True))
    )


_SETTINGS = ("do_resize", "size", "resample", "do_center_crop", "crop_size", "crop_pct", "do_pad")


def _candidates(processor: Any) -> Iterator[Preprocessing]:
    """Yields what a preprocessor may do, as far as its settings tell; whether it does is for others to see."""
    interpolation = _RESAMPLING.get(int(getattr(processor, "resample", None) or 0))
    size, crop_size = getattr(processor, "size", None), getattr(processor, "crop_size", None)
    if interpolation is None or not processor.do_resize:
        return
    crop = _sides(crop_size) if getattr(processor, "do_center_crop", None) else None
    shortest = getattr(size, "shortest_edge", None)
    resized: list[tuple[Any, tuple[Any, Any] | None]] = []
    if shortest is None:
        resized += [(_sides(size), crop or _sides(size))]
    else:
        fraction = getattr(processor, "crop_pct", None) or 1.0
        resized += [(shortest, crop), (int(256 / 224 * shortest), crop)]  # the second one is LeViT's
        resized += [(int(shortest / fraction), (shortest, shortest)), ((shortest, shortest), (shortest, shortest))]
    factor = 255 * processor.rescale_factor if processor.do_rescale else 255.0
    offset = 1.0 if getattr(processor, "rescale_offset", False) else 0.0
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
    for resize, cropped in resized:
        if resize is None or cropped is None or not _is_small(resize, cropped):
            continue
        try:
            yield Preprocessing(
                resize_px=resize,
                crop_px=cropped,
                mean=tuple((value + offset) / factor for value in _by_channel(mean)),
                std=tuple(value / factor for value in _by_channel(std)),
                interpolation=cast("Any", interpolation),
                crop_start="down",
            )
        except InvalidOption:
            continue


def _sides(size: Any) -> tuple[int, int] | None:
    height, width = getattr(size, "height", None), getattr(size, "width", None)
    return None if height is None or width is None else (height, width)


def _by_channel(values: Any) -> tuple[float, ...]:
    return (float(values),) * 3 if isinstance(values, int | float) else tuple(map(float, values))


def _is_small(resize: Any, crop: tuple[int, int]) -> bool:
    sides = (*(resize if isinstance(resize, tuple) else (resize,)), *crop)
    return all(isinstance(side, int) and 1 <= side <= MAX_INPUT_PX for side in sides)


def _pictures(crop: tuple[int, int]) -> Iterator[np.ndarray]:
    """Yields pictures wide and high, of sizes that leave each number of odd pixels to a crop."""
    height, width = crop
    draw = np.random.default_rng(0)
    for more in range(4):
        size = (height + 2, 2 * width + 3 + more) if more % 2 else (2 * height + 3 + more, width + 2)
        yield draw.integers(0, 256, (*size, 3), dtype=np.uint8)


def _makes_same(processor: Any, preprocessing: Preprocessing, picture: np.ndarray) -> bool:
    from PIL import Image

    theirs = np.asarray(processor(Image.fromarray(picture), return_tensors="np")["pixel_values"])[0]
    pixels, _ = seen(Image.fromarray(picture), preprocessing)
    ours = ((pixels / 255 - preprocessing.mean) / preprocessing.std).transpose(2, 0, 1)
    return theirs.shape == ours.shape and bool(np.abs(theirs - ours).max() <= _SAME * np.abs(ours).max())


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Keeps what transformers says while it loads to itself: what is wrong is raised by those who asked."""
    logging = transformers.utils.logging
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
