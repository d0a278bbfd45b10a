"""Programs of torch.export as networks: they answer as the networks that were exported, and nothing in them is run."""

import io
import json
import os
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from camserve.archive import build_archive, load_package, read_card
from camserve.engine import Engine
from camserve.errors import CamserveError, InvalidInput, InvalidOption, NotFound, Unsupported
from camserve.types import Preprocessing
from camserve.types.offered import offered

SIDE = 32
SAME = 1e-4
"""The goal; the operations are the same, and a map is divided by its largest number."""
PLAIN = Preprocessing(SIDE, (SIDE, SIDE), (0.5,) * 3, (0.25,) * 3)
ANY = {0: torch.export.Dim("n")}


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, 3, 2, 1)
        self.norm, self.relu = nn.BatchNorm2d(outputs), nn.ReLU()

    def forward(self, x):
        return self.relu(self.norm(self.convolution(x)))


class Small(nn.Module):
    """A convolutional network with a shortcut around its third layer, and a constant."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.features = nn.Sequential(Block(channels, 6), Block(6, 8))
        self.more, self.head = nn.Conv2d(8, 8, 3, 1, 1), nn.Linear(8, 4)

    def forward(self, x):
        low = self.features(x)
        high = self.more(low).relu() * torch.tensor(1.5).to(low)
        return self.head((low + high).mean(dim=(-2, -1)) * 4)


def exported(network: nn.Module, path: Path, images=None, shapes=ANY) -> Path:
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) if images is None else images
    given = images if isinstance(images, tuple) else (images,)
    program = torch.export.export(network.eval(), given, dynamic_shapes=None if shapes is None else (shapes,))
    torch.export.save(program, path)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return exported(Small(), tmp_path_factory.mktemp("export") / "small.pt2")


def packed(path: Path, store: Path, **options) -> Path:
    return build_archive(f"export:{path}", store=store, **{"preprocessing": PLAIN, **options})


def engine(path: Path, store: Path, **options) -> Engine:
    return Engine.load(packed(path, store, **options).stem, store=store, runtime="eager")


def photo(height: int = 40, width: int = 51) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(7).integers(0, 60, (height, width, 3))
    waves = np.stack([np.sin(x / 5), np.cos(y / 4), np.sin((x + y) / 6)], axis=-1)
    return (95 + 90 * waves + noise).astype(np.uint8)


METHODS = [("rise", {"masks": 40}), "score_cam", ("occlusion", {"positions": 4}), "grad_cam", "integrated_gradients"]


def test_a_program_answers_as_the_network_does(small, tmp_path):
    theirs = Engine(Small().eval(), preprocessing=PLAIN)
    ours = engine(small, tmp_path)
    assert [each.name for each in ours.info.layers if ":" not in each.name] == [
        each.name for each in theirs.info.layers if ":" not in each.name
    ]
    asked = {"targets": [0, "top2"], "layer": "features.1", "evaluate": True, "evaluation_steps": 4}
    expected, came = (each.explain(photo(), METHODS, **asked) for each in (theirs, ours))
    probabilities = [each.probability for each in expected.predictions]
    assert [each.probability for each in came.predictions] == pytest.approx(probabilities, abs=SAME)
    assert len(came.maps) == len(expected.maps)
    for one, other in zip(came.maps, expected.maps, strict=True):
        assert np.abs(one.array - other.array).max() <= SAME, one.method.name
        assert one.faithfulness.insertion == pytest.approx(other.faithfulness.insertion, abs=SAME)
    assert sum(not one.degenerate for one in came.maps) >= len(METHODS)


@pytest.mark.parametrize("images", [1, 3])
def test_a_fixed_number_of_images_is_kept_to_and_layers_say_why_not(small, tmp_path, images):
    fixed = exported(Small(), tmp_path / "fixed.pt2", torch.rand(images, 3, SIDE, SIDE), shapes=None)
    expected = engine(small, tmp_path).explain(photo(), [METHODS[0], METHODS[2]], [1])
    ours = engine(fixed, tmp_path)
    came = ours.explain(photo(), [METHODS[0], METHODS[2]], [1])
    for one, other in zip(came.maps, expected.maps, strict=True):
        assert one.array == pytest.approx(other.array, abs=SAME)
    assert not {"grad_cam", "score_cam", "integrated_gradients"} & set(offered(ours.info))
    with pytest.raises(
        Unsupported, match=rf"exported for {images} image.*dynamic_shapes=.*the methods that work: .*rise"
    ):
        ours.explain(photo(), ["grad_cam"])


def test_an_archive_holds_the_weights_once_and_needs_no_file(small, tmp_path):
    copy = tmp_path / "copy.pt2"
    copy.write_bytes(small.read_bytes())
    path = packed(copy, tmp_path)
    copy.unlink()
    card = read_card(path)
    assert card.architecture == "export:copy.pt2"
    assert card.source.startswith("program of torch.export copy.pt2, sha256 ")
    module, _ = load_package(path)
    x = torch.rand(3, 3, SIDE, SIDE)
    with torch.no_grad():
        torch.testing.assert_close(module(x), Small().eval()(x), rtol=0, atol=1e-6)
    assert not module.state_dict()


class AsDict(Small):
    def forward(self, x):
        found = super().forward(x)
        return {"logits": found, "other": (-found, found[:, :1])}


def test_outputs_in_a_dict_or_tuple_are_found(small, tmp_path):
    expected = engine(small, tmp_path).explain(photo(), [], top_predictions=4).predictions
    found = (
        engine(exported(AsDict(), tmp_path / "dict.pt2"), tmp_path).explain(photo(), [], top_predictions=4).predictions
    )
    assert [one.probability for one in found] == pytest.approx([one.probability for one in expected], abs=1e-6)


class Ordered(Small):
    """Returns a class of its own that holds tensors by name."""

    def forward(self, x):
        return OrderedDict(logits=super().forward(x))


@dataclass
class Found:
    logits: torch.Tensor


class Unknown(Small):
    def forward(self, x):
        return Found(super().forward(x))


def test_a_class_of_outputs_that_is_not_known_is_refused(tmp_path):
    torch.export.register_dataclass(Found, serialized_type_name="tests.Found")
    with pytest.raises(InvalidInput, match=r"are in a 'tests.Found': export a network that returns a tensor, a tuple"):
        packed(exported(Unknown(), tmp_path / "own.pt2"), tmp_path)


def test_a_class_that_holds_tensors_by_name_is_taken_as_a_dict(small, tmp_path):
    expected = engine(small, tmp_path).explain(photo(), [], top_predictions=4).predictions
    found = (
        engine(exported(Ordered(), tmp_path / "own.pt2"), tmp_path).explain(photo(), [], top_predictions=4).predictions
    )
    assert [one.probability for one in found] == pytest.approx([one.probability for one in expected], abs=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.bfloat16, 3e-2)])
def test_other_precisions_are_taken_as_they_are(small, tmp_path, dtype, tolerance):
    path = exported(Small().to(dtype), tmp_path / "other.pt2", torch.rand(2, 3, SIDE, SIDE).to(dtype))
    expected = engine(small, tmp_path).explain(photo(), [], top_predictions=4).predictions
    found = engine(path, tmp_path).explain(photo(), [("rise", {"masks": 4})], top_predictions=4).predictions
    assert [one.probability for one in found] == pytest.approx([one.probability for one in expected], abs=tolerance)


class Places(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.last = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 3, 1)

    def forward(self, x):
        return self.last(self.first(x).relu())


def test_segmentation(tmp_path):
    path = exported(Places(), tmp_path / "places.pt2")
    ours = Engine.load(build_archive(f"export:{path}", store=tmp_path, outputs="segmentation").stem, store=tmp_path)
    card = read_card(tmp_path / "places.mar")
    assert card.preprocessing.resize_px == card.preprocessing.crop_px == (SIDE, SIDE)
    theirs = Engine(Places().eval(), preprocessing=card.preprocessing, outputs="segmentation")
    asked = {"targets": ["top2"], "layer": "first"}
    for one, other in zip(*(each.explain(photo(), METHODS[:4], **asked).maps for each in (ours, theirs)), strict=True):
        assert one.array == pytest.approx(other.array, abs=SAME)


# Files that are none, or would do something else


class Two(nn.Module):
    def forward(self, x, y):
        return (x + y).mean(dim=(2, 3))


class Whole(nn.Module):
    def forward(self, x):
        return x.float().mean(dim=(2, 3))


class NoGradients(nn.Module):
    def forward(self, x):
        with torch.no_grad():
            found = x.mean(dim=(2, 3))
        return found * 2


PROGRAMS = {
    "several inputs": (Two(), (torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)), "must have one input.*has 2"),
    "whole numbers": (Whole(), torch.ones(2, 3, 8, 8, dtype=torch.uint8), "must be of float32.*is uint8"),
    "three axes": (nn.Linear(8, 4), torch.rand(2, 3, 8), r"must be \(images, channels, height, width\), has 3 axes"),
    "a graph inside": (NoGradients(), torch.rand(2, 3, 8, 8), "operators must be those of PyTorch on tensors"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_of_another_kind_is_refused_with_the_reason(tmp_path, name):
    network, images, text = PROGRAMS[name]
    path = exported(network, tmp_path / "bad.pt2", images, shapes=None)
    with pytest.raises(InvalidInput, match=text):
        packed(path, tmp_path)
    assert not list(tmp_path.glob("*.mar"))


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def written(found: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_STORED) as archive:
        for name, content in found.items():
            archive.writestr(name, content)
    return data.getvalue()


def name_of(found: dict[str, bytes], end: str) -> str:
    return next(name for name in found if name.endswith(end))


class Evil:
    def __reduce__(self):
        return (os.mkdir, (os.environ["CAMSERVE_TEST_EVIL"],))


def evil() -> bytes:
    data = io.BytesIO()
    torch.save(Evil(), data)
    return data.getvalue()


def with_graph(change):
    def changed(found: dict[str, bytes]) -> None:
        name = name_of(found, "models/model.json")
        content = json.loads(found[name])
        change(content)
        found[name] = json.dumps(content).encode()

    return changed


def with_node(**changes):
    return with_graph(lambda content: content["graph_module"]["graph"]["nodes"][0].update(changes))


def evil_name(content) -> None:
    """A name that becomes a line of Python."""
    text = json.dumps(content)
    content.clear()
    content.update(json.loads(text.replace('"conv2d"', json.dumps("a = __import__('os').mkdir(E)"))))


def evil_size(content) -> None:
    values = content["graph_module"]["graph"]["tensor_values"]
    for value in values.values():
        for size in value["sizes"]:
            if "as_expr" in size:
                size["as_expr"]["expr_str"] = "__import__('os').mkdir(__import__('os').environ['CAMSERVE_TEST_EVIL'])"


def large_size(content) -> None:
    for value in content["graph_module"]["graph"]["tensor_values"].values():
        for size in value["sizes"]:
            if "as_expr" in size:
                size["as_expr"]["expr_str"] = "9**9**9**9"


def evil_guards(content) -> None:
    content["guards_code"] = ["__import__('os').mkdir(__import__('os').environ['CAMSERVE_TEST_EVIL']) is None"]


def evil_structure(content) -> None:
    signature = content["graph_module"]["module_call_graph"][0]["signature"]
    part = {"type": "collections.defaultdict", "context": {"default_factory_module": "this"}, "children_spec": []}
    signature["out_spec"] = json.dumps([1, part])


def evil_module(content) -> None:
    stack = """L__self__,,N;L__self__f,f"),__import__('os').mkdir('x')#,torch.nn.Module"""
    content["graph_module"]["graph"]["nodes"][0]["metadata"]["nn_module_stack"] = stack


