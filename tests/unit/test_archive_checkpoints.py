"""Weights as trainers write them, names of classes as people write them, and networks with tensors in common."""

import argparse
import json
import logging
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from camserve.archive import build_archive, load_package, read_card
from camserve.archive.checkpoints import Checkpoint, fitted, read_checkpoint
from camserve.archive.class_names import read_labels
from camserve.archive.package import WEIGHTS
from camserve.archive.untrusted import read_member
from camserve.errors import InvalidInput, NotFound, Unsupported
from camserve.types import Preprocessing

SMALL = Preprocessing(32, (32, 32), (0.5,) * 3, (0.5,) * 3)

NETS = '''
import random

import torch
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.features(x).mean(dim=(2, 3)))


def build():
    return Net()


class Shared(nn.Module):
    """One convolution under two names, a weight of two layers, and a buffer that is a part of another."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 2)
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.again = self.first
        self.head = nn.Linear(4, 3)
        self.other = nn.Linear(4, 3, bias=False)
        self.other.weight = self.head.weight
        self.register_buffer("whole", torch.rand(10))
        self.register_buffer("part", self.whole[2:5])

    def forward(self, x):
        x = self.again(self.stem(x)).relu().mean(dim=(2, 3))
        return self.head(x) + self.other(x) + self.part


def shared():
    return Shared()


class Hidden(Net):
    """Has numbers that no state dict has."""

    def __init__(self):
        super().__init__()
        self.scale = torch.tensor([random.random(), random.random(), random.random()])

    def forward(self, x):
        return super().forward(x) * self.scale


def hidden():
    return Hidden()


def noisy():
    net = Net()
    net.register_forward_hook(lambda module, inputs, output: output + torch.rand_like(output))
    return net


counter = []


def growing():
    """Is larger each time that it is built."""
    counter.append(0)
    net = Net()
    net.register_buffer("history", torch.zeros(len(counter)))
    return net


class Forgetful(Net):
    """Changes its weights when it is loaded."""

    def _load_from_state_dict(self, state, prefix, *rest):
        super()._load_from_state_dict({key: value + 1 for key, value in state.items()}, prefix, *rest)


class Overlapping(Net):
    """Has buffers that share memory, none of which is a part of the other."""

    def __init__(self):
        super().__init__()
        base = torch.rand(8)
        self.register_buffer("early", base[0:4])
        self.register_buffer("late", base[2:6])
        self.register_buffer("even", base[::2])
        self.register_buffer("third", base[3:4])


def overlapping():
    return Overlapping()


def half():
    return Net().half()


def bfloat16():
    return Net().to(torch.bfloat16)


def broken():
    raise KeyError("no such thing")


def program():
    return torch.export.export(Net().eval(), (torch.rand(1, 3, 32, 32),))
'''


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """A module `our_nets` on the path, gone afterwards."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "our_nets.py").write_text(NETS)
    monkeypatch.syspath_prepend(tmp_path / "code")
    import our_nets

    yield our_nets
    del sys.modules["our_nets"]


def packed(tmp_path: Path, function: str, **options) -> Path:
    return build_archive(f"our_nets:{function}", store=tmp_path, preprocessing=SMALL, **options)


def trained(net: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for value in net.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand_like(value))
    return net.eval()


def under(state: dict, *prefixes: str) -> dict:
    return {"".join(prefixes) + name: value for name, value in state.items()}


# Checkpoints

WAYS: dict[str, tuple[Callable[[dict], object], tuple[str, ...]]] = {
    "a state dict": (lambda state: state, ()),
    "state_dict": (lambda state: {"state_dict": state, "epoch": 3}, ("its 'state_dict' was taken",)),
    "model": (
        lambda state: {"model": state, "optimizer": {"state": {}, "param_groups": []}},
        ("its 'model' was taken",),
    ),
    "model_state_dict": (
        lambda state: {"epoch": 1, "loss": 0.5, "model_state_dict": state},
        ("its 'model_state_dict'",),
    ),
    "DataParallel": (lambda state: under(state, "module."), ("the prefix 'module.' was taken off",)),
    "DataParallel in a checkpoint": (
        lambda state: {"state_dict": under(state, "module."), "best_acc1": torch.tensor(0.5)},
        ("its 'state_dict' was taken", "the prefix 'module.' was taken off"),
    ),
    "Lightning": (
        lambda state: {
            "pytorch-lightning_version": "2.1.0",
            "state_dict": under(state, "model.") | {"loss.weight": torch.ones(3)},
            "hyper_parameters": {"lr": 0.1},
        },
        ("its 'state_dict' was taken", "the prefix 'model.' was taken off", "left out: loss.weight"),
    ),
    "Lightning, another attribute": (lambda state: {"state_dict": under(state, "net.")}, ("the prefix 'net.'",)),
    "torch.compile": (lambda state: under(state, "_orig_mod."), ("'_orig_mod.'",)),
    "compiled and parallel": (lambda state: under(state, "module.", "_orig_mod."), ("'module._orig_mod.'",)),
    "compiled inside": (
        lambda state: {name.replace("features.", "features._orig_mod."): value for name, value in state.items()},
        ("'_orig_mod.' in its names was taken off",),
    ),
    "moving average": (
        lambda state: {"n_averaged": torch.tensor(7)} | under(state, "module."),
        ("the prefix 'module.' was taken off", "left out: n_averaged"),
    ),
    "moving average alone": (lambda state: {"ema": state, "epoch": 3}, ("its 'ema' was taken",)),
    "moving average beside": (
        lambda state: {"state_dict_ema": {"a": torch.zeros(1)}, "state_dict": state},
        ("its 'state_dict' was taken; beside it there is 'state_dict_ema'",),
    ),
    "a key of one's own": (lambda state: {"my_weights": state, "notes": {"a": 1}}, ("its 'my_weights' was taken",)),
    "two levels": (
        lambda state: {"model": {"state_dict": state}},
        ("its 'model' was taken", "its 'state_dict' was taken"),
    ),
    "options of a script": (
        lambda state: {"model": state, "args": argparse.Namespace(lr=0.1), "best": np.float64(0.5)},
        ("its 'model' was taken",),
    ),
    "half precision": (lambda state: {name: _half(value) for name, value in state.items()}, ()),
}


def _half(value: torch.Tensor) -> torch.Tensor:
    return value.half() if value.is_floating_point() else value


@pytest.mark.parametrize("way", WAYS)
def test_a_checkpoint_is_loaded_with_a_word_about_what_was_taken_off(way, tmp_path, nets, caplog):
    net = trained(nets.Net())
    wrap, told = WAYS[way]
    torch.save(wrap(net.state_dict()), tmp_path / "last.ckpt")
    with caplog.at_level(logging.WARNING):
        path = packed(tmp_path, "build", weights=str(tmp_path / "last.ckpt"))
    found, card = load_package(path)
    image = torch.rand(1, 3, 32, 32)
    tolerance = 0.02 if way == "half precision" else 0  # eleven bits of each weight
    torch.testing.assert_close(found(image), net(image), rtol=tolerance, atol=tolerance)
    assert all(text in card.source for text in told)
    assert bool(caplog.records) == bool(told)
    assert all(text in caplog.text for text in told)


def test_a_real_average_of_torch_is_loaded(tmp_path, nets):
    from torch.optim.swa_utils import AveragedModel

    net = trained(nets.Net())
    torch.save(AveragedModel(net).state_dict(), tmp_path / "swa.pth")
    found, _ = load_package(packed(tmp_path, "build", weights=str(tmp_path / "swa.pth")))
    image = torch.rand(1, 3, 32, 32)
    assert torch.equal(found(image), net(image))


@pytest.mark.parametrize("source", ["torchvision:squeezenet1_1", "timm:vit_tiny_patch16_224"])
def test_classes_are_counted_without_the_prefix(source, tmp_path):
    import timm
    from torchvision.models import get_model

    name = source.partition(":")[2]
    net = timm.create_model(name, num_classes=4) if "timm" in source else get_model(name, num_classes=4)
    torch.save({"state_dict": under(net.state_dict(), "module.")}, tmp_path / "four.pth")
    card = read_card(build_archive(source, store=tmp_path, weights=str(tmp_path / "four.pth")))
    assert len(card.labels) == 4
    assert "the prefix 'module.' was taken off" in card.source


def test_names_that_fit_are_left_as_they_are():
    """Here `module.` is the network's own."""
    state = {"module.weight": torch.zeros(1), "weight": torch.ones(1)}
    found = fitted(Checkpoint(state), ["module.weight"])
    assert (found.state, found.taken) == (state, ())


