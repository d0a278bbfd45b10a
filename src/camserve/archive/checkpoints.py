"""Reads weights from the files that trainers write. Nothing in such a file is run, whatever it is.

A state dict may be inside of a checkpoint (`state_dict`, `model`, ...), and its names may begin with what a trainer put
around the network: `module.` (DataParallel), `model.` (Lightning), `_orig_mod.` (torch.compile). Both are taken off,
and what was taken off is told.
"""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camserve.archive.untrusted import opened_zip, reading, short
from camserve.errors import InvalidInput
from camserve.wording import close_to

if TYPE_CHECKING:
    import torch

STATES = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "weights", "params")
"""Keys under which trainers keep the network's state dict, in the order in which they are looked for."""

AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema")
"""Keys of moving averages of the weights, which are taken where nothing else is there."""

_WRAPPERS = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_MOST_LEVELS = 4  # of a prefix, and of dicts around a state dict
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)|WeightsUnpickler error: Unsupported (?:global|class) ([\w.]+)")

_SAVED = "torch.save(module.state_dict(), 'weights.pth')"
_PROGRAMS = {
    "constants.pkl": (
        "a TorchScript program, whose code loading would run",
        "torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth')",
    ),
    "serialized_exported_program.json": (
        "a program of torch.export, which is a SOURCE of its own, export:FILE",
        "torch.save(dict(torch.export.load(FILE).state_dict), 'weights.pth')",
    ),
    "archive_format": (
        "a program of torch.export, which is a SOURCE of its own, export:FILE",
        "torch.save(dict(torch.export.load(FILE).state_dict), 'weights.pth')",
    ),
}
"""Names of members that tell a program, what it is, and how its weights are saved alone."""


@dataclass(frozen=True)
class Checkpoint:
    """Holds a state dict, and in words what was taken off to find it."""

    state: dict[str, torch.Tensor]
    taken: tuple[str, ...] = ()


def read_checkpoint(path: Path) -> Checkpoint:
    """Returns the state dict in a file of safetensors or of `torch.save`.

    Raises:
        InvalidInput: it has none, or could not be read without running code; the text says how to save one.
    """
    from safetensors.torch import load_file

    with reading(path, "a state dict that can be read safely"):
        if path.suffix == ".safetensors":
            return Checkpoint(load_file(path))
        if zipfile.is_zipfile(path):  # as torch.save writes it
            with opened_zip(path) as archive:  # it unpacks to what is in proportion
                _check_no_program(path, archive.namelist())
        content = _load(path)
    found = _unwrapped(content, ())
    if found is None:
        raise InvalidInput(
            f"{short(path)} must hold a state dict (tensors by name), or one under {', '.join(STATES[:4])}, ...; "
            f"it holds {some(content)}"
        )
    return Checkpoint(current_names(found.state), found.taken)


def _check_no_program(path: Path, members: Collection[str]) -> None:
    for member, (what, saved) in _PROGRAMS.items():
        if any(name.rpartition("/")[2] == member for name in members):
            raise InvalidInput(
                f"{short(path)} is {what}, not a state dict that can be read safely; where it was made: {saved}, "
                "and as SOURCE package.module:function that builds the network"
            )


def _load(path: Path) -> Any:
    import pickle

    import torch

    try:
        with torch.serialization.safe_globals(_bare_values()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = next((part for match in [_GLOBAL.search(str(error))] if match for part in match.groups() if part), "")
        if not name:
            raise
        raise InvalidInput(
            f"{short(path)} is not a state dict that can be read safely: it holds {name}, and code is run to make one; "
            f"where it was made: {_SAVED}"
        ) from None


def _bare_values() -> list[Any]:
    """Returns what training scripts keep beside the weights and torch does not allow: their options, a best score.

    All of them only hold values: a Namespace of argparse, and numbers of numpy, under both names of their maker.
    """
    import numpy as np

    maker = np.float64(0).__reduce__()[0]
    names = [f"{package}.multiarray.scalar" for package in ("numpy.core", "numpy._core")]
    numbers = [type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int32, np.int64, np.bool_)]
    return [argparse.Namespace, np.dtype, *numbers, *((maker, name) for name in names)]