def writes_a_file(content) -> None:
    node = content["graph_module"]["graph"]["nodes"][0]
    node["target"] = "torch.ops.aten.save.default"
    node["inputs"].append({"name": "filename", "arg": {"as_string": "x"}, "kind": 1})


def reads_a_file(content) -> None:
    content["graph_module"]["graph"]["nodes"][0]["target"] = "torch.ops.aten.from_file.default"


def pickled_weight(found: dict[str, bytes]) -> None:
    name = name_of(found, "model_weights_config.json")
    content = json.loads(found[name])
    first = next(iter(content["config"].values()))
    first["use_pickle"] = True
    found[name] = json.dumps(content).encode()
    found[name_of(found, "/weight_0")] = evil()


def pickled_inputs(found: dict[str, bytes]) -> None:
    found[name_of(found, "sample_inputs/model.pt")] = evil()


def on_a_gpu(found: dict[str, bytes]) -> None:
    for end in ("model_weights_config.json", "models/model.json"):
        name = name_of(found, end)
        found[name] = found[name].replace(b'"type": "cpu"', b'"type": "cuda"')


def without(end: str):
    return lambda found: found.pop(name_of(found, end))


def short_weight(found: dict[str, bytes]) -> None:
    name = name_of(found, "/weight_0")
    found[name] = found[name][:20]


