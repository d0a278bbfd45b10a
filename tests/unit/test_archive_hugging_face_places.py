"""Detectors and segmentation networks as Hugging Face saves them: answers are those of transformers' own processors."""

import json
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from camserve.archive import build_archive, load_package, read_card
from camserve.engine import Engine
from camserve.errors import InvalidInput, InvalidOption

SIDE = 64
LABELS = {index: f"thing {index}" for index in range(5)}
SMALL = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "num_queries": 12}
SMALL |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "id2label": LABELS}


def backbone():
    return transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage1", "stage2"]
    )


def detr():
    config = transformers.DetrConfig(backbone_config=backbone(), **SMALL)
    return transformers.DetrForObjectDetection(config)


def conditional_detr():
    config = transformers.ConditionalDetrConfig(backbone_config=backbone(), **SMALL)
    return transformers.ConditionalDetrForObjectDetection(config)


def yolos():
    config = transformers.YolosConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=[SIDE, SIDE],
        patch_size=16,
        num_detection_tokens=12,
        id2label=LABELS,
    )
    return transformers.YolosForObjectDetection(config)


def square(processor):
    return lambda: processor(size={"height": SIDE, "width": SIDE})


DETECTORS = {
    "detr": (detr, square(transformers.DetrImageProcessor)),
    "conditional_detr": (conditional_detr, square(transformers.ConditionalDetrImageProcessor)),
    "yolos": (yolos, square(transformers.YolosImageProcessor)),
    "conditional_rt": (conditional_detr, square(transformers.RTDetrImageProcessor)),
}


def segformer():
    config = transformers.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
        id2label=LABELS,
    )
    return transformers.SegformerForSemanticSegmentation(config)


def upernet():
    four = {"hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "out_features": [f"stage{at}" for at in range(1, 5)]}
    config = transformers.UperNetConfig(
        backbone_config=transformers.ConvNextConfig(**four),
        hidden_size=16,
        auxiliary_channels=8,
        auxiliary_in_channels=16,
        pool_scales=[1, 2],
        id2label=LABELS,
    )
    return transformers.UperNetForSemanticSegmentation(config)


PLACES = {
    "segformer": (segformer, square(transformers.SegformerImageProcessor)),
    "upernet": (upernet, square(transformers.SegformerImageProcessor)),
}


def saved(directory: Path, network, processor) -> Path:
    torch.manual_seed(3)
    made = network()
    for weight in made.parameters():  # as they are made, all answers are alike
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.25)
    made.save_pretrained(directory)
    processor().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("places")
    return {name: saved(root / name, *family) for name, family in (DETECTORS | PLACES).items()}


def photo(height: int = 97, width: int = 150) -> Image.Image:
    return Image.fromarray(np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8))


def packed(directory: Path, store: Path, **options) -> Path:
    return build_archive(f"hf:{directory}", store=store, **options)


def detected(directory: Path, picture: Image.Image, threshold: float) -> list[tuple[float, str, list[float]]]:
    """What transformers detects in a picture, in its pixels, the best first."""
    processor = transformers.AutoImageProcessor.from_pretrained(directory, backend="pil")
    network = transformers.AutoModelForObjectDetection.from_pretrained(directory).eval()
    with torch.no_grad():
        outputs = network(**processor(picture, return_tensors="pt"))
    size = torch.tensor([[picture.height, picture.width]])
    (found,) = processor.post_process_object_detection(outputs, threshold=threshold, target_sizes=size)
    rows = zip(*(found[name].tolist() for name in ("scores", "labels", "boxes")), strict=True)
    return [(score, LABELS[label], box) for score, label, box in sorted(rows, reverse=True)]


def inside(box: list[float], picture: Image.Image) -> list[float]:
    """A box cut off at the edges of its picture."""
    most = (picture.width, picture.height) * 2
    return [min(max(edge, 0.0), far) for edge, far in zip(box, most, strict=True)]


@pytest.mark.parametrize("family", DETECTORS)
@pytest.mark.parametrize("size", [(97, 150), (64, 64)])
def test_detections_are_those_of_transformers(directories, tmp_path, family, size):
    packed(directories[family], tmp_path)
    engine = Engine.load(family, store=tmp_path, runtime="eager")
    assert (engine.info.outputs, engine.info.labels) == ("boxes", tuple(LABELS.values()))
    picture = photo(*size)
    ours = engine.explain(picture, [], top_predictions=300).predictions
    theirs = detected(directories[family], picture, threshold=0.05)
    assert len(theirs) >= 5
    # RT-DETR's processor keeps as many as there are queries, ours the 300 best.
    for one, (score, label, box) in zip(ours, theirs, strict=family != "conditional_rt"):
        assert one.label == label
        assert one.probability == pytest.approx(score, abs=1e-5)
        assert one.box == pytest.approx(inside(box, picture), abs=1e-2)  # of a hundred pixels, in float32


def test_d_rise_works(directories, tmp_path):
    packed(directories["detr"], tmp_path)
    engine = Engine.load("detr", store=tmp_path, runtime="eager")
    found = engine.explain(photo(), [("d_rise", {"masks": 24, "grid": 4})], ["top2"])
    assert len(found.maps) == 2
    assert found.cost.queries == 24
    assert found.maps[0].score == pytest.approx(found.predictions[0].probability, abs=1e-5)


