"""References that are packed with a network of vectors: how they are read, made, kept and compared."""

from __future__ import annotations

import io
import json
import pickle
import struct
import sys
import unicodedata
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.numpy import load, save
from torch import nn
from torch.nn import functional as F
from torchvision import transforms

from camserve import Engine, cli
from camserve.archive import build_archive, read_card
from camserve.archive.references import REFERENCES, given_references, load_array
from camserve.errors import CamserveError, InvalidImage, InvalidInput, InvalidOption, NotFound, Unsupported
from camserve.types import Preprocessing, Vector
from camserve.types.references import MAX_REFERENCES, References
from camserve.worker.network import load_network

PREPROCESSING = Preprocessing(resize_px=64, crop_px=tiny.TINY_SIZE, mean=(0.5,) * 3, std=(0.25,) * 3)
SOURCE = "camserve_test_faces:faces"
ANN, BOB, CAT = (np.array(row, float) for row in ([1, 2, 0, 0, 3], [-1, 0, 5, 0, 0.5], [0, 0, 0, 2, 1]))


def faces() -> nn.Module:
    """A network of vectors of 5 numbers, whose directions differ from picture to picture."""
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(3, 9, 5, stride=4), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(36, 5)
    )


def grey_faces() -> nn.Module:
    """The same of pictures with four channels."""
    return nn.Sequential(nn.Conv2d(4, 3, 1), faces())


def dark() -> nn.Module:
    """A network that gives zeros for every picture."""
    module = faces()
    nn.init.zeros_(module[-1].weight)
    nn.init.zeros_(module[-1].bias)
    return module


def endless() -> nn.Module:
    """A network that divides by the brightness of the darkest pixel: infinite for black ones."""

    class Divided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = faces()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) / (x.amin(dim=(1, 2, 3)) + 2)[:, None]

    return Divided()


@pytest.fixture(autouse=True)
def package(monkeypatch):
    """The networks above as a package that an archive names."""
    monkeypatch.setitem(sys.modules, "camserve_test_faces", sys.modules[__name__])


def picture(path: Path, seed: int, size: tuple[int, int] = (90, 120)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tiny.png(tiny.pixels(seed, size)))
    return path


@pytest.fixture
def people(tmp_path: Path) -> Path:
    """Pictures of ann, several of bob, and a file that macOS leaves behind."""
    folder = tmp_path / "people"
    picture(folder / "ann.png", 1)
    for seed in (2, 3, 4):
        picture(folder / "bob" / f"{seed}.png", seed)
    (folder / ".DS_Store").write_bytes(b"Bud1")
    return folder


def packed(store: Path, references: Path | None, source: str = SOURCE, **options: object) -> Path:
    given = {"outputs": "embedding", "preprocessing": PREPROCESSING, "name": "faces"} | options
    return build_archive(source, store=store, references=references, **given)


def vectors(folder: Path, **arrays: object) -> Path:
    path = folder / "people.npz"
    np.savez(path, **arrays)
    return path


