"""Archives that were made to harm: whatever is in them, what comes out is typed, names the file, and costs little."""

import io
import json
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from camserve import cli
from camserve.archive import build_archive, ensure_archive, load_package, read_card
from camserve.archive.untrusted import read_bytes, read_member, read_text
from camserve.errors import CamserveError, InvalidInput, InvalidOption, NotFound

SMALL = "torchvision:squeezenet1_1"
LONG = "x" * 5000
CARD = {
    "name": "mine",
    "version": "1.0",
    "architecture": SMALL,
    "preprocessing": {"resize_px": 64, "crop_px": [64, 64], "mean": [0, 0, 0], "std": [1, 1, 1]},
    "layer": None,
    "source": "none",
    "licence": "",
}


def packed(path: Path, members: Mapping[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def members(card: object = CARD, labels: object = ("a", "b"), weights: bytes = b"") -> dict[str, bytes]:
    texts = [value if isinstance(value, bytes) else json.dumps(value).encode() for value in (card, labels)]
    return {"model.json": texts[0], "labels.json": texts[1], "weights.safetensors": weights}


def changed(**changes: Any) -> dict[str, Any]:
    return CARD | changes


def resized(**changes: Any) -> dict[str, Any]:
    return changed(preprocessing=CARD["preprocessing"] | changes)


def test_the_archive_that_is_changed_below_is_a_good_one(tmp_path: Path):
    card = read_card(packed(tmp_path / "x.mar", members()))
    assert (card.name, card.labels, card.preprocessing.crop_px) == ("mine", ("a", "b"), (64, 64))


NESTED = b"[" * 100_000
CARDS: dict[str, object] = {
    "garbage": b"\xff\x00\x80",
    "empty": b"",
    "nested": NESTED,
    "nested in an object": b'{"a":' * 100_000,
    "a list": [],
    "a number of a million digits": b'{"name": ' + b"1" * 10**6 + b"}",
    "a long text": b'"' + b"x" * 2**22 + b'"',
    "lacks a key": {key: value for key, value in CARD.items() if key != "source"},
    "another key": changed(other=1),
    "a long key": CARD | {LONG: 1},
    "no name": changed(name=None),
    "a long name": changed(name=LONG),
    "a name that leaves": changed(name="../../etc/passwd"),
    "a long version": changed(version=LONG),
    "a list as architecture": changed(architecture=[SMALL]),
    "a long architecture": changed(architecture=LONG),
    "a long source": changed(source=LONG),
    "a number as layer": changed(layer=7),
    "a text as preprocessing": changed(preprocessing="none"),
    "a huge input": resized(crop_px=[10**6, 10**6]),
    "a huge size": resized(resize_px=10**9),
    "a huge size to stretch to": resized(resize_px=[64, 10**9]),
    "three sizes to stretch to": resized(resize_px=[64, 64, 64]),
    "a size to stretch to that does not cover the crop": resized(resize_px=[64, 63]),
    "texts as sizes to stretch to": resized(resize_px=["64", "64"]),
    "an unknown start of the crop": resized(crop_start="up"),
    "a size of nothing": resized(crop_px=[0, 64]),
    "a text as size": resized(resize_px="64"),
    "three sizes": resized(crop_px=[64, 64, 64]),
    "two colours": resized(mean=[0, 0]),
    "a text as colour": resized(std=["a", "b", "c"]),
    "an unknown interpolation": resized(interpolation="magic"),
    "an evaluation that is none": changed(evaluation=[1]),
    "an evaluation of texts": changed(evaluation={"a": "b"}),
    "unknown outputs": changed(outputs="magic"),
    "a number as output": changed(output=7),
    "a text as units": changed(outputs="value", units="px"),
    "a number as unit": changed(outputs="value", units=[7]),
    "a long unit": changed(outputs="value", units=["x" * 33]),
    "a thousand channels": resized(mean=[0] * 1025, std=[1] * 1025),
    "a fraction as channels": resized(channels=3.0),
    "a fraction as size": resized(resize_px=64.5),
}
LABELS: dict[str, object] = {
    "garbage": b"\xff\x00\x80",
    "empty": b"",
    "nested": NESTED,
    "closed, but nested": NESTED + b"]" * 100_000,
    "an object": {"a": "b"},
    "a text": "abc",
    "numbers": [1, 2],
    "null": None,
    "a long label": [LONG],
    "many bytes": b"[" + b"[]," * (2**22 // 3) + b"[]]",
}


@pytest.mark.parametrize("name", CARDS)
def test_a_card_of_anything_is_refused(name: str, tmp_path: Path):
    refused(packed(tmp_path / "x.mar", members(card=CARDS[name])))


@pytest.mark.parametrize("name", LABELS)
def test_labels_of_anything_are_refused(name: str, tmp_path: Path):
    refused(packed(tmp_path / "x.mar", members(labels=LABELS[name])))


def refused(path: Path, read: Callable[[Path], object] = read_card, text: str = "is not a camserve archive") -> None:
    with pytest.raises(InvalidInput, match=text) as caught:
        read(path)
    assert path.name in str(caught.value)
    assert len(str(caught.value)) < 600


# Zip files


def lying(path: Path, size: int) -> Path:
    """An archive whose weights inflate to more than both of their headers say."""
    packed(path, members(weights=b"\0" * 2**26))
    data = bytearray(path.read_bytes())
    for place in range(len(data) - 4):
        if data[place : place + 4] in (b"PK\1\2", b"PK\3\4"):
            size_at, name_at = (24, 46) if data[place + 2] == 1 else (22, 30)
            if data[place + name_at : place + name_at + 7] == b"weights":
                data[place + size_at : place + size_at + 4] = struct.pack("<I", size)
    path.write_bytes(data)
    return path


def ending_early(path: Path) -> Path:
    """An archive whose weights are ten bytes shorter than its directory says, with the checksum that they have."""
    packed(path, members(weights=b"0123456789" * 9))
    data = bytearray(path.read_bytes())
    entry = data.index(b"weights.safetensors", data.index(b"PK\1\2")) - 46
    data[entry + 24 : entry + 28] = struct.pack("<I", 100)
    path.write_bytes(data)
    return path


def test_a_member_that_ends_before_its_size_is_refused(tmp_path: Path):
    path = ending_early(tmp_path / "x.mar")
    refused(path, lambda archive: read_member(archive, "weights.safetensors"), text="weights.safetensors is cut off")
    refused(path, load_package, text="weights.safetensors is cut off")


def patched(path: Path, old: bytes, new: bytes) -> Path:
    packed(path, members())
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))
    return path


def cut(path: Path, start: int, stop: int) -> Path:
    packed(path, members())
    path.write_bytes(path.read_bytes()[start:stop])
    return path


def in_each_other(path: Path) -> Path:
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("model.json", "{}")
    return packed(path, {"x.mar": inner.getvalue()})


ZIPS: dict[str, Callable[[Path], Path]] = {
    "without its end": lambda path: cut(path, 0, -10),
    "without its beginning": lambda path: cut(path, 40, 10**6),
    "encrypted": lambda path: patched(path, b"PK\1\2\x14\x03\x14\0\0\0", b"PK\1\2\x14\x03\x14\0\1\0"),
    "of a later version": lambda path: patched(path, b"PK\1\2\x14\x03\x14\0", b"PK\1\2\x14\x03\xff\0"),
    "with other names": lambda path: patched(path, b"model.json", b"medal.json"),
    "in each other": in_each_other,
    "a directory that lies elsewhere": lambda path: patched(path, b"PK\5\6", b"PK\5\6\xff\xff\xff\xff"),
}


@pytest.mark.parametrize("name", ZIPS)
def test_a_broken_zip_is_refused(name: str, tmp_path: Path):
    refused(ZIPS[name](tmp_path / "x.mar"))


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_only_what_can_be_bounded_is_inflated(compression: int, tmp_path: Path):
    refused(packed(tmp_path / "x.mar", members(), compression), text="must be stored or deflated")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "..\\x", "x" * 256])
