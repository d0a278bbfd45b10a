"""What an explanation took, as every door says it."""

from __future__ import annotations

import dataclasses
import json

from camserve.codecs import texts, v1
from camserve.types import Cost, Explanation, InputView, Prediction
from camserve.types.request import ExplainRequest

COST = Cost(
    queries=9,
    stage_seconds={"queue": 0.5},
    steps=2,
    precision="bfloat16",
    worker="w",
    evaluation_queries=4,
    cached=True,
    image_bytes=2**40,
    runtime="onnx",
    micro_batch=8,
)
ANSWER = Explanation("fake", "1.0", (Prediction(2, "cup", 0.5),), (), InputView((2, 3), (0, 0, 3, 2), (2, 3)), COST)


def test_every_figure_here_differs_from_its_default():
    for field in dataclasses.fields(Cost):
        assert getattr(COST, field.name) != field.default, field.name


def test_the_typed_api_carries_every_figure():
    message = v1.reply_to_proto(ANSWER, [])
    assert {field.name for field, _ in message.cost.ListFields()} == {field.name for field in dataclasses.fields(Cost)}
    assert v1.explanation_from_proto(message, ExplainRequest(b"")).cost == COST


def test_json_carries_every_figure():
    assert Cost(**json.loads(json.dumps(texts.cost_json(COST)))) == COST