def own_vector(path: Path) -> torch.Tensor:
    """The network's vector of a picture in float64, the picture prepared by torchvision."""
    prepare = transforms.Compose(
        [
            transforms.Resize(64, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(tiny.TINY_SIZE),
            transforms.ToTensor(),
            transforms.Normalize((0.5,) * 3, (0.25,) * 3),
        ]
    )
    with Image.open(path) as image:
        return faces().double()(prepare(image.convert("RGB"))[None].double())[0].detach()


def test_pictures_become_the_networks_own_vectors_and_several_are_averaged(tmp_path, people):
    network = load_network(packed(tmp_path, people))
    assert network.info.labels == ("ann", "bob")
    ann = own_vector(people / "ann.png")
    bob = sum(F.normalize(own_vector(people / "bob" / f"{seed}.png"), dim=0) for seed in (2, 3, 4))
    expected = F.normalize(torch.stack([ann, bob]), dim=1).numpy()
    np.testing.assert_allclose(network.references.vectors, expected, atol=1e-6)  # float32 passes against float64
    plain_mean = sum(own_vector(people / "bob" / f"{seed}.png") for seed in (2, 3, 4))
    assert abs(F.normalize(plain_mean, dim=0).numpy() - expected[1]).max() > 1e-5, "normalised before, not after"


def test_predictions_are_the_nearest_references(tmp_path, people):
    packed(tmp_path, people)
    new = picture(tmp_path / "new.png", 9)
    answer = Engine.load("faces", tmp_path).explain(new, ["grad_cam"], ["bob", 0, "top2"], top_predictions=7)
    bob = sum(F.normalize(own_vector(people / "bob" / f"{seed}.png"), dim=0) for seed in (2, 3, 4))
    cosines = [float(F.cosine_similarity(own_vector(new), one, dim=0)) for one in (own_vector(people / "ann.png"), bob)]
    order = sorted((0, 1), key=lambda index: -cosines[index])
    assert [(one.index, one.label) for one in answer.predictions] == [(index, ("ann", "bob")[index]) for index in order]
    assert [one.similarity for one in answer.predictions] == pytest.approx([cosines[i] for i in order], abs=1e-6)
    assert [one.target_text for one in answer.maps] == ["bob", "ann"]
    assert [one.score for one in answer.maps] == pytest.approx(cosines[::-1], abs=1e-6)


def test_a_map_of_a_reference_is_that_of_its_vector(tmp_path, people):
    engine = Engine(faces(), preprocessing=PREPROCESSING, outputs="embedding", references=people)
    held = engine.network.references.vectors[1]
    by_name, by_vector = engine.explain(people / "ann.png", ["score_cam"], ["bob", Vector(held)]).maps
    np.testing.assert_allclose(by_name.array, by_vector.array, atol=1e-6)
    assert by_name.score == pytest.approx(by_vector.score)


def test_without_a_target_the_nearest_reference_is_explained(people):
    engine = Engine(faces(), preprocessing=PREPROCESSING, outputs="embedding", references=people)
    assert [one.target_text for one in engine.explain(people / "ann.png").maps] == ["ann"]


def test_predictions_alone_need_no_target(people):
    engine = Engine(faces(), preprocessing=PREPROCESSING, outputs="embedding", references=people)
    answer = engine.explain(people / "ann.png", [])
    assert ([one.label for one in answer.predictions], answer.maps) == (["ann", "bob"], ())
    assert answer.predictions[0].similarity == pytest.approx(1, abs=1e-6)


def test_predictions_alone_of_a_network_without_references_say_why_there_are_none(people):
    engine = Engine(faces(), preprocessing=PREPROCESSING, outputs="embedding")
    with pytest.raises(Unsupported, match="has no predictions, since no references are packed with it"):
        engine.explain(people / "ann.png", [])


def test_vectors_by_name_come_from_an_npz(tmp_path):
    path = vectors(tmp_path, ann=ANN, bob=np.stack([BOB, 7 * CAT]))
    network = load_network(packed(tmp_path, path))
    mean = BOB / np.linalg.norm(BOB) + CAT / np.linalg.norm(CAT)
    expected = [ANN / np.linalg.norm(ANN), mean / np.linalg.norm(mean)]
    np.testing.assert_allclose(network.references.vectors, expected, atol=1e-7)
    assert network.info.labels == ("ann", "bob")


@pytest.mark.parametrize("scale", [1e-300, 1e300, 1e-40, 1e38])
def test_lengths_of_vectors_do_not_matter_however_large(scale, tmp_path):
    network = load_network(packed(tmp_path, vectors(tmp_path, ann=scale * ANN)))
    np.testing.assert_allclose(network.references.vectors[0], ANN / np.linalg.norm(ANN), atol=1e-7)


@pytest.mark.parametrize("dtype", [">f8", "<f2", "i4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_the_rows_of_an_npy_are_named_by_a_file_of_labels(dtype, order, tmp_path):
    np.save(tmp_path / "rows.npy", np.asarray([4 * BOB, 4 * ANN], dtype=dtype, order=order))
    (tmp_path / "names.txt").write_text("zoe\nann\n")
    network = load_network(packed(tmp_path, tmp_path / "rows.npy", labels=tmp_path / "names.txt"))
    assert network.info.labels == ("zoe", "ann"), "their order is that of the rows"
    expected = [BOB / np.linalg.norm(BOB), ANN / np.linalg.norm(ANN)]
    np.testing.assert_allclose(network.references.vectors, expected, atol=1e-7)


def test_a_picture_of_other_channels_is_an_array(tmp_path):
    preprocessing = Preprocessing(64, tiny.TINY_SIZE, (0.5,) * 4, (0.25,) * 4)
    array = np.random.default_rng(1).random((*tiny.TINY_SIZE, 4), np.float32)
    (tmp_path / "fields").mkdir()
    np.save(tmp_path / "fields" / "wheat.npy", array)
    packed(tmp_path, tmp_path / "fields", "camserve_test_faces:grey_faces", preprocessing=preprocessing)
    (prediction,) = Engine.load("faces", tmp_path).explain(array, []).predictions
    assert (prediction.label, prediction.similarity) == ("wheat", pytest.approx(1, abs=1e-6))


def test_accents_are_written_in_one_way(tmp_path):
    picture(tmp_path / "people" / (unicodedata.normalize("NFD", "Zoë") + ".png"), 1)
    packed(tmp_path, tmp_path / "people")
    assert read_card(tmp_path / "faces.mar").labels == (unicodedata.normalize("NFC", "Zoë"),)


def test_the_same_references_give_the_same_bytes_and_others_another_hash(tmp_path, people):
    first = packed(tmp_path, people)
    content, weights = first.read_bytes(), load_network(first).info.weights
    assert packed(tmp_path, people).read_bytes() == content
    hashes = {weights}
    for arrays in ({}, {"ann": ANN}, {"ann": BOB}, {"zoe": BOB}):
        references = vectors(tmp_path, **arrays) if arrays else None
        hashes.add(load_network(packed(tmp_path, references)).info.weights)
    assert len(hashes) == 5, "kept replies and images of a worker are those of one model"


def test_an_unpacked_archive_has_them_as_well(tmp_path, people):
    with zipfile.ZipFile(packed(tmp_path, people)) as archive:
        archive.extractall(tmp_path / "unpacked")
    assert load_network(tmp_path / "unpacked").info.labels == ("ann", "bob")


# What is refused


def nested(folder: Path) -> Path:
    return picture(folder / "people" / "ann" / "more" / "1.png", 1).parents[2]


def empty(folder: Path) -> Path:
    (folder / "people").mkdir()
    return folder / "people"


def without_pictures(folder: Path) -> Path:
    (folder / "people" / "ann").mkdir(parents=True)
    return folder / "people"


def with_text(folder: Path) -> Path:
    picture(folder / "people" / "ann.png", 1)
    (folder / "people" / "readme.txt").write_text("pictures of ann")
    return folder / "people"


def cut_off(folder: Path) -> Path:
    path = picture(folder / "people" / "ann.png", 1)
    path.write_bytes(path.read_bytes()[:200])
    return path.parent


def twice(folder: Path) -> Path:
    picture(folder / "people" / "ann.png", 1)
    return picture(folder / "people" / "ann" / "2.png", 2).parents[1]


def twice_in_two_spellings(folder: Path) -> Path:
    for form in ("NFC", "NFD"):
        picture(folder / "people" / (unicodedata.normalize(form, "Zoë") + ".png"), 1)
    return folder / "people"


def unprintable(folder: Path) -> Path:
    return picture(folder / "people" / "a\tb.png", 1).parent


def not_utf8(folder: Path) -> Path:
    return picture(folder / "people" / "a\udcffb.png", 1).parent


def pickled(folder: Path) -> Path:
    return vectors(folder, ann=np.array([{"a": 1}], dtype=object))


def twice_in_a_zip(folder: Path) -> Path:
    file = io.BytesIO()
    np.save(file, ANN)
    with zipfile.ZipFile(folder / "people.npz", "w") as archive:
        archive.writestr("ann.npy", file.getvalue())
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("ann.npy", file.getvalue())
    return folder / "people.npz"


def file(name: str, content: bytes) -> Callable[[Path], Path]:
    def written(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return written


def claiming(shape: str) -> bytes:
    """An .npy file that says another shape than it has numbers."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + bytes(40)


def of(**arrays: object) -> Callable[[Path], Path]:
    return lambda folder: vectors(folder, **arrays)


REFUSED: Mapping[str, tuple[Callable[[Path], Path], type[CamserveError], str]] = {
    "nothing there": (lambda folder: folder / "nowhere", NotFound, "there are no references"),
    "a directory without pictures": (empty, InvalidInput, "there are no pictures in"),
    "a reference without pictures": (without_pictures, InvalidInput, "there are no pictures in"),
    "directories in a reference": (nested, InvalidInput, "has pictures alone"),
    "a text among pictures": (with_text, InvalidImage, "readme.txt: not a JPEG, PNG, WEBP image"),
    "a picture that is cut off": (cut_off, InvalidImage, "ann.png: the PNG file is broken or truncated"),
    "a name twice": (twice, InvalidOption, "each reference has a name of its own, and 'ann' comes twice"),
    "a name in two spellings": (twice_in_two_spellings, InvalidOption, "comes twice"),
    "a name that is not printable": (unprintable, InvalidOption, "a text that can be printed"),
    "a name that is no Unicode": (not_utf8, InvalidOption, "a text that can be printed"),
    "a file of another kind": (file("people.csv", b"1,2,3"), InvalidInput, "its name ends in '.csv'"),
    "an npz of anything": (file("people.npz", b"PK garbage"), InvalidInput, "is not a file of vectors"),
    "an npz with other files": (file("people.npz", b""), InvalidInput, "is not a file of vectors"),
    "a pickle": (file("people.npy", pickle.dumps([1, 2])), InvalidInput, "is not a file of vectors"),
    "objects": (pickled, InvalidInput, "its elements are numbers, got object"),
    "a name twice in a zip": (twice_in_a_zip, InvalidOption, "'ann' comes twice"),
    "texts": (of(ann=np.array(["a", "b"])), InvalidInput, "its elements are numbers"),
    "a number alone": (of(ann=np.array(3.0)), InvalidInput, r"a vector has the shape \[dimension\]"),
    "three axes": (of(ann=np.ones((1, 1, 5))), InvalidInput, r"a vector has the shape \[dimension\]"),
    "no vectors": (of(ann=np.ones((0, 5))), InvalidInput, r"a vector has the shape \[dimension\]"),
    "more numbers than there are": (
        file("people.npy", claiming("(1000000, 5)")),
        InvalidInput,
        "has another size",
    ),
    "a shape below 0": (file("people.npy", claiming("(-2, -5)")), InvalidInput, "is not a file of vectors"),
    "another length": (of(ann=np.ones(4)), InvalidInput, "vectors have 5 numbers, those of reference 'ann' 4"),
    "a long name": (of(**{"a" * 300: ANN}), InvalidOption, "must be a text of at most 256 characters"),
    "NaN": (of(ann=ANN, bob=[1, np.nan, 0, 0, 0]), InvalidInput, "'bob' has numbers that are not finite"),
    "infinity": (of(ann=[1, np.inf, 0, 0, 0]), InvalidInput, "'ann' has numbers that are not finite"),
    "zeros": (of(ann=ANN, bob=np.zeros(5)), InvalidInput, "'bob' is all zeros"),
    "vectors that cancel": (of(ann=[ANN, -3 * ANN]), InvalidInput, "'ann' cancel each other"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_references_that_cannot_be_are_refused_with_the_reason(name, tmp_path):
    make, kind, text = REFUSED[name]
    path = make(tmp_path)
    with pytest.raises(kind, match=text):
        packed(tmp_path / "store", path)
    assert not (tmp_path / "store" / "faces.mar").exists()


def test_there_are_not_too_many(tmp_path, monkeypatch):
    monkeypatch.setattr("camserve.archive.references.MAX_REFERENCES", 2)
    with pytest.raises(InvalidOption, match="at most 2 references"):
        given_references(vectors(tmp_path, a=ANN, b=BOB, c=CAT))
    with pytest.raises(InvalidOption, match=f"a model has 1..{MAX_REFERENCES} references, got {MAX_REFERENCES + 1}"):
        References(tuple(map(str, range(MAX_REFERENCES + 1))), np.ones((MAX_REFERENCES + 1, 1), np.float32))


def test_an_array_is_bounded_before_it_is_read():
    with pytest.raises(ValueError, match="an array may have at most"):
        load_array(io.BytesIO(), 2**40)


@pytest.mark.parametrize(
    ("names", "text"), [("ann\nbob\n", "has 3 references, and --labels has 2 names"), ("a\na\nb", "'a' comes twice")]
)
def test_names_of_rows_must_fit(names, text, tmp_path):
    np.save(tmp_path / "rows.npy", np.array([ANN, BOB, CAT]))
    (tmp_path / "names.txt").write_text(names)
    with pytest.raises(InvalidOption, match=text):
        packed(tmp_path, tmp_path / "rows.npy", labels=tmp_path / "names.txt")


def test_rows_need_names_and_nothing_else_has_some(tmp_path, people):
    np.save(tmp_path / "rows.npy", np.array([ANN]))
    with pytest.raises(InvalidOption, match="has 1 references, and --labels has 0 names"):
        packed(tmp_path, tmp_path / "rows.npy")
    (tmp_path / "names.txt").write_text("a\nb\n")
    with pytest.raises(InvalidOption, match="have names of their own"):
        packed(tmp_path, people, labels=tmp_path / "names.txt")
    with pytest.raises(InvalidOption, match="the labels of vectors are the names of their references"):
        packed(tmp_path, None, labels=tmp_path / "names.txt")


@pytest.mark.parametrize("outputs", [None, "softmax", "value"])
def test_references_are_for_vectors_alone(outputs, tmp_path, people, monkeypatch):
    if outputs is not None:
        monkeypatch.setattr("camserve.archive.package.find_weights", None)  # it is refused before any work
    with pytest.raises(InvalidOption, match="references are for outputs embedding and text-image, got"):
        packed(tmp_path, people, outputs=outputs)


@pytest.mark.parametrize("kind", ["object", "pictures", "vectors"])
def test_an_engine_takes_them_for_vectors_alone(kind, people, tmp_path):
    held = References(("ann",), np.ones((1, 5), np.float32))
    given = {"object": held, "pictures": people, "vectors": vectors(tmp_path, ann=ANN)}[kind]
    with pytest.raises(InvalidOption, match="are for outputs embedding and text-image, and these are softmax"):
        Engine(faces(), preprocessing=PREPROCESSING, references=given)


def test_a_network_without_direction_for_a_picture_is_refused(tmp_path, people):
    with pytest.raises(InvalidInput, match="the vector of reference 'ann' is all zeros"):
        packed(tmp_path, people, "camserve_test_faces:dark")
    Image.new("RGB", (64, 64)).save(people / "ann.png")  # black
    with pytest.raises(InvalidInput, match="the vector of reference 'ann' has numbers that are not finite"):
        packed(tmp_path, people, "camserve_test_faces:endless")


# Archives of strangers


def with_member(path: Path, content: bytes | None, labels: object = ("ann", "bob")) -> Path:
    """Returns a copy of an archive with another member of references, or without."""
    changed = path.with_name("changed.mar")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            if name not in (REFERENCES, "labels.json"):
                new.writestr(name, old.read(name))
        new.writestr("labels.json", json.dumps(labels))
        if content is not None:
            new.writestr(REFERENCES, content)
    return changed


def tensors(*rows: object, dtype: str = "f4") -> bytes:
    return save({"references": np.array(rows, dtype)})


GOOD = ([1, 2, 0, 0, 3], [0, 1, 0, 0, 0])
BAD: Mapping[str, tuple[bytes | None, object, str]] = {
    "no vectors": (None, ("ann", "bob"), "references.safetensors"),
    "garbage": (b"garbage" * 100, ("ann", "bob"), "is not a camserve archive with references"),
    "empty": (b"", ("ann", "bob"), "is not a camserve archive with references"),
    "pickle": (pickle.dumps([1]), ("ann", "bob"), "is not a camserve archive with references"),
    "a long header": (struct.pack("<Q", 2**62) + b"{}", ("ann", "bob"), "is not a camserve archive with references"),
    "float64": (tensors(*GOOD, dtype="f8"), ("ann", "bob"), "have float32 vectors"),
    "one axis": (tensors(1, 2), ("ann", "bob"), r"of the shape \[2, dimension\]"),
    "too few": (tensors(GOOD[0]), ("ann", "bob"), r"of the shape \[2, dimension\], got float32 \[1, 5\]"),
    "another name": (save({"vectors": np.ones((2, 5), "f4")}), ("ann", "bob"), "has one tensor, 'references'"),
    "another tensor": (
        save({"references": np.ones((2, 5), "f4"), "b": np.ones(1, "f4")}),
        ("ann", "bob"),
        "has one tensor",
    ),
    "NaN": (tensors(GOOD[0], [np.nan] * 5), ("ann", "bob"), "'bob' has numbers that are not finite"),
    "zeros": (tensors(GOOD[0], [0] * 5), ("ann", "bob"), "'bob' is all zeros"),
    "a name twice": (tensors(*GOOD), ("ann", "ann"), "'ann' comes 2 times"),
    "no name": (tensors(*GOOD), ("ann", ""), "a text that can be printed"),
    "a terminal's code": (tensors(*GOOD), ("ann", "\x1b[2J"), "a text that can be printed"),
    "another length": (tensors([1, 2], [3, 4]), ("ann", "bob"), "vectors have 5 numbers, its references 2"),
    "no numbers": (tensors([], []), ("ann", "bob"), "is all zeros"),
}


@pytest.mark.parametrize("name", BAD)
def test_references_of_anything_in_an_archive_are_refused(name, tmp_path):
    content, labels, text = BAD[name]
    path = packed(tmp_path, vectors(tmp_path, ann=ANN, bob=BOB))
    with pytest.raises((InvalidInput, InvalidOption), match=text):
        load_network(with_member(path, content, labels))
    assert load_network(with_member(path, tensors(*GOOD))).info.labels == ("ann", "bob"), (
        "nothing else is wrong with it"
    )


def test_the_member_is_bounded_before_it_is_read(tmp_path):
    path = packed(tmp_path, vectors(tmp_path, ann=ANN, bob=BOB))
    large = with_member(path, bytes(2**26 + 2**13))
    with pytest.raises(InvalidInput, match=r"references\.safetensors may have at most"):
        load_network(large)
    with zipfile.ZipFile(large) as archive:
        archive.extractall(tmp_path / "unpacked")
    with pytest.raises(InvalidInput, match=r"references\.safetensors may have at most"):
        load_network(tmp_path / "unpacked")


def test_an_archive_holds_the_vectors_as_float32_of_length_1(tmp_path):
    with zipfile.ZipFile(packed(tmp_path, vectors(tmp_path, ann=ANN, bob=BOB))) as archive:
        (found,) = load(archive.read(REFERENCES)).values()
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


# The command line


def test_the_command_line_packs_names_and_explains(tmp_path, people, capsys):
    command = f"archive {SOURCE} --outputs embedding --name faces --references {people} --store {tmp_path}"
    sizes = "--resize 64 --crop 48x64 --mean 0.5 0.5 0.5 --std 0.25 0.25 0.25"
    assert cli.run(f"{command} {sizes}".split()) == 0
    assert cli.run(f"models faces --store {tmp_path}".split()) == 0
    said = capsys.readouterr().out
    assert "outputs embedding of 5 numbers, 2 references: ann, bob" in said
    assert "--target 'ann'" in said
    assert "What makes the image similar to a packed reference." in said
    explain = f"explain {people / 'ann.png'} --local --model faces --store {tmp_path} --out {tmp_path} --target bob"
    assert cli.run(explain.split()) == 0
    said = capsys.readouterr().out
    assert [word in said for word in ("reference", "similarity 1.00", "ann-grad_cam-bob.png")] == [True] * 3


def test_the_command_line_says_that_there_are_none(tmp_path, capsys):
    packed(tmp_path, None)
    assert cli.run(f"models faces --store {tmp_path}".split()) == 0
    assert "outputs embedding of 5 numbers, no references\n" in capsys.readouterr().out
