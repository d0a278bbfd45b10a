"""Image classifiers as Hugging Face saves them: packed whole, answered as by transformers, and never running code."""

import json
import pickle
import shutil
import socket
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file

from camserve.archive import build_archive, load_package, read_card
from camserve.engine import Engine
from camserve.errors import CamserveError, InvalidInput, InvalidOption, NotFound
from camserve.images import seen

SIDE = 64
LABELS = {index: f"thing {index}" for index in range(5)}


def vit(**settings):
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=SIDE,
            patch_size=16,
            id2label=LABELS,
            **settings,
        )
    )


def resnet():
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], id2label=LABELS)
    config.layer_type = "basic"
    return transformers.ResNetForImageClassification(config)


def convnext():
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, id2label=LABELS)
    return transformers.ConvNextForImageClassification(config)


def swin():
    return transformers.SwinForImageClassification(
        transformers.SwinConfig(
            image_size=SIDE, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4, id2label=LABELS
        )
    )


def convnext_processor(side: int = SIDE):
    return transformers.ConvNextImageProcessor(size={"shortest_edge": side}, crop_pct=0.875)


def squashing():
    return transformers.ViTImageProcessor(size={"height": SIDE, "width": SIDE})


def cropping():
    size, crop = {"shortest_edge": 71}, {"height": SIDE, "width": SIDE}
    return transformers.CLIPImageProcessor(size=size, crop_size=crop)


FAMILIES = {
    "vit": (vit, squashing),
    "resnet": (resnet, convnext_processor),
    "convnext": (convnext, lambda: convnext_processor(384)),
    "swin": (swin, cropping),
}


def saved(directory: Path, network, processor) -> Path:
    torch.manual_seed(3)
    made = network()
    for weight in made.parameters():  # as they are made, all answers are alike
        torch.nn.init.normal_(weight, std=0.2 if weight.ndim > 1 else 0.5)
    made.save_pretrained(directory)
    processor().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hugging-face")
    return {name: saved(root / name, *family) for name, family in FAMILIES.items()}


@pytest.fixture
def directory(directories, tmp_path) -> Path:
    """A good directory that a test may change."""
    return Path(shutil.copytree(directories["vit"], tmp_path / "mine"))


def photo(height: int = 97, width: int = 150) -> Image.Image:
    return Image.fromarray(np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8))


def piped(directory: Path, picture: Image.Image, backend: str = "pil") -> dict[str, float]:
    pipeline = transformers.pipeline(
        "image-classification",
        model=str(directory),
        image_processor=transformers.AutoImageProcessor.from_pretrained(directory, backend=backend),
    )
    return {each["label"]: each["score"] for each in pipeline(picture, top_k=None)}


def scored(engine: Engine, picture: Image.Image) -> dict[str, float]:
    found = engine.explain(picture, ["grad_cam"], top_predictions=5).predictions
    return {each.label: each.probability if each.value is None else each.value for each in found}


def packed(directory: Path, store: Path, **options) -> Path:
    return build_archive(f"hf:{directory}", store=store, **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(97, 150), (151, 96), (64, 64)])
def test_predictions_are_those_of_transformers_own_pipeline(directories, tmp_path, family, size):
    packed(directories[family], tmp_path)
    engine = Engine.load(family, store=tmp_path, runtime="eager")
    assert engine.info.labels == tuple(LABELS.values())
    ours = scored(engine, photo(*size))
    theirs = piped(directories[family], photo(*size))
    assert max(theirs.values()) - min(theirs.values()) > 0.1
    # Rounding of float32: sums of some hundred terms, in another order.
    assert ours == pytest.approx(theirs, abs=2e-6)


def test_pictures_resized_by_torchvision_are_nearly_the_same(directories, tmp_path):
    """Its pixels of 8 bits are rounded otherwise than Pillow's in places."""
    packed(directories["swin"], tmp_path)
    engine = Engine.load("swin", store=tmp_path, runtime="eager")
    assert scored(engine, photo()) == pytest.approx(piped(directories["swin"], photo(), "torchvision"), abs=0.02)


