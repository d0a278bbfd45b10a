"""Serves the typed gRPC service: decodes, calls and encodes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from camserve.codecs import v1
from camserve.gateway.api.calls import Calls, Decoded, Door, Form, Write
from camserve.gateway.api.status import Context, abort
from camserve.gateway.pool.registry import Registry
from camserve.gateway.requests.explainer import OnProgress
from camserve.types import Explanation, InputView, Progress, SaliencyMap
from camserve.types.request import ExplainRequest, RequestLimits
from camserve.v1 import explain_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["ExplanationService"]

RAW = ("Explain", "StreamExplain")
"""Methods that read and write serialized messages by themselves."""


class ExplanationService:
    """Implements `camserve.v1.ExplanationService`.

    Args:
        registry: the models.
        calls: the explain calls of every door.
        limits: the bounds of a request and its reply.
    """

    def __init__(self, registry: Registry, calls: Calls, limits: RequestLimits) -> None:
        self._registry = registry
        self._calls = calls
        self._limits = limits

    async def Explain(self, requests: object, context: Context) -> None:  # noqa: N802  # gRPC's name
        """Answers `Explain`, as explain.proto says."""
        await self._calls.explain(context, Door(self._decoded, self._model_name))

    async def StreamExplain(self, requests: object, context: Context) -> None:  # noqa: N802  # gRPC's name
        """Answers `StreamExplain`, as explain.proto says."""

        # Messages are written to the context, not yielded, so that the call ends at once when its client goes away.

        def telling(request: ExplainRequest, write: Write) -> OnProgress:
            async def tell(progress: Progress, view: InputView) -> None:
                await write(await asyncio.to_thread(self._update, request, progress, view))

            return tell

        await self._calls.explain(context, Door(self._decoded_for_stream, self._model_name), telling)

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsReply:  # noqa: N802
        """Answers `ListModels`, as explain.proto says."""
        return pb.ListModelsReply(
            models=[
                pb.ModelSummary(
                    name=model.name,
                    version=model.info.version if model.info else "",
                    ready=model.ready,
                    failure=model.failure,
                )
                for model in self._registry.models
            ]
        )

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.Model:  # noqa: N802  # gRPC's name
        """Answers `GetModel`, as explain.proto says."""
        try:
            model = self._registry.get(request.name)
            return v1.served_model_to_proto(model.required(), model.ready)
        except Exception as error:
            await abort(context, error)

    def _decoded(self, data: bytes) -> Decoded:
        return decoded(data, self._limits, lambda reply: reply.SerializeToString())

    def _decoded_for_stream(self, data: bytes) -> Decoded:
        return decoded(data, self._limits, lambda reply: pb.ExplainUpdate(reply=reply).SerializeToString())

    def _model_name(self, data: bytes) -> str:
        return v1.model_name(data, self._limits)

    def _update(self, request: ExplainRequest, progress: Progress, view: InputView) -> bytes:
        message = v1.progress_to_proto(progress, view, request.output, self._limits.message_bytes)
        return pb.ExplainUpdate(progress=message).SerializeToString()


def decoded(data: bytes, limits: RequestLimits, written: Callable[[pb.ExplainReply], bytes]) -> Decoded:
    """Returns a serialized `ExplainRequest` decoded, for a door that writes its reply in a form of its own.

    Args:
        data: the message.
        limits: the bounds of a request and its reply.
        written: returns a reply as the door's clients read it.
    """
    request = v1.request_from_bytes(data, limits)

    def encode(maps: Iterable[SaliencyMap], finish: Callable[[], Explanation]) -> pb.ExplainReply:
        encoded = v1.maps_to_proto(maps, request.output, limits.message_bytes)
        return v1.reply_to_proto(finish(), encoded)

    def with_evidence(reply: pb.ExplainReply, evidence: str) -> bytes:
        reply.evidence = evidence
        return written(reply)

    return Decoded(request, encode, form=Form(v1.canonical_reply, with_evidence))
