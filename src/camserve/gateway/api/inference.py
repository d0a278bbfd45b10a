"""Serves the Open Inference Protocol: decodes, calls and encodes. Its explain calls take the same way as our own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

from camserve import __version__
from camserve.codecs import oip as codec
from camserve.errors import CamserveError, NotFound
from camserve.gateway.api.calls import Calls, Decoded, Door
from camserve.gateway.api.status import Context, abort
from camserve.gateway.pool.registry import Registry, ServedModel
from camserve.oip import inference_pb2 as oip
from camserve.types import Explanation, ModelInfo, SaliencyMap
from camserve.types.request import RequestLimits
from camserve.wording import shown

SERVICE = oip.DESCRIPTOR.services_by_name["GRPCInferenceService"]

NAME, EXTENSIONS = "camserve", ("explain",)

RAW = ("ModelInfer",)
"""Methods that read and write serialized messages by themselves."""


class InferenceService:
    """Implements `inference.GRPCInferenceService`; see inference.proto."""

    def __init__(self, registry: Registry, calls: Calls, limits: RequestLimits) -> None:
        self._registry = registry
        self._calls = calls
        self._door = Door(partial(_decoded, limits=limits), partial(codec.model_name, limits=limits))

    async def ServerLive(self, request: oip.ServerLiveRequest, context: Context) -> oip.ServerLiveResponse:  # noqa: N802
        """Answers that the server lives, since it answers."""
        return oip.ServerLiveResponse(live=True)

    async def ServerReady(self, request: oip.ServerReadyRequest, context: Context) -> oip.ServerReadyResponse:  # noqa: N802
        """Answers whether one model is ready, as the health service does."""
        return oip.ServerReadyResponse(ready=any(model.ready for model in self._registry.models))

    async def ModelReady(self, request: oip.ModelReadyRequest, context: Context) -> oip.ModelReadyResponse:  # noqa: N802
        """Answers whether a model is ready; an unknown one is not, so that clients ask again until it is there."""
        try:
            return oip.ModelReadyResponse(ready=self.model(request.name, request.version).ready)
        except CamserveError:
            return oip.ModelReadyResponse(ready=False)

    async def ServerMetadata(  # noqa: N802  # gRPC's name
        self, request: oip.ServerMetadataRequest, context: Context
    ) -> oip.ServerMetadataResponse:
        """Answers with the name and the version of the server."""
        return oip.ServerMetadataResponse(name=NAME, version=__version__, extensions=EXTENSIONS)

    async def ModelMetadata(  # noqa: N802  # gRPC's name
        self, request: oip.ModelMetadataRequest, context: Context
    ) -> oip.ModelMetadataResponse:
        """Answers with a model's name, version and tensors; the tensors are the same for all models."""
        try:
            return codec.metadata(self.model(request.name, request.version).required())
        except Exception as error:
            await abort(context, error)

    async def ModelInfer(self, requests: object, context: Context) -> None:  # noqa: N802  # gRPC's name
        """Answers with an explanation of an image."""
        await self._calls.explain(context, self._door)

    def model(self, name: str, version: str) -> ServedModel:
        """Returns the model of a name; raises NotFound where it is served in another version than asked for."""
        model = self._registry.get(name)
        if version not in ("", model.required().version):
            raise NotFound(f"model {model.name} is served in version {model.required().version}, not {shown(version)}")
        return model


@dataclass
class Reply:
    """Makes the reply of one call. It has the outputs that are wanted, else all that the model has."""

    inference: codec.Inference

    def fit(self, model: ModelInfo) -> None:
        """Takes note of the model that is asked; raises InvalidInput where it lacks an output that is wanted."""
        self.inference = codec.fitted(self.inference, model)

    def encode(self, maps: Iterable[SaliencyMap], finish: Callable[[], Explanation]) -> bytes:
        """Returns the message; the model is known by then."""
        return codec.encode(stacked(maps, finish), self.inference)


def stacked(maps: Iterable[SaliencyMap], finish: Callable[[], Explanation]) -> Explanation:
    """Returns an explanation with all of its maps, which one tensor holds."""
    made = tuple(maps)
    return replace(finish(), maps=made)


def _decoded(data: bytes, limits: RequestLimits) -> Decoded:
    reply = Reply(codec.decode(data, limits))
    return Decoded(reply.inference.request, reply.encode, reply.inference.timeout_s, reply.fit)
