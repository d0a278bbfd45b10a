"""What the handler answers: the gateway's steps and plain clients, pooled, every failure in its own answer."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import pixels, png

from camserve import wire
from camserve.errors import InvalidImage, InvalidOption
from camserve.methods import GradCam, GroupCam, ScoreCam
from camserve.types import Item, Target, Task
from camserve.worker.executor import Executor
from camserve.worker.service import WorkerService
from camserve.worker.v1 import step_pb2


@pytest.fixture
def service(tiny_network):
    return WorkerService(Executor(tiny_network))


def plain(service: WorkerService, **entry: Any) -> dict[str, Any]:
    (answer,) = service.answer([entry])
    return json.loads(answer.body)


def step_entry(*items: Item) -> dict[str, bytes]:
    request = step_pb2.WorkerRequest(step=wire.step_to_proto(items))
    return {"camserve": bytearray(request.SerializeToString())}


def step_result(answer):
    return wire.step_result_from_proto(step_pb2.WorkerReply.FromString(answer.body).step)


def test_a_plain_upload_gets_predictions_and_a_grad_cam_as_png(service):
    reply = plain(service, body=bytearray(png(pixels(0))))
    assert [set(prediction) for prediction in reply["predictions"]] == [{"index", "label", "probability"}] * 5
    (saliency,) = reply["maps"]
    assert saliency["method"] == "grad_cam"
    assert saliency["target"] == reply["predictions"][0]
    image = Image.open(io.BytesIO(base64.b64decode(saliency["png"])))
    assert (image.format, image.mode, image.size) == ("PNG", "L", (64, 48))


def test_form_fields_choose_method_targets_and_format(service):
    entry = {"method": b"group_cam", "groups": b"4", "theta": b"50", "target": b"lynx,top2,0", "format": b"float"}
    reply = plain(service, data=png(pixels(0)), **entry)
    first = reply["maps"][0]
    assert first["parameters"] == {"groups": 4, "theta": 50.0, "variant": "paper", "grouping": "chunk"}
    assert first["target"]["label"] == "lynx"
    assert np.asarray(first["values"]).shape == (48, 64)


def test_options_as_json_take_several_methods(service):
    options = {"methods": ["grad_cam", {"name": "score_cam"}], "targets": [1, "tabby cat"], "format": "none"}
    reply = plain(service, data=png(pixels(0)), options=json.dumps(options).encode())
    assert reply["maps"] == []
    assert reply["cost"]["queries"] > 0


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "send an image"),
        ({"data": b""}, "zero bytes"),
        ({"data": b"not an image"}, "not a JPEG"),
        ({"data": png(pixels(0))[:200]}, "truncated"),
        ({"data": png(pixels(0)), "method": "grad_cam_9"}, "unknown method 'grad_cam_9'"),
        ({"data": png(pixels(0)), "method": "group_cam", "groups": "13"}, "groups must be 1..12"),
        ({"data": png(pixels(0)), "method": "group_cam", "theta": "101"}, "theta must be 0..100, got 101"),
        ({"data": png(pixels(0)), "target": "6"}, "class index must be 0..5, got 6"),
        ({"data": png(pixels(0)), "target": "crane"}, "names classes 3, 4"),
        ({"data": png(pixels(0)), "layer": "nowhere"}, "unknown layer 'nowhere'"),
        ({"data": png(pixels(0)), "format": "gif"}, "format must be one of"),
        ({"data": png(pixels(0)), "options": b"[1"}, "options must be a JSON object"),
        ({"data": png(pixels(0)), "top_predictions": "-1"}, "top_predictions must be"),
        ({"data": png(pixels(0)), "colour": "red"}, "unknown parameter 'colour'"),
    ],
)
def test_a_bad_plain_request_is_told_what_was_wrong(service, entry, message):
    (answer,) = service.answer([entry])
    assert answer.status == 400
    assert message in json.loads(answer.body)["error"]["message"]


def test_one_bad_request_in_a_batch_of_eight_leaves_seven_right_answers(service):
    good = [{"data": png(pixels(seed)), "method": "score_cam", "format": "float"} for seed in range(8)]
    alone = [json.loads(service.answer([entry])[0].body) for entry in good]
    batch = [*good[:3], {"data": png(pixels(3))[:-30]}, *good[4:]]
    together = [json.loads(answer.body) for answer in service.answer(batch)]
    assert together[3]["error"]["kind"] == "InvalidImage"
    for place in {0, 1, 2, 4, 5, 6, 7}:
        ours, theirs = together[place]["maps"][0]["values"], alone[place]["maps"][0]["values"]
        np.testing.assert_allclose(ours, theirs, atol=1e-5)  # other batch shapes round float32 sums differently


def test_plain_clients_and_the_gateway_share_a_batch(service):
    item = Item(png(pixels(1)), (Target(index=2),), (Task(0, GradCam(), 0, 0), Task(1, ScoreCam(), 3, 9)))
    answers = service.answer([{"data": png(pixels(0))}, step_entry(item, item), {"data": b"?"}])
    assert [answer.content_type for answer in answers] == [
        "application/json",
        "application/protobuf",
        "application/json",
    ]
    first, second = step_result(answers[1]).outcomes
    assert [partial.position for partial in first.partials] == [0, 1]
    assert first.targets[0].index == 2
    np.testing.assert_allclose(first.partials[1].sums, second.partials[1].sums, rtol=1e-5)


def test_an_unreadable_item_of_a_step_is_its_own_error(service):
    step = wire.step_to_proto([Item(png(pixels(0)), (), ())] * 3)
    step.items[1].tasks.add().method.group_cam.theta = 200
    step.items[2].image.ClearField("encoded")
    (answer,) = service.answer([{"camserve": step_pb2.WorkerRequest(step=step).SerializeToString()}])
    good, bad_option, no_image = step_result(answer).outcomes
    assert good.predictions
    assert isinstance(bad_option, InvalidOption)
    assert isinstance(no_image, InvalidImage)


def test_describe_tells_labels_layers_and_input_size(service, tiny_network):
    request = step_pb2.WorkerRequest(describe=step_pb2.DescribeRequest())
    (answer,) = service.answer([{"camserve": request.SerializeToString()}])
    described = step_pb2.WorkerReply.FromString(answer.body).describe
    assert wire.model_from_proto(described.model) == tiny_network.info
    assert tiny_network.info.default_layer == "4"


def test_bytes_that_are_no_request_are_answered_with_an_error(service):
    (answer,) = service.answer([{"camserve": b"\xff\xff\xff"}])
    assert step_pb2.WorkerReply.FromString(answer.body).error.kind == "InvalidInput"


def test_an_unforeseen_failure_is_a_fixed_sentence_and_a_logged_traceback(service, tiny_network, caplog):
    def fail(*_: Any) -> torch.Tensor:
        raise RuntimeError("secret detail")

    handle = tiny_network.module[3].register_forward_hook(fail)
    (answer,) = service.answer([{"data": png(pixels(0))}])
    handle.remove()
    assert answer.status == 500
    assert b"secret" not in answer.body
    assert "secret detail" in caplog.text


def test_a_step_pools_targets_of_group_cam_by_their_numbers(service):
    """Query l of target t is number t * groups + l, so the two halves are the two targets."""
    targets = (Target(index=0), Target(index=5))

    def sums(start: int, stop: int) -> np.ndarray:
        item = Item(png(pixels(4)), targets, (Task(0, GroupCam(groups=6), start, stop),))
        return step_result(service.answer([step_entry(item)])[0]).outcomes[0].partials[0].sums

    whole, first, second = sums(0, 12), sums(0, 6), sums(6, 12)
    assert np.abs(first[1]).max() == np.abs(second[0]).max() == 0
    np.testing.assert_allclose(first + second, whole, atol=1e-6)
