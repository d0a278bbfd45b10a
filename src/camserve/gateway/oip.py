"""The Open Inference Protocol: convert, call, convert. Its explain calls take the same way as our own."""

from __future__ import annotations

import asyncio

from camserve import __version__
from camserve.errors import CamserveError, NotFound
from camserve.gateway import oip_convert
from camserve.gateway.calls import Calls, Context, abort
from camserve.gateway.requestid import request_id
from camserve.gateway.watch import Catalogue, ServedModel
from camserve.oip import inference_pb2 as oip
from camserve.oip import inference_pb2_grpc
from camserve.v1 import explain_pb2 as pb

SERVICE = oip.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name


class InferenceService(inference_pb2_grpc.GRPCInferenceServiceServicer):
    """`inference.GRPCInferenceService`; see inference.proto."""

    def __init__(self, catalogue: Catalogue, calls: Calls) -> None:
        self._catalogue = catalogue
        self._calls = calls

    async def ServerLive(self, request: oip.ServerLiveRequest, context: Context) -> oip.ServerLiveResponse:  # noqa: N802
        """Whoever answers lives."""
        return oip.ServerLiveResponse(live=True)

    async def ServerReady(self, request: oip.ServerReadyRequest, context: Context) -> oip.ServerReadyResponse:  # noqa: N802
        """As the health service: one model is ready."""
        return oip.ServerReadyResponse(ready=any(model.ready for model in self._catalogue.models))

    async def ModelReady(self, request: oip.ModelReadyRequest, context: Context) -> oip.ModelReadyResponse:  # noqa: N802
        """False also for what is not known: clients ask again until it is."""
        try:
            return oip.ModelReadyResponse(ready=self._model(request.name, request.version).ready)
        except CamserveError:
            return oip.ModelReadyResponse(ready=False)

    async def ServerMetadata(  # noqa: N802  # gRPC's name
        self, request: oip.ServerMetadataRequest, context: Context
    ) -> oip.ServerMetadataResponse:
        """Name and version."""
        return oip.ServerMetadataResponse(name="camserve", version=__version__, extensions=["explain"])

    async def ModelMetadata(  # noqa: N802  # gRPC's name
        self, request: oip.ModelMetadataRequest, context: Context
    ) -> oip.ModelMetadataResponse:
        """The same for every model but its name and version."""
        try:
            return oip_convert.metadata(self._model(request.name, request.version).required())
        except Exception as error:
            await abort(context, error)

    async def ModelInfer(self, request: oip.ModelInferRequest, context: Context) -> oip.ModelInferResponse:  # noqa: N802
        """Large tensors are converted in a thread."""
        with self._calls.held():
            try:
                asked = await asyncio.to_thread(oip_convert.asked, request)
            except Exception as error:
                named = pb.ExplainRequest(model=request.model_name, methods=[pb.MethodSpec()])
                await self._calls.refuse(named, context, error)
            reply = await self._calls.explain(asked.request, context, timeout_s=asked.timeout_s)
            try:
                return await asyncio.to_thread(oip_convert.response, reply, asked, request_id())
            except Exception as error:
                await abort(context, error)

    def _model(self, name: str, version: str) -> ServedModel:
        model = self._catalogue.get(name)
        if version not in ("", model.required().version):
            raise NotFound(f"model {model.name} is served in version {model.required().version}, not {version!r}")
        return model
