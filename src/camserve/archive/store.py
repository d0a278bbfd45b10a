"""Keeps the directory of archives, and reads the manifest of models that can be built into it."""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from camserve.archive.card import check_name, read_card
from camserve.archive.package import CONFIG, HANDLER, MODEL_CONFIG, build_archive, handler_source, source_tree
from camserve.archive.untrusted import is_file, read_member, read_text, reading
from camserve.errors import CamserveError, NotFound
from camserve.types import Outputs

MANIFEST = "models.toml"
STORE_VARIABLE = "CAMSERVE_MODEL_STORE"


@dataclass(frozen=True)
class ListedModel:
    """Holds one table of a `models.toml`."""

    source: str
    version: str
    input_px: tuple[int, int]
    """(height, width) of the network's input."""
    licence: str
    """Licence of the weights."""
    weights_from: str
    """Origin of the weights, for people."""
    weights_sha256: str
    """SHA-256 of the weights as their source has them, which is checked before anything is built of them."""
    packed_sha256: str
    """SHA-256 of `weights.safetensors` in the archive."""
    weights: str | None = None
    """The weights, as `build_archive` takes them."""
    layer: str | None = None
    """Address of the default layer; None: found automatically."""
    outputs: Outputs = "softmax"
    """Kind of the network's outputs: see `camserve.scores`."""
    units: tuple[str, ...] = ()
    """Unit of each number of outputs "value"; one is that of all."""


def model_store(path: str | Path | None = None) -> Path:
    """Returns the directory of archives: the argument, else `CAMSERVE_MODEL_STORE`, else `./model_store`."""
    return Path(path or os.environ.get(STORE_VARIABLE) or "model_store")


def archives(store: Path) -> tuple[str, ...]:
    """Returns the sorted names of the archives in the store."""
    return tuple(sorted(path.stem for path in store.glob("[!.]*.mar")))


def listed_models(store: Path) -> dict[str, ListedModel]:
    """Returns the models that can be built, by name: camserve's own, and those of the store's `models.toml`.

    Raises:
        InvalidInput: the store's `models.toml` cannot be read.
    """
    own = store / MANIFEST
    return _read_manifest(_shipped()) | (_read_manifest(own) if is_file(own) else {})


def ensure_archive(name: str, store: Path) -> Path:
    """Returns `<store>/<name>.mar`, which can be read; builds a listed model if missing, broken, or another camserve's.

    Raises:
        InvalidOption: not a model name.
        NotFound: neither in the store nor listed; the text has the names that are.
        InvalidInput: the weights are not those that `models.toml` lists, or the manifest is broken, or an archive that
            is not listed.
    """
    path = store / f"{check_name('model name', name)}.mar"
    listed = listed_models(store)
    model = listed.get(name)
    if model is None:
        if is_file(path):
            read_card(path)
            return path
        known = ", ".join(sorted({*listed, *archives(store)}))
        raise NotFound(f"there is no model {name!r} in {store}; there are {known}")
    return path if _is_current(path, model) else _build(name, model, store)


def _build(name: str, model: ListedModel, store: Path) -> Path:
    return build_archive(
        model.source,
        name=name,
        version=model.version,
        store=store,
        weights=model.weights,
        weights_sha256=model.weights_sha256,
        outputs=model.outputs,
        units=model.units,
        layer=model.layer,
        licence=model.licence,
    )


def _is_current(path: Path, model: ListedModel) -> bool:
    try:
        card = read_card(path)
        same_files = read_member(path, HANDLER) == handler_source() and read_member(path, CONFIG) == MODEL_CONFIG
    except CamserveError:
        return False
    made_from = (card.architecture, card.version, card.layer, card.licence, card.outputs, set(card.units))
    listed = (model.source, model.version, model.layer, model.licence, model.outputs, set(model.units))
    return same_files and made_from == listed


def _shipped() -> Path:
    packaged = Path(str(files("camserve.archive").joinpath(MANIFEST)))
    return packaged if packaged.is_file() else source_tree() / "model_store" / MANIFEST


def _read_manifest(path: Path) -> dict[str, ListedModel]:
    what = "a manifest of models"
    with reading(path, what):
        return {name: _listed(table) for name, table in tomllib.loads(read_text(path, what)).items()}


def _listed(table: dict[str, Any]) -> ListedModel:
    height, width = table.pop("input_px")
    return ListedModel(input_px=(height, width), units=tuple(table.pop("units", ())), **table)
