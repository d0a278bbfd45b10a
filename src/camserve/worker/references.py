"""Makes the references that are packed with a network, each a vector of length 1: of pictures, prompts or vectors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from camserve import images
from camserve.archive.references import Given, load_array
from camserve.archive.untrusted import reading
from camserve.errors import CamserveError, InvalidImage, InvalidInput, InvalidOption, Unsupported
from camserve.runtimes.modes import exact_float32
from camserve.scores import text_vectors
from camserve.types.references import References, check_takes_references
from camserve.wording import shown
from camserve.worker.network import Network


def made_references(network: Network, given: Given) -> References:
    """Returns the references of what was given, each the mean of its normalised vectors, normalised.

    Args:
        network: the network, of vectors; pictures become its input as those of a request do.
        given: pictures, prompts or vectors by name. For a network of other than 1 or 3 channels a picture is an `.npy`
            file. Prompts are for outputs "text-image" alone.

    Raises:
        InvalidImage: a picture cannot be read, or is none.
        InvalidInput: the vector of a picture has no direction, or that of several; vectors of another length.
        InvalidOption: the outputs are no vectors; a prompt that the text encoder does not take; as `References`.
        Unsupported: the text encoder fails, or gives no vector for a prompt.
    """
    check_takes_references(network.score.kind)
    vectors = [_direction(name, _vectors(network, name, content)) for name, content in given.items()]
    return References(tuple(given), np.array(vectors, np.float32))


def embedded(network: Network, path: Path) -> np.ndarray:
    """Returns the network's vector (D,) of a picture, float64; raises as `made_references`."""
    try:
        pixels, _ = images.seen(_content(path), network.preprocessing)
    except InvalidImage as error:
        raise InvalidImage(f"reference {path}: {error}") from None
    batch = network.normalise(torch.from_numpy(pixels)[None])
    with torch.no_grad(), exact_float32(), network.evaluating(), torch.autocast(batch.device.type, enabled=False):
        outputs = network.scores(batch, "exact")[0]
    return np.asarray(outputs.detach().cpu(), np.float64)


def _content(path: Path) -> images.ImageContent:
    if path.suffix != ".npy":
        return images.read_image(path)
    with reading(path, "the array of a picture"), path.open("rb") as file:
        return np.asarray(load_array(file, path.stat().st_size), np.float32)


def _vectors(network: Network, name: str, content: object) -> np.ndarray:
    if isinstance(content, np.ndarray):
        if content.shape[1] != network.info.dimension:
            raise InvalidInput(
                f"the network's vectors have {network.info.dimension} numbers, "
                f"those of reference {shown(name)} {content.shape[1]}"
            )
        return content
    assert isinstance(content, (list, tuple)), "a reference has vectors, pictures or prompts"
    if isinstance(content[0], str):
        return _of_prompts(network, name, content)
    return np.array([embedded(network, path) for path in content])


def _of_prompts(network: Network, name: str, prompts: Sequence[str]) -> np.ndarray:
    if network.text_encoder is None or network.score.kind != "text-image":
        raise InvalidOption(f"prompts are for outputs text-image, and these are {network.score.kind}")
    try:
        with exact_float32(), network.evaluating(), torch.autocast(network.device.type, enabled=False):
            vectors = text_vectors(network.text_encoder, prompts)
    except CamserveError:
        raise
    except Exception as error:  # the model owner's code; whoever packs it must see what it says
        reason = " ".join(str(error).split())[:400]
        raise Unsupported(
            f"the text encoder raises {type(error).__name__} for the prompts of {shown(name)}: {reason}"
        ) from error
    if vectors.shape[1] != network.info.dimension:
        raise InvalidOption(
            f"the network's vectors have {network.info.dimension} numbers, its text encoder's {vectors.shape[1]}"
        )
    return vectors


def _direction(name: str, vectors: np.ndarray) -> np.ndarray:
    largest = np.abs(vectors).max(axis=1, keepdims=True)
    if not largest.all():
        raise InvalidInput(f"the vector of reference {shown(name)} is all zeros: nothing is similar to it")
    with np.errstate(invalid="ignore"):  # what is not finite stays so, and `References` refuses it
        scaled = vectors / largest  # so that no square is beyond float64
        mean = (scaled / np.linalg.norm(scaled, axis=1, keepdims=True)).mean(axis=0)
    length = np.linalg.norm(mean)
    if length < _CANCELLED:
        raise InvalidInput(f"the vectors of reference {shown(name)} cancel each other: their mean has no direction")
    return np.asarray(mean / length)


_CANCELLED = 1e-6
"""Length of a mean of vectors of length 1 below which rounding of float32 would be its direction."""
