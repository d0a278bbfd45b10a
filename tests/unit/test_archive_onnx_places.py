"""ONNX detectors and segmentation networks: they answer as the PyTorch networks that they were made of."""

import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torchvision
from torch import nn

from camserve.archive import build_archive, read_card
from camserve.engine import Engine
from camserve.errors import InvalidOption, Unsupported
from camserve.methods import Rise
from camserve.types import Item, Preprocessing, Target, Task
from camserve.worker.executor import Executor
from camserve.worker.network import load_network

SAME = 1e-4
"""The goal: two runtimes add up in different orders."""
SIDE = 32
NAMES = ("cat", "dog", "bird")


def exported(network: nn.Module, path: Path, outputs: list[str], size=(2, 3, SIDE, SIDE), dynamic: bool = True) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's age, and of sizes that become constants
        torch.onnx.export(
            network.eval(),
            (torch.rand(size, generator=torch.Generator().manual_seed(0)),),
            str(path),
            input_names=["images"],
            output_names=outputs,
            dynamic_axes={name: {0: "n"} for name in ("images", *outputs)} if dynamic else {},
            opset_version=17,
            dynamo=False,
        )
    return path


class Grid(nn.Module):
    """Makes boxes and logits of classes (n, 64, .) at the places of an image, and of nothing."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first, self.last = nn.Conv2d(3, 12, 5, 4, 2), nn.Conv2d(12, 4 + classes, 3, 1, 1)
        nn.init.normal_(self.last.weight, std=0.5)

    def both(self, x):
        found = self.last(self.first(x).relu()).flatten(2).transpose(1, 2)
        return found[..., 4:], found[..., :4].sigmoid()


class Detr(Grid):
    def forward(self, x):
        return self.both(x)


class Named(Grid):
    """Names its logits of 4 classes, which have the shape of boxes."""

    def forward(self, x):
        return dict(zip(("logits", "pred_boxes"), self.both(x), strict=True))


class Yolo(Grid):
    """Candidates (n, 4 + 3, 64) in pixels, and scores."""

    def forward(self, x):
        logits, boxes = self.both(x)
        return torch.cat([boxes * SIDE, logits[..., :3].sigmoid()], dim=2).transpose(1, 2)


class Listed(Grid):
    """Detects what is in one image, as torchvision's detectors do: what is probable, and does not overlap."""

    def one(self, image):
        logits, shares = self.both(image[None])
        scores, labels = logits[0, :, :3].sigmoid().max(dim=1)
        edges = torch.cat([shares[0, :, :2] * 16, 16 + shares[0, :, 2:] * 16], dim=1)
        kept = torchvision.ops.nms(edges, scores, 0.5)
        kept = kept[scores[kept] > 0.3]
        return edges[kept], labels[kept], scores[kept]


class OfBatch(Listed):
    def forward(self, x):
        return self.one(x[0])


class OfImage(Listed):
    def forward(self, x):
        return self.one(x)


class ByTorch(Listed):
    def forward(self, x):
        return [dict(zip(("boxes", "labels", "scores"), self.one(image), strict=True)) for image in x]


def photo(height: int = 41, width: int = 55) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(7).integers(0, 60, (height, width, 3))
    waves = np.stack([np.sin(x / 4), np.cos(y / 3), np.sin((x + y) / 5)], axis=-1)
    return (95 + 90 * waves + noise).astype(np.uint8)


@pytest.fixture
def labels(tmp_path) -> Path:
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    return tmp_path / "names.txt"


def same_detections(ours: Engine, theirs: Engine) -> None:
    asked = [("d_rise", {"masks": 24, "grid": 4}), ("occlusion", {"positions": 3})], ["top2"]
    came, expected = (each.explain(photo(), *asked, top_predictions=50) for each in (ours, theirs))
    assert len(expected.predictions) >= 3
    for one, other in zip(came.predictions, expected.predictions, strict=True):
        assert one.label == other.label
        assert one.probability == pytest.approx(other.probability, abs=SAME)
        assert one.box == pytest.approx(other.box, abs=100 * SAME)  # pixels, of some tens
    assert len(came.maps) == 4
    for one, other in zip(came.maps, expected.maps, strict=True):
        assert np.abs(one.array - other.array).max() <= 10 * SAME, one.method.name  # boxes differ by their rounding


PLAIN = Preprocessing((SIDE, SIDE), (SIDE, SIDE), (0.0,) * 3, (1.0,) * 3, "bilinear")
CASES = {
    "detr": (Detr, Named, ["logits", "pred_boxes"]),
    "detr-sigmoid": (lambda: Detr(3), lambda: Detr(3), ["a", "b"]),
    "yolo": (Yolo, Yolo, ["output0"]),
}


@pytest.mark.parametrize("decoding", CASES)
def test_a_graph_whose_detections_are_still_to_be_made(tmp_path, labels, decoding):
    make, twin, outputs = CASES[decoding]
    graph = exported(make(), tmp_path / "graph.onnx", outputs)
    path = build_archive(f"onnx:{graph}", store=tmp_path, labels=labels, detections=decoding)
    card = read_card(path)
    assert (card.outputs, card.detections, card.preprocessing) == ("boxes", decoding, PLAIN)
    options = {"preprocessing": PLAIN, "labels": NAMES, "outputs": "boxes", "detections": decoding}
    same_detections(Engine.load("graph", store=tmp_path), Engine(twin().eval(), **options))


