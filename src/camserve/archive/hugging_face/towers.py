"""Makes of CLIP and its like a network of outputs "text-image", with a text encoder that is packed as data.

Tokens are made by the package tokenizers, from what a tokeniser of transformers says of itself: a table and rules, no
code. What is packed is tried: tokens are those of the tokeniser, and scaled cosines the network's own answers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from camserve.archive.untrusted import is_file, reading, short
from camserve.errors import InvalidInput, InvalidOption, NotFound
from camserve.scores.returned import Wrapped
from camserve.wording import shown

TEXT = "text.json"
"""Name in an archive of what makes tokens of texts."""
MAX_BYTES = 2**26
"""Bytes of a tokeniser; those of 256,000 tokens have 35 MB."""

_TOKENISERS = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt")
"""Files of which one must be there, if any is."""
_PROBES = ("a photo of a cat", "Two DOGS and one cat, asleep!", "", "Stra\u00dfe 7: na\u00efve  \u732b")
_SAME = 1e-4
"""Share of the largest answer by which scaled cosines may differ from the network's: rounding is a tenth of it."""


class Towers(Wrapped):
    """Makes vectors (n, D) of images (n, C, H, W) by the image tower of a network; `text_encoder` makes those of texts.

    Args:
        network: a network of transformers, in eval mode.
        text: what makes tokens, as `packed_text` returns it.

    Raises:
        InvalidInput: the text is none such.
    """

    def __init__(self, network: nn.Module, text: bytes) -> None:
        super().__init__(network)
        # No submodule: its weights are the network's.
        self.__dict__["text_encoder"] = TextTower(network, text)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the vectors, of any length."""
        return _vectors(cast("Any", self._network).get_image_features(pixel_values=x))


class TextTower:
    """Makes vectors (n, D) of texts by the text tower of a network: a `camserve.scores.TextEncoder`.

    Args:
        network: a network of transformers.
        text: what makes tokens, as `packed_text` returns it.

    Raises:
        InvalidInput: the text is none such.
    """

    def __init__(self, network: nn.Module, text: bytes) -> None:
        self._network: Any = network
        with reading(Path(TEXT), "what makes tokens of texts"):
            if len(text) > MAX_BYTES:
                raise ValueError(f"it may have at most {MAX_BYTES} bytes, has {len(text)}")
            said = json.loads(text)
            self.max_length = int(said["max_length"])
            self._pad = None if said["padding"] is None else int(said["padding"]["token"])
            self._left = self._pad is not None and bool(said["padding"]["left"])
            self._masked = self._pad is not None and bool(said["padding"]["masked"])
            self._tokeniser = _tokeniser(json.dumps(said["tokeniser"]))

    @property
    def padded(self) -> bool:
        """Tells whether every text is brought to `max_length`."""
        return self._pad is not None

    @property
    def scale(self) -> float:
        """Factor of the cosines: the exponential of `logit_scale`, or the inverse of ALIGN's `temperature`."""
        if hasattr(self._network, "temperature"):
            return 1 / float(self._network.temperature)
        return math.exp(float(self._network.logit_scale))

    @property
    def bias(self) -> float | None:
        """Number that is added to scaled cosines where each text may be true by itself; None where one of all is."""
        bias = getattr(self._network, "logit_bias", None)
        return None if bias is None else float(bias)

    def tokens(self, text: str) -> Sequence[int]:
        """Returns all tokens of a text, those of its ends included; raises InvalidOption where it has none for it."""
        try:
            with _in_rust():
                return cast("Sequence[int]", self._tokeniser.encode(text).ids)
        except ValueError as error:
            raise InvalidOption(f"this model's tokeniser makes no tokens of {shown(text)}: {error}") from None

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Returns the vectors (n, D); texts of as many tokens go together, so that none is padded to another's length.

        A network that was trained on texts of one length gets that.
        """
        given = [self._padded(list(self.tokens(text))) for text in texts]
        found: dict[int, Tensor] = {}
        for length in {len(tokens) for tokens, _ in given}:
            rows = [index for index, (tokens, _) in enumerate(given) if len(tokens) == length]
            device = next(self._network.parameters()).device
            tokens, mask = (torch.tensor([given[row][part] for row in rows], device=device) for part in (0, 1))
            beside = {"attention_mask": mask} if self._masked else {}
            vectors = _vectors(self._network.get_text_features(input_ids=tokens, **beside))
            found |= dict(zip(rows, vectors, strict=True))
        return torch.stack([found[row] for row in range(len(texts))])

    def _padded(self, tokens: list[int]) -> tuple[list[int], list[int]]:
        """Returns tokens and which of them count."""
        if self._pad is None:
            return tokens, [1] * len(tokens)
        more = max(0, self.max_length - len(tokens))
        parts = (tokens, [self._pad] * more), ([1] * len(tokens), [0] * more)
        filled, mask = ([*part[1], *part[0]] if self._left else [*part[0], *part[1]] for part in parts)
        return filled, mask


def packed_text(transformers: Any, directory: Path, network: Any) -> bytes:
    """Returns what makes tokens of texts as the tokeniser of a directory does, as JSON.

    Raises:
        NotFound: the directory has no tokeniser.
        InvalidOption: the tokeniser, or the network, does more than can be packed.
        InvalidInput: a file of it cannot be read.
    """
    files = [name for name in _TOKENISERS if is_file(directory / name)]
    if not files:
        raise NotFound(f"{short(directory)} has no {_TOKENISERS[0]}: save the tokeniser, or the processor, beside it")
    for name in files:
        if (size := (directory / name).stat().st_size) > MAX_BYTES:
            raise InvalidInput(f"{short(directory / name)} may have at most {MAX_BYTES} bytes, has {size}")
    with reading(directory, "a Hugging Face network with a tokeniser"):
        tokeniser = transformers.AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    backend = getattr(tokeniser, "backend_tokenizer", None)
    if backend is None:
        raise InvalidOption(
            f"the tokeniser {type(tokeniser).__name__} is code, and only one that the package tokenizers runs "
            f"({_TOKENISERS[0]}) is packed"
        )
    settings = network.config.text_config
    fixed = "siglip" in network.config.model_type  # as transformers' own pipeline has it
    most = min(tokeniser.model_max_length, int(settings.max_position_embeddings))
    masked = "attention_mask" in tokeniser.model_input_names
    padding = {"token": tokeniser.pad_token_id, "left": tokeniser.padding_side == "left", "masked": masked}
    said = {"max_length": most, "padding": padding if fixed else None, "tokeniser": json.loads(backend.to_str())}
    said["tokeniser"] |= {"padding": None, "truncation": None}
    said["max_length"] = _most_tokens(network, said)
    found = TextTower(network, json.dumps(said).encode())
    for probe in _PROBES:
        if list(found.tokens(probe)) != list(tokeniser(probe)["input_ids"]):
            raise InvalidOption(f"the tokeniser {type(tokeniser).__name__} does more than its table says: {probe!r}")
    return json.dumps(said, ensure_ascii=False, sort_keys=True).encode()


def check_answers(transformers: Any, directory: Path, towers: Towers, network: Any, images: Tensor) -> None:
    """Raises InvalidOption where a network's answers are other than scaled cosines of its towers' vectors.

    Args:
        transformers: the package.
        directory: directory of the tokeniser.
        towers: the towers.
        network: the network that they are of.
        images: some images (n, C, H, W).
    """
    encoder = cast("TextTower", towers.text_encoder)
    texts = ["a photo of a cat", "two dogs"]
    tokeniser = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    padding = {"padding": "max_length", "max_length": encoder.max_length} if encoder.padded else {"padding": True}
    name = type(network).__name__
    with torch.no_grad():
        try:
            given = tokeniser(texts, return_tensors="pt", **padding)
            theirs = network(pixel_values=images, **given).logits_per_image
            vectors = [nn.functional.normalize(each, dim=1) for each in (towers(images), encoder.encode(texts))]
        except Exception as error:  # whatever comes of a network that is called otherwise than it wants
            reason = " ".join(str(error).split())[:200]
            raise InvalidOption(
                f"{name} is not asked with a batch of images and one of texts alone: {reason}"
            ) from None
    ours = encoder.scale * vectors[0] @ vectors[1].T + (encoder.bias or 0.0)
    if theirs.shape != ours.shape or not torch.allclose(ours, theirs, rtol=0, atol=_SAME * float(theirs.abs().max())):
        raise InvalidOption(f"the answers of {name} are not scaled cosines of vectors of image and text")


def _most_tokens(network: Any, said: Mapping[str, Any]) -> int:
    """Returns how many tokens a network takes, as far as it is seen to: some count positions from the padding's on."""
    most = int(said["max_length"])
    encoder = TextTower(network, json.dumps(said).encode())
    (token, *_) = encoder.tokens(_PROBES[0])
    pad = getattr(network.config.text_config, "pad_token_id", None) or 0
    for fewer in (0, pad + 1):
        try:
            with torch.no_grad():
                network.get_text_features(input_ids=torch.full((1, most - fewer), token))
        except Exception:
            # A position that the network has no vector of: an IndexError, or whatever a device makes of it.
            continue
        return most - fewer
    raise InvalidOption(f"{type(network).__name__} does not take texts of {most} tokens, as its configuration says")


def _vectors(found: Any) -> Tensor:
    """Returns the vectors among what a tower returns."""
    return cast("Tensor", found if isinstance(found, Tensor) else found.pooler_output)


def _tokeniser(text: str) -> Tokenizer:
    with _in_rust():
        return Tokenizer.from_str(text)


@contextmanager
def _in_rust() -> Iterator[None]:
    """Makes whatever the package tokenizers raises a ValueError: what panics in Rust is no Exception here."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        raise ValueError(f"the package tokenizers says {short(' '.join(str(error).split()))}") from None
