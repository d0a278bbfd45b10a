"""Box files in both forms, what is wrong with broken ones, and the examples made of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import pixels, png

from camserve.errors import InvalidInput, NotFound
from camserve.evaluation.examples import Example, classes_of, folder_examples, seen_boxes, unknown_labels
from camserve.evaluation.truth import TrueBox, read_boxes
from camserve.types import InputView

COCO = {
    "images": [{"id": 7, "file_name": "val/cat.jpg"}, {"id": 8, "file_name": "empty.jpg"}],
    "categories": [{"id": 1, "name": "lynx"}, {"id": 2, "name": "person"}],
    "annotations": [
        {"image_id": 7, "category_id": 1, "bbox": [10, 20.5, 30, 40]},
        {"image_id": 7, "category_id": 2, "bbox": [0, 0, 5, 5], "iscrowd": 0},
        {"image_id": 7, "category_id": 1, "bbox": [1, 1, 2, 2], "iscrowd": 1},
    ],
}
VOC = """<annotation><filename>{name}</filename><size><width>90</width></size>
<object><name>lynx</name><bndbox><xmin>11</xmin><ymin>1</ymin><xmax>40</xmax><ymax>60</ymax></bndbox></object>
<object><name>dog</name><part><name>head</name></part>
<bndbox><ymin>2</ymin><xmin>1</xmin><xmax>3</xmax><ymax>4</ymax></bndbox></object></annotation>"""


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_coco(tmp_path):
    assert read_boxes(written(tmp_path / "boxes.json", json.dumps(COCO))) == {
        "cat.jpg": (TrueBox("lynx", 10, 20.5, 40, 60.5), TrueBox("person", 0, 0, 5, 5)),
        "empty.jpg": (),
    }


def test_pascal_voc_counts_from_one_and_includes_the_last_pixel(tmp_path):
    path = written(tmp_path / "cat.xml", VOC.format(name="cat.jpg"))
    expected = (TrueBox("lynx", 10, 0, 40, 60), TrueBox("dog", 0, 1, 3, 4))
    assert read_boxes(path) == {"cat.jpg": expected}
    written(tmp_path / "dog.xml", VOC.format(name="dog.jpg"))
    assert read_boxes(tmp_path) == {"cat.jpg": expected, "dog.jpg": expected}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("boxes.json", "{"),
        ("boxes.json", "[]"),
        ("boxes.json", json.dumps(COCO | {"annotations": [{"image_id": 9, "category_id": 1, "bbox": [1, 2, 3, 4]}]})),
        ("boxes.json", json.dumps(COCO | {"annotations": [{"image_id": 7, "category_id": 1, "bbox": [1, 2, 3]}]})),
        ("boxes.xml", "<annotation>"),
        ("boxes.xml", "<annotation></annotation>"),
        ("boxes.xml", VOC.format(name="a.jpg").replace("<xmin>11</xmin>", "")),
        ("boxes.xml", VOC.format(name="a.jpg").replace("11", "left")),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, text):
    with pytest.raises(InvalidInput, match=rf"{name} is neither a COCO JSON nor a Pascal VOC XML"):
        read_boxes(written(tmp_path / name, text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(NotFound, match="no box file"):
        read_boxes(tmp_path / "boxes.json")
    with pytest.raises(NotFound, match="no XML file"):
        read_boxes(tmp_path)


def test_examples_are_the_images_of_a_folder_by_name(tmp_path):
    for name in ("b.png", "a.PNG", "notes.txt"):
        (tmp_path / name).write_bytes(png(pixels(0)))
    box = TrueBox("lynx", 0, 0, 1, 1)
    examples = folder_examples(tmp_path, {"b.png": (box,), "elsewhere.png": (box,)})
    assert [(example.name, example.boxes) for example in examples] == [("a.PNG", ()), ("b.png", (box,))]
    assert examples[0].read() == png(pixels(0))
    assert examples[0].digest(b"x") != examples[1].digest(b"x")


def test_a_folder_without_what_is_wanted(tmp_path):
    with pytest.raises(NotFound, match="no folder"):
        folder_examples(tmp_path / "none")
    with pytest.raises(NotFound, match="no image"):
        folder_examples(tmp_path)
    (tmp_path / "a.png").write_bytes(png(pixels(0)))
    with pytest.raises(NotFound, match=r"no image of .*: it names other.png"):
        folder_examples(tmp_path, {"other.png": ()})


LABELS = ("tabby cat", "lynx", "crane", "crane")


def test_boxes_by_class_without_those_of_no_class():
    boxes = [TrueBox(label, 0, 0, 1, 1) for label in ("Lynx", "person", "crane", "tabby_cat", "lynx")]
    assert classes_of(boxes, LABELS) == {1: (boxes[0], boxes[4]), 0: (boxes[3],)}
    assert unknown_labels([Example("a", b"", tuple(boxes))], LABELS) == ["crane", "person"]
    assert unknown_labels([Example("a", b"")], LABELS) == []


def test_boxes_of_no_class_at_all_are_refused():
    with pytest.raises(InvalidInput, match="whose first is 'tabby cat': person"):
        unknown_labels([Example("a", b"", (TrueBox("person", 0, 0, 1, 1),))], LABELS)


def test_boxes_are_cut_to_what_the_network_saw():
    view = InputView(original_size=(100, 200), crop=(50.0, 0.0, 150.0, 100.0), size=(10, 10))
    boxes = [TrueBox("x", 40, 10, 60, 20), TrueBox("x", 0, 0, 50, 100), TrueBox("x", 140, 90, 200, 100)]
    assert seen_boxes(boxes, view) == (TrueBox("x", 50, 10, 60, 20), TrueBox("x", 140, 90, 150, 100))