@pytest.mark.parametrize(("kind", "size"), [(OfBatch, (1, 3, SIDE, SIDE)), (OfImage, (3, SIDE, SIDE))])
def test_a_graph_that_detects_what_is_in_one_image(tmp_path, labels, kind, size):
    graph = exported(kind(), tmp_path / "graph.onnx", ["x", "y", "z"], size, dynamic=False)
    path = build_archive(f"onnx:{graph}", store=tmp_path, labels=labels)
    assert (read_card(path).outputs, read_card(path).preprocessing) == ("boxes", PLAIN)
    theirs = Engine(ByTorch().eval(), preprocessing=PLAIN, labels=NAMES, outputs="boxes")
    same_detections(Engine.load("graph", store=tmp_path), theirs)


def test_what_a_graph_returns_says_what_is_to_be_told(tmp_path, labels):
    graph = exported(Yolo(), tmp_path / "graph.onnx", ["output0"])
    with pytest.raises(Unsupported, match=r"it returned a tensor \(2, 7, 64\); .*say --detections yolo$"):
        build_archive(f"onnx:{graph}", store=tmp_path, labels=labels, outputs="boxes")
    with pytest.raises(Unsupported, match=r"a tensor .images, candidates, 5 . classes."):
        build_archive(f"onnx:{graph}", store=tmp_path, labels=labels, detections="yolo5")
    with pytest.raises(InvalidOption, match="give the names of all"):
        build_archive(f"onnx:{graph}", store=tmp_path, detections="yolo")


def test_a_detector_has_no_layer(tmp_path, labels):
    graph = exported(OfBatch(), tmp_path / "graph.onnx", ["x", "y", "z"], (1, 3, SIDE, SIDE), dynamic=False)
    with pytest.raises(InvalidOption, match="there is no layer 'x' in a graph that detects"):
        build_archive(f"onnx:{graph}", store=tmp_path, labels=labels, layer="x")


class Places(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.last = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 3, 1)

    def forward(self, x):
        return self.last(self.first(x).relu())


def test_segmentation_at_a_layer_and_without(tmp_path):
    graph = exported(Places(), tmp_path / "places.onnx", ["out"])
    path = build_archive(f"onnx:{graph}", store=tmp_path, outputs="segmentation", layer="/first/Conv_output_0")
    card = read_card(path)
    assert card.preprocessing.resize_px == card.preprocessing.crop_px == (SIDE, SIDE)
    ours = Engine.load("places", store=tmp_path)
    theirs = Engine(Places().eval(), preprocessing=card.preprocessing, outputs="segmentation", layer="first")
    methods = [("rise", {"masks": 24}), ("occlusion", {"positions": 3}), "score_cam", "recipro_cam"]
    targets = ["top2", "region:5,5,30,30:1"]
    came, expected = (each.explain(photo(), methods, targets, top_predictions=3) for each in (ours, theirs))
    assert [one.share for one in came.predictions] == pytest.approx(
        [one.share for one in expected.predictions], abs=SAME
    )
    assert len(came.maps) == len(expected.maps) >= 8
    for one, other in zip(came.maps, expected.maps, strict=True):
        assert np.abs(one.array - other.array).max() <= SAME, one.method.name


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second, self.head = nn.Conv2d(3, 6, 3, 4, 1), nn.Conv2d(6, 6, 3, 1, 1), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.second(self.first(x).relu()).relu().mean(dim=(-2, -1)) * 4)


def test_recipro_cam_runs_the_tail_of_a_graph(tmp_path):
    graph = exported(Small(), tmp_path / "small.onnx", ["scores"])
    build_archive(f"onnx:{graph}", store=tmp_path, preprocessing=PLAIN, layer="/second/Conv_output_0")
    theirs = Engine(Small().eval(), preprocessing=PLAIN, layer="second")
    came, expected = (
        each.explain(photo(), ["recipro_cam"], [0, 2]).maps for each in (Engine.load("small", store=tmp_path), theirs)
    )
    for one, other in zip(came, expected, strict=True):
        assert np.ptp(other.array) > 0.5
        assert np.abs(one.array - other.array).max() <= SAME


class NoNumber(Small):
    """Has no answer where a corner is as red as can be."""

    def forward(self, x):
        return super().forward(x) + 0 * (0.999 - x[:, :1, 0, 0]).log()


def test_outputs_that_are_no_numbers_fail_their_item_alone(tmp_path):
    graph = exported(NoNumber(), tmp_path / "small.onnx", ["scores"])
    path = build_archive(f"onnx:{graph}", store=tmp_path, preprocessing=PLAIN)
    network = load_network(path)
    plain = np.full((SIDE, SIDE, 3), 0.25, np.float32)
    bad = plain.copy()
    bad[0, 0] = 1.0
    items = [Item(image, (Target(index=1),), (Task(0, Rise(masks=4), 0, 4),)) for image in (bad, plain)]
    refused, answered = Executor(network).execute(items).outcomes
    assert isinstance(refused, Unsupported)
    assert "not finite" in str(refused)
    (alone,) = Executor(network).execute(items[1:]).outcomes
    assert [one.probability for one in answered.predictions] == [one.probability for one in alone.predictions]


def test_labels_that_are_whole_numbers_do_not_disturb_a_classifier(tmp_path):
    """A second output of whole numbers is what is most probable."""
    graph = exported(Small(), tmp_path / "small.onnx", ["scores"])
    model = onnx.load(graph)
    model.graph.node.append(onnx.helper.make_node("ArgMax", ["scores"], ["label"], axis=1, keepdims=0))
    model.graph.output.append(onnx.helper.make_tensor_value_info("label", onnx.TensorProto.INT64, ["n"]))
    onnx.save(model, tmp_path / "both.onnx")
    for name in ("small", "both"):
        build_archive(f"onnx:{tmp_path / name}.onnx", store=tmp_path, preprocessing=PLAIN)
    one, other = (Engine.load(name, store=tmp_path).explain(photo(), []).predictions for name in ("small", "both"))
    assert [each.probability for each in one] == [each.probability for each in other]
