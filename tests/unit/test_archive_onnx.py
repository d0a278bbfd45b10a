"""ONNX graphs as networks: they answer as the PyTorch networks that they were made of, and open no other files."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from camserve.archive import build_archive, load_package, read_card
from camserve.engine import Engine
from camserve.errors import CamserveError, InvalidInput, InvalidOption, NotFound, Unsupported
from camserve.types import Preprocessing
from camserve.types.offered import offered

SAME = 1e-4
"""The goal: two runtimes add up in different orders, and a map is divided by its largest number."""
SIDE = 64
PLAIN = Preprocessing(SIDE, (SIDE, SIDE), (0.5,) * 3, (0.25,) * 3)


def exported(
    network: nn.Module, path: Path, size=(3, SIDE, SIDE), dynamic: bool = True, images: int = 2, dtype=torch.float32
) -> Path:
    names = {"images": {0: "n"}, "scores": {0: "n"}} if dynamic else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's age, and of sizes that become constants
        torch.onnx.export(
            network.eval(),
            (torch.rand(images, *size, generator=torch.Generator().manual_seed(0)).to(dtype),),
            str(path),
            input_names=["images"],
            output_names=["scores"],
            dynamic_axes=names,
            opset_version=17,
            dynamo=False,
        )
    return path


class Small(nn.Module):
    """A convolutional network with a shortcut around its second layer."""

    def __init__(self, channels: int = 3, classes: int = 4) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Conv2d(channels, 6, 3, 4, 1), nn.Conv2d(6, 6, 3, 1, 1)
        self.head = nn.Linear(6, classes)

    def forward(self, x):
        low = self.first(x).relu()
        high = self.second(low).relu()
        return self.head((low + high).mean(dim=(-2, -1)) * 4)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return exported(Small(), tmp_path_factory.mktemp("onnx") / "small.onnx")


def tensors(path: Path) -> list[str]:
    return [name for node in onnx.load(path).graph.node for name in node.output]


def packed(path: Path, store: Path, **options) -> Path:
    return build_archive(f"onnx:{path}", store=store, **options)


def engine(path: Path, store: Path, **options) -> Engine:
    return Engine.load(packed(path, store, **options).stem, store=store)


def photo(height: int = 80, width: int = 97) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(7).integers(0, 60, (height, width, 3))
    waves = np.stack([np.sin(x / 9), np.cos(y / 7), np.sin((x + y) / 11)], axis=-1)
    return (95 + 90 * waves + noise).astype(np.uint8)


METHODS = [
    ("rise", {"masks": 60}),
    ("score_cam", {}),
    ("occlusion", {"positions": 4}),
    ("eigen_cam", {}),
    ("ss_cam", {"samples": 3}),
    ("is_cam", {"samples": 3}),
    ("ablation_cam", {}),
]


def digits(store: Path):
    """The digits network as PyTorch runs it, and its graph; its layer by both names."""
    module, card = load_package(build_archive("digits", store=store))
    return module, card, "features.4.2", "/features/features.4/features.4.2/Relu_output_0"


def resnet(store: Path):
    preprocessing = Preprocessing(72, (SIDE, SIDE), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear")
    path = build_archive(
        "torchvision:resnet18", weights="random", store=store, name="resnet", preprocessing=preprocessing
    )
    module, card = load_package(path)
    return module, card, "layer1.1", "/layer1/layer1.1/relu_1/Relu_output_0"


@pytest.mark.parametrize(("make", "methods"), [(digits, METHODS), (resnet, METHODS[:3])])
def test_the_graph_of_a_network_answers_as_the_network_does(tmp_path, make, methods):
    module, card, layer, tensor = make(tmp_path)
    channels, size = card.preprocessing.channels, card.preprocessing.crop_px
    graph = exported(module, tmp_path / "graph.onnx", (channels, *size))
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps(card.labels))
    theirs = Engine.load(card.name, store=tmp_path, runtime="eager")
    ours = engine(graph, tmp_path, layer=tensor, labels=labels, preprocessing=card.preprocessing, name="ours")
    asked = {"targets": [0, "top2"], "evaluate": True, "evaluation_steps": 4}
    expected = theirs.explain(photo(), methods, layer=layer, **asked)
    came = ours.explain(photo(), methods, **asked)
    assert [each.label for each in came.predictions] == [each.label for each in expected.predictions]
    probabilities = [each.probability for each in expected.predictions]
    assert [each.probability for each in came.predictions] == pytest.approx(probabilities, abs=SAME)
    assert len(came.maps) == len(expected.maps) == 3 * len(methods)
    for one, other in zip(came.maps, expected.maps, strict=True):
        assert np.abs(one.array - other.array).max() <= SAME, one.method.name
        assert one.faithfulness.insertion == pytest.approx(other.faithfulness.insertion, abs=SAME)
    assert sum(not one.degenerate for one in came.maps) >= len(methods)


def test_methods_that_work_follow_from_the_graph(small, tmp_path):
    alone = engine(small, tmp_path).info
    assert set(offered(alone)) >= {"rise", "occlusion"}
    assert not {"score_cam", "eigen_cam", "grad_cam", "integrated_gradients"} & set(offered(alone))
    at_layer = engine(small, tmp_path, name="cut", layer="/second/Conv_output_0").info
    assert {"rise", "occlusion", "score_cam", "ss_cam", "is_cam", "eigen_cam", "ablation_cam"} <= set(offered(at_layer))
    assert not {"grad_cam", "integrated_gradients", "guided_backprop", "attention_rollout"} & set(offered(at_layer))
    (layer,) = at_layer.layers
    assert (layer.name, layer.channels, layer.height, layer.width) == ("/second/Conv_output_0", 6, 16, 16)
    assert at_layer.runtime.name == "onnx"


@pytest.mark.parametrize("method", ["grad_cam", "integrated_gradients", "score_cam"])
def test_the_other_methods_say_why_they_do_not(small, tmp_path, method):
    with pytest.raises(Unsupported, match=r"ONNX.*the methods that work: .*rise"):
        engine(small, tmp_path).explain(photo(), [method])


@pytest.mark.parametrize("precision", ["exact", "auto", "bfloat16"])
def test_a_graph_is_run_in_its_own_precision(small, tmp_path, precision):
    ours = engine(small, tmp_path)
    if precision == "bfloat16":
        with pytest.raises(Unsupported, match="an ONNX graph is run as it is"):
            ours.explain(photo(), [("rise", {"masks": 4})], precision=precision)
    else:
        assert ours.explain(photo(), [("rise", {"masks": 4})], precision=precision).cost.precision == "exact"


@pytest.mark.parametrize("wanted", ["eager", "onnx", "auto"])
def test_every_choice_of_a_runtime_is_that_of_the_graph(small, tmp_path, wanted):
    packed(small, tmp_path)
    assert Engine.load("small", store=tmp_path, runtime=wanted).info.runtime.name == "onnx"


# Graphs of other shapes


def scores(found: Engine, picture: np.ndarray | None = None) -> list[float]:
    answer = found.explain(photo() if picture is None else picture, [("rise", {"masks": 6})], [0], top_predictions=9)
    return [each.probability for each in sorted(answer.predictions, key=lambda each: each.index)]


@pytest.mark.parametrize("layer", [None, "/Add_output_0"])
@pytest.mark.parametrize("images", [1, 3])
def test_a_fixed_number_of_images_is_kept_to(small, tmp_path, images, layer):
    fixed = exported(Small(), tmp_path / "fixed.onnx", dynamic=False, images=images)
    expected = engine(small, tmp_path).explain(photo(), [("rise", {"masks": 7})], [1])
    came = engine(fixed, tmp_path, layer=layer).explain(photo(), [("rise", {"masks": 7})], [1])
    assert came.maps[0].array == pytest.approx(expected.maps[0].array, abs=SAME)


class OneByOne(Small):
    """Has the number of images in its graph, whatever its axes are called."""

    def forward(self, x):
        return super().forward(x).reshape(1, 4)


def test_a_graph_that_takes_one_image_though_it_says_any_is_run_one_by_one(small, tmp_path):
    one = exported(OneByOne(), tmp_path / "one.onnx", images=1)
    assert scores(engine(one, tmp_path)) == pytest.approx(scores(engine(small, tmp_path)), abs=SAME)


class ChannelsLast(Small):
    def forward(self, x):
        return super().forward(x.permute(0, 3, 1, 2))


def test_channels_may_come_last(small, tmp_path):
    last = exported(ChannelsLast(), tmp_path / "last.onnx", (SIDE, SIDE, 3))
    assert scores(engine(last, tmp_path)) == pytest.approx(scores(engine(small, tmp_path)), abs=SAME)


def test_half_precision_is_taken_as_it_is(small, tmp_path):
    half = exported(Small().half(), tmp_path / "half.onnx", dtype=torch.float16)
    # float16 has three digits.
    assert scores(engine(half, tmp_path)) == pytest.approx(scores(engine(small, tmp_path)), abs=5e-3)


def test_grey_images_are_said_how_to_be_made(tmp_path):
    grey = exported(Small(channels=1), tmp_path / "grey.onnx", (1, SIDE, SIDE))
    with pytest.raises(InvalidOption, match="--resize, --crop, --mean and --std"):
        packed(grey, tmp_path)
    preprocessing = Preprocessing(SIDE, (SIDE, SIDE), (0.5,), (0.25,))
    assert engine(grey, tmp_path, preprocessing=preprocessing).info.channels == 1


class Several(Small):
    def forward(self, x):
        found = super().forward(x)
        return found, -found


def test_one_of_several_outputs_is_explained(small, tmp_path):
    path = tmp_path / "several.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Several().eval(),
            (torch.rand(2, 3, SIDE, SIDE),),
            str(path),
            input_names=["images"],
            output_names=["one", "other"],
            dynamic_axes={name: {0: "n"} for name in ("images", "one", "other")},
            dynamo=False,
        )
    first = scores(engine(path, tmp_path, output="one"))
    other = scores(engine(path, tmp_path, name="other", output="other"))
    assert first == pytest.approx(scores(engine(small, tmp_path)), abs=SAME)
    assert np.argsort(first).tolist() == np.argsort(other)[::-1].tolist()


def renamed(path: Path, old: str, new: str) -> Path:
    model = onnx.load(path)
    for node in model.graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                names[index] = new if name == old else name
    target = path.with_name("renamed.onnx")
    onnx.save(model, target)
    return target


@pytest.mark.parametrize("name", ["model/relu:0", "a.b.c:12", "x:relu0", "dots.and spaces"])
def test_a_layer_may_be_called_as_exporters_call_it(small, tmp_path, name):
    graph = renamed(Path(shutil.copy(small, tmp_path / "copy.onnx")), "/second/Conv_output_0", name)
    ours = engine(graph, tmp_path, layer=name)
    assert [each.name for each in ours.info.layers] == [name]
    expected = engine(small, tmp_path, layer="/second/Conv_output_0").explain(photo(), ["score_cam", "ablation_cam"])
    came = ours.explain(photo(), ["score_cam", "ablation_cam"])
    for one, other in zip(came.maps, expected.maps, strict=True):
        assert one.array == pytest.approx(other.array, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "text"), [("a..b", "another name"), ("trunk", "another name"), ("half", "another name")]
)
def test_a_layer_that_cannot_be_addressed_is_refused(small, tmp_path, name, text):
    graph = renamed(Path(shutil.copy(small, tmp_path / "copy.onnx")), "/second/Conv_output_0", name)
    with pytest.raises(InvalidOption, match="give the tensor another name"):
        packed(graph, tmp_path, layer=name)


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        ("/second/Conv_output", "close to it: /second/Conv_output_0"),
        ("scores", "no score depends on the tensor 'scores'"),
        ("/ReduceMean_output_0", "no layer"),
    ],
)
def test_a_layer_that_is_none_is_refused_with_the_reason(small, tmp_path, layer, text):
    with pytest.raises((InvalidOption, Unsupported), match=text):
        packed(small, tmp_path, layer=layer)


def test_a_shortcut_around_the_layer_keeps_what_the_image_shows(small, tmp_path):
    """Ablation-CAM switches off channels of the layer, and not of the shortcut."""
    module = Small().eval()
    picture = photo(SIDE, SIDE)
    ours = engine(small, tmp_path, layer="/second/Conv_output_0", preprocessing=PLAIN)
    theirs = Engine(module, preprocessing=PLAIN, layer="second")
    for method in ("ablation_cam", "score_cam"):
        came, expected = (each.explain(picture, [method], [2]).maps[0].array for each in (ours, theirs))
        assert came == pytest.approx(expected, abs=SAME)


def with_shortcut_and_fixed(path: Path) -> Path:
    return exported(Small(), path / "fixed.onnx", dynamic=False, images=1)


def test_a_cut_that_others_pass_by_needs_a_dynamic_number_of_images(tmp_path):
    with pytest.raises(InvalidOption, match="export it with a dynamic number of images"):
        packed(with_shortcut_and_fixed(tmp_path), tmp_path, layer="/second/Conv_output_0")


# Numbers beside the file


@pytest.fixture
def outside(small, tmp_path) -> Path:
    """A graph whose numbers lie in a file beside it."""
    folder = tmp_path / "outside"
    folder.mkdir()
    onnx.save(
        onnx.load(small),
        folder / "graph.onnx",
        save_as_external_data=True,
        location="numbers.bin",
        size_threshold=0,
        convert_attribute=True,
    )
    return folder / "graph.onnx"


def test_numbers_beside_the_file_are_packed_with_it(outside, small, tmp_path):
    path = packed(outside, tmp_path)
    shutil.rmtree(outside.parent)
    found = Engine.load(path.stem, store=tmp_path)
    assert scores(found) == pytest.approx(scores(engine(small, tmp_path)), abs=1e-6)


def relocated(path: Path, **changes: str) -> None:
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = changes.get(entry.key, entry.value)
    onnx.save(model, path)


OUTSIDE = {
    "above the folder": ({"location": "../numbers.bin"}, "in its own folder"),
    "anywhere": ({"location": "/etc/passwd"}, "in its own folder"),
    "nowhere": ({"location": ""}, "in its own folder"),
    "not there": ({"location": "others.bin"}, "is not there"),
    "behind the end": ({"offset": "1000000"}, "reach beyond"),
    "too long": ({"length": "1000000"}, "reach beyond"),
    "before the start": ({"offset": "-4"}, "reach beyond"),
    "not a number": ({"offset": "four"}, "is not an ONNX network"),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_numbers_that_lie_elsewhere_are_refused(outside, tmp_path, name):
    changes, text = OUTSIDE[name]
    shutil.copy(outside.parent / "numbers.bin", tmp_path / "numbers.bin")
    relocated(outside, **changes)
    with pytest.raises(InvalidInput, match=text):
        packed(outside, tmp_path)
    assert not list(tmp_path.glob("*.mar"))


def test_a_link_does_not_lead_out_of_the_folder(outside, tmp_path):
    numbers = (outside.parent / "numbers.bin").rename(tmp_path / "secret.bin")
    (outside.parent / "numbers.bin").symlink_to(numbers)
    with pytest.raises(InvalidInput, match="in its own folder"):
        packed(outside, tmp_path)


def test_an_archive_whose_graph_names_other_files_is_refused(outside, small, tmp_path):
    """Whoever loads an archive need not trust its maker: ONNX Runtime would look in the current folder."""
    path, unpacked = packed(small, tmp_path), tmp_path / "unpacked"
    shutil.unpack_archive(path, unpacked, "zip")
    (unpacked / "network.onnx").write_bytes(outside.read_bytes())
    with pytest.raises(InvalidInput, match="lie in other files"):
        load_package(unpacked)


def test_a_graph_of_too_many_bytes_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "huge.onnx"
    with path.open("wb") as file:
        file.truncate(2**31)  # a hole, without blocks on the disk
    monkeypatch.setattr(Path, "read_bytes", None)
    with pytest.raises(InvalidInput, match="at most 2147483647 bytes, has 2147483648"):
        packed(path, tmp_path)


def test_numbers_of_too_many_bytes_are_refused_before_they_are_read(outside, tmp_path, monkeypatch):
    with (outside.parent / "numbers.bin").open("ab") as file:
        file.truncate(2**31)
    relocated(outside, offset="0", length=str(2**30))
    monkeypatch.setattr(onnx, "load_external_data_for_model", None)
    with pytest.raises(InvalidInput, match="with all of its numbers"):
        packed(outside, tmp_path)


# Files that are no network, or another one


def graph(nodes, inputs, outputs, initializers=(), opset=17, domains=(), functions=()) -> bytes:
    model = helper.make_model(
        helper.make_graph(list(nodes), "g", list(inputs), list(outputs), list(initializers)),
        opset_imports=[helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)],
        functions=list(functions),
    )
    model.ir_version = 8
    return model.SerializeToString()


def image(name="images", shape=("n", 3, SIDE, SIDE), kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def pooled(kind=TensorProto.FLOAT, **images) -> dict:
    """A graph whose scores are the means of the channels."""
    return {
        "nodes": [helper.make_node("ReduceMean", ["images"], ["scores"], axes=[2, 3], keepdims=0)],
        "inputs": [image(kind=kind, **images)],
        "outputs": [helper.make_tensor_value_info("scores", kind, ("n", 3))],
    }


def test_the_graph_that_is_changed_below_is_a_good_one(tmp_path):
    (tmp_path / "good.onnx").write_bytes(graph(**pooled()))
    assert len(scores(engine(tmp_path / "good.onnx", tmp_path))) == 3


def custom(domain: str, kind: str = "Magic", **options) -> bytes:
    given = pooled()
    given["nodes"].append(helper.make_node(kind, ["scores"], ["more"], domain=domain, **options))
    given["outputs"] = [helper.make_tensor_value_info("more", TensorProto.FLOAT, ("n", 3))]
    return graph(**given, domains=(domain,))


def hidden_custom() -> bytes:
    """A custom operator in the branch of an If."""
    result = [helper.make_tensor_value_info("made", TensorProto.FLOAT, ("n", 3))]
    branch = helper.make_graph([helper.make_node("Magic", ["scores"], ["made"], domain="evil")], "branch", [], result)
    given = pooled()
    yes = numpy_helper.from_array(np.array(True), "yes")
    given["nodes"].append(helper.make_node("If", ["yes"], ["more"], then_branch=branch, else_branch=branch))
    given["outputs"] = [helper.make_tensor_value_info("more", TensorProto.FLOAT, ("n", 3))]
    return graph(**given, initializers=[yes], domains=("evil",))


def two_inputs() -> bytes:
    given = pooled()
    given["nodes"].insert(0, helper.make_node("Add", ["left", "right"], ["images"]))
    given["inputs"] = [image("left"), image("right")]
    return graph(**given)


def integers() -> bytes:
    nodes = [helper.make_node("ArgMax", ["images"], ["scores"], axis=1)]
    return graph(nodes, [image()], [helper.make_tensor_value_info("scores", TensorProto.INT64, ("n", 1, SIDE, SIDE))])


BAD = {
    "empty": (lambda small: b"", InvalidInput, "is not an ONNX network"),
    "garbage": (lambda small: b"\xff\x00\x80garbage" * 9, InvalidInput, "is not an ONNX network"),
    "cut off": (lambda small: small[: len(small) // 2], InvalidInput, "is not an ONNX network"),
    "text": (lambda small: b"graph {}", InvalidInput, "is not an ONNX network"),
    "two image inputs": (lambda small: two_inputs(), InvalidInput, "must have one input.*has 2 .'left', 'right'"),
    "dynamic sizes": (
        lambda small: graph(**pooled(shape=("n", 3, "h", "w"))),
        InvalidOption,
        "--resize, --crop, --mean and --std",
    ),
    "dynamic channels": (lambda small: graph(**pooled(shape=("n", "c", SIDE, SIDE))), InvalidInput, "fixed number of"),
    "three axes": (lambda small: graph(**pooled(shape=(3, SIDE, SIDE))), InvalidInput, "has 3 axes"),
    "integers as images": (
        lambda small: graph(**pooled(kind=TensorProto.INT32)),
        InvalidInput,
        "must be of float32, float16 or float64, is INT32",
    ),
    "integers as scores": (lambda small: integers(), InvalidInput, "no tensor of numbers"),
    "a custom operator": (lambda small: custom("evil"), InvalidInput, "it has evil.Magic"),
    "a custom operator in a branch": (lambda small: hidden_custom(), InvalidInput, "it has evil.Magic"),
    "an operator that opens files": (
        lambda small: custom("com.microsoft", "EPContext", ep_cache_context="/etc/passwd"),
        InvalidInput,
        "it has com.microsoft.EPContext",
    ),
    "an operator that nobody knows": (lambda small: custom("", "Magic"), InvalidInput, "Magic"),
    "an opset of the future": (lambda small: graph(**pooled(), opset=99), InvalidInput, "opset 99.*at most"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_with_the_reason(small, tmp_path, capfd, name):
    make, error, text = BAD[name]
    (tmp_path / "bad.onnx").write_bytes(make(small.read_bytes()))
    with pytest.raises(error, match=text):
        packed(tmp_path / "bad.onnx", tmp_path)
    assert not list(tmp_path.glob("*.mar"))
    assert "onnxruntime" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["empty", "garbage", "cut off", "two image inputs", "a custom operator"])
def test_an_archive_with_another_graph_is_refused(small, tmp_path, name):
    path, unpacked = packed(small, tmp_path), tmp_path / "unpacked"
    shutil.unpack_archive(path, unpacked, "zip")
    (unpacked / "network.onnx").write_bytes(BAD[name][0](small.read_bytes()))
    with pytest.raises(CamserveError, match=r"network\.onnx"):
        load_package(unpacked)


def test_sizes_that_are_dynamic_may_be_said(tmp_path):
    (tmp_path / "any.onnx").write_bytes(graph(**pooled(shape=("n", 3, "h", "w"))))
    assert engine(tmp_path / "any.onnx", tmp_path, preprocessing=PLAIN).info.input_size == (SIDE, SIDE)


def test_functions_of_the_file_itself_are_no_custom_operators(tmp_path):
    """PyTorch's newer exporter writes them."""
    body = [helper.make_node("Relu", ["x"], ["half"]), helper.make_node("Identity", ["half"], ["y"])]
    function = helper.make_function("own", "Step", ["x"], ["y"], body, [helper.make_opsetid("", 17)])
    given = pooled()
    given["nodes"].insert(0, helper.make_node("Step", ["pixels"], ["images"], domain="own"))
    given["inputs"] = [image("pixels")]
    (tmp_path / "own.onnx").write_bytes(graph(**given, domains=("own",), functions=[function]))
    assert len(scores(engine(tmp_path / "own.onnx", tmp_path))) == 3
    assert engine(tmp_path / "own.onnx", tmp_path, name="cut", layer="images").info.layers[0].channels == 3


def test_a_file_that_is_not_there_and_weights_beside_it_are_refused(small, tmp_path):
    with pytest.raises(NotFound, match="there is no file"):
        packed(tmp_path / "none.onnx", tmp_path)
    with pytest.raises(InvalidOption, match="are those in it"):
        packed(small, tmp_path, weights="random")


def test_the_card_says_where_the_graph_came_from(small, tmp_path):
    card = read_card(packed(small, tmp_path))
    assert card.architecture == "onnx:small.onnx"
    assert card.source.startswith("ONNX file small.onnx, sha256 ")
    assert card.preprocessing.crop_px == (SIDE, SIDE)


def test_another_graph_is_another_model(small, tmp_path):
    torch.manual_seed(2)
    network = Small()
    nn.init.zeros_(network.head.bias)
    other = exported(network, tmp_path / "other.onnx")
    assert engine(small, tmp_path).info.weights != engine(other, tmp_path).info.weights
