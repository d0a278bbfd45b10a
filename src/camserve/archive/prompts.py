"""Reads the prompts that are to be packed with a network of outputs "text-image". No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from camserve.archive.untrusted import is_file, read_text, reading, short
from camserve.errors import InvalidInput, InvalidOption, NotFound
from camserve.types.references import MAX_REFERENCES
from camserve.wording import shown

PromptsLike = str | Path | Sequence[str] | Mapping[str, str | Sequence[str]]
"""Type of prompts as people give them: a file of them, a list, or one or several by name."""

MAX_PROMPTS = 100
"""Number of prompts of one name; CLIP's authors use 80 for each class of ImageNet."""

_WHAT = "a file of prompts: one in each line, a JSON list of them, or a JSON object from names to one or several"


def given_prompts(prompts: PromptsLike) -> Mapping[str, tuple[str, ...]]:
    """Returns the prompts by name, in order; the name of a prompt that has none is the prompt.

    Args:
        prompts: a file of UTF-8, or what it would hold. The vectors of several prompts of one name are averaged.

    Raises:
        NotFound: there is no such file.
        InvalidInput: the file has no prompts.
        InvalidOption: there are none or too many, one is no text or is empty, or a name comes twice.
    """
    found: Any = _read(Path(prompts)) if isinstance(prompts, (str, Path)) else prompts
    if not isinstance(found, Mapping):
        if not isinstance(found, Sequence):
            raise InvalidOption(f"prompts are {_WHAT}; got {shown(found)}")
        texts = [_text(prompt) for prompt in found]
        found = dict(zip(texts, texts, strict=True))
        if len(found) < len(texts):
            twice = next(text for text in texts if texts.count(text) > 1)
            raise InvalidOption(f"each prompt has a name of its own, and {shown(twice)} comes twice")
    if not 1 <= len(found) <= MAX_REFERENCES:
        raise InvalidOption(f"a model has 1..{MAX_REFERENCES} names of prompts, got {len(found)}")
    return {name: _several(name, texts) for name, texts in found.items()}


def _read(path: Path) -> Any:
    if not is_file(path):
        raise NotFound(f"there is no file of prompts {short(path)}")
    with reading(path, _WHAT):
        text = read_text(path, _WHAT).strip()
        if not text:
            raise InvalidInput(f"{short(path)} is empty, and must be {_WHAT}")
        return json.loads(text) if text.startswith(("[", "{")) else text.splitlines()


def _several(name: str, texts: Any) -> tuple[str, ...]:
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, Sequence) or not 1 <= len(texts) <= MAX_PROMPTS:
        raise InvalidOption(f"{shown(name)} has one prompt or a list of up to {MAX_PROMPTS}, got {shown(texts)}")
    return tuple(_text(text) for text in texts)


def _text(prompt: Any) -> str:
    if not isinstance(prompt, str) or not prompt.strip():
        raise InvalidOption(f"a prompt is a text of at least one word, got {shown(prompt)}")
    return prompt.strip()
