"""CLIP and its like as Hugging Face saves them: vectors, tokens and answers are those of transformers."""

import json
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from PIL import Image
from torch import nn
from towers import FAMILIES, PROMPTS, saved

from camserve.archive import build_archive, load_package, read_card
from camserve.archive.hugging_face.towers import TextTower
from camserve.engine import Engine
from camserve.errors import CamserveError, InvalidInput, InvalidOption, NotFound


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("towers")
    return {name: saved(root / name, family) for name, family in FAMILIES.items()}


@pytest.fixture
def directory(directories, tmp_path) -> Path:
    """A good directory that a test may change."""
    return Path(shutil.copytree(directories["clip"], tmp_path / "mine"))


def photo(height: int = 50, width: int = 71) -> Image.Image:
    return Image.fromarray(np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8))


def packed(directory: Path, store: Path, **options) -> Path:
    return build_archive(f"hf:{directory}", store=store, **options)


def answered(directory: Path, picture: Image.Image, texts: list[str]) -> torch.Tensor:
    """The logits and the probabilities of transformers itself."""
    processor = transformers.AutoImageProcessor.from_pretrained(directory, backend="pil")
    tokeniser = transformers.AutoTokenizer.from_pretrained(directory)
    network = transformers.AutoModelForZeroShotImageClassification.from_pretrained(directory).eval()
    fixed = "siglip" in network.config.model_type
    padding = {"padding": "max_length", "max_length": 16} if fixed else {"padding": True}
    with torch.no_grad():
        given = tokeniser(texts, return_tensors="pt", **padding)
        return network(**given, pixel_values=processor(picture, return_tensors="pt")["pixel_values"]).logits_per_image[
            0
        ]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_transformers(directories, tmp_path, family):
    packed(directories[family], tmp_path, prompts=PROMPTS)
    engine = Engine.load(family, store=tmp_path, runtime="eager")
    assert engine.info.outputs == "text-image"
    assert engine.info.labels == tuple(PROMPTS)
    module, _ = load_package(tmp_path / f"{family}.mar")
    encoder = module.text_encoder
    assert encoder.max_length == FAMILIES[family]()[2]
    logits = answered(directories[family], photo(), PROMPTS)
    found = {one.label: one for one in engine.explain(photo(), [], top_predictions=3).predictions}
    ours = [encoder.scale * found[text].similarity + (encoder.bias or 0.0) for text in PROMPTS]
    assert max(ours) - min(ours) > 0.01
    assert ours == pytest.approx(logits.tolist(), abs=1e-5)
    told = logits.sigmoid() if "siglip" in family else logits.softmax(dim=0)
    assert [found[text].probability for text in PROMPTS] == pytest.approx(told.tolist(), abs=1e-5)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_a_text_of_a_request_is_a_prompt_as_well(directories, tmp_path, family):
    packed(directories[family], tmp_path, prompts=PROMPTS[:2])
    engine = Engine.load(family, store=tmp_path, runtime="eager")
    found = engine.explain(photo(), ["grad_cam", ("rise", {"masks": 8})], ["text:a photo of a cat", "a photo of a cat"])
    of_text, of_prompt = found.maps[0], found.maps[1]
    assert of_text.score == pytest.approx(of_prompt.score, abs=1e-6)
    assert of_text.array == pytest.approx(of_prompt.array, abs=1e-4)
    assert not of_text.degenerate


def test_texts_of_other_lengths_do_not_change_one(directories, tmp_path):
    module, _ = load_package(packed(directories["clip"], tmp_path))
    with torch.no_grad():
        alone, together = (module.text_encoder.encode(texts)[0] for texts in (PROMPTS[:1], PROMPTS))
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)


def test_a_text_that_is_too_long_is_refused(directories, tmp_path):
    packed(directories["clip"], tmp_path)
    engine = Engine.load("clip", store=tmp_path, runtime="eager")
    with pytest.raises(InvalidOption, match="a text has at most 40 tokens here, got"):
        engine.explain(photo(), ["grad_cam"], [f"text:{'dog ' * 30}"])