def test_of_several_prefixes_that_with_the_most_names_is_taken():
    student, teacher = ({name: torch.tensor(value) for name in "ab"} for value in (1.0, 2.0))
    state = under(student, "student.") | {"teacher.a": teacher["a"]}
    found = fitted(Checkpoint(state), ["a", "b"])
    assert found.state == student
    assert found.taken == ("the prefix 'student.' was taken off", "left out: teacher.a")


def test_missing_and_unexpected_keys_are_told_with_close_names(tmp_path, nets):
    state = nets.Net().state_dict()
    state["heads.weight"] = state.pop("head.weight")
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(InvalidInput) as caught:
        packed(tmp_path, "build", weights=str(tmp_path / "other.pth"))
    assert "Missing key(s): head.weight (close to it: heads.weight)" in str(caught.value)
    assert "Unexpected key(s): heads.weight" in str(caught.value)


def test_hundreds_of_keys_are_told_as_a_few(tmp_path, nets):
    torch.save({f"layer{index}.weight": torch.zeros(1) for index in range(500)}, tmp_path / "other.pth")
    with pytest.raises(InvalidInput, match=r"and 495 more") as caught:
        packed(tmp_path, "build", weights=str(tmp_path / "other.pth"))
    assert len(str(caught.value)) < 600


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