def compiled(found: dict[str, bytes]) -> None:
    found["small/data/aotinductor/model/code.so"] = b"\x7fELF"


def old(found: dict[str, bytes]) -> None:
    found.clear()
    found["serialized_exported_program.json"] = b"{}"


BAD = {
    "a function of torch": (with_node(target="torch.os.mkdir"), "it has 'torch.os.mkdir'"),
    "a function of operator": (with_node(target="_operator.methodcaller"), "it has '_operator.methodcaller'"),
    "an operator of others": (with_node(target="torch.ops.mine.magic.default"), "it has 'torch.ops.mine.magic"),
    "no operator": (with_node(target="torch.ops.aten.__class__.mro"), "it has 'torch.ops.aten.__class__.mro'"),
    "an extension": (with_node(target="#mine:magic"), "it has '#mine:magic'"),
    "a file that is written": (with_graph(writes_a_file), "aten.save"),
    "a file that is read": (with_graph(reads_a_file), "aten.from_file"),
    "a name that is code": (with_graph(evil_name), "a name that cannot be"),
    "a size that is code": (with_graph(evil_size), "a size that is no sum or product"),
    "a size without end": (with_graph(large_size), "a size that is no sum or product"),
    "a structure that imports": (with_graph(evil_structure), "collections.defaultdict"),
    "a module that is code": (with_graph(evil_module), "names modules that cannot be"),
    "a pickled weight": (pickled_weight, "pickled"),
    "on a GPU": (on_a_gpu, "lie on cuda.*move_to_device_pass"),
    "compiled code": (compiled, "code that a compiler has made"),
    "an older PyTorch": (old, "PyTorch before 2.8.*save it again"),
    "no weights": (without("model_weights_config.json"), "has no data/weights/model_weights_config.json"),
    "no weight": (without("/weight_0"), "is not there: 'weight_0'"),
    "a weight cut off": (short_weight, "is not a program that torch.export.save wrote"),
    "no graph": (without("models/model.json"), "must hold one program, has 0"),
    "no format": (without("archive_format"), "no archive_format"),
}


