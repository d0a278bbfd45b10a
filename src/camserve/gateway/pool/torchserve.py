"""Defines what the gateway asks of a backend, and asks TorchServe 0.12: all that the gateway knows of it is here.

A step that got no usable answer raises `Unavailable`: it may be sent again. Where a worker died or was silent for too
long it raises `WorkerLost`, which is one, too.
"""

from __future__ import annotations

import asyncio
import json
import logging
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import grpc
from google.protobuf.message import DecodeError

from camserve.codecs import step
from camserve.codecs.bulk import within
from camserve.errors import INTERNAL_MESSAGE, CamserveError, Internal, NotFound, Unavailable, WorkerLost
from camserve.torchserve import inference_pb2
from camserve.types import Item, ModelInfo, StepResult

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

_PREDICTIONS = inference_pb2.DESCRIPTOR.services_by_name["InferenceAPIsService"].methods_by_name["Predictions"]

KEY = "camserve"
"""Key in TorchServe's input map that holds a WorkerRequest."""


@dataclass(frozen=True)
class Workers:
    """The workers of a model at one backend."""

    ready: frozenset[str]
    """Names of the workers that can answer; a worker that is started again has another name."""
    wanted: int
    """Number of workers that there should be."""


class Backend(Protocol):
    """A TorchServe with the workers of some models."""

    async def step(self, model: str, items: Sequence[Item], timeout_s: float) -> StepResult:
        """Has one worker answer a step.

        Raises:
            WorkerLost: a worker died or was silent for too long over the step, which may be the step's own fault.
            Unavailable: no usable answer came; the step may be sent again.
            CamserveError: sending it again would not help.
        """

    async def describe(self, model: str, timeout_s: float) -> ModelInfo:
        """Returns the model as a worker describes it; raises what `step` raises."""

    async def look(self, model: str) -> Workers:
        """Returns which workers can answer, and how many should; raises Unavailable when nobody can tell."""

    async def models(self) -> Sequence[str]:
        """Returns the names of the served models; raises Unavailable when nobody can tell."""

    async def close(self) -> None:
        """Closes connections."""


class TorchServeBackend:
    """Speaks to TorchServe 0.12: by gRPC `Predictions` for steps, by its management API for the state of its workers.

    Args:
        grpc_address: "host:port" of the inference service.
        management_url: "http://host:port" of the management API.
        max_message_bytes: largest message either way.
        http_timeout_s: bound of each call of the management API.
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
        # Takes and gives bytes: a stub would make and read messages of up to 128 MiB on the event loop.
        path = f"/{_PREDICTIONS.containing_service.full_name}/{_PREDICTIONS.name}"
        self._predictions = self._channel.unary_unary(path, None, None)  # bytes as they are

    async def step(self, model: str, items: Sequence[Item], timeout_s: float) -> StepResult:
        """Has one worker answer a step; messages are made and read in a thread. Raises what `Backend.step` raises."""
        message = await asyncio.to_thread(lambda: _message(model, *step.request_pieces(items)))
        answer = await self._ask(model, message, timeout_s)
        return await asyncio.to_thread(_read, step.result_from_bytes, answer)

    async def describe(self, model: str, timeout_s: float) -> ModelInfo:
        """Returns the model as a worker describes it; raises what `Backend.step` raises."""
        answer = await self._ask(model, _message(model, step.DESCRIBE), timeout_s)
        return _read(step.description_from_bytes, answer)

    async def look(self, model: str) -> Workers:
        """Returns the workers in state READY; none for a model that TorchServe does not have."""
        try:
            versions = await self._get(f"/models/{urllib.parse.quote(model, safe='')}")
        except NotFound:
            return Workers(frozenset(), 0)
        ready = [worker for version in versions for worker in version["workers"] if worker["status"] == "READY"]
        # A container that is started again has the same process ids; the times then differ.
        names = frozenset(f"{worker['pid']} since {worker['startTime']}" for worker in ready)
        return Workers(names, sum(version["minWorkers"] for version in versions))

    async def models(self) -> Sequence[str]:
        """Returns the names of the registered models."""
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

    async def _ask(self, model: str, message: bytes, timeout_s: float) -> bytes:
        """Returns TorchServe's serialized answer; raises our error for one of TorchServe's."""
        try:
            return cast(bytes, await self._predictions(message, timeout=timeout_s))
        except grpc.aio.AioRpcError as error:
            raise self._translated(error, model, timeout_s) from None

    def _translated(self, error: grpc.aio.AioRpcError, model: str, timeout_s: float) -> CamserveError:
        """Returns our error for one of TorchServe's, which tells most of its errors apart by text alone."""
        details = error.details() or ""
        _log.warning("TorchServe on model %s: %s: %s", model, error.code().name, details)
        for code, text, kind, sentence in _TRANSLATIONS:
            if code in (None, error.code()) and text in details:
                return kind(sentence.format(model=model, address=self._grpc_address, timeout_s=timeout_s))
        return Unavailable(f"TorchServe answered {error.code().name}")

    async def _get(self, path: str) -> Any:
        """Returns what the management API has at a path; raises NotFound or Unavailable where it has nothing."""
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
_TRANSLATIONS: tuple[tuple[grpc.StatusCode | None, str, type[CamserveError], str], ...] = (
    # TorchServe's own texts come with changing codes: a death is INTERNAL, after a SIGKILL RESOURCE_EXHAUSTED.
    (None, "Worker died", WorkerLost, "the worker of {model} died while it answered"),
    (None, "Model not found", NotFound, "TorchServe has no model {model}"),
    (None, "has no worker to serve", Unavailable, "no worker of {model} is free"),
    (None, "Out of resources", Unavailable, "the worker of {model} is out of memory"),
    (None, "Prediction failed", Unavailable, "the worker of {model} failed"),
    # gRPC's own: the step is larger than TorchServe's max_request_size, or than the channel's bound. That is a fault of
    # the configuration.
    (None, "larger than max", Internal, INTERNAL_MESSAGE),
    (None, "exceeds maximum size", Internal, INTERNAL_MESSAGE),
    (_Code.CANCELLED, "RST_STREAM", Internal, INTERNAL_MESSAGE),
    (_Code.UNAVAILABLE, "", Unavailable, "TorchServe does not answer at {address}"),
    (_Code.DEADLINE_EXCEEDED, "", WorkerLost, "a worker of {model} took longer than {timeout_s:g} s for a step"),
)
"""Rows of (status, fragment of the text, our error, its sentence); the first row that fits counts, and None fits any
status. The texts come first: TorchServe answers most of its errors as INTERNAL, and some with a status that says
something else."""


def _message(model: str, *request: bytes) -> bytes:
    """Returns a serialized `PredictionsRequest` whose input has a request, given in pieces, under `KEY`."""
    kind = inference_pb2.PredictionsRequest
    entry = (*within(1, KEY.encode()), *within(2, *request))  # an entry of a map is a message of a key and a value
    return b"".join((kind(model_name=model).SerializeToString(), *within(kind.INPUT_FIELD_NUMBER, *entry)))


def _read(read: Callable[[bytes], _T], answer: bytes) -> _T:
    """Returns what a worker's answer says; raises the error that it says instead."""
    try:
        return read(inference_pb2.PredictionResponse.FromString(answer).prediction)
    except (ValueError, DecodeError) as error:
        raise malformed(error) from None


def malformed(reason: object) -> Unavailable:
    """Logs why a worker's reply makes no sense; returns the error for it, to be raised."""
    _log.warning("malformed reply of a worker: %s", reason)
    return Unavailable("a worker's reply could not be read")