@pytest.mark.parametrize(
    ("settings", "outputs"),
    [
        ({"problem_type": "multi_label_classification"}, "sigmoid"),
        ({"problem_type": "regression"}, "value"),
        ({"problem_type": "single_label_classification"}, "softmax"),
    ],
)
def test_the_problem_type_says_what_outputs_are(tmp_path, settings, outputs):
    directory = saved(tmp_path / "mine", lambda: vit(**settings), squashing)
    packed(directory, tmp_path)
    engine = Engine.load("mine", store=tmp_path, runtime="eager")
    assert engine.info.outputs == outputs
    assert scored(engine, photo()) == pytest.approx(piped(directory, photo()), abs=1e-5)


def test_an_archive_holds_all_that_is_needed_and_asks_no_network(directory, tmp_path, monkeypatch):
    def refused(*arguments):
        raise AssertionError(f"asks the network: {arguments}")

    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(socket.socket, "connect", refused)
    path = packed(directory, tmp_path, name="alone")
    shutil.rmtree(directory)
    card = read_card(path)
    assert (card.architecture, card.outputs) == ("hf:ViTForImageClassification", "softmax")
    module, _ = load_package(path)
    assert type(module) is transformers.ViTForImageClassification


@pytest.mark.parametrize("good", [True, False])
def test_whoever_packs_can_ask_the_hub_and_hears_of_it_afterwards(directory, tmp_path, monkeypatch, good):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    logging = transformers.utils.logging
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    if not good:
        changed("config.json", hidden_size=48)(directory)  # which fails while transformers loads it
    with nullcontext() if good else pytest.raises(InvalidInput):
        packed(directory, tmp_path)
    assert constants.HF_HUB_OFFLINE is False
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_weights_of_half_precision_are_kept_as_they_are_in_float32(directory, tmp_path):
    before, _ = load_package(packed(directory, tmp_path, name="whole"))
    weights = load_file(directory / "model.safetensors")
    save_file({name: value.half() for name, value in weights.items()}, directory / "model.safetensors")
    after, _ = load_package(packed(directory, tmp_path))
    for name, value in after.state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, before.state_dict()[name].half().float(), rtol=0, atol=0)


def test_weights_in_several_files_are_read(directory, tmp_path):
    before, _ = load_package(packed(directory, tmp_path, name="one"))
    (directory / "model.safetensors").unlink()
    before.save_pretrained(directory, max_shard_size="20KB")
    assert len(list(directory.glob("model-*.safetensors"))) > 1
    after, _ = load_package(packed(directory, tmp_path, name="several"))
    for name, value in after.state_dict().items():
        torch.testing.assert_close(value, before.state_dict()[name], rtol=0, atol=0)


# How pictures become input


