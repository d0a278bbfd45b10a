"""Archives: reproducible, complete, safe to read, and the same network after packing."""

import hashlib
import json
import subprocess
import sys
import urllib.error
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.models import get_model, get_model_weights

from camserve.archive import build_archive, load_package, read_card
from camserve.archive.package import WEIGHTS
from camserve.archive.untrusted import read_member
from camserve.errors import InvalidInput, InvalidOption, NotFound, Unavailable
from camserve.types import Preprocessing
from camserve.worker.network import load_network

SMALL = "torchvision:squeezenet1_1"  # 5 MB, and its classifier is a convolution


@pytest.fixture
def state_file(tmp_path: Path) -> Path:
    """Weights of a SqueezeNet with three classes."""
    torch.manual_seed(7)
    path = tmp_path / "mine.pth"
    torch.save(get_model("squeezenet1_1", num_classes=3).state_dict(), path)
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_same_inputs_give_the_same_bytes(tmp_path):
    first, second = (build_archive(SMALL, store=tmp_path / name, weights="random") for name in ("a", "b"))
    assert sha256(first) == sha256(second)


def test_archive_has_what_torchserve_needs(tmp_path):
    path = build_archive(SMALL, name="small", version="2.1", store=tmp_path, weights="random")
    manifest = json.loads(read_member(path, "MAR-INF/MANIFEST.json"))
    assert manifest["runtime"] == "python"
    assert manifest["model"] == {
        "modelName": "small",
        "modelVersion": "2.1",
        "handler": "saliency_handler.py",
        "configFile": "model-config.yaml",
    }
    with zipfile.ZipFile(path) as archive:
        assert set(archive.namelist()) >= {manifest["model"]["handler"], manifest["model"]["configFile"], WEIGHTS}
    assert [file.name for file in tmp_path.iterdir()] == ["small.mar"]


def test_packed_network_answers_like_the_original(tmp_path, state_file):
    path = build_archive(SMALL, name="mine", store=tmp_path, weights=str(state_file))
    original = get_model("squeezenet1_1", num_classes=3).eval()
    original.load_state_dict(torch.load(state_file, weights_only=True))
    packed, card = load_package(path)
    image = torch.rand(1, 3, *card.preprocessing.crop_px)
    assert torch.equal(packed(image), original(image))
    assert not packed.training
    assert card.labels == ("class 0", "class 1", "class 2")
    assert sha256(state_file) in card.source
    assert str(tmp_path) not in card.source  # a path would make archives differ between machines


def test_unpacked_directory_is_the_same_package(tmp_path):
    path = build_archive(SMALL, store=tmp_path, weights="random")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "unpacked")
    (packed, card), (unpacked, same_card) = load_package(path), load_package(tmp_path / "unpacked")
    assert card == same_card == read_card(path)
    for left, right in zip(packed.state_dict().values(), unpacked.state_dict().values(), strict=True):
        assert torch.equal(left, right)


def test_given_preprocessing_labels_layer_and_licence_are_kept(tmp_path, state_file):
    labels = tmp_path / "labels.txt"
    labels.write_text("cat\ndog\ngrüner Tee\n", encoding="utf-8")
    preprocessing = Preprocessing(70, (64, 48), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear")
    path = build_archive(
        SMALL,
        store=tmp_path,
        weights=str(state_file),
        labels=labels,
        layer="features.12",
        preprocessing=preprocessing,
        licence="CC0-1.0",
    )
    card = read_card(path)
    assert card.labels == ("cat", "dog", "grüner Tee")
    assert (card.preprocessing, card.layer, card.licence) == (preprocessing, "features.12", "CC0-1.0")


def test_labels_may_be_a_json_list(tmp_path, state_file):
    labels = tmp_path / "labels.json"
    labels.write_text('["a", "b", "c"]')
    path = build_archive(SMALL, store=tmp_path, weights=str(state_file), labels=labels)
    assert read_card(path).labels == ("a", "b", "c")


@pytest.mark.parametrize("text", ["a\nb\n", '["a", "b", "c", "d"]'])
def test_labels_must_be_as_many_as_the_outputs(tmp_path, state_file, text):
    labels = tmp_path / "labels"
    labels.write_text(text)
    with pytest.raises(InvalidInput, match=r"squeezenet1_1, [24] outputs: .*size mismatch"):
        build_archive(SMALL, store=tmp_path, weights=str(state_file), labels=labels)
    assert not list(tmp_path.glob("*.mar"))


@pytest.mark.parametrize("text", ["", '["a", 1, "c"]', '{"0": "a"}', '["a"', "a\n\nc\n"])
def test_unusable_labels_are_refused(tmp_path, state_file, text):
    labels = tmp_path / "labels"
    labels.write_text(text)
    with pytest.raises(InvalidInput, match="labels file"):
        build_archive(SMALL, store=tmp_path, weights=str(state_file), labels=labels)


def test_safetensors_weights(tmp_path, state_file):
    from safetensors.torch import save_file

    path = tmp_path / "mine.safetensors"
    save_file(torch.load(state_file, weights_only=True), path)
    from_safetensors = build_archive(SMALL, name="b", store=tmp_path, weights=str(path))
    from_pth = build_archive(SMALL, name="a", store=tmp_path, weights=str(state_file))
    assert read_member(from_safetensors, WEIGHTS) == read_member(from_pth, WEIGHTS)


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def test_pickled_code_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Bomb()}, "evil.pth")
    with pytest.raises(InvalidInput, match="can be read safely"):
        build_archive(SMALL, store=tmp_path, weights="evil.pth")
    assert not Path("exploded").exists()


