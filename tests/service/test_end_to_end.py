"""The whole service with its default model: client, gateway, real TorchServe, handler, real weights, real photos."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
import pytest_asyncio
import skimage.data
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from PIL import Image
from triton_harness import triton

from camserve import AsyncClient, Engine
from camserve.archive import ensure_archive
from camserve.errors import Unsupported
from camserve.gateway.ops.settings import Settings
from camserve.gateway.pool.discovery import torchserves
from camserve.gateway.server import Gateway
from camserve.methods import METHODS as METHODS_BY_NAME
from camserve.supervisor import TorchServe, WorkerSettings
from camserve.torchserve import inference_pb2, inference_pb2_grpc
from camserve.types import BoxOptions, Explanation, Target

pytestmark = [pytest.mark.torchserve, pytest.mark.asyncio(loop_scope="module")]

STORE = Path(__file__).parents[2] / "model_store"
CAT_CLASSES = {"tiger cat", "Egyptian cat", "tabby"}
METHODS = ["cam", "grad_cam", "group_cam", ("group_cam", {"variant": "reference", "groups": 16})]


@dataclass
class Service:
    torchserve: TorchServe
    gateway: Gateway
    client: AsyncClient


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service() -> AsyncIterator[Service]:
    ensure_archive("lite0", STORE)
    # Plain clients' calls are batched here; the gateway's steps pay the delay, which no test measures.
    # As many threads as the engine has here (tests/conftest.py): sums that are split among threads round otherwise, and
    # where a pixel lies on the edge of a ReLU6 its gradient is then another one, by more than any tolerance.
    workers = WorkerSettings(store=STORE, device="cpu", threads=1, batch_size=8, batch_delay_ms=300)
    torchserve = TorchServe(workers.on_free_ports())
    await torchserve.start()
    settings = Settings(listen="127.0.0.1:0", metrics_listen="127.0.0.1:0", poll_s=0.2)
    try:
        async with (
            Gateway(settings, torchserves([torchserve.backend])) as gateway,
            AsyncClient(gateway.address) as client,
        ):
            await gateway.wait_ready(120)
            yield Service(torchserve, gateway, client)
    finally:
        await torchserve.stop()


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load("lite0", STORE, device="cpu")


def jpeg(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "JPEG", quality=90)
    return file.getvalue()


CAT, COFFEE = jpeg(skimage.data.chelsea()), jpeg(skimage.data.coffee())


def assert_same_maps(ours: Explanation, theirs: Explanation) -> None:
    """float32 sums in another order: a step's queries share micro-batches of other compositions."""
    assert len(ours.maps) == len(theirs.maps)
    for one, other in zip(ours.maps, theirs.maps, strict=True):
        assert (one.method, one.target.label, one.layer) == (other.method, other.target.label, other.layer)
        np.testing.assert_allclose(one.array, other.array, atol=1e-4)


async def test_the_cat_is_a_cat_and_the_coffee_an_espresso(service: Service) -> None:
    cat, coffee = await asyncio.gather(service.client.explain(CAT), service.client.explain(COFFEE))
    assert {prediction.label for prediction in cat.predictions[:3]} == CAT_CLASSES
    assert coffee.predictions[0].label == "espresso"
    assert coffee.predictions[0].probability == pytest.approx(0.95, abs=0.02)


async def test_the_served_maps_are_those_of_the_embedded_engine(service: Service, engine: Engine) -> None:
    asked = {"methods": METHODS, "targets": ["tabby", Target(top_k=2)]}
    served = await service.client.explain(CAT, **asked)
    assert_same_maps(served, await asyncio.to_thread(engine.explain, CAT, **asked))
    assert served.cost.steps > 1


async def test_score_cam_in_many_steps_is_the_embedded_engines(service: Service, engine: Engine) -> None:
    """At an early layer, whose 112 channels are cheaper than the last layer's 1280."""
    asked = {"methods": ["score_cam"], "targets": ["espresso"], "layer": "_blocks.10"}
    served = await service.client.explain(COFFEE, **asked)
    assert_same_maps(served, await asyncio.to_thread(engine.explain, COFFEE, **asked))
    assert served.cost.steps > 1
    assert served.cost.queries <= 112


