"""What the gateway asks of the workers, and how TorchServe 0.12 is asked: all that the gateway knows of it is here.

A step that got no usable answer raises `Unavailable`: it may be sent again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
from google.protobuf.message import DecodeError

from camserve import wire
from camserve.errors import INTERNAL_MESSAGE, CamserveError, Internal, NotFound, Unavailable
from camserve.torchserve import inference_pb2, inference_pb2_grpc
from camserve.types import Item, ModelInfo, StepResult
from camserve.worker.v1 import step_pb2

_log = logging.getLogger(__name__)

KEY = "camserve"
"""The key in TorchServe's input map that holds a WorkerRequest."""


@dataclass(frozen=True)
class Workers:
    """The workers of a model behind one upstream."""

    ready: frozenset[str]
    """Those that can answer; a worker that is started again has another name."""
    wanted: int
    """As many as there should be."""


class Upstream(Protocol):
    """The workers behind a gateway."""

    async def step(self, model: str, items: Sequence[Item], timeout_s: float) -> StepResult:
        """Has one worker answer a step.

        Raises:
            Unavailable: no usable answer came; the step may be sent again.
            CamserveError: sending it again would not help.
        """

    async def describe(self, model: str, timeout_s: float) -> ModelInfo:
        """What a worker says of the model. Raises as `step`."""

    async def look(self, model: str) -> Workers:
        """Which workers can answer, and how many should. Raises Unavailable when nobody can tell."""

    async def models(self) -> Sequence[str]:
        """Names of the served models. Raises Unavailable when nobody can tell."""

    async def close(self) -> None:
        """Closes connections."""


