"""What a record says of a request and its answer: all that was asked, and hashes of what a person has sent."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_finalise_results import IMAGE
from tiny import png

from camserve.evidence.canonical import sha256
from camserve.evidence.record import image_told, line_of, map_digest, target_told
from camserve.evidence.verify import parsed
from camserve.gateway.pool.fake import MODEL
from camserve.methods import GradCam
from camserve.types import (
    AnyTarget,
    Contrast,
    Cost,
    Explanation,
    InputView,
    Prediction,
    Region,
    SaliencyMap,
    Target,
    Text,
    Vector,
    Word,
)
from camserve.types.request import ExplainRequest

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


def line(target: AnyTarget, text: str, **fields: object) -> str:
    model = replace(MODEL, outputs="text-image", dimension=4, labels=())
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
