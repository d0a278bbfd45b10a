"""What the handler answers: the gateway's steps and plain clients, pooled, every failure in its own answer."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import pixels, png

from camserve.codecs import step as codec
from camserve.errors import DeadlineExceeded, ImageMissing, InvalidImage, InvalidInput, InvalidOption
from camserve.methods import GradCam, GroupCam, ScoreCam
from camserve.saliency import xrai
from camserve.types import Item, Target, Task
from camserve.worker.executor import MEMORY_BYTES, Executor
from camserve.worker.service import PLAIN_LIMITS, WorkerService
from camserve.worker.v1 import step_pb2


@pytest.fixture
def service(tiny_network):
    return WorkerService(Executor(tiny_network))


def plain(service: WorkerService, **entry: Any) -> dict[str, Any]:
    (answer,) = service.answer([entry])
    return json.loads(answer.body)


def step_entry(*items: Item) -> dict[str, bytes]:
    return {"camserve": bytearray(codec.request_to_bytes(items))}


def step_result(answer):
    return codec.result_from_bytes(answer.body)


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


def test_a_plain_client_gets_a_ranked_map(service, monkeypatch):
    """The ranking is a step of its own behind the passes; without it every pixel would have another value."""
    monkeypatch.setattr(xrai, "SCALES", (250,))
    reply = plain(service, data=png(pixels(0)), method=b"xrai", steps=b"2", format=b"float")
    assert reply["cost"]["queries"] == 4
    assert reply["cost"]["steps"] == 2
    assert 1 < len(np.unique(reply["maps"][0]["values"])) < 100


def test_options_as_json_take_several_methods(service):
    options = {"methods": ["grad_cam", {"name": "score_cam"}], "targets": [1, "tabby cat"]}
    reply = plain(service, data=png(pixels(0)), options=json.dumps(options).encode())
    assert [one["method"] for one in reply["maps"]] == ["grad_cam", "grad_cam", "score_cam", "score_cam"]
    assert reply["cost"]["queries"] > 0


def test_predictions_alone_run_no_method(service):
    reply = plain(service, data=png(pixels(0)), method="score_cam", format="none")
    assert (len(reply["predictions"]), reply["maps"], reply["cost"]["queries"]) == (5, [], 0)


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
        ({"data": png(pixels(0)), "colour": "red"}, "unknown option 'colour'; there are method"),
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
    assert first.targets[0].target == Target(index=2)
    np.testing.assert_allclose(first.partials[1].sums, second.partials[1].sums, rtol=1e-5)


def test_an_unreadable_item_of_a_step_is_its_own_error(service):
    request = step_pb2.WorkerRequest.FromString(codec.request_to_bytes([Item(png(pixels(0)), (), ())] * 3))
    request.step.items[1].tasks.add().method.group_cam.theta = 200
    request.step.items[2].image.ClearField("encoded")
    (answer,) = service.answer([{"camserve": request.SerializeToString()}])
    good, bad_option, no_image = step_result(answer).outcomes
    assert good.predictions
    assert isinstance(bad_option, InvalidOption)
    assert isinstance(no_image, InvalidImage)


def test_describe_tells_labels_layers_and_input_size(service, tiny_network):
    (answer,) = service.answer([{"camserve": codec.DESCRIBE}])
    assert codec.description_from_bytes(answer.body) == tiny_network.info
    assert tiny_network.info.default_layer == "4"


def test_bytes_that_are_no_request_are_answered_with_an_error(service):
    (answer,) = service.answer([{"camserve": b"\xff\xff\xff"}])
    with pytest.raises(InvalidInput, match="not a camserve"):
        step_result(answer)


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


# Images: their digests, and their sizes


def test_an_image_is_sent_once_and_then_known_by_its_digest(tiny_network):
    service = WorkerService(Executor(tiny_network, MEMORY_BYTES))
    whole = Item(png(pixels(1)), (Target(index=2),), (Task(0, ScoreCam(), 0, 12),), digest=b"name")
    light, other = replace(whole, image=None), replace(whole, image=None, digest=b"another")
    first, again, missing = (step_result(service.answer([step_entry(item)])[0]) for item in (whole, light, other))
    assert first.keeps_images
    np.testing.assert_array_equal(first.outcomes[0].partials[0].sums, again.outcomes[0].partials[0].sums)
    assert isinstance(missing.outcomes[0], ImageMissing)


def test_a_worker_without_memory_says_so(service):
    whole = Item(png(pixels(1)), (), (), digest=b"name")
    first, again = (step_result(service.answer([step_entry(item)])[0]) for item in (whole, replace(whole, image=None)))
    assert not first.keeps_images
    assert isinstance(again.outcomes[0], ImageMissing)


def test_a_step_says_which_model_answered_and_what_it_made(tiny_network):
    tiny_network.info = replace(tiny_network.info, version="3.1", weights="abc")
    item = Item(png(pixels(1)), (Target(index=2),), (Task(0, ScoreCam(), 0, 7), Task(1, GradCam(), 0, 0)))
    result = step_result(WorkerService(Executor(tiny_network)).answer([step_entry(item)])[0])
    assert (result.version, result.weights) == ("3.1", "abc")
    assert result.is_of(tiny_network.info)
    assert not result.is_of(replace(tiny_network.info, weights="def"))
    made = {"opening": 1, "layer_gradient": 1, "masked_forward": result.outcomes[0].partials[0].queries}
    assert result.made == made


def test_what_nobody_waits_for_any_more_is_not_done(service):
    item = Item(png(pixels(1)), (Target(index=2),), (Task(0, GradCam(), 0, 0),))
    late = replace(item, expires_s=0.0)
    first, second = step_result(service.answer([step_entry(late, item)])[0]).outcomes
    assert isinstance(first, DeadlineExceeded)
    assert second.partials


def black(height: int, width: int) -> bytes:
    """A PNG file of black pixels, one bit each: small, however many they are."""
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "size"),
    [
        pytest.param(black(8100, 8000), (8100, 8000), id="64.8 megapixels"),
        pytest.param(
            png(np.random.default_rng(0).integers(0, 256, (1930, 3000, 3), dtype=np.uint8)), (1930, 3000), id="17 MB"
        ),
    ],
)
def test_an_image_above_the_defaults_passes_a_worker_whose_door_allowed_it(service, tiny_network, data, size):
    """A gateway has checked it by its own limits; the worker has none of its own."""
    item = Item(data, (Target(index=2),), (Task(0, GradCam(), 0, 0),))
    (outcome,) = step_result(service.answer([step_entry(item)])[0]).outcomes
    assert outcome.view.original_size == size
    (answer,) = service.answer([{"data": data}])
    assert "may have at most" in json.loads(answer.body)["error"]["message"], "a plain client's door has the defaults"
    limits = replace(PLAIN_LIMITS, image_bytes=2**26, image_pixels=10**8)
    reply = plain(WorkerService(Executor(tiny_network), limits), data=data, size="layer")
    assert len(reply["maps"]) == 1


# Requests that take several items


def test_a_plain_client_gets_curves_and_a_ranking_as_well(service):
    options = {"method": "xrai:steps=2; grad_cam", "target": "1,2", "evaluate": "true", "evaluation_steps": "3"}
    reply = plain(service, data=png(pixels(0)), format="float", **options)
    assert [saliency["method"] for saliency in reply["maps"]] == ["xrai", "xrai", "grad_cam", "grad_cam"]
    for saliency in reply["maps"]:
        assert saliency["complete"]
        assert 0 <= saliency["deletion_auc"] <= 1
        assert 0 <= saliency["insertion_auc"] <= 1
    assert reply["cost"]["evaluation_queries"] == 4 * 2 * 4
    assert reply["cost"]["queries"] == 4 + 4 * 2 * 4
    assert reply["cost"]["steps"] == 3


def test_a_later_item_that_fails_fails_its_own_request_alone(service, tiny_network):
    def fail(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if len(inputs[0]) == 5:  # a micro-batch of the curves; everything before has one image
            raise RuntimeError("secret detail")

    handle = tiny_network.module.register_forward_pre_hook(fail)
    entries = [{"data": png(pixels(0)), "evaluate": "true"}, {"data": png(pixels(1))}]
    bad, good = (json.loads(answer.body) for answer in service.answer(entries))
    handle.remove()
    assert bad["error"]["kind"] == "Internal"
    assert "secret" not in bad["error"]["message"]
    assert len(good["maps"]) == 1


def test_a_worker_keeps_libtiff_off_its_stderr(tiny_network, monkeypatch):
    noted: list[str] = []
    monkeypatch.setattr("camserve.images.silence_libtiff", lambda: noted.append("worker"))
    WorkerService(Executor(tiny_network))
    assert noted == ["worker"]