@pytest.fixture
def mark(tmp_path, monkeypatch) -> Path:
    """The folder that code in a file would make."""
    monkeypatch.setenv("CAMSERVE_TEST_EVIL", str(tmp_path / "evil"))
    return tmp_path / "evil"


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_with_the_reason_and_nothing_of_it_is_run(small, tmp_path, mark, name):
    change, text = BAD[name]
    found = members(small)
    change(found)
    (tmp_path / "bad.pt2").write_bytes(written(found))
    with pytest.raises(InvalidInput, match=text):
        packed(tmp_path / "bad.pt2", tmp_path)
    assert not mark.exists()
    assert not list(tmp_path.glob("*.mar"))


@pytest.mark.parametrize("change", [pickled_inputs, with_graph(evil_guards)])
def test_what_nothing_depends_on_is_left_out(small, tmp_path, mark, change):
    found = members(small)
    change(found)
    (tmp_path / "other.pt2").write_bytes(written(found))
    assert engine(tmp_path / "other.pt2", tmp_path).explain(photo(), []).predictions
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"\xff\x00garbage" * 9, pickle.dumps({"state_dict": 1})])
def test_what_is_no_archive_is_refused(tmp_path, content):
    (tmp_path / "bad.pt2").write_bytes(content)
    with pytest.raises(InvalidInput, match=r"is not a program that torch\.export\.save wrote"):
        packed(tmp_path / "bad.pt2", tmp_path)


def test_a_file_cut_off_is_refused(small, tmp_path):
    data = small.read_bytes()
    (tmp_path / "bad.pt2").write_bytes(data[: len(data) // 2])
    with pytest.raises(InvalidInput, match=r"is not a program that torch\.export\.save wrote"):
        packed(tmp_path / "bad.pt2", tmp_path)


@pytest.mark.parametrize(
    "name", ["a function of torch", "a name that is code", "a size that is code", "a pickled weight"]
)
def test_an_archive_with_another_program_is_refused(small, tmp_path, mark, name):
    """Whoever loads an archive need not trust its maker."""
    path = packed(small, tmp_path)
    found = members(small)
    BAD[name][0](found)
    changed = members(path) | {"network.pt2": written(found)}
    path.write_bytes(written(changed))
    with pytest.raises(CamserveError, match=r"network\.pt2"):
        load_package(path)
    assert not mark.exists()


def test_a_file_that_is_not_there_and_weights_beside_it_are_refused(small, tmp_path):
    with pytest.raises(NotFound, match="there is no file"):
        packed(tmp_path / "none.pt2", tmp_path)
    with pytest.raises(InvalidOption, match="are those in it"):
        packed(small, tmp_path, weights="random")


def test_another_program_is_another_model(small, tmp_path):
    network = Small()
    nn.init.zeros_(network.head.bias)
    other = exported(network, tmp_path / "other.pt2")
    assert engine(small, tmp_path).info.weights != engine(other, tmp_path).info.weights