@pytest.mark.parametrize("content", [{"state_dict": {"a": torch.zeros(1)}, "epoch": 3}, [torch.zeros(1)], {}])
def test_a_file_without_a_fitting_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(InvalidInput, match=r"must hold a state dict|are not of torchvision:squeezenet1_1"):
        build_archive(SMALL, store=tmp_path, weights=str(tmp_path / "other.pth"))


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_a_file_of_rubbish_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"not weights at all, not even nearly")
    with pytest.raises(InvalidInput, match="not a state dict that can be read safely"):
        build_archive(SMALL, store=tmp_path, weights=str(tmp_path / name))


def test_missing_keys_are_named(tmp_path, state_file):
    state = torch.load(state_file, weights_only=True)
    del state["features.0.bias"]
    torch.save(state, state_file)
    with pytest.raises(InvalidInput, match=r"Missing key.*features\.0\.bias"):
        build_archive(SMALL, store=tmp_path, weights=str(state_file))


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "a b", "-x", "ä", "a\n", 7])
def test_names_that_cannot_be_in_a_path_are_refused(tmp_path, name):
    with pytest.raises(InvalidOption, match="name must match"):
        build_archive(SMALL, name=name, store=tmp_path, weights="random")


def test_versions_that_cannot_be_in_a_path_are_refused(tmp_path):
    with pytest.raises(InvalidOption, match="version must match"):
        build_archive(SMALL, version="1/0", store=tmp_path, weights="random")


@pytest.mark.parametrize(
    "source", ["torchvision:resnet5", "resnet18", "torchvision:", "torchvision:raft_small", "x", "a b:c", "a:"]
)
def test_unknown_sources_are_refused(tmp_path, source):
    with pytest.raises(InvalidOption, match="a source is efficientnet-lite0, digits, torchvision:NAME of a classifier"):
        build_archive(source, store=tmp_path, weights="random")


def test_near_sources_are_named(tmp_path):
    with pytest.raises(InvalidOption, match="torchvision:resnet50"):
        build_archive("torchvision:resnet5", store=tmp_path, weights="random")


@pytest.mark.parametrize("weights", [None, "IMAGENET1K_V9", "nowhere.pth"])
def test_unknown_weights_are_answered_with_those_there_are(tmp_path, weights):
    with pytest.raises(InvalidOption, match=r"IMAGENET1K_V1.*file.*random|IMAGENET1K_V1.*random.*file") as caught:
        build_archive(SMALL, store=tmp_path, weights=weights)
    assert str(caught.value).endswith("got none" if weights is None else f"there is no file {weights!r}")


def test_unknown_layer_is_answered_with_those_there_are(tmp_path):
    with pytest.raises(InvalidOption, match=r"no spatial layer 'layer4'.*features\.12"):
        build_archive(SMALL, store=tmp_path, weights="random", layer="layer4")