PROCESSORS = {
    "a shorter side and a crop": (lambda: cropping(), 71, (64, 64)),
    "a stretched picture": (lambda: squashing(), (64, 64), (64, 64)),
    "a share of the crop": (lambda: convnext_processor(), 73, (64, 64)),
    "LeViT's own factor": (
        lambda: transformers.LevitImageProcessor(
            size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, resample=3
        ),
        73,
        (64, 64),
    ),
    "stretched and cropped": (
        lambda: transformers.CLIPImageProcessor(
            size={"height": 70, "width": 81}, crop_size={"height": 64, "width": 64}, resample=2
        ),
        (70, 81),
        (64, 64),
    ),
    "not normalised": (lambda: transformers.ViTImageProcessor(size=64, do_normalize=False), (64, 64), (64, 64)),
    "not scaled": (lambda: transformers.ViTImageProcessor(size=64, do_rescale=False), (64, 64), (64, 64)),
    "neither": (
        lambda: transformers.ViTImageProcessor(size=64, do_rescale=False, do_normalize=False, resample=0),
        (64, 64),
        (64, 64),
    ),
    "scaled otherwise": (
        lambda: transformers.ViTImageProcessor(size=64, rescale_factor=1 / 127.5, image_mean=[1.0] * 3),
        (64, 64),
        (64, 64),
    ),
    "EfficientNet's offset": (
        lambda: transformers.EfficientNetImageProcessor(
            size=64, rescale_factor=1 / 127.5, rescale_offset=True, include_top=False, resample=3
        ),
        (64, 64),
        (64, 64),
    ),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_input_is_that_of_the_preprocessor(directory, tmp_path, name):
    processor, resize_px, crop_px = PROCESSORS[name]
    processor().save_pretrained(directory)
    preprocessing = read_card(packed(directory, tmp_path)).preprocessing
    assert (preprocessing.resize_px, preprocessing.crop_px) == (resize_px, crop_px)
    for size in ((crop_px[0] + 1, 2 * crop_px[1] + 30), (177, 90), (90, 91)):
        theirs = transformers.AutoImageProcessor.from_pretrained(directory, backend="pil")(photo(*size))
        pixels, _ = seen(photo(*size), preprocessing)
        ours = ((pixels / 255 - preprocessing.mean) / preprocessing.std).transpose(2, 0, 1)
        assert ours == pytest.approx(np.asarray(theirs["pixel_values"][0]), rel=1e-5, abs=1e-4)


REFUSED_PROCESSORS = {
    "channels turned round": lambda: transformers.MobileViTImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, do_flip_channel_order=True
    ),
    "a crop that is padded": lambda: transformers.CLIPImageProcessor(
        size={"shortest_edge": 48}, crop_size={"height": 64, "width": 64}
    ),
    "no size": lambda: transformers.ViTImageProcessor(do_resize=False),
    "Lanczos": lambda: transformers.ViTImageProcessor(size=64, resample=1),
    "a longest side": lambda: transformers.CLIPImageProcessor(
        size={"shortest_edge": 48, "longest_edge": 64}, do_center_crop=False
    ),
    "a shorter side alone": lambda: transformers.CLIPImageProcessor(size={"shortest_edge": 64}, do_center_crop=False),
    "normalised twice": lambda: transformers.EfficientNetImageProcessor(size=64, include_top=True, resample=3),
}


@pytest.mark.parametrize("name", REFUSED_PROCESSORS)
def test_a_preprocessor_that_does_something_else_is_refused(directory, tmp_path, name):
    REFUSED_PROCESSORS[name]().save_pretrained(directory)
    with pytest.raises(InvalidOption, match=r"preprocessing of \w+ cannot be expressed"):
        packed(directory, tmp_path)
    assert not list(tmp_path.glob("*.mar"))


# Directories that are none


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code was run')",))


def changed(name: str, **changes):
    def change(directory: Path) -> None:
        content = json.loads((directory / name).read_text()) | changes
        (directory / name).write_text(json.dumps(content))

    return change


def pickled(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))


