"""The gRPC service: convert, call, convert."""

from __future__ import annotations

from camserve.gateway.calls import Calls, Context, abort
from camserve.gateway.convert import model_to_proto
from camserve.gateway.watch import Catalogue
from camserve.v1 import explain_pb2 as pb
from camserve.v1 import explain_pb2_grpc


class ExplanationService(explain_pb2_grpc.ExplanationServiceServicer):
    """`camserve.v1.ExplanationService`."""

    def __init__(self, catalogue: Catalogue, calls: Calls) -> None:
        self._catalogue = catalogue
        self._calls = calls

    async def Explain(self, request: pb.ExplainRequest, context: Context) -> pb.ExplainReply:  # noqa: N802  # gRPC's name
        """See explain.proto."""
        return await self._calls.explain(request, context)

    async def StreamExplain(self, request: pb.ExplainRequest, context: Context) -> None:  # noqa: N802  # gRPC's name
        """See explain.proto. Written with `context.write`, so that a client that goes away ends it at once."""

        async def on_progress(progress: pb.Progress) -> None:
            await context.write(pb.ExplainUpdate(progress=progress))

        reply = await self._calls.explain(request, context, on_progress)
        await context.write(pb.ExplainUpdate(reply=reply))

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsReply:  # noqa: N802
        """See explain.proto."""
        return pb.ListModelsReply(
            models=[
                pb.ModelSummary(name=model.name, version=model.info.version if model.info else "", ready=model.ready)
                for model in self._catalogue.models
            ]
        )

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.Model:  # noqa: N802  # gRPC's name
        """See explain.proto."""
        try:
            model = self._catalogue.get(request.name)
            return model_to_proto(model.required(), model.ready)
        except Exception as error:
            await abort(context, error)