def test_names_that_would_leave_the_archive_are_refused(name: str, tmp_path: Path):
    path = packed(tmp_path / "x.mar", members() | {name: b""})
    refused(path, text="it may not have a file of this name")


def test_a_name_that_comes_twice_is_refused(tmp_path: Path):
    path = tmp_path / "x.mar"
    packed(path, members() | {"medal.json": b"{}"})
    path.write_bytes(path.read_bytes().replace(b"medal.json", b"model.json"))
    refused(path, text="it has two files of one name")


def test_the_directory_is_bounded_before_it_is_read(tmp_path: Path):
    path = packed(tmp_path / "x.mar", {"a": b""})
    data = path.read_bytes()
    start, end = data.index(b"PK\1\2"), data.index(b"PK\5\6")
    entries = data[start:end] * (2**22 // (end - start) + 1)
    path.write_bytes(data[:start] + entries + data[end : end + 12] + struct.pack("<II", len(entries), start) + b"\0\0")
    refused(path, text=f"its directory may have at most 4194304 bytes, has {len(entries)}")


def test_the_number_of_files_is_bounded(tmp_path: Path):
    path = packed(tmp_path / "x.mar", members() | {str(number): b"" for number in range(1000)})
    refused(path, text="it may have at most 1000 files, has 1003")


def test_weights_that_inflate_out_of_proportion_are_refused(tmp_path: Path):
    path = packed(tmp_path / "x.mar", members(weights=b"\0" * 2**27))
    most = 2**26
    refused(path, text=f"of {path.stat().st_size} bytes may unpack to at most {most} bytes, got 134")
    refused(path, load_package, text="may unpack to at most")


INFLATE = """
import sys, resource
from pathlib import Path
from camserve.archive.untrusted import read_member
from camserve.errors import InvalidInput
def room():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmSize")]
    return 1024 * int(line.split()[1])
resource.setrlimit(resource.RLIMIT_AS, (room() + 2**25, room() + 2**25))
try:
    read_member(Path(sys.argv[1]), "weights.safetensors")
except InvalidInput as error:
    print(error)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the memory in use is read from Linux's /proc")
def test_a_size_that_lies_does_not_inflate_more(tmp_path: Path):
    """64 MiB that are said to be 1000 bytes, with 32 MiB to do it in."""
    path = lying(tmp_path / "x.mar", 1000)
    done = subprocess.run(
        [sys.executable, "-c", INFLATE, path], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "is not a camserve archive: " in done.stdout


# Weights


@pytest.mark.parametrize(
    "weights",
    [
        b"",
        b"garbage" * 100,
        pickle.dumps({"a": [1, 2, 3]}),
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 10) + b"[" * 10,
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 60) + b'{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}'.ljust(60) + b"\0" * 4,
        struct.pack("<Q", 70) + b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}'.ljust(70),
    ],
    ids=["empty", "garbage", "pickle", "long header", "broken header", "no tensors", "unknown type", "huge tensor"],
)
def test_weights_of_anything_are_refused(weights: bytes, tmp_path: Path):
    path = packed(tmp_path / "x.mar", members(weights=weights))
    with pytest.raises(InvalidInput, match=r"x\.mar is not a camserve archive with weights|do not fit"):
        load_package(path)


STATES: dict[str, bytes] = {
    "empty.pth": b"",
    "empty.safetensors": b"",
    "garbage.pth": b"\x80\x02garbage",
    "garbage.safetensors": b"garbage" * 9,
    "pickle.pth": pickle.dumps([1]),
    "pickle of old.pth": pickle.dumps(0x1950A86A20F9469CFC6C, 2)
    + pickle.dumps(1001, 2)
    + pickle.dumps({}, 2)
    + b"\x80\x02c",
    "text.pth": b"hello\n" * 9,
    "op.pth": b"\x80\x02(U\x01a\x85R.",
}


@pytest.mark.parametrize("name", STATES)
def test_state_dicts_of_anything_are_refused(name: str, tmp_path: Path):
    (tmp_path / name).write_bytes(STATES[name])
    with pytest.raises(InvalidInput, match=name) as caught:
        build_archive(SMALL, store=tmp_path, weights=str(tmp_path / name))
    assert "it holds ," not in str(caught.value), "code is named where some would be run, and only there"


def test_a_state_dict_that_inflates_out_of_proportion_is_refused(tmp_path: Path):
    torch.save({"a": torch.zeros(2**25)}, tmp_path / "stored.pth")
    with zipfile.ZipFile(tmp_path / "stored.pth") as stored:
        packed(tmp_path / "x.pth", {info.filename: stored.read(info) for info in stored.infolist()})
    with pytest.raises(InvalidInput, match=r"x\.pth of \d+ bytes may unpack to at most"):
        build_archive(SMALL, store=tmp_path, weights=str(tmp_path / "x.pth"))


# Texts


def test_texts_that_cannot_be_read_are_refused_by_name(tmp_path: Path):
    (tmp_path / "latin.txt").write_bytes(b"\xe4")
    (tmp_path / "long.txt").write_bytes(b" " * (2**22 + 1))
    reasons = {"latin.txt": "can't decode", "long.txt": "at most 4194304 bytes", "none.txt": "No such"}
    for name, reason in reasons.items():
        refused(tmp_path / name, lambda path: read_text(path, "a list"), f"is not a list: .*{reason}")
    for name in ("long.txt", "none.txt"):
        refused(tmp_path / name, lambda path: read_bytes(path, "a list"), "is not a list")


# Names


def test_a_name_that_no_file_can_have_is_answered(tmp_path: Path):
    with pytest.raises(NotFound, match="there is no archive"):
        read_card(tmp_path / LONG)
    with pytest.raises(NotFound, match="there is no archive"):
        read_member(tmp_path / "a\0b", "model.json")
    with pytest.raises(InvalidOption, match="model name must match"):
        ensure_archive(LONG, tmp_path)
    with pytest.raises(InvalidOption, match="model name must match"):
        build_archive(SMALL, name=LONG, store=tmp_path, weights="random")
    with pytest.raises(InvalidOption, match="there is no file"):
        build_archive(SMALL, store=tmp_path, weights=LONG)
    with pytest.raises(NotFound, match="labels file"):
        build_archive(SMALL, store=tmp_path, weights="random", labels=Path(LONG))
    with pytest.raises(NotFound, match="report"):
        build_archive(SMALL, store=tmp_path, weights="random", evaluation=Path(LONG))
    with pytest.raises(InvalidOption, match="a source is"):
        build_archive(LONG, store=tmp_path)


def test_the_longest_name_can_be_built(tmp_path: Path):
    name = "x" * 128
    assert build_archive(SMALL, name=name, store=tmp_path, weights="random").name == f"{name}.mar"


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b"\xff\xfe", b'{"a": 1}', b"[" + b"1" * 5000 + b"]", b"x" * (2**22 + 1)]
)
def test_files_of_labels_may_have_anything(text: bytes, tmp_path: Path):
    (tmp_path / "labels").write_bytes(text)
    with pytest.raises(InvalidInput, match="labels file"):
        build_archive(SMALL, store=tmp_path, weights="random", labels=tmp_path / "labels")


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b"\xff\xfe", b"[]", b'{"settings": []}', b'{"settings": {"protocols": []}}']
)
def test_reports_may_have_anything(text: bytes, tmp_path: Path):
    (tmp_path / "report.json").write_bytes(text)
    with pytest.raises(InvalidInput, match=r"report\.json is not a report"):
        build_archive(SMALL, store=tmp_path, weights="random", evaluation=tmp_path / "report.json")


@pytest.mark.parametrize("text", [b"x = 1", b"x = [1]", b"\xff\xfe", b"x = " + b"[" * 100_000, b"[x]\ninput_px = 3"])
def test_manifests_may_have_anything(text: bytes, tmp_path: Path):
    (tmp_path / "models.toml").write_bytes(text)
    with pytest.raises(InvalidInput, match=r"models\.toml is not a manifest of models"):
        ensure_archive("x", tmp_path)


# The store


@pytest.fixture
def store(tmp_path: Path) -> Path:
    (tmp_path / "broken.mar").write_bytes(b"garbage")
    packed(tmp_path / "good.mar", members(card=changed(name="good")))
    packed(tmp_path / "nested.mar", members(labels=NESTED))
    return tmp_path


def test_a_broken_archive_does_not_hide_the_others(
    store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "160")  # no cell is broken
    assert cli.run(["models", "--store", str(store)]) == 0
    text = "".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"good1.0{SMALL}packed" in text
    assert "brokenunusable" in text
    assert "nestedunusable" in text


@pytest.mark.parametrize("name", ["broken", "nested"])
def test_a_broken_archive_is_refused_before_it_is_served(store: Path, name: str):
    assert ensure_archive("good", store) == store / "good.mar"
    with pytest.raises(CamserveError, match=rf"{name}\.mar is not a camserve archive"):
        ensure_archive(name, store)
