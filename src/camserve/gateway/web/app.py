"""Serves the paths of the HTTP door: explanations, as JSON and as events, models, health, and Open Inference."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from importlib import resources

from starlette.routing import Route, Router

from camserve.codecs import v1, v1_json
from camserve.errors import InvalidInput, InvalidOption, Unauthenticated, Unavailable
from camserve.gateway.api import request_ids
from camserve.gateway.api.access import Token, set_caller
from camserve.gateway.api.auth import caller_of
from camserve.gateway.api.calls import Calls, Decoded, Door, Write
from camserve.gateway.api.explanation import SERVICE, ExplanationService, decoded
from camserve.gateway.api.inference import InferenceService
from camserve.gateway.api.status import abort
from camserve.gateway.ops.watched_files import Reloaded
from camserve.gateway.pool.registry import Registry
from camserve.gateway.requests.explainer import OnProgress
from camserve.gateway.web import open_inference, openapi
from camserve.gateway.web.exchange import Ended, Exchange, Message, Receive, Send, event
from camserve.gateway.web.problems import MethodNotAllowed, UnknownPath, UnsupportedMediaType
from camserve.types import InputView, Progress
from camserve.types.request import ExplainRequest, RequestLimits
from camserve.v1 import explain_pb2 as pb
from camserve.wording import shown

TIMEOUT = "request-timeout"
"""Header with the seconds in which the client wants an answer."""

JSON, EVENTS = "application/json", "text/event-stream"

PAGE: Mapping[str, str] = {"/": "index.html"} | {
    f"/{name}": name
    for name in (
        *(f"{module}.js" for module in ("app", "api", "draw", "maps", "photo", "question", "state")),
        *("style.css", "icon.svg", "colormaps.png"),
    )
}
"""Files of the page by their paths."""

_TYPES = {"html": "text/html; charset=utf-8", "js": "text/javascript", "css": "text/css"}
_TYPES |= {"svg": "image/svg+xml", "png": "image/png"}


def page_file(name: str) -> bytes:
    """Returns a file of the page; the colours are those of overlays."""
    package = "camserve.finalise" if name == "colormaps.png" else "camserve.gateway.web"
    folder = resources.files(package)
    return (folder if name == "colormaps.png" else folder.joinpath("page")).joinpath(name).read_bytes()


_Answer = Callable[[Exchange, Message], Awaitable[None]]


@dataclass(frozen=True)
class _Path:
    """Describes what answers a path. It is no function: Starlette would call one with a request of its own."""

    handled: Callable[[_Path, Message, Receive, Send], Awaitable[None]]
    answer: _Answer
    methods: tuple[str, ...] = ()
    """The methods that the path takes; none where it takes any."""
    name: str = ""
    """Full name of the gRPC method that it stands for; "" where there is none."""
    content_type: str = JSON
    """Type of an answer that is no problem."""
    open_to_all: bool = False
    """Whether nobody needs a token."""

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answers one request."""
        await self.handled(self, scope, receive, send)


