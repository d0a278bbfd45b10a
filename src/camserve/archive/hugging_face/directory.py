"""Reads networks that Hugging Face's `save_pretrained` wrote.

A directory has config.json, weights as safetensors, and preprocessor_config.json; one of images and texts also a
tokeniser. Networks and preprocessors are those of the installed package transformers: nothing is downloaded, and no
code of the directory or of the Hub is run. So what could name such code is refused (`auto_map`, attention kernels by
name, quantisers), in archives as well.

How images become input is not believed: what camserve makes of a few pictures is compared with what the preprocessor
makes of them, and a preprocessor that does something else is refused. So is how answers become detections, or
probabilities of texts.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from camserve.archive.checkpoints import some
from camserve.archive.hugging_face.kinds import DETECTOR, TOWERS, Kind, kind_of
from camserve.archive.hugging_face.preprocessing import expressed
from camserve.archive.untrusted import is_file, parse_json, read_bytes, reading, short
from camserve.errors import InvalidInput, InvalidOption, NotFound
from camserve.types import Outputs, Preprocessing
from camserve.types.model import Decoding

if TYPE_CHECKING:
    import torch

HUGGING_FACE = "hf:"
CONFIG = "config.json"
PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")
"""Names under which preprocessors are saved, the second one by newer versions for several at once."""
TOKENISER = "tokenizer_config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")

_WHAT = "a Hugging Face network"
_WANTED = f"{_WHAT} as save_pretrained writes it: {CONFIG}, {WEIGHTS[0]} and {PREPROCESSORS[0]}"
_RUNS_CODE = re.compile(r"auto_map|quantization_config|\w*_implementation\w*|use_kernels")
"""Keys of a configuration that can name code, or kernels that transformers would download and run."""
_MOST_MODULES = 10_000
"""Bound of each number of layers: the deepest networks have some hundreds."""
_MOST_PARAMETERS = 2**32
_COUNTS = re.compile(r"\w*(?:layers|depths?|blocks|stages|repeats)")


@dataclass(frozen=True)
class Found:
    """Holds what a directory has."""

    architecture: str
    """Name of the network's class in transformers."""
    files: Mapping[str, bytes]
    """Files, by name, that rebuild the network."""
    state: dict[str, torch.Tensor]
    """The state dict, by the names that the installed transformers has for them."""
    file: Path | None
    """The file of the weights; None where there are several."""
    preprocessing: Preprocessing
    labels: tuple[str, ...] | None
    """Names of its classes; None for a network that has none."""
    outputs: Outputs
    decoding: Decoding | None
    """Form of the answers that its detections are made of; None for a network of other outputs."""
    taken: tuple[str, ...]
    """Says in words in what the network is shown images otherwise than by its preprocessor."""


def read_directory(directory: Path) -> Found:
    """Returns the network that a directory has.

    Raises:
        NotFound: there is no such directory, it lacks a file, or transformers is not installed.
        InvalidOption: the network is of no kind that can be packed, or what is done before or behind it cannot be
            expressed.
        InvalidInput: the directory has code, pickled weights alone, or files that cannot be read or do not fit.
    """
    transformers = _transformers()
    _check_files(directory)
    config = read_bytes(directory / CONFIG, _WHAT)
    kind, content = _check_config(directory / CONFIG, config)
    for name in (*PREPROCESSORS, TOKENISER):
        if is_file(directory / name):
            _check_runs_nothing(directory / name, _parsed(directory / name))
    with reading(directory, _WHAT), _quiet(transformers):
        processor = transformers.AutoImageProcessor.from_pretrained(
            directory, backend="pil", local_files_only=True, trust_remote_code=False
        )
        preprocessing, said = expressed(processor, kind.whole)
        network, report = getattr(transformers, kind.auto).from_pretrained(
            directory,
            config=_configuration(transformers, content),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype="float32",
            ignore_mismatched_sizes=True,  # they are told, with their names
            output_loading_info=True,
        )
        _check_complete(directory, report)
        files = {CONFIG: config}
        if kind is TOWERS:
            files |= _text(transformers, directory, network, preprocessing)
    labels = network.config.id2label
    return Found(
        architecture=type(network).__name__,
        files=files,
        state=network.state_dict(),
        file=directory / WEIGHTS[0] if is_file(directory / WEIGHTS[0]) else None,
        preprocessing=preprocessing,
        labels=None if kind is TOWERS else tuple(str(labels[index]) for index in range(len(labels))),
        outputs=kind.outputs or _outputs(network.config),
        decoding=_decoding(processor) if kind is DETECTOR else None,
        taken=(said,) if said else (),
    )


def file_names(architecture: str) -> tuple[str, ...]:
    """Returns the names of the files that rebuild a network, by the name of its class in transformers.

    Raises:
        NotFound: transformers is not installed.
    """
    _transformers()
    from camserve.archive.hugging_face.towers import TEXT

    return (CONFIG, TEXT) if TOWERS.has(architecture) else (CONFIG,)


