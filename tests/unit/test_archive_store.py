"""The model store: what is listed, what is built, and when."""

import hashlib
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from camserve.archive import (
    archives,
    build_archive,
    ensure_archive,
    listed_models,
    model_store,
    read_card,
)
from camserve.archive import package as package_module
from camserve.archive import store as store_module
from camserve.archive.package import WEIGHTS, handler_source
from camserve.archive.sources import find_weights, sha256_of
from camserve.archive.untrusted import read_member
from camserve.errors import InvalidInput, InvalidOption, NotFound
from camserve.evaluation.digits.shipped import SHIPPED
from camserve.worker.network import load_network

ROOT = Path(__file__).parents[2]

OWN = """
[small]
source = "torchvision:squeezenet1_1"
version = "3.0"
input_px = [224, 224]
licence = "CC0-1.0"
weights = "WEIGHTS"
weights_from = "nowhere in particular"
weights_sha256 = "SHA256"
packed_sha256 = ""
"""


@pytest.fixture
def own_store(tmp_path) -> Path:
    """A store whose own manifest lists `small`, with weights from a file."""
    from torchvision.models import get_model

    store = tmp_path / "store"
    store.mkdir()
    weights = tmp_path / "weights.pth"
    torch.save(get_model("squeezenet1_1", num_classes=2).state_dict(), weights)
    manifest = OWN.replace("WEIGHTS", str(weights)).replace("SHA256", sha256_of(weights))
    (store / "models.toml").write_text(manifest)
    return store


SHIPPED_MODELS = listed_models(Path("no store"))


@pytest.mark.parametrize("name", SHIPPED_MODELS)
def test_shipped_manifest_is_true(name, tmp_path):
    model = SHIPPED_MODELS[name]
    path = ensure_archive(name, tmp_path)
    card = read_card(path)
    assert sha256_of(find_weights(model.source, model.weights).file) == model.weights_sha256
    assert hashlib.sha256(read_member(path, WEIGHTS)).hexdigest() == model.packed_sha256
    assert (card.name, card.version, card.architecture) == (name, model.version, model.source)
    if name in SHIPPED:
        network = SHIPPED[name]
        labels = network.prompts or network.labels
        assert (card.labels, card.outputs, card.units) == (labels, network.outputs, network.units)
    assert (card.preprocessing.crop_px, card.licence, card.layer) == (model.input_px, model.licence, model.layer)
    assert model.layer in (None, load_network(path, runtime="eager").survey.default)  # found without being told


def test_the_networks_of_digit_scenes_are_listed():
    assert set(SHIPPED_MODELS) == {"lite0", *SHIPPED}


def test_a_network_of_timm_says_which_extra_it_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.layers.hybrid_embed", None)  # importing it fails, as where timm is missing
    with pytest.raises(NotFound, match=r"camserve\[timm\]"):
        ensure_archive("digits-vit-timm", tmp_path)


def test_a_listed_model_is_built_alike_everywhere(own_store, tmp_path):
    first = ensure_archive("small", own_store).read_bytes()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "models.toml").write_text((own_store / "models.toml").read_text())
    assert ensure_archive("small", tmp_path / "other").read_bytes() == first


def test_current_archive_is_not_built_again(own_store):
    path = ensure_archive("small", own_store)
    before = path.stat().st_ino
    assert ensure_archive("small", own_store) == path
    assert path.stat().st_ino == before


@pytest.mark.parametrize("spoil", ["broken", "handler", "version"])
def test_stale_archive_is_built_again(own_store, monkeypatch, spoil):
    path = ensure_archive("small", own_store)
    if spoil == "broken":
        path.write_bytes(path.read_bytes()[:1000])
    elif spoil == "handler":
        for module in (package_module, store_module):
            monkeypatch.setattr(module, "handler_source", lambda: b"# a newer handler\n")
    else:
        manifest = own_store / "models.toml"
        manifest.write_text(manifest.read_text().replace('"3.0"', '"4.0"'))
    assert ensure_archive("small", own_store) == path
    assert read_member(path, "saliency_handler.py") == store_module.handler_source()
    assert read_card(path).version == ("4.0" if spoil == "version" else "3.0")


def test_other_weights_than_listed_are_refused(own_store):
    manifest = own_store / "models.toml"
    manifest.write_text(manifest.read_text().replace('weights_sha256 = "', 'weights_sha256 = "0'))
    with pytest.raises(InvalidInput, match="must have sha256 0"):
        ensure_archive("small", own_store)
    assert archives(own_store) == ()


def test_archive_of_ones_own_is_taken_as_it_is(tmp_path):
    path = build_archive("torchvision:squeezenet1_1", name="mine", store=tmp_path, weights="random")
    assert ensure_archive("mine", tmp_path) == path
    assert archives(tmp_path) == ("mine",)


def test_unknown_model_is_answered_with_those_there_are(own_store):
    with pytest.raises(NotFound, match=r"'nope'.*lite0, small"):
        ensure_archive("nope", own_store)


def test_name_cannot_leave_the_store(tmp_path):
    zipfile.ZipFile(tmp_path / "x.mar", "w").close()
    with pytest.raises(InvalidOption, match="model name must match"):
        ensure_archive("../x", tmp_path / "store")


@pytest.mark.parametrize("text", ["not toml", "[x]\nsource = 1\n", '[x]\nunknown = "key"\ninput_px = [1, 2]\n'])
def test_broken_manifest_is_named(tmp_path, text):
    (tmp_path / "models.toml").write_text(text)
    with pytest.raises(InvalidInput, match=r"models\.toml is not a manifest"):
        ensure_archive("x", tmp_path)


def test_store_is_the_argument_then_the_variable_then_here(monkeypatch):
    monkeypatch.delenv("CAMSERVE_MODEL_STORE", raising=False)
    assert model_store() == Path("model_store")
    monkeypatch.setenv("CAMSERVE_MODEL_STORE", "/models")
    assert model_store() == Path("/models")
    assert model_store("mine") == Path("mine")


def test_archives_carry_the_handler_of_the_source_tree():
    assert handler_source() == (ROOT / "handlers" / "saliency_handler.py").read_bytes()