CHEAP = {
    "d_rise": {"masks": 40},
    "integrated_gradients": {"steps": 6},
    "is_cam": {"samples": 2},
    "occlusion": {"positions": 6},
    "rise": {"masks": 40},
    "smooth_grad": {"samples": 3},
    "smooth_grad_cam_plus_plus": {"samples": 3},
    "ss_cam": {"samples": 2},
    "group_cam": {"groups": 8, "grouping": "kmeans"},
    "xrai": {"steps": 3},
}
"""Parameters with which a method asks few queries."""


@pytest.mark.parametrize("method", METHODS_BY_NAME)
async def test_every_method_answers_over_grpc_as_in_the_engine(service: Service, engine: Engine, method: str) -> None:
    """At an early layer of 80 channels; CAM at the last one. Transformers' methods say why they cannot."""
    layer = "" if method == "cam" else "_blocks.7"
    asked = {"methods": [(method, CHEAP.get(method, {}))], "targets": ["tabby"], "layer": layer}
    if METHODS_BY_NAME[method].needs == "ViT":
        with pytest.raises(Unsupported, match="no attention was seen"):
            await service.client.explain(CAT, **asked)
        return
    served = await service.client.explain(CAT, **asked)
    assert_same_maps(served, await asyncio.to_thread(engine.explain, CAT, **asked))
    assert served.maps[0].complete
    assert not served.maps[0].degenerate


async def test_several_layers_and_the_curves_of_the_map_are_those_of_the_engine(
    service: Service, engine: Engine
) -> None:
    asked = {"methods": [("group_cam", {"groups": 4})], "layer": ["_blocks.7", "_bn1"], "fusion": "max"}
    asked |= {"evaluate": True, "evaluation_steps": 7}
    served = await service.client.explain(COFFEE, **asked)
    local = await asyncio.to_thread(engine.explain, COFFEE, **asked)
    assert_same_maps(served, local)
    ours, theirs = served.maps[0].faithfulness, local.maps[0].faithfulness
    assert ours is not None
    assert theirs is not None
    # Pixels of nearly equal saliency may change places, a handful of 7168 in each step.
    np.testing.assert_allclose(ours.deletion, theirs.deletion, atol=0.01)
    np.testing.assert_allclose(ours.insertion, theirs.insertion, atol=0.01)
    assert ours.insertion_auc > ours.deletion_auc
    assert served.cost.evaluation_queries == 16


async def test_a_map_marks_the_cup(service: Service) -> None:
    """The cup with its coffee, as it lies in the photo of 600 x 400: left, top, right, bottom."""
    answer = await service.client.explain(COFFEE, ["group_cam"], boxes=BoxOptions(threshold=0.5))
    box = answer.maps[0].boxes[0]
    assert 150 < (box.left + box.right) / 2 < 420
    assert 20 < (box.top + box.bottom) / 2 < 250


async def test_a_killed_worker_costs_time_and_nothing_else(service: Service, engine: Engine) -> None:
    asked = {"methods": [("group_cam", {"groups": 64})], "targets": ["tiger cat", "tabby"]}
    killed: list[int] = []

    def kill_once(done: int, total: int) -> None:
        """With the first news, when half of the queries are still to be asked."""
        if not killed:
            killed.append(_worker(service.torchserve).pid)
            _worker(service.torchserve).send_signal(signal.SIGKILL)

    served = await service.client.explain(CAT, **asked, on_progress=kill_once, timeout_s=120)
    assert_same_maps(served, await asyncio.to_thread(engine.explain, CAT, **asked))
    assert _worker(service.torchserve).pid not in killed


def _worker(torchserve: TorchServe) -> psutil.Process:
    (worker,) = [
        child for child in psutil.Process(torchserve.pid).children() if "model_service_worker" in str(child.cmdline())
    ]
    return worker