def test_an_archive_holds_all_that_is_needed_and_asks_no_network(directory, tmp_path, monkeypatch):
    def refused(*arguments):
        raise AssertionError(f"asks the network: {arguments}")

    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(socket.socket, "connect", refused)
    path = packed(directory, tmp_path, name="alone", prompts=PROMPTS)
    shutil.rmtree(directory)
    card = read_card(path)
    assert (card.architecture, card.outputs, card.labels) == ("hf:CLIPModel", "text-image", tuple(PROMPTS))
    module, _ = load_package(path)
    assert "vision_model.embeddings.patch_embedding.weight" in module.state_dict()


def changed(name: str, **changes):
    def change(directory: Path) -> None:
        content = json.loads((directory / name).read_text()) | changes
        (directory / name).write_text(json.dumps(content))

    return change


def without_tokeniser(directory: Path) -> None:
    for path in directory.glob("*token*"):
        path.unlink()
    for name in ("vocab.json", "merges.txt"):
        (directory / name).unlink(missing_ok=True)


BAD = {
    "code named by the tokeniser": (
        changed("tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.Mine", None]}),
        InvalidInput,
        "auto_map",
    ),
    "no tokeniser": (without_tokeniser, NotFound, "has no tokenizer.json"),
    "a tokeniser that is none": (
        lambda directory: (directory / "tokenizer.json").write_text('{"model": 7}'),
        InvalidInput,
        "is not a Hugging Face network with a tokeniser",
    ),
    "a file of code": (lambda directory: (directory / "tokens.py").write_text(""), InvalidInput, "code"),
    "another temperature": (changed("config.json", model_type="clipseg"), CamserveError, "CLIPModel"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_directory_is_refused_with_the_reason(directory, tmp_path, name):
    change, error, text = BAD[name]
    change(directory)
    with pytest.raises(error, match=text):
        packed(directory, tmp_path)
    assert not list(tmp_path.glob("*.mar"))


def test_a_network_whose_answers_are_no_cosines_is_refused(directory, tmp_path, monkeypatch):
    forward = transformers.CLIPModel.forward

    def other(self, **given):
        found = forward(self, **given)
        found["logits_per_image"] = found["logits_per_image"] * 1.01
        return found

    monkeypatch.setattr(transformers.CLIPModel, "forward", other)
    with pytest.raises(InvalidOption, match="are not scaled cosines"):
        packed(directory, tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"max_length": 9, "padding": null, "tokeniser": {"model": 1}}'])
def test_an_archive_with_another_text_is_refused(directory, tmp_path, content):
    """Whoever loads an archive need not trust its maker."""
    path = packed(directory, tmp_path)
    unpacked = tmp_path / "unpacked"
    shutil.unpack_archive(path, unpacked, "zip")
    (unpacked / "text.json").write_text(content)
    with pytest.raises(InvalidInput, match=r"text\.json is not what makes tokens of texts"):
        load_package(unpacked)


def words(**changes: object) -> bytes:
    """What makes tokens of texts, by a table of two words."""
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece({"a": 0, "cat": 1}, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    said = json.loads(made.to_str()) | changes
    return json.dumps({"max_length": 9, "padding": None, "tokeniser": said}).encode()


MARKED = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"[CLS]": {"id": "[CLS]", "ids": [0], "tokens": ["[CLS]"]}},
}


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("a dog", {}),  # an Exception: there is no [UNK]
        ("a cat", {"post_processor": MARKED | {"special_tokens": {}}}),  # a panic in Rust
    ],
)
def test_a_text_that_a_tokeniser_fails_on_is_refused(text, changes):
    """An archive can hold any tokeniser; where it is made it says nothing of texts that it will fail on."""
    tower = TextTower(nn.Module(), words(**changes))
    with pytest.raises(InvalidOption, match=f"this model's tokeniser makes no tokens of '{text}': the package token"):
        tower.tokens(text)


def test_a_tokeniser_of_an_archive_makes_tokens():
    assert list(TextTower(nn.Module(), words(post_processor=MARKED)).tokens("a cat")) == [0, 0, 1]