class TorchServeUpstream:
    """TorchServe 0.12: gRPC `Predictions` for steps, the management API for the state of its workers.

    Args:
        grpc_address: "host:port" of the inference service.
        management_url: "http://host:port" of the management API.
        max_message_bytes: largest message either way.
        http_timeout_s: for calls of the management API.
    """

    def __init__(
        self, grpc_address: str, management_url: str, max_message_bytes: int = 128 * 2**20, http_timeout_s: float = 5.0
    ) -> None:
        self._grpc_address = grpc_address
        self._management_url = management_url.rstrip("/")
        self._http_timeout_s = http_timeout_s
        self._http = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback: never through a proxy
        self._channel = grpc.aio.insecure_channel(
            grpc_address,
            options=[
                ("grpc.max_send_message_length", max_message_bytes),
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.enable_http_proxy", 0),
                ("grpc.max_reconnect_backoff_ms", 1000),
            ],
        )
        self._stub = inference_pb2_grpc.InferenceAPIsServiceStub(self._channel)  # type: ignore[no-untyped-call]

    async def step(self, model: str, items: Sequence[Item], timeout_s: float) -> StepResult:
        """Has one worker answer a step; raises as `Upstream.step`."""
        request = step_pb2.WorkerRequest(step=wire.step_to_proto(items))
        reply = await self._ask(model, request, "step", timeout_s)
        try:
            return wire.step_result_from_proto(reply.step)
        except ValueError as error:
            raise malformed(error) from None

    async def describe(self, model: str, timeout_s: float) -> ModelInfo:
        """What a worker says of the model; raises as `Upstream.step`."""
        request = step_pb2.WorkerRequest(describe=step_pb2.DescribeRequest())
        reply = await self._ask(model, request, "describe", timeout_s)
        return wire.model_from_proto(reply.describe.model)

    async def look(self, model: str) -> Workers:
        """Workers in state READY; none for a model that TorchServe does not have."""
        try:
            versions = await self._get(f"/models/{urllib.parse.quote(model, safe='')}")
        except NotFound:
            return Workers(frozenset(), 0)
        ready = [worker for version in versions for worker in version["workers"] if worker["status"] == "READY"]
        # A container that is started again has the same process ids; the times then differ.
        names = frozenset(f"{worker['pid']} since {worker['startTime']}" for worker in ready)
        return Workers(names, sum(version["minWorkers"] for version in versions))

    async def models(self) -> Sequence[str]:
        """Names of the registered models."""
        names: list[str] = []
        token: str | None = "0"
        while token is not None:
            page = await self._get(f"/models?limit=100&next_page_token={token}")
            names += [model["modelName"] for model in page["models"]]
            token = page.get("nextPageToken")
        return names

    async def close(self) -> None:
        """Closes the channel."""
        await self._channel.close(None)

    async def _ask(
        self, model: str, request: step_pb2.WorkerRequest, expected: str, timeout_s: float
    ) -> step_pb2.WorkerReply:
        message = inference_pb2.PredictionsRequest(model_name=model, input={KEY: request.SerializeToString()})
        try:
            answer = await self._stub.Predictions(message, timeout=timeout_s)
            reply = step_pb2.WorkerReply.FromString(answer.prediction)
        except grpc.aio.AioRpcError as error:
            raise self._translated(error, model, timeout_s) from None
        except DecodeError as error:
            raise malformed(error) from None
        kind = reply.WhichOneof("reply")
        if kind == "error":
            raise wire.error_from_proto(reply.error)
        if kind != expected:
            raise malformed(f"expected {expected}, got {kind}")
        return reply

    def _translated(self, error: grpc.aio.AioRpcError, model: str, timeout_s: float) -> CamserveError:
        """Our error for one of TorchServe's, which tells most of them apart by text alone."""
        details = error.details() or ""
        _log.warning("TorchServe on model %s: %s: %s", model, error.code().name, details)
        for code, text, kind, sentence in _TRANSLATIONS:
            if error.code() is code and text in details:
                return kind(sentence.format(model=model, address=self._grpc_address, timeout_s=timeout_s))
        return Unavailable(f"TorchServe answered {error.code().name}")

    async def _get(self, path: str) -> Any:
        return await asyncio.to_thread(self._get_blocking, path)

    def _get_blocking(self, path: str) -> Any:
        try:
            with self._http.open(self._management_url + path, timeout=self._http_timeout_s) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            if error.code == 404:
                raise NotFound(f"TorchServe's management API has no {path}") from None
            raise Unavailable(f"TorchServe's management API answered {error.code}") from None
        except (OSError, ValueError) as error:
            raise Unavailable(f"TorchServe does not answer at {self._management_url}: {error}") from None


_Code = grpc.StatusCode
_TRANSLATIONS: tuple[tuple[grpc.StatusCode, str, type[CamserveError], str], ...] = (
    (_Code.INTERNAL, "Model not found", NotFound, "TorchServe has no model {model}"),
    (_Code.INTERNAL, "has no worker to serve", Unavailable, "no worker of {model} is free"),
    (_Code.INTERNAL, "Worker died", Unavailable, "the worker of {model} died while it answered"),
    (_Code.INTERNAL, "Out of resources", Unavailable, "the worker of {model} is out of memory"),
    (_Code.UNAVAILABLE, "Prediction failed", Unavailable, "the worker of {model} failed"),
    (_Code.UNAVAILABLE, "", Unavailable, "TorchServe does not answer at {address}"),
    # The step is larger than TorchServe's max_request_size, or than the channel's bound: a fault of the configuration.
    (_Code.CANCELLED, "RST_STREAM", Internal, INTERNAL_MESSAGE),
    (_Code.RESOURCE_EXHAUSTED, "", Internal, INTERNAL_MESSAGE),
    (_Code.DEADLINE_EXCEEDED, "", Unavailable, "a worker of {model} took longer than {timeout_s:g} s for a step"),
)
"""(status, part of its text, our error, its sentence); the first row that fits counts."""


def malformed(reason: object) -> Unavailable:
    """The error for a worker's reply that makes no sense; the log has the reason."""
    _log.warning("malformed reply of a worker: %s", reason)
    return Unavailable("a worker's reply could not be read")