async def test_a_generic_client_gets_by_with_reflection_alone(service: Service) -> None:
    """As grpcurl does it: no generated code, the messages come from the server's descriptors."""

    def call() -> dict:
        with grpc.insecure_channel(service.gateway.address) as channel:
            pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
            method = pool.FindServiceByName("camserve.v1.ExplanationService").FindMethodByName("Explain")
            send, receive = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
            stub = channel.unary_unary(
                "/camserve.v1.ExplanationService/Explain",
                request_serializer=send.SerializeToString,
                response_deserializer=receive.FromString,
            )
            request = {
                "image": {"encoded": base64.b64encode(COFFEE).decode()},
                "methods": [{"groupCam": {"groups": 4}}],
                "targets": [{"label": "espresso"}],
                "output": {"encoding": "OVERLAY_PNG"},
            }
            return MessageToDict(stub(ParseDict(request, send()), timeout=60))

    reply = await asyncio.to_thread(call)
    assert reply["predictions"][0]["label"] == "espresso"
    overlay = Image.open(io.BytesIO(base64.b64decode(reply["maps"][0]["data"])))
    assert (overlay.format, overlay.size) == ("PNG", (224, 224))


async def test_tritonclient_gets_the_maps_of_the_engine(service: Service, engine: Engine, tmp_path: Path) -> None:
    """The unmodified client of another server, over the Open Inference Protocol."""
    call = {"parameters": {"explain_method": "grad_cam group_cam:groups=4", "explain_targets": "espresso"}}
    found, arrays = await triton(service.gateway.address, COFFEE, tmp_path, model="lite0", calls=[call])
    local = await asyncio.to_thread(engine.explain, COFFEE, ["grad_cam", ("group_cam", {"groups": 4})], ["espresso"])
    assert found["ready"]
    assert arrays["0 labels"][0] == "espresso"
    np.testing.assert_allclose(arrays["0 saliency"], np.stack([one.array for one in local.maps]), atol=1e-4)


async def curl(*arguments: str) -> dict:
    process = await asyncio.create_subprocess_exec("curl", "-s", *arguments, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    return json.loads(out)


async def test_curl_uploads_an_image_and_chooses_a_method(service: Service, tmp_path: Path) -> None:
    path, url = tmp_path / "cat.jpg", f"{service.torchserve.inference_url}/predictions/lite0"
    path.write_bytes(CAT)
    default, chosen = await asyncio.gather(
        curl("-T", str(path), url),
        curl("-F", f"data=@{path}", "-F", "method=group_cam", "-F", "groups=8", "-F", "target=tabby", url),
    )
    assert default["predictions"][0]["label"] == "tiger cat"
    assert default["maps"][0]["method"] == "grad_cam"
    (saliency,) = chosen["maps"]
    assert (saliency["method"], saliency["parameters"]["groups"], saliency["target"]["label"]) == (
        "group_cam",
        8,
        "tabby",
    )


async def test_a_bad_call_in_torchserves_own_batch_leaves_seven_right_answers(service: Service, engine: Engine) -> None:
    """Plain gRPC calls at once: TorchServe's dynamic batching makes a batch of them."""
    options = json.dumps({"methods": [{"name": "group_cam", "groups": 4}], "format": "float", "size": "layer"}).encode()
    images = [CAT, COFFEE, CAT, CAT[:2000], COFFEE, CAT, COFFEE, CAT]
    async with grpc.aio.insecure_channel(service.torchserve.grpc_address) as channel:
        stub = inference_pb2_grpc.InferenceAPIsServiceStub(channel)
        replies = await asyncio.gather(
            *(
                stub.Predictions(
                    inference_pb2.PredictionsRequest(model_name="lite0", input={"data": image, "options": options})
                )
                for image in images
            )
        )
    answers = [json.loads(reply.prediction) for reply in replies]
    assert answers.pop(3)["error"]["kind"] == "InvalidImage"
    shared = {answer["cost"]["stage_seconds"]["queries"] for answer in answers}
    assert len(shared) < len(answers)  # calls of one batch report the stages of one step
    expected = {
        image: engine.explain(image, [("group_cam", {"groups": 4})], size="layer").maps[0].array
        for image in (CAT, COFFEE)
    }
    for image, answer in zip(images[:3] + images[4:], answers, strict=True):
        np.testing.assert_allclose(answer["maps"][0]["values"], expected[image], atol=1e-4)