def build_network(files: Mapping[str, bytes]) -> torch.nn.Module:
    """Returns the network that some files describe, with random weights, on the CPU, in float32.

    Raises:
        InvalidInput: they describe none, or could have code run.
        InvalidOption: they describe one of another kind.
        NotFound: transformers is not installed.
    """
    transformers = _transformers()
    kind, content = _check_config(Path(CONFIG), files[CONFIG])
    with reading(Path(CONFIG), f"the configuration of {_WHAT}"), _quiet(transformers):
        import torch

        def make() -> torch.nn.Module:
            made = _configuration(transformers, content)
            network = getattr(transformers, kind.auto).from_config(made, trust_remote_code=False, dtype=torch.float32)
            return cast("torch.nn.Module", network)

        with torch.device("meta"):
            numbers = sum(weight.numel() for weight in make().parameters())
        if numbers > _MOST_PARAMETERS:
            raise ValueError(f"a network has at most {_MOST_PARAMETERS} parameters, got {numbers}")
        network = make()
    if kind is not TOWERS:
        return network
    from camserve.archive.hugging_face.towers import TEXT, Towers

    if TEXT not in files:
        raise InvalidInput(f"a network of images and texts has a file {TEXT}, and it is not there")
    return Towers(network, files[TEXT])


def _configuration(transformers: Any, content: Mapping[str, Any]) -> Any:
    """Returns the configuration of a network; it is made of a copy, from which transformers may take parts."""
    return transformers.CONFIG_MAPPING[content["model_type"]].from_dict(copy.deepcopy(content))


def _text(transformers: Any, directory: Path, network: Any, preprocessing: Preprocessing) -> dict[str, bytes]:
    """Returns the file by which a network of images and texts makes tokens, once it is seen to answer as it does."""
    import torch

    from camserve.archive.hugging_face.towers import TEXT, Towers, check_answers, packed_text

    text = packed_text(transformers, directory, network)
    draw = torch.Generator().manual_seed(0)
    images = torch.randn((2, preprocessing.channels, *preprocessing.crop_px), generator=draw)
    check_answers(transformers, directory, Towers(network, text), network, images)
    return {TEXT: text}


def _decoding(processor: Any) -> Decoding:
    """Returns how a preprocessor makes detections of a network's answers.

    Each of DETR's two ways is tried on random answers. Of the better ones of each, all must be the same: preprocessors
    differ in how many they keep.

    Raises:
        InvalidOption: it does it in another way.
    """
    from types import SimpleNamespace

    import torch

    from camserve.scores.decoding import LEAST, decode

    draw, (height, width) = torch.Generator().manual_seed(0), (480, 640)
    answers = {
        "logits": 2 * torch.randn((1, 12, 7), generator=draw),
        "pred_boxes": 0.1 + 0.8 * torch.rand((1, 12, 4), generator=draw),
    }
    name = type(processor).__name__.removesuffix("Pil")
    try:
        (theirs,) = processor.post_process_object_detection(
            SimpleNamespace(**answers), threshold=LEAST, target_sizes=torch.tensor([[height, width]])
        )
        rows = sorted(zip(*(theirs[key].tolist() for key in ("scores", "labels", "boxes")), strict=True), reverse=True)
        for decoding in _DETRS:
            (ours,) = decode(decoding, answers, (height, width))
            found = zip(*(ours[key].tolist() for key in ("scores", "labels", "boxes")), strict=True)
            if len(rows) >= 5 and all(map(_is_same, rows, sorted(found, reverse=True))):
                return decoding
    except Exception as error:  # whatever comes of a preprocessor that wants other answers
        raise InvalidOption(f"{name} makes detections of other answers than DETR's: {short(error)}") from None
    raise InvalidOption(f"{name} makes detections of a network's answers in another way than those of DETR's kind do")


_DETRS: tuple[Decoding, ...] = ("detr", "detr-sigmoid")


def _is_same(one: tuple[float, int, list[float]], other: tuple[float, int, list[float]]) -> bool:
    """Tells whether two detections are the same, to float32's rounding: a share, a class and pixels."""
    far = max(abs(mine - yours) for mine, yours in zip((one[0], *one[2]), (other[0], *other[2]), strict=True))
    return one[1] == other[1] and far <= 1e-3


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
            files = [name for name in names if name.endswith(".safetensors")]
            if strange := set(parts.values()) - set(files):
                some_file = short(repr(strange.pop()))
                raise ValueError(
                    f"the weights are safetensors that lie in the directory itself, and it names {some_file}"
                )


def _parsed(path: Path) -> dict[str, Any]:
    return _an_object(path, read_bytes(path, _WHAT))


def _an_object(path: Path, data: bytes) -> dict[str, Any]:
    content = parse_json(path, data, _WHAT)
    if not isinstance(content, dict):
        raise InvalidInput(f"{short(path)} must be an object, got {type(content).__name__}")
    return content


def _check_config(path: Path, data: bytes) -> tuple[Kind, dict[str, Any]]:
    """Returns the kind of network that a configuration describes, and what it says; it names no code."""
    content = _an_object(path, data)
    _check_runs_nothing(path, content)
    return kind_of(path, content), content


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


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Keeps what transformers says while it loads to itself, and keeps it from asking the Hub.

    What is wrong is raised by those who asked. A configuration may name a backbone that is looked for on the Hub.
    """
    from huggingface_hub import constants

    logging = transformers.utils.logging
    before, bars, offline = logging.get_verbosity(), logging.is_progress_bar_enabled(), constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