def test_failed_download_names_the_file_option(tmp_path, monkeypatch):
    def offline(*_args, **_kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(Unavailable, match=r"https://.*no route to host.*give the file as weights"):
        build_archive(SMALL, store=tmp_path, weights="DEFAULT")


def test_downloaded_weights_bring_labels_and_preprocessing(tmp_path, monkeypatch):
    weights = get_model_weights("squeezenet1_1")["DEFAULT"]
    state = get_model("squeezenet1_1").state_dict()
    monkeypatch.setattr(type(weights), "get_state_dict", lambda *_args, **_kwargs: state)
    card = read_card(build_archive(SMALL, store=tmp_path, weights="IMAGENET1K_V1"))
    assert card.labels == tuple(weights.meta["categories"])
    assert card.preprocessing == Preprocessing(
        256, (224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), interpolation="bilinear"
    )
    assert weights.url in card.source


def test_densenets_published_names_are_understood(tmp_path):
    state = get_model("densenet121", num_classes=2).state_dict()
    old = {key.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2."): value for key, value in state.items()}
    assert old.keys() != state.keys()
    torch.save(old, tmp_path / "old.pth")
    packed, _ = load_package(
        build_archive("torchvision:densenet121", store=tmp_path, weights=str(tmp_path / "old.pth"))
    )
    assert packed.state_dict().keys() == state.keys()


def test_random_weights_leave_the_callers_generator_alone(tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    build_archive(SMALL, store=tmp_path, weights="random")
    assert torch.equal(torch.rand(2), expected)


def test_failed_write_leaves_the_old_archive(tmp_path, monkeypatch):
    path = build_archive(SMALL, store=tmp_path, weights="random")
    before = sha256(path)

    def full(*_args):
        raise OSError("disk full")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    with pytest.raises(OSError, match="disk full"):
        build_archive(SMALL, version="2", store=tmp_path, weights="random")
    assert sha256(path) == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"not a zip", None])
def test_what_is_not_an_archive_is_refused(tmp_path, content):
    path = tmp_path / "x.mar"
    if content is None:
        zipfile.ZipFile(path, "w").close()
    else:
        path.write_bytes(content)
    with pytest.raises(InvalidInput, match="not a camserve archive"):
        read_card(path)


def test_a_missing_archive_is_not_found(tmp_path):
    with pytest.raises(NotFound, match=r"nope\.mar"):
        load_package(tmp_path / "nope.mar")


def test_lite0_recognises_the_cat(tmp_path):
    from PIL import Image
    from skimage import data

    from camserve.images import network_view

    network, card = load_package(build_archive("efficientnet-lite0", store=tmp_path))
    assert card.preprocessing == Preprocessing(256, (224, 224), (0.498,) * 3, (0.502,) * 3, "bicubic")
    view, _ = network_view(Image.fromarray(data.chelsea()), card.preprocessing)
    pixels = (np.asarray(view, dtype=np.float32) / 255 - card.preprocessing.mean) / card.preprocessing.std
    scores = network(torch.from_numpy(pixels).float().permute(2, 0, 1)[None])[0]
    assert {card.labels[index] for index in scores.topk(3).indices} == {"tiger cat", "Egyptian cat", "tabby"}


def test_reading_a_card_loads_no_torch(tmp_path):
    path = build_archive(SMALL, store=tmp_path, weights="random")
    code = (
        "import sys, pathlib, camserve.archive as archive;"
        f"archive.read_card(pathlib.Path({str(path)!r}));"
        "archive.listed_models(pathlib.Path('.'));"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0


def test_an_evaluation_travels_with_the_model(tmp_path):
    report = tmp_path / "report.json"
    rows = [{"title": "Grad-CAM", "rise_overall": 0.25}, {"title": "CAM", "rise_overall": None}]
    report.write_text(json.dumps({"settings": {"protocols": ["rise", "group_cam"]}, "methods": rows}))
    path = build_archive(SMALL, name="small", store=tmp_path, weights="random", evaluation=report)
    assert read_card(path).evaluation == {"Grad-CAM": 0.25}
    assert load_network(path).info.evaluation == {"Grad-CAM": 0.25}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"settings": {"protocols": []}, "methods": []}'])
def test_what_is_no_report_is_refused(tmp_path, text):
    report = tmp_path / "report.json"
    report.write_text(text)
    with pytest.raises(InvalidInput, match=r"not a report\.json of camserve evaluate"):
        build_archive(SMALL, name="small", store=tmp_path, weights="random", evaluation=report)
    with pytest.raises(NotFound, match="no report"):
        build_archive(SMALL, name="small", store=tmp_path, weights="random", evaluation=tmp_path / "none.json")