def test_a_processor_that_keeps_proportions_is_taken_at_its_square(directories, tmp_path, caplog):
    directory = Path(shutil.copytree(directories["detr"], tmp_path / "mine"))
    size = {"shortest_edge": SIDE, "longest_edge": 2 * SIDE}
    transformers.DetrImageProcessor(size=size).save_pretrained(directory)
    card = read_card(packed(directory, tmp_path))
    assert (card.preprocessing.resize_px, card.preprocessing.crop_px) == ((SIDE, SIDE), (SIDE, SIDE))
    assert "DetrImageProcessor keeps proportions: here images are stretched to its square, 64 x 64" in card.source
    assert "keeps proportions" in caplog.text
    engine = Engine.load("mine", store=tmp_path, runtime="eager")
    picture = photo(80, 80)
    ours = engine.explain(picture, [], top_predictions=300).predictions
    for one, (score, label, box) in zip(ours, detected(directory, picture, 0.05), strict=True):
        assert one.label == label
        assert one.probability == pytest.approx(score, abs=1e-5)
        assert one.box == pytest.approx(inside(box, picture), abs=1e-2)


@pytest.mark.parametrize("family", PLACES)
def test_places_are_of_the_classes_that_transformers_finds(directories, tmp_path, family):
    packed(directories[family], tmp_path)
    engine = Engine.load(family, store=tmp_path, runtime="eager")
    assert (engine.info.outputs, engine.info.labels) == ("segmentation", tuple(LABELS.values()))
    processor = transformers.AutoImageProcessor.from_pretrained(directories[family], backend="pil")
    network = transformers.AutoModelForSemanticSegmentation.from_pretrained(directories[family]).eval()
    with torch.no_grad():
        logits = network(**processor(photo(), return_tensors="pt")).logits[0]
    winners = logits.argmax(dim=0)
    expected = {LABELS[index]: float((winners == index).float().mean()) for index in range(5)}
    found = engine.explain(photo(), ["grad_cam", ("rise", {"masks": 8})], ["top1"], top_predictions=5)
    assert {one.label: one.share for one in found.predictions} == pytest.approx(expected, abs=1e-5)
    assert not found.maps[0].degenerate
    index = int(winners.flatten().bincount().argmax())
    own = logits.softmax(dim=0)[index][winners == index].mean()
    assert found.maps[0].score == pytest.approx(float(own), abs=1e-5)


def test_a_backbone_of_timm_is_made_without_asking_the_hub(tmp_path, monkeypatch):
    config = transformers.DetrConfig(use_timm_backbone=True, backbone="resnet18", **SMALL)
    directory = saved(tmp_path / "mine", lambda: transformers.DetrForObjectDetection(config), DETECTORS["detr"][1])
    content = json.loads((directory / "config.json").read_text())
    content["backbone_config"]["use_pretrained_backbone"] = True
    (directory / "config.json").write_text(json.dumps(content))
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **more: asked.append(given) or refuse())
    path = packed(directory, tmp_path)
    load_package(path)
    assert not asked


def refuse():
    raise OSError("there is no network here")


def test_a_backbone_that_is_only_named_is_not_looked_for(directories, tmp_path, monkeypatch):
    directory = Path(shutil.copytree(directories["conditional_detr"], tmp_path / "mine"))
    content = json.loads((directory / "config.json").read_text())
    content |= {"backbone_config": None, "use_timm_backbone": False, "backbone": "someone/network"}
    (directory / "config.json").write_text(json.dumps(content))
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **more: asked.append(given) or refuse())
    with pytest.raises(InvalidInput, match="is not a Hugging Face network"):
        packed(directory, tmp_path)
    assert not asked


def test_detections_that_are_made_in_another_way_are_refused(directories, tmp_path, monkeypatch):
    made = transformers.DetrImageProcessorPil.post_process_object_detection

    def other(self, *given, **more):
        return [found | {"boxes": found["boxes"] + 3} for found in made(self, *given, **more)]

    monkeypatch.setattr(transformers.DetrImageProcessorPil, "post_process_object_detection", other)
    with pytest.raises(
        InvalidOption, match="DetrImageProcessor makes detections of a network's answers in another way"
    ):
        packed(directories["detr"], tmp_path)


def test_a_processor_that_makes_no_detections_is_refused(directories, tmp_path):
    directory = Path(shutil.copytree(directories["detr"], tmp_path / "mine"))
    transformers.ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(directory)
    with pytest.raises(InvalidOption, match="ViTImageProcessor makes detections of other answers than DETR's"):
        packed(directory, tmp_path)


def test_code_in_the_directory_is_refused(directories, tmp_path):
    for name in ("detr", "segformer"):
        directory = Path(shutil.copytree(directories[name], tmp_path / name))
        content = json.loads((directory / "config.json").read_text()) | {"auto_map": {"AutoModel": "mine.Mine"}}
        (directory / "config.json").write_text(json.dumps(content))
        with pytest.raises(InvalidInput, match="auto_map"):
            packed(directory, tmp_path)
