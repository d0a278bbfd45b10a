"""Serves the Open Inference Protocol over HTTP: its paths under /v2, which stand for the methods of its service."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from camserve import __version__
from camserve.codecs import oip_json as codec
from camserve.errors import Unavailable
from camserve.gateway.api.calls import Calls, Decoded, Door
from camserve.gateway.api.inference import EXTENSIONS, NAME, SERVICE, InferenceService, Reply, stacked
from camserve.gateway.web.exchange import Exchange, Message
from camserve.gateway.web.problems import UnsupportedMediaType
from camserve.types import Explanation, SaliencyMap
from camserve.types.request import RequestLimits
from camserve.wording import shown

BINARY = "application/octet-stream"
"""Type of a body whose elements are binary."""

JSON = "application/json"

PREFIX = "/v2"

DETAIL = "error"
"""Member of a problem document that the protocol's clients read: their errors have this one alone."""


@dataclass(frozen=True)
class Answer:
    """Says what answers one path of the protocol."""

    path: str
    method: str
    answer: Callable[[Exchange, Message], Any]
    name: str
    """Full name of the method of gRPC that it stands for."""
    open_to_all: bool = False


class OpenInference:
    """Answers the paths of the protocol.

    Args:
        service: the same over gRPC, which knows models by name and version.
        calls: the explain calls of every door.
        limits: the bounds of a request and its reply.
        ready: returns the names of the models that are ready; raises Unavailable where none is.
    """

    def __init__(
        self, service: InferenceService, calls: Calls, limits: RequestLimits, ready: Callable[[], Sequence[str]]
    ) -> None:
        self._service, self._calls, self._limits, self._any_ready = service, calls, limits, ready

    def answers(self) -> list[Answer]:
        """Returns what answers the paths."""
        found = [
            Answer(PREFIX, "GET", self._server, _name("ServerMetadata")),
            Answer(f"{PREFIX}/health/live", "GET", self._live, _name("ServerLive"), open_to_all=True),
            Answer(f"{PREFIX}/health/ready", "GET", self._ready, _name("ServerReady"), open_to_all=True),
        ]
        for path in (f"{PREFIX}/models/{{name}}", f"{PREFIX}/models/{{name}}/versions/{{version}}"):
            found += [
                Answer(path, "GET", self._model, _name("ModelMetadata")),
                Answer(f"{path}/ready", "GET", self._model_ready, _name("ModelReady")),
                Answer(f"{path}/infer", "POST", self._infer, _name("ModelInfer")),
            ]
        return found

    async def _server(self, exchange: Exchange, scope: Message) -> None:
        await _write(exchange, {"name": NAME, "version": __version__, "extensions": [*EXTENSIONS, codec.BINARY]})

    async def _live(self, exchange: Exchange, scope: Message) -> None:
        await _write(exchange, {"live": True})

    async def _ready(self, exchange: Exchange, scope: Message) -> None:
        self._any_ready()
        await _write(exchange, {"ready": True})

    async def _model(self, exchange: Exchange, scope: Message) -> None:
        await _write(exchange, codec.metadata(self._service.model(*_named(scope)).required()))

    async def _model_ready(self, exchange: Exchange, scope: Message) -> None:
        model = self._service.model(*_named(scope))
        if not model.ready:
            raise Unavailable(f"model {model.name} is not ready")
        await _write(exchange, {"name": model.name, "ready": True})

    async def _infer(self, exchange: Exchange, scope: Message) -> None:
        await self._calls.explain(exchange, self._door(exchange, *_named(scope)))  # type: ignore[arg-type]

    def _door(self, exchange: Exchange, name: str, version: str) -> Door:
        content_type = exchange.headers.get("content-type", "")
        if content_type.partition(";")[0].strip().lower() not in ("", JSON, BINARY):
            raise UnsupportedMediaType(f"an inference request is {JSON} or {BINARY}, got {shown(content_type)}")
        length = exchange.headers.get(codec.HEADER_LENGTH)

        def decode(data: bytes) -> Decoded:
            asked = codec.decode(data, length, name, version, self._limits)

            reply = Reply(asked.inference)

            def encode(maps: Iterable[SaliencyMap], finish: Callable[[], Explanation]) -> bytes:
                body, json_bytes = codec.encode(stacked(maps, finish), replace(asked, inference=reply.inference))
                if json_bytes is not None:
                    exchange.head(BINARY, (codec.HEADER_LENGTH, str(json_bytes)))
                return body

            return Decoded(asked.inference.request, encode, asked.inference.timeout_s, reply.fit)

        return Door(decode, lambda data: name)


def _name(method: str) -> str:
    return f"{SERVICE.full_name}/{method}"


def _named(scope: Message) -> tuple[str, str]:
    """Returns the name and the version of the model in a path; "" where it has no version."""
    found = scope["path_params"]
    return found["name"], found.get("version", "")


async def _write(exchange: Exchange, values: Any) -> None:
    await exchange.write(json.dumps(values).encode())