def _unwrapped(content: Any, taken: tuple[str, ...]) -> Checkpoint | None:
    """Returns the state dict in what a file holds; None where there is none."""
    import torch

    if not isinstance(content, Mapping) or len(taken) > _MOST_LEVELS:
        return None
    if content and all(isinstance(value, torch.Tensor) for value in content.values()):
        return Checkpoint({str(key): value for key, value in content.items()}, taken)
    inside = {key: value for key, value in content.items() if isinstance(value, Mapping)}
    found = {
        key: state
        for key, value in inside.items()
        if (state := _unwrapped(value, (*taken, f"its {str(key)[:100]!r} was taken")))
    }
    named = [key for key in (*STATES, *AVERAGES) if key in found]
    if not named and len(found) == 1:
        named = list(found)
    if not named:
        return None
    chosen = found[named[0]]
    others = f"; beside it there is {', '.join(map(repr, named[1:]))}" if len(named) > 1 else ""
    return Checkpoint(chosen.state, (*chosen.taken[:-1], chosen.taken[-1] + others))


def fitted(checkpoint: Checkpoint, names: Collection[str]) -> Checkpoint:
    """Returns a checkpoint by the names of a network, without what a trainer put before them.

    Args:
        checkpoint: as it was read.
        names: names of the network's own state dict.

    Returns:
        The same where its names fit best as they are. Else what lies under the prefix with which most names fit, the
        shortest of several; what does not lie under it is left out, and told.
    """
    best, most = checkpoint, _fitting(checkpoint.state, names)
    for state, told in _variants(checkpoint.state):
        for prefix in _prefixes(state):
            count = sum(prefix + name in state for name in names)
            if count > most:
                best, most = Checkpoint(*_under(state, prefix, (*checkpoint.taken, *told))), count
    return best


def _fitting(state: Mapping[str, Any], names: Collection[str]) -> int:
    return sum(name in state for name in names)


def _variants(state: dict[str, torch.Tensor]) -> list[tuple[dict[str, torch.Tensor], tuple[str, ...]]]:
    """Returns the state dict as it is, and without the wrappers that may stand anywhere in a name."""
    wrappers = sorted({found for name in state for found in _WRAPPERS.findall(name)})
    plain = {_WRAPPERS.sub("", name): tensor for name, tensor in state.items()}
    told = f"{', '.join(map(repr, wrappers))} in its names was taken off"
    return [(state, ()), (plain, (told,))] if wrappers else [(state, ())]


def _prefixes(state: Mapping[str, Any]) -> list[str]:
    """Returns what names begin with, up to a dot, the shortest first."""
    found = {""}
    for name in state:
        parts = name.split(".")[:-1][:_MOST_LEVELS]
        found.update(".".join(parts[:level]) + "." for level in range(1, len(parts) + 1))
    return sorted(found, key=lambda prefix: (prefix.count("."), prefix))


def _under(
    state: dict[str, torch.Tensor], prefix: str, taken: tuple[str, ...]
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    inside = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    outside = {name: None for name in state if not name.startswith(prefix)}
    told = (*taken, f"the prefix {prefix!r} was taken off") if prefix else taken
    return inside, (*told, f"left out: {some(outside)}") if outside else told


def misfit(state: Mapping[str, torch.Tensor], missing: Collection[str], unexpected: Collection[str]) -> str:
    """Returns in words which names of a network a state dict lacks, each with close ones that it has, and reversely."""
    close = {name: close_to(name, unexpected, most=1, cutoff=0.7) for name in list(missing)[:5]}
    lacks = [f"{name} (close to it: {near[0]})" if near else name for name, near in close.items()]
    texts = []
    if missing:
        texts.append(f"Missing key(s): {_first(lacks, len(missing))}")
    if unexpected:
        texts.append(f"Unexpected key(s): {_first(list(unexpected)[:5], len(unexpected))}")
    return "; ".join(texts) or f"it has {some(state)}"


def _first(names: list[str], number: int) -> str:
    return ", ".join(names) + (f" and {number - len(names)} more" if number > len(names) else "")


def current_names(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the tensors by today's names: in DenseNet's published weights `norm1.weight` is still `norm.1.weight`."""
    return {_OLD_DENSENET.sub(r"\1\2", key): tensor for key, tensor in state.items()}


def some(content: object) -> str:
    """Returns the first names in a mapping, or else what it is."""
    if not isinstance(content, Mapping):
        return type(content).__name__
    keys = [str(key)[:100] for key in content]
    return (", ".join(keys[:5]) or "nothing") + (", ..." if len(keys) > 5 else "")