@pytest.mark.parametrize("what", ["module", "in a checkpoint", "TorchScript", "traced", "export", "old pickle"])
def test_programs_and_pickles_are_refused_with_the_way_out_and_never_run(what, tmp_path, nets, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net, file = nets.Net().eval(), str(tmp_path / "file.pt")
    way_out = r"torch\.save\(module\.state_dict\(\)"
    if what == "module":
        torch.save(net, file)
    elif what == "in a checkpoint":
        torch.save({"state_dict": net.state_dict(), "callbacks": Bomb()}, file)
    elif what == "TorchScript":
        torch.jit.save(torch.jit.script(net), file)
        way_out = r"torch\.save\(torch\.jit\.load\(FILE\)\.state_dict\(\)"
    elif what == "traced":
        torch.jit.save(torch.jit.trace(net, torch.rand(1, 3, 32, 32)), file)
        way_out = r"torch\.save\(torch\.jit\.load\(FILE\)\.state_dict\(\)"
    elif what == "export":
        torch.export.save(torch.export.export(net, (torch.rand(1, 3, 32, 32),)), file)
        way_out = r"torch\.save\(dict\(torch\.export\.load\(FILE\)\.state_dict\)"
    else:
        Path(file).write_bytes(pickle.dumps(Bomb()))
        way_out = ""
    with pytest.raises(InvalidInput, match="not a state dict that can be read safely.*" + way_out):
        packed(tmp_path, "build", weights=file)
    assert not Path("exploded").exists()
    assert not list(tmp_path.glob("*.mar"))


def test_what_the_way_out_says_is_a_way_out(tmp_path, nets):
    net = trained(nets.Net())
    torch.jit.save(torch.jit.script(net), str(tmp_path / "s.pt"))
    torch.save(torch.jit.load(str(tmp_path / "s.pt")).state_dict(), tmp_path / "script.pth")
    torch.export.save(torch.export.export(net, (torch.rand(1, 3, 32, 32),)), tmp_path / "e.pt2")
    torch.save(dict(torch.export.load(tmp_path / "e.pt2").state_dict), tmp_path / "export.pth")
    for name in ("script.pth", "export.pth"):
        found, _ = load_package(packed(tmp_path, "build", weights=str(tmp_path / name)))
        image = torch.rand(1, 3, 32, 32)
        assert torch.equal(found(image), net(image))


@pytest.mark.parametrize(
    "content", [{"a": {"b": 1}}, {"epoch": 3}, [1], 7, {"a": {"x": torch.ones(1)}, "b": {"y": torch.ones(1)}}]
)
def test_a_file_without_a_state_dict_says_what_it_has(content, tmp_path):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(InvalidInput, match=r"must hold a state dict .* or one under state_dict, .*; it holds"):
        read_checkpoint(tmp_path / "x.pth")


# Tensors in common


def test_a_network_with_tensors_in_common_is_packed_and_has_them_in_common_again(tmp_path, nets):
    path = packed(tmp_path, "shared")
    names = _names_in(path)
    assert {"first.weight", "head.weight", "whole", "part"} <= names
    assert not {"again.weight", "again.bias", "other.weight"} & names
    loaded, _ = load_package(path)
    assert loaded.first is loaded.again
    assert loaded.head.weight is loaded.other.weight
    torch.manual_seed(0)  # as the archive was built
    original = nets.Shared().eval()
    image = torch.rand(1, 3, 32, 32)
    assert torch.equal(loaded(image), original(image))


def _names_in(path: Path) -> set[str]:
    data = read_member(path, WEIGHTS)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return set(header) - {"__metadata__"}


@pytest.mark.parametrize("saved", ["by torch", "by safetensors"])
def test_weights_of_a_network_with_tensors_in_common_are_read(saved, tmp_path, nets):
    from safetensors.torch import save_model

    net = trained(nets.Shared())
    file = tmp_path / ("mine.pth" if saved == "by torch" else "mine.safetensors")
    if saved == "by torch":
        torch.save(net.state_dict(), file)
    else:
        save_model(net, str(file))  # leaves out what is there twice
    found, _ = load_package(packed(tmp_path, "shared", weights=str(file)))
    image = torch.rand(1, 3, 32, 32)
    assert torch.equal(found(image), net(image))


def test_weights_that_differ_where_the_network_has_one_are_refused(tmp_path, nets):
    state = nets.Shared().state_dict()
    state["again.weight"] = state["again.weight"] + 1
    torch.save(state, tmp_path / "mine.pth")
    with pytest.raises(InvalidInput, match=r"has first\.weight and again\.weight in common, and they differ"):
        packed(tmp_path, "shared", weights=str(tmp_path / "mine.pth"))


@pytest.mark.parametrize(
    ("missing", "names"),
    [
        ({"early"}, "early"),
        ({"late"}, "late"),
        ({"early", "late"}, "early, late, third"),  # `even` lies around `third`, and has none of it
    ],
)
def test_memory_that_was_loaded_in_part_is_missing(missing, names, tmp_path, nets):
    state = nets.Overlapping().state_dict()
    kept = {name: value.clone() for name, value in state.items() if name not in {*missing, "third"}}
    torch.save(kept, tmp_path / "mine.pth")
    with pytest.raises(InvalidInput, match=rf"Missing key\(s\): {names}$"):
        packed(tmp_path, "overlapping", weights=str(tmp_path / "mine.pth"))


# Read again before it is done


@pytest.mark.parametrize(
    ("function", "text"),
    [
        ("hidden", "answers a picture otherwise when it is loaded again"),
        ("noisy", "another answer each time that it sees the same picture"),
        ("growing", "the weights do not fit our_nets:growing"),
    ],
)
def test_an_archive_that_is_another_network_when_it_is_loaded_is_refused(function, text, tmp_path, nets):
    earlier = packed(tmp_path, "build", name="mine")
    before = earlier.read_bytes()
    with pytest.raises((InvalidInput, Unsupported), match=text):
        packed(tmp_path, function, name="mine")
    assert earlier.read_bytes() == before
    assert list(tmp_path.glob("*.mar")) == [earlier]
    assert not list(tmp_path.glob(".mine*"))


@pytest.mark.parametrize("damage", ["a weight", "a label"])
def test_what_was_written_is_compared_with_what_was_meant(damage, tmp_path, nets, monkeypatch):
    """A disk that changes what is written to it."""
    write = zipfile.ZipFile.writestr

    def damaged(archive, entry, content, *rest):
        if damage == "a weight" and entry.filename == WEIGHTS:
            content = content[:-1] + bytes([content[-1] ^ 1])
        if damage == "a label" and entry.filename == "labels.json":
            content = content.replace(b"class 0", b"class 9")
        write(archive, entry, content, *rest)

    monkeypatch.setattr(zipfile.ZipFile, "writestr", damaged)
    with pytest.raises(Unsupported, match=r"other numbers than were packed|card of build is another one"):
        packed(tmp_path, "build")
    assert not list(tmp_path.glob("*.mar"))


@pytest.mark.parametrize("function", ["half", "bfloat16"])
def test_a_network_of_half_precision_is_packed_as_it_is(function, tmp_path, nets):
    found, _ = load_package(packed(tmp_path, function))
    assert next(found.parameters()).dtype == (torch.half if function == "half" else torch.bfloat16)


def test_a_function_that_fails_is_named_with_what_it_raised(tmp_path, nets):
    with pytest.raises(InvalidInput, match=r"our_nets:broken raises KeyError: 'no such thing'"):
        packed(tmp_path, "broken")


def test_an_exported_program_is_no_module(tmp_path, nets):
    with pytest.raises(InvalidInput, match=r"got ExportedProgram; pack what torch\.export\.save writes as export:FILE"):
        packed(tmp_path, "program")


# Names of classes

NAMES = ("Ångström", "tabby, tabby cat", "grüner Tee")
LABELS = {
    "lines": "\n".join(NAMES).encode(),
    "a mark": "\n".join(NAMES).encode("utf-8-sig"),
    "Windows' line ends": "\r\n".join((*NAMES, "")).encode(),
    "old line ends": "\r".join(NAMES).encode(),
    "empty lines at the end": "\n".join((*NAMES, "", "  ", "")).encode(),
    "spaces": "".join(f" {name}\t\n" for name in NAMES).encode(),
    "UTF-16": "\r\n".join(NAMES).encode("utf-16"),
    "UTF-16, big-endian": b"\xfe\xff" + "\n".join(NAMES).encode("utf-16-be"),
    "a JSON list": json.dumps(NAMES).encode(),
    "a JSON list with a mark": json.dumps(NAMES, ensure_ascii=False).encode("utf-8-sig"),
    "from index to name": json.dumps({str(index): name for index, name in enumerate(NAMES)}).encode(),
    "not in order": json.dumps({str(index): NAMES[index] for index in (2, 0, 1)}).encode("utf-8-sig"),
    "from name to index": json.dumps({NAMES[index]: index for index in (1, 2, 0)}).encode(),
    "a config.json": json.dumps({"architectures": [], "id2label": {str(i): n for i, n in enumerate(NAMES)}}).encode(),
    "as Keras has them": json.dumps({str(i): [f"n{i}", n] for i, n in enumerate(NAMES)}).encode(),
}


@pytest.mark.parametrize("name", LABELS)
def test_names_of_classes_are_read_as_they_are_written(name, tmp_path):
    (tmp_path / "labels").write_bytes(LABELS[name])
    assert read_labels(tmp_path / "labels") == NAMES


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("cat\nÅngström\r\ndog".encode("latin-1"), r"must be UTF-8, and line 2 is not; as Latin-1 it is 'Ångström':"),
        (b"\xff\xfea", "labels file"),
        ("cat\ndog".encode("utf-16-le"), "has a byte 0: convert the file to UTF-8"),
        (b"cat\n\ndog", r"name 1 is ''"),
        (b"", r"name 0 is ''"),
        (b"[]", "labels file"),
        (b'["cat", 7]', "name 1 is 7"),
        (b'["cat", ""]', "name 1 is ''"),
        (b'{"0": "cat", "2": "dog"}', r"indices 0\.\.1 once each; 1 is not there"),
        (b'{"cat": 0, "dog": 0}', r"indices 0\.\.1 once each; 1 is not there|indices 0\.\.0"),
        (b'{"cat": 1}', r"indices 0\.\.0 once each; 0 is not there"),
        (b'{"0": "cat", "01": "dog"}', "1 is not there"),
        (b"{}", "labels file"),
        (b'{"0": null}', "name 0 is None"),
    ],
)
def test_names_that_cannot_be_read_are_refused_with_what_came(data, text, tmp_path):
    (tmp_path / "labels").write_bytes(data)
    with pytest.raises(InvalidInput, match=text):
        read_labels(tmp_path / "labels")


def test_a_labels_file_that_is_not_there(tmp_path):
    with pytest.raises(NotFound, match="no labels file"):
        read_labels(tmp_path / "nowhere")


def test_two_names_of_one_index_do_not_become_one_class(tmp_path):
    (tmp_path / "labels").write_text('{"cat": 0, "dog": 0, "fox": 1}')
    with pytest.raises(InvalidInput, match="once each"):
        read_labels(tmp_path / "labels")
