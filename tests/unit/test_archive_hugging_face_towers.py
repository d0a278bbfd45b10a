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

from camserve.archive import build_archive, load_package, read_card
from camserve.engine import Engine
from camserve.errors import CamserveError, InvalidInput, InvalidOption, NotFound

SIDE = 32
PROMPTS = ["a photo of a cat", "two dogs, asleep", "a red bird over the sea"]
WORDS = sorted({letter for prompt in PROMPTS for letter in prompt.lower()} | set("bcdefghijklmnopqrstuvwxyz,!.?7"))


def bpe_of_letters() -> transformers.PreTrainedTokenizerBase:
    """CLIP's tokeniser with letters and a few pairs for a table."""
    ends = ["<|startoftext|>", "<|endoftext|>"]
    letters = [letter for letter in WORDS if letter != " "]
    names = [*letters, *(f"{letter}</w>" for letter in letters), "ca", "cat</w>", "do", *ends]
    vocabulary = {name: index for index, name in enumerate(names)}
    return transformers.CLIPTokenizer(
        vocab=vocabulary, merges=[("c", "a"), ("ca", "t</w>"), ("d", "o")], model_max_length=77
    )


def wordpieces() -> transformers.PreTrainedTokenizerBase:
    """BERT's tokeniser."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "cat", "two", "dog", "##s", "red", ","]
    return transformers.BertTokenizer(vocab={name: index for index, name in enumerate(words)}, model_max_length=512)


def unigrams(names: list[str] | None = None) -> transformers.PreTrainedTokenizerBase:
    """A tokeniser of pieces with an end and no start, as SigLIP's is."""
    pieces = ["<pad>", "</s>", "<unk>", "\u2581a", "\u2581photo", "\u2581of", "\u2581cat", "\u2581two", "\u2581dogs"]
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({one: at for at, one in enumerate(pieces)}, "<unk>"))
    made.normalizer = tokenizers.normalizers.Lowercase()
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=16,
        model_input_names=names or ["input_ids"],
    )


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
SEEN = {**SMALL, "image_size": SIDE, "patch_size": 8}


def clip():
    text = {**SMALL, "vocab_size": 200, "max_position_embeddings": 40, "eos_token_id": 100}
    tokeniser = bpe_of_letters()
    text |= {"eos_token_id": tokeniser.eos_token_id, "bos_token_id": tokeniser.bos_token_id}
    config = transformers.CLIPConfig(text_config=text, vision_config=SEEN, projection_dim=24)
    return transformers.CLIPModel(config), tokeniser, 40


def siglip():
    text = {**SMALL, "vocab_size": 16, "max_position_embeddings": 64, "projection_size": 32}
    config = transformers.SiglipConfig(text_config=text, vision_config=SEEN)
    return transformers.SiglipModel(config), unigrams(), 16


def siglip_masked():
    network, _, most = siglip()
    return network, unigrams(["input_ids", "attention_mask"]), most


def chinese_clip():
    text = {**SMALL, "vocab_size": 30, "max_position_embeddings": 48}
    config = transformers.ChineseCLIPConfig(text_config=text, vision_config=SEEN, projection_dim=24)
    return transformers.ChineseCLIPModel(config), wordpieces(), 48


def altclip():
    text = {**SMALL, "vocab_size": 30, "max_position_embeddings": 48, "project_dim": 24, "pad_token_id": 0}
    config = transformers.AltCLIPConfig(text_config=text, vision_config=SEEN, projection_dim=24)
    return transformers.AltCLIPModel(config), wordpieces(), 47


def align():
    text = {**SMALL, "vocab_size": 30, "max_position_embeddings": 48}
    seen = {
        "image_size": SIDE,
        "in_channels": [32, 8],
        "out_channels": [8, 16],
        "kernel_sizes": [3, 3],
        "strides": [1, 2],
        "num_block_repeats": [1, 1],
        "expand_ratios": [1, 2],
        "depthwise_padding": [],
        "hidden_dim": 32,
        "width_coefficient": 1.0,
        "depth_coefficient": 1.0,
    }
    config = transformers.AlignConfig(text_config=text, vision_config=seen, projection_dim=16)
    return transformers.AlignModel(config), wordpieces(), 48


FAMILIES = {
    "clip": clip,
    "siglip": siglip,
    "siglip_masked": siglip_masked,
    "chinese_clip": chinese_clip,
    "altclip": altclip,
    "align": align,
}


def saved(directory: Path, family) -> Path:
    torch.manual_seed(3)
    network, tokeniser, _ = family()
    for weight in network.parameters():  # as they are made, all answers are alike
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.2)
    for name, value in (("logit_scale", 1.5), ("logit_bias", -0.7), ("temperature", 0.2)):
        if hasattr(network, name):
            torch.nn.init.constant_(getattr(network, name), value)
    network.save_pretrained(directory)
    tokeniser.save_pretrained(directory)
    size = {"shortest_edge": SIDE}
    transformers.CLIPImageProcessor(size=size, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(directory)
    return directory


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