class Web:
    """Answers HTTP requests as an ASGI application.

    Args:
        registry: the models.
        calls: the explain calls of every door.
        typed: the typed service, which lists models.
        inference: the service of the Open Inference Protocol.
        limits: the bounds of a request and its reply.
        most_bytes: bound of a body as it would come by gRPC; base64 may have a third more.
        tokens: the tokens that are let in; None: nobody needs one.
        on_refusal: called for each request without a known token.
    """

    def __init__(
        self,
        registry: Registry,
        calls: Calls,
        typed: ExplanationService,
        inference: InferenceService,
        limits: RequestLimits,
        most_bytes: int,
        tokens: Reloaded[tuple[Token, ...]] | None,
        on_refusal: Callable[[], None],
    ) -> None:
        self._registry, self._calls, self._typed, self._limits = registry, calls, typed, limits
        self._most_bytes, self._tokens, self._on_refusal = most_bytes, tokens, on_refusal
        self.draining = False
        """Whether the server is about to end, and takes nothing new."""
        self._router = Router(
            [
                self._route("/v1/explain", "POST", self._explain, f"{SERVICE.full_name}/Explain"),
                self._route("/v1/explain:stream", "POST", self._stream, f"{SERVICE.full_name}/StreamExplain", EVENTS),
                self._route("/v1/models", "GET", self._models, f"{SERVICE.full_name}/ListModels"),
                self._route("/v1/models/{name}", "GET", self._model, f"{SERVICE.full_name}/GetModel"),
                *(
                    self._route(each.path, each.method, each.answer, each.name, open_to_all=each.open_to_all)
                    for each in open_inference.OpenInference(inference, calls, limits, self._ready_models).answers()
                ),
                *(self._static(path, name) for path, name in PAGE.items()),
                self._route("/openapi.json", "GET", self._described, "", open_to_all=True),
                self._route("/healthz", "GET", self._healthy, "", open_to_all=True),
                self._route("/readyz", "GET", self._ready, "", open_to_all=True),
            ],
            redirect_slashes=False,
            default=_Path(self._handled, self._unknown, open_to_all=True),
        )

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answers one request."""
        await self._router(scope, receive, send)

    def _route(
        self, path: str, method: str, answer: _Answer, name: str, content_type: str = JSON, open_to_all: bool = False
    ) -> Route:
        return Route(path, _Path(self._handled, answer, _methods(method), name, content_type, open_to_all))

    def _static(self, path: str, name: str) -> Route:
        content = page_file(name)

        async def answer(exchange: Exchange, scope: Message) -> None:
            await exchange.write(content)

        kind = _TYPES[name.rpartition(".")[2]]
        return Route(path, _Path(self._handled, answer, _methods("GET"), "", kind, open_to_all=True))

    async def _handled(self, path: _Path, scope: Message, receive: Receive, send: Send) -> None:
        """Has a request answered in the name of its caller, until it is answered or its client has gone."""
        if scope["type"] != "http":  # a websocket: its handshake is refused by closing
            await send({"type": "websocket.close"})
            return
        is_oip = f"{scope['path']}/".startswith(f"{open_inference.PREFIX}/")
        exchange = Exchange(
            scope,
            receive,
            send,
            content_type=path.content_type,
            most_bytes=self._bound(scope),
            detail_also=open_inference.DETAIL if is_oip else "",
        )
        request_ids.begin(exchange.headers.get(request_ids.KEY), path.name)
        answering = asyncio.ensure_future(self._answered(exchange, scope, path))
        watching = asyncio.ensure_future(self._watched(exchange, answering))
        try:
            await answering
        except (Ended, asyncio.CancelledError):
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise
        finally:
            answering.cancel()
            watching.cancel()

    async def _answered(self, exchange: Exchange, scope: Message, path: _Path) -> None:
        try:
            if path.methods and scope["method"] not in path.methods:
                exchange.allows = ", ".join(path.methods)
                raise MethodNotAllowed(f"{scope['path']} takes {exchange.allows}, got {shown(scope['method'])}")
            if not path.open_to_all and self._tokens is not None:
                self._identify(exchange)
            if self.draining and not path.open_to_all:
                raise Unavailable("the server is shutting down")
            exchange.allow(_timeout_s(exchange))
            if (coding := exchange.headers.get("content-encoding", "identity").lower()) != "identity":
                raise UnsupportedMediaType(f"a body is taken as it is, without compression, got {shown(coding)}")
            await path.answer(exchange, scope)
        except Exception as error:
            if isinstance(error, Ended):
                raise
            await abort(exchange, error)  # type: ignore[arg-type]  # what it uses of gRPC's context is there
        await exchange.finish()

    async def _watched(self, exchange: Exchange, answering: asyncio.Future[None]) -> None:
        """Cancels the answer when its client goes."""
        await exchange.gone()
        answering.cancel()

    def _identify(self, exchange: Exchange) -> None:
        try:
            assert self._tokens is not None, "asked before"
            set_caller(caller_of(self._tokens, exchange.given("authorization"), "header"))
        except Unauthenticated:
            self._on_refusal()
            raise

    def _bound(self, scope: Message) -> int:
        """Returns the most bytes of a body: base64 makes four of three."""
        content_type = dict(scope["headers"]).get(b"content-type", b"").decode("latin-1").lower()
        is_binary = content_type.startswith((v1_json.MULTIPART, open_inference.BINARY))
        return self._most_bytes if is_binary else self._most_bytes * 4 // 3 + 4

    async def _explain(self, exchange: Exchange, scope: Message) -> None:
        await self._calls.explain(exchange, self._door(exchange, lambda reply: v1_json.to_json(reply)))  # type: ignore[arg-type]

    async def _stream(self, exchange: Exchange, scope: Message) -> None:
        def telling(request: ExplainRequest, write: Write) -> OnProgress:
            async def tell(progress: Progress, view: InputView) -> None:
                await write(await asyncio.to_thread(self._news, request, progress, view))

            return tell

        door = self._door(exchange, lambda reply: event("reply", v1_json.to_json(reply)))
        await self._calls.explain(exchange, door, telling)  # type: ignore[arg-type]

    def _door(self, exchange: Exchange, written: Callable[[pb.ExplainReply], bytes]) -> Door:
        content_type = exchange.headers.get("content-type", "")
        kind = content_type.partition(";")[0].strip().lower()
        if kind not in (v1_json.JSON, v1_json.MULTIPART):
            raise UnsupportedMediaType(
                f"a request is {v1_json.JSON} or {v1_json.MULTIPART}, got {shown(kind) if kind else 'no content type'}"
            )

        def decode(data: bytes) -> Decoded:
            return decoded(v1_json.request_bytes(data, content_type), self._limits, written)

        def model_name(data: bytes) -> str:
            try:
                return v1.model_name(v1_json.request_bytes(data, content_type), self._limits)
            except InvalidInput:
                return ""

        return Door(decode, model_name)

    def _news(self, request: ExplainRequest, progress: Progress, view: InputView) -> bytes:
        message = v1.progress_to_proto(progress, view, request.output, self._limits.message_bytes)
        return event("progress", v1_json.to_json(message))

    async def _models(self, exchange: Exchange, scope: Message) -> None:
        reply = await self._typed.ListModels(pb.ListModelsRequest(), exchange)  # type: ignore[arg-type]
        await exchange.write(v1_json.to_json(reply))

    async def _model(self, exchange: Exchange, scope: Message) -> None:
        asked = pb.GetModelRequest(name=scope["path_params"]["name"])
        reply = await self._typed.GetModel(asked, exchange)  # type: ignore[arg-type]
        await exchange.write(v1_json.to_json(reply))

    async def _described(self, exchange: Exchange, scope: Message) -> None:
        await exchange.write(json.dumps(openapi.document()).encode())

    async def _healthy(self, exchange: Exchange, scope: Message) -> None:
        await exchange.write(b'{"status":"SERVING"}')

    async def _ready(self, exchange: Exchange, scope: Message) -> None:
        await exchange.write(json.dumps({"status": "SERVING", "models": self._ready_models()}).encode())

    def _ready_models(self) -> list[str]:
        """Returns the names of the models that are ready; raises Unavailable where none is, or the server ends."""
        ready = [model.name for model in self._registry.models if model.ready]
        if self.draining or not ready:
            raise Unavailable("the server is shutting down" if self.draining else "no model is ready")
        return ready

    async def _unknown(self, exchange: Exchange, scope: Message) -> None:
        paths = ", ".join(route.path for route in self._router.routes if isinstance(route, Route))
        raise UnknownPath(f"there is no {shown(scope['path'])}; there are {paths}")


def _methods(method: str) -> tuple[str, ...]:
    """Returns a method with what HTTP has go with it: a GET whose body is not wanted."""
    return (method, "HEAD") if method == "GET" else (method,)


def _timeout_s(exchange: Exchange) -> float | None:
    """Returns the seconds in which a client wants an answer; raises InvalidOption where it says something else."""
    text = exchange.headers.get(TIMEOUT)
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InvalidOption(f"Request-Timeout is a number of seconds above 0, got {shown(text)}")
    return seconds
