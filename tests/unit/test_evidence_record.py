"""What a record says of a request and its answer: all that was asked, and hashes of what a person has sent."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_finalise_results import IMAGE
from tiny import png

from camserve.errors import CamserveError, InvalidInput
from camserve.evidence.canonical import sha256
from camserve.evidence.record import image_told, line_of, map_digest, target_told
from camserve.evidence.replay import check_image, compare, read_record, request_options
from camserve.evidence.verify import parsed
from camserve.gateway.pool.fake import MODEL
from camserve.methods import GradCam
from camserve.types import (
    AnyTarget,
    Contrast,
    Cost,
    Explanation,
    InputView,
    ModelInfo,
    Prediction,
    Region,
    SaliencyMap,
    Target,
    Text,
    Vector,
    Word,
)
from camserve.types.request import ExplainRequest, make_request

VIEW = InputView((32, 48), (0.0, 0.0, 48.0, 32.0), (32, 48))
WORDS = "is Ann Smith ill?"
PICTURE = png(IMAGE)
VECTOR = np.array([0.5, -1.0, 2.0, 0.25], np.float32)


def hash_of(content: bytes) -> dict[str, object]:
    return {"sha256": sha256(content), "bytes": len(content)}


TOLD: list[tuple[AnyTarget, dict[str, object]]] = [
    (Target(index=3), {"index": 3}),
    (Target(top_k=2), {"top_k": 2}),
    (
        Contrast(Target(index=3), (Target(index=1),)),
        {"contrast": {"of": {"index": 3}, "than": [{"index": 1}], "gamma": 1.0}},
    ),
    (Text(WORDS), {"text": hash_of(WORDS.encode())}),
    (Word(2, WORDS), {"word": {"at": 2, "words": hash_of(WORDS.encode())}}),
    (Vector(VECTOR), {"vector": hash_of(VECTOR.tobytes())}),
    (Vector(image=PICTURE), {"reference": hash_of(PICTURE)}),
    (Vector(image=IMAGE), {"reference": hash_of(IMAGE.tobytes())}),
    (Region(Target(index=2), mask=PICTURE), {"region": {"of": {"index": 2}, "mask": hash_of(PICTURE)}}),
]


@pytest.mark.parametrize(("target", "told"), TOLD, ids=lambda value: type(value).__name__)
def test_a_target_is_told_without_what_a_person_has_sent(target: AnyTarget, told: dict[str, object]):
    assert target_told(target) == told


def test_an_image_is_told_by_its_hash():
    assert image_told(PICTURE) == {**hash_of(PICTURE), "form": "file"}
    assert image_told(IMAGE) == {**hash_of(IMAGE.tobytes()), "form": "uint8", "shape": [32, 48, 3]}
    swapped = (IMAGE / 255).astype(">f4")
    told = image_told(swapped)
    assert told == {**hash_of(swapped.astype("<f4").tobytes()), "form": "float32", "shape": [32, 48, 3]}


def test_a_map_is_told_by_its_numbers():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert map_digest(array) == sha256(array.astype("<f4").tobytes())
    assert map_digest(np.asfortranarray(array)) == map_digest(array)
    assert map_digest(array.T) != map_digest(array)


TOWERS = replace(MODEL, outputs="text-image", dimension=4, labels=())


def line(target: AnyTarget, text: str, model: ModelInfo = TOWERS, **fields: object) -> str:
    fitted = ExplainRequest(PICTURE, (GradCam(),), (target,), evidence=True, **fields).fit(model)
    array = np.zeros((32, 48), np.float32)
    saliency = SaliencyMap(
        GradCam(), Prediction(0, text), ("features",), array, (0.0, 1.0), False, True, target_text=text, score=0.5
    )
    cost = Cost(0, {}, 1, "exact", "here")
    return line_of(Explanation("fake", "1.0", (), (saliency,), VIEW, cost), fitted)


def test_words_that_are_explained_are_nowhere_in_a_record():
    found = line(Text(WORDS), f"text:{WORDS}")
    assert "Smith" not in found
    assert parsed(found.encode())["maps"][0]["target"] == hash_of(f"text:{WORDS}".encode())
    assert parsed(line(Vector(VECTOR), "vector:4").encode())["maps"][0]["target"] == "vector:4"


def test_records_of_a_file(tmp_path: Path):
    path = tmp_path / "records.jsonl"
    one = json.loads(line(Target(index=3), "three", MODEL)) | {"number": 1}
    path.write_text(json.dumps(one) + "\n" + json.dumps(one | {"number": 2}) + "\n")
    assert read_record(path, 2)["number"] == 2
    with pytest.raises(InvalidInput, match="2 records: say which"):
        read_record(path)
    with pytest.raises(InvalidInput, match="no record 3"):
        read_record(path, 3)
    for text, said in (
        ("{}\n", "no records of form"),
        ("", "is empty"),
        ("{", "cannot read"),
        ("[" * 10_000, "cannot"),
        (json.dumps(one | {"maps": [{}]}), "a record whose maps is not as camserve writes it"),
        (json.dumps(one | {"methods": []}), "a map of a method that it does not tell of"),
    ):
        path.write_text(text)
        with pytest.raises(InvalidInput, match=said):
            read_record(path)


MISSING = object()


def places(value: object, way: tuple[object, ...] = ()) -> Iterator[tuple[object, ...]]:
    """The way to each value in a JSON value, but for itself."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield (*way, key)
        yield from places(one, (*way, key))


def test_a_record_that_somebody_has_changed_is_refused_or_asked_but_never_a_fault(tmp_path: Path):
    """Whatever stands in whatever place: a record may come from anybody."""
    path = tmp_path / "record.json"
    whole = json.loads(line(Contrast(Target(index=3), (Target(index=1),)), "three", MODEL))
    assert len(list(places(whole))) > 50
    refused, asked = 0, 0
    for way in places(whole):
        for other in (MISSING, None, [], [{}], "a", -9, {"a": 1}):
            found = copy.deepcopy(whole)
            inside = found
            for key in way[:-1]:
                inside = inside[key]
            inside[way[-1]] = other
            if other is MISSING:
                del inside[way[-1]]
            path.write_text(json.dumps(found))
            try:
                record = read_record(path)
                assert isinstance(check_image(record, PICTURE), str)
                options = request_options(record)
                compare(record, whole | {"maps": []})
                make_request(PICTURE, **options).fit(MODEL)
                asked += 1
            except CamserveError:
                refused += 1
    assert min(refused, asked) > 50