def pickled_in_parts(directory: Path) -> None:
    """An index that safetensors have names a file that is none."""
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save(weights, directory / "pytorch_model.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "pytorch_model.bin")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def cut(directory: Path) -> None:
    data = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(data[: len(data) // 2])


def without(name: str):
    return lambda directory: (directory / name).unlink()


def without_head(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    save_file(
        {name: value for name, value in weights.items() if "classifier" not in name}, directory / "model.safetensors"
    )


def outside(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory.parent / "model.safetensors")
    index = {"metadata": {}, "weight_map": {"classifier.weight": "../model.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


BAD = {
    "code named by the network": (
        changed("config.json", auto_map={"AutoModelForImageClassification": "mine.Mine"}),
        InvalidInput,
        "auto_map",
    ),
    "code named by the preprocessor": (
        changed("preprocessor_config.json", auto_map={"AutoImageProcessor": "mine.Mine"}),
        InvalidInput,
        "auto_map",
    ),
    "a kernel of the Hub": (
        changed("config.json", attn_implementation="someone/kernel"),
        InvalidInput,
        "attn_implementation",
    ),
    "a kernel of the Hub, by its inner name": (
        changed("config.json", _attn_implementation="someone/kernel"),
        InvalidInput,
        "_attn_implementation",
    ),
    "a kernel, further inside": (
        changed("config.json", text_config=[{"attn_implementation": "someone/kernel"}]),
        InvalidInput,
        "attn_implementation",
    ),
    "a quantiser": (
        changed("config.json", quantization_config={"quant_method": "gptq"}),
        InvalidInput,
        "quantization_config",
    ),
    "a file of code": (
        lambda directory: (directory / "modeling.py").write_text("raise SystemExit"),
        InvalidInput,
        "code",
    ),
    "pickled weights": (pickled, InvalidInput, "save_pretrained"),
    "pickled weights in parts": (pickled_in_parts, InvalidInput, "are safetensors that lie .*'pytorch_model.bin'"),
    "weights outside": (outside, InvalidInput, "lie in the directory itself"),
    "an adapter": (lambda directory: (directory / "adapter_config.json").write_text("{}"), InvalidInput, "adapter"),
    "no weights": (without("model.safetensors"), NotFound, "no model.safetensors"),
    "no configuration": (without("config.json"), NotFound, "no config.json"),
    "no preprocessor": (without("preprocessor_config.json"), NotFound, "no preprocessor_config.json"),
    "weights cut off": (cut, InvalidInput, "is not a Hugging Face network"),
    "weights without a head": (without_head, InvalidInput, "missing: classifier"),
    "weights of another size": (changed("config.json", hidden_size=48), InvalidInput, "of another shape: class"),
    "no image classifier": (changed("config.json", architectures=["ViTModel"]), InvalidOption, "ViTModel"),
    "no architecture": (changed("config.json", architectures=None), InvalidOption, "image classification"),
    "an unknown network": (changed("config.json", model_type="magic"), InvalidOption, "image classification"),
    "a list as network": (changed("config.json", model_type=["vit"]), InvalidOption, "image classification"),
    "a network of timm": (changed("config.json", model_type="timm_wrapper"), InvalidOption, "timm:NAME"),
    "a million layers": (changed("config.json", num_hidden_layers=10**6), InvalidInput, "num_hidden_layers 1000000"),
    "a text as size": (changed("config.json", hidden_size="wide"), InvalidInput, "Hugging Face network"),
    "a huge picture": (
        changed("preprocessor_config.json", size={"height": 10**6, "width": 10**6}),
        InvalidOption,
        "cannot be expressed",
    ),
    "an unknown preprocessor": (
        changed("preprocessor_config.json", image_processor_type="Magic"),
        InvalidInput,
        "Hugging Face network",
    ),
    "a configuration that is none": (
        lambda directory: (directory / "config.json").write_text("[1]"),
        InvalidInput,
        "must be an object",
    ),
    "a configuration that is no JSON": (
        lambda directory: (directory / "config.json").write_bytes(b"\xff\x00"),
        InvalidInput,
        "Hugging Face network",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_directory_is_refused_with_the_reason(directory, tmp_path, name):
    change, error, text = BAD[name]
    change(directory)
    with pytest.raises(error, match=text):
        packed(directory, tmp_path)
    assert not list(tmp_path.glob("*.mar"))


def test_a_directory_that_is_not_there_is_told_how_to_get_it(tmp_path):
    with pytest.raises(NotFound, match="hf download NAME --local-dir DIRECTORY"):
        build_archive("hf:google/vit-base-patch16-224", store=tmp_path)


def test_weights_beside_the_directory_are_refused(directory, tmp_path):
    with pytest.raises(InvalidOption, match="are those in it"):
        packed(directory, tmp_path, weights="random")


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_map": {"AutoConfig": "mine.Mine"}},
        {"attn_implementation": "someone/kernel"},
        {"architectures": ["ViTModel"]},
        {"num_hidden_layers": 10**6},
        {"hidden_size": 2**19, "intermediate_size": 2**19},
        {"hidden_size": "wide"},
    ],
)
def test_an_archive_with_another_configuration_is_refused(directory, tmp_path, changes):
    """Whoever loads an archive need not trust its maker."""
    path = packed(directory, tmp_path)
    unpacked = tmp_path / "unpacked"
    shutil.unpack_archive(path, unpacked, "zip")
    changed("config.json", **changes)(unpacked)
    with pytest.raises(CamserveError, match=r"config\.json"):
        load_package(unpacked)


def test_another_configuration_is_another_model(directory, tmp_path):
    """The same weights answer otherwise, and nothing kept of the one may be used for the other."""
    one = packed(directory, tmp_path, name="one")
    changed("config.json", hidden_act="relu")(directory)
    other = packed(directory, tmp_path, name="other")
    hashes = {Engine.load(path.stem, store=tmp_path, runtime="eager").info.weights for path in (one, other)}
    assert len(hashes) == 2
