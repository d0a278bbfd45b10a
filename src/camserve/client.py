"""Gets explanations from a camserve server, synchronous and with asyncio; needs grpcio, protobuf, numpy and Pillow.

>>> with Client("127.0.0.1:8500") as client:
...     answer = client.explain("cat.jpg", methods=["grad_cam", ("group_cam", {"groups": 16})], targets=["tabby"])
>>> answer.maps[0].overlay().save("tabby.png")
>>> Client("camserve.example:443", tls=Tls(ca="ca.pem"), token="camserve_...")

Both clients build requests with `camserve.types.request` and read replies with `camserve.codecs.v1`; only the call
differs.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self, TypeVar, Unpack, cast

import grpc

from camserve import errors
from camserve.codecs import v1
from camserve.connection import Metadata, Tls, credentials, is_local, metadata, traced
from camserve.errors import CamserveError, DeadlineExceeded, Internal, InvalidOption, Unavailable
from camserve.finalise.encode import ARRAYS
from camserve.images import ImageLike
from camserve.many import AT_ONCE, Answered, answers, answers_async
from camserve.methods import MethodLike
from camserve.types import Explanation, Model, ModelSummary, Progress, StreamOptions, TargetLike
from camserve.types.request import ExplainRequest, Options, make_request
from camserve.v1 import explain_pb2 as pb
from camserve.v1.explain_pb2_grpc import ExplanationServiceStub

__all__ = ["Answered", "AsyncClient", "Client", "Model", "ModelSummary", "Progress", "Tls"]

DEFAULT_ADDRESS = "127.0.0.1:8500"
ERROR_KEY = "camserve-error"
"""Key in the trailing metadata: the name of the server's class in `camserve.errors`."""

RETRY_KEY = "grpc-retry-pushback-ms"
"""Key in the trailing metadata of an overloaded server: after how many milliseconds to try again."""

REQUEST_ID_KEY = "x-request-id"
"""Key in the metadata of every call and answer: the id under which the server's log has it."""

_POLL_S = 0.1

_Image = TypeVar("_Image", bound=ImageLike)


class Client:
    """Connects to one server; safe to share between threads.

    Args:
        address: host:port.
        timeout_s: deadline of every call that states none of its own; None: the server's.
        tls: for a server with TLS; None: plain text.
        token: secret of a bearer token, for a server that wants one.

    Raises:
        InvalidOption: a file of `tls` cannot be read, a token would leave this machine in plain text, or this process
            was forked from one that had made a client. A client that was made before a fork raises it with each call.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout_s: float | None = None,
        tls: Tls | None = None,
        token: str | None = None,
    ) -> None:
        self.address = address
        self.timeout_s = timeout_s
        self._process = _own_process()
        self._metadata = metadata(token)
        secured, options = credentials(address, tls, token), _channel_options(address)
        self._channel = (
            grpc.insecure_channel(address, options)
            if secured is None
            else grpc.secure_channel(address, secured, options)
        )
        self._stub: Any = ExplanationServiceStub(self._channel)  # type: ignore[no-untyped-call]  # generated code

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection; calls under way are cancelled."""
        self._channel.close()

    def explain(
        self,
        image: ImageLike,
        methods: Sequence[MethodLike] = ("grad_cam",),
        targets: Sequence[TargetLike] = (),
        *,
        timeout_s: float | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        request_id: str = "",
        **options: Unpack[Options],
    ) -> Explanation:
        """Returns predictions, and one map for each method and target; all share one forward pass.

        Args:
            image: a path, a file's bytes, a PIL image, or an array: uint8 (H, W, 3), grey (H, W) of uint8 or uint16,
                or float32 in [0, 1]. A uint8 or float32 array of the network's own input size is taken as it is;
                everything else is resized and cropped. A PIL image is sent as its own file where its pixels were not
                loaded, else as PNG; above 16 MiB as WebP without loss, or as JPEG of quality 95 where that is above
                16 MiB, too.
            methods: names, (name, parameters) or method specs.
            targets: class indices, labels or Targets; empty means the most probable class.
            timeout_s: deadline in seconds; None: the client's.
            on_progress: function called with masked queries (done, total) while the server works.
            request_id: id under which the server logs the call: 1..128 printable ASCII characters without spaces; empty
                means a new one.
            options: model, layer, size, priority and more: see `camserve.types.request.Options`.

        Raises:
            InvalidInput: a bad image or option; the text says what was allowed and what came.
            NotFound: no such model; the text names those that exist.
            Unsupported: a method that this model cannot serve.
            Overloaded, DeadlineExceeded, Unavailable: the same request may succeed later.
        """
        options.setdefault("stream", StreamOptions(max_maps=0))
        request = _request(image, methods, targets, **options)
        if on_progress is None:
            reply = self._call(self._stub.Explain, v1.request_to_proto(request), timeout_s, request_id)
            return v1.explanation_from_proto(reply, request)
        for update in self._updates(request, timeout_s, request_id):
            if isinstance(update, Explanation):
                return update
            on_progress(update.done, update.total)
        raise Internal("the stream ended without a reply")

    def stream(
        self,
        image: ImageLike,
        methods: Sequence[MethodLike] = ("grad_cam",),
        targets: Sequence[TargetLike] = (),
        *,
        timeout_s: float | None = None,
        request_id: str = "",
        **options: Unpack[Options],
    ) -> Iterator[Progress | Explanation]:
        """Yields predictions, progress and maps that sharpen while the server works, then the explanation.

        Arguments and errors are those of `explain`; the option `stream` says how often there are maps. Closing the
        iterator cancels the call.
        """
        return self._updates(_request(image, methods, targets, **options), timeout_s, request_id)

    def explain_many(
        self,
        images: Iterable[_Image],
        methods: Sequence[MethodLike] = ("grad_cam",),
        targets: Sequence[TargetLike] = (),
        *,
        at_once: int = AT_ONCE,
        timeout_s: float | None = None,
        **options: Unpack[Options],
    ) -> Iterator[Answered[_Image]]:
        """Yields an answer for each of many images as it comes, an explanation or the error that it failed with.

        Images are taken from `images`, and read, once there is a place for them. The priority is "batch" where nobody
        says another. An image for which the server has no room, or no worker, is asked again some times. Closing the
        iterator cancels the calls under way.

        Args:
            images: what `explain` takes, any number of them.
            methods: as `explain` takes them.
            targets: as `explain` takes them.
            at_once: number of images asked at once.
            timeout_s: deadline in seconds of each call; None: the client's.
            options: see `camserve.types.request.Options`.

        Raises:
            InvalidOption: `at_once` is below 1. What is wrong with an image or a request is in its answer.
        """
        options.setdefault("priority", "batch")
        live: set[Any] = set()

        def ask(image: _Image) -> Explanation:
            request = _request(image, methods, targets, **options)
            with _typed_errors(self.address):
                message, sent = v1.request_to_proto(request), _sent(self._metadata, "")
                call = self._stub.Explain.future(message, timeout=_first(timeout_s, self.timeout_s), metadata=sent)
                live.add(call)
                try:
                    reply = call.result()
                finally:
                    live.discard(call)
            return v1.explanation_from_proto(reply, request)

        def withdraw() -> None:
            for call in list(live):
                call.cancel()

        _check_process(self._process)
        return answers(images, ask, at_once, withdraw)

    def models(self, *, timeout_s: float | None = None) -> tuple[ModelSummary, ...]:
        """Returns the models that the server can explain."""
        reply = self._call(self._stub.ListModels, pb.ListModelsRequest(), timeout_s)
        return v1.summaries_from_proto(reply)

    def model(self, name: str = "", *, timeout_s: float | None = None) -> Model:
        """Returns labels, layers and methods of a model; the name may be empty when the server has exactly one.

        Raises:
            NotFound: no such model; the text names those that exist.
        """
        return v1.served_model_from_proto(self._call(self._stub.GetModel, pb.GetModelRequest(name=name), timeout_s))

    def wait_ready(self, timeout_s: float = 60.0, *, model: str = "") -> None:
        """Returns once the model, or with an empty name every model that has not failed, has a worker that is ready.

        Raises:
            Unavailable: not within `timeout_s`; the text says what was seen last.
        """
        until, last = time.monotonic() + timeout_s, "no answer"
        while (seen := self._readiness(model, max(until - time.monotonic(), _POLL_S))) is not None:
            last = seen or last
            if time.monotonic() + _POLL_S > until:
                raise Unavailable(f"{self.address} is not ready after {timeout_s:g} s: {last}")
            time.sleep(_POLL_S)

    def _readiness(self, model: str, timeout_s: float) -> str | None:
        try:
            return unready(self.models(timeout_s=timeout_s), model)
        except Unavailable as error:
            return str(error)
        except DeadlineExceeded:
            return ""  # nothing new was seen

    def _call(self, method: Any, request: Any, timeout_s: float | None, request_id: str = "") -> Any:
        _check_process(self._process)
        with _typed_errors(self.address):
            sent = _sent(self._metadata, request_id)
            return method(request, timeout=_first(timeout_s, self.timeout_s), metadata=sent)

    def _updates(
        self, request: ExplainRequest, timeout_s: float | None, request_id: str
    ) -> Iterator[Progress | Explanation]:
        _check_process(self._process)
        timeout_s = _first(timeout_s, self.timeout_s)
        sent = _sent(self._metadata, request_id)
        call = self._stub.StreamExplain(v1.request_to_proto(request), timeout=timeout_s, metadata=sent)
        try:
            with _typed_errors(self.address):
                for message in call:
                    yield v1.update_from_proto(message, request)
        finally:
            call.cancel()


class AsyncClient:
    """Does what `Client` does with asyncio; must be made inside the running event loop."""

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout_s: float | None = None,
        tls: Tls | None = None,
        token: str | None = None,
    ) -> None:
        self.address = address
        self.timeout_s = timeout_s
        self._process = _own_process()
        self._metadata = metadata(token)
        secured, options = credentials(address, tls, token), _channel_options(address)
        self._channel = (
            grpc.aio.insecure_channel(address, options)
            if secured is None
            else grpc.aio.secure_channel(address, secured, options)
        )
        self._stub: Any = ExplanationServiceStub(self._channel)  # type: ignore[no-untyped-call]  # generated code

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connection; calls under way are cancelled."""
        await self._channel.close(None)

    async def explain(
        self,
        image: ImageLike,
        methods: Sequence[MethodLike] = ("grad_cam",),
        targets: Sequence[TargetLike] = (),
        *,
        timeout_s: float | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        request_id: str = "",
        **options: Unpack[Options],
    ) -> Explanation:
        """Returns what `Client.explain` returns; the image is read and decoded in a thread."""
        options.setdefault("stream", StreamOptions(max_maps=0))
        request, message = await asyncio.to_thread(_made, image, methods, targets, **options)
        if on_progress is None:
            reply = await self._call(self._stub.Explain, message, timeout_s, request_id)
            return await asyncio.to_thread(v1.explanation_from_proto, reply, request)
        async for update in self._updates(request, message, timeout_s, request_id):
            if isinstance(update, Explanation):
                return update
            on_progress(update.done, update.total)
        raise Internal("the stream ended without a reply")

    async def stream(
        self,
        image: ImageLike,
        methods: Sequence[MethodLike] = ("grad_cam",),
        targets: Sequence[TargetLike] = (),
        *,
        timeout_s: float | None = None,
        request_id: str = "",
        **options: Unpack[Options],
    ) -> AsyncIterator[Progress | Explanation]:
        """Yields what `Client.stream` yields."""
        request, message = await asyncio.to_thread(_made, image, methods, targets, **options)
        async for update in self._updates(request, message, timeout_s, request_id):
            yield update

    def explain_many(
        self,
        images: Iterable[_Image],
        methods: Sequence[MethodLike] = ("grad_cam",),
        targets: Sequence[TargetLike] = (),
        *,
        at_once: int = AT_ONCE,
        timeout_s: float | None = None,
        **options: Unpack[Options],
    ) -> AsyncIterator[Answered[_Image]]:
        """Returns what yields what that of `Client.explain_many` yields, and raises what it raises."""
        options.setdefault("priority", "batch")

        async def ask(image: _Image) -> Explanation:
            return await self.explain(image, methods, targets, timeout_s=timeout_s, **options)

        return answers_async(images, ask, at_once)

    async def models(self, *, timeout_s: float | None = None) -> tuple[ModelSummary, ...]:
        """Returns the models that the server can explain."""
        reply = await self._call(self._stub.ListModels, pb.ListModelsRequest(), timeout_s)
        return v1.summaries_from_proto(reply)

    async def model(self, name: str = "", *, timeout_s: float | None = None) -> Model:
        """Returns what `Client.model` returns, and raises what it raises."""
        return v1.served_model_from_proto(
            await self._call(self._stub.GetModel, pb.GetModelRequest(name=name), timeout_s)
        )

    async def wait_ready(self, timeout_s: float = 60.0, *, model: str = "") -> None:
        """Returns once `Client.wait_ready` would, and raises what it raises."""
        until, last = time.monotonic() + timeout_s, "no answer"
        while (seen := await self._readiness(model, max(until - time.monotonic(), _POLL_S))) is not None:
            last = seen or last
            if time.monotonic() + _POLL_S > until:
                raise Unavailable(f"{self.address} is not ready after {timeout_s:g} s: {last}")
            await asyncio.sleep(_POLL_S)

    async def _readiness(self, model: str, timeout_s: float) -> str | None:
        try:
            return unready(await self.models(timeout_s=timeout_s), model)
        except Unavailable as error:
            return str(error)
        except DeadlineExceeded:
            return ""  # nothing new was seen

    async def _call(self, method: Any, request: Any, timeout_s: float | None, request_id: str = "") -> Any:
        _check_process(self._process)
        with _typed_errors(self.address):
            sent = _sent(self._metadata, request_id)
            return await method(request, timeout=_first(timeout_s, self.timeout_s), metadata=sent)

    async def _updates(
        self, request: ExplainRequest, message: pb.ExplainRequest, timeout_s: float | None, request_id: str
    ) -> AsyncIterator[Progress | Explanation]:
        _check_process(self._process)
        timeout_s = _first(timeout_s, self.timeout_s)
        sent = _sent(self._metadata, request_id)
        call = self._stub.StreamExplain(message, timeout=timeout_s, metadata=sent)
        try:
            with _typed_errors(self.address):
                async for update in call:
                    yield await asyncio.to_thread(v1.update_from_proto, update, request)
        finally:
            call.cancel()


_processes: set[int] = set()
"""Ids of the processes in which clients were made. A fork finds that of the process that it was forked from."""


def _own_process() -> int:
    """Returns the id of this process; raises InvalidOption where gRPC cannot work in it."""
    process, supported = os.getpid(), os.environ.get("GRPC_ENABLE_FORK_SUPPORT", "").lower() in ("1", "true", "yes")
    if _processes and process not in _processes and not supported:
        raise InvalidOption(
            "this process was forked from one that had made a client, and gRPC does not work in it: start it with "
            'multiprocessing\'s "spawn", or set GRPC_ENABLE_FORK_SUPPORT=1 before the program starts'
        )
    _processes.add(process)
    return process


def _check_process(process: int) -> None:
    """Raises InvalidOption in another process than that in which a client was made: no connection survives a fork."""
    if os.getpid() != process:
        raise InvalidOption(
            f"this client was made before a fork, in process {process}: make one in each process, after the fork"
        )


def _request(*asked: Any, **options: Any) -> ExplainRequest:
    """Returns the request; raises as `make_request`, and for an encoding that no array can be read from."""
    request = make_request(*asked, **options)
    if request.output.encoding not in ARRAYS:
        raise InvalidOption(f"encoding must be one of {', '.join(ARRAYS)}, got {request.output.encoding!r}")
    return request


def _made(*asked: Any, **options: Any) -> tuple[ExplainRequest, pb.ExplainRequest]:
    """Returns the request and its message; both take long for a large image."""
    request = _request(*asked, **options)
    return request, v1.request_to_proto(request)


def unready(models: Sequence[ModelSummary], name: str = "") -> str | None:
    """Returns a text about what is not ready, of one model or with an empty name of all; None when everything is.

    Models that have failed hold up no others.
    """
    wanted = [model for model in models if name in ("", model.name)]
    if not wanted:
        return f"there is no model {name!r}" if name else "no model is served"
    failed = [f"model {model.name} failed: {model.failure}" for model in wanted if model.failure]
    waiting = [model.name for model in wanted if not model.ready and not model.failure]
    if waiting:
        return f"no worker is ready for {', '.join(waiting)}"
    return None if any(model.ready for model in wanted) else "; ".join(failed)


def _seconds(milliseconds: str | bytes | None) -> float | None:
    return None if milliseconds is None else int(milliseconds) / 1000


def _first(value: float | None, default: float | None) -> float | None:
    return default if value is None else value


def _sent(own: Metadata, request_id: str) -> Metadata:
    """Returns the metadata of a call: the client's own, its id, and the span that it is made in."""
    if not re.fullmatch(r"[!-~]{0,128}", request_id):
        raise InvalidOption(f"a request id is 1..128 printable ASCII characters without spaces, got {request_id!r}")
    return (*own, *(((REQUEST_ID_KEY, request_id),) if request_id else ()), *traced())


def _channel_options(address: str) -> list[tuple[str, int]]:
    options = [
        ("grpc.max_send_message_length", -1),  # the server has the limits
        ("grpc.max_receive_message_length", -1),
        ("grpc.initial_reconnect_backoff_ms", 100),  # a server that is just starting is found soon
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2000),
    ]
    if is_local(address):
        options.append(("grpc.enable_http_proxy", 0))  # `http_proxy` is not meant for this machine
    return options


@contextmanager
def _typed_errors(address: str) -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        typed = as_error(cast(grpc.Call, error), address)
        typed.request_id = _request_id(cast(grpc.Call, error))
        raise typed from None


def _request_id(error: grpc.Call) -> str:
    sent = [*(error.initial_metadata() or ()), *(error.trailing_metadata() or ())]
    return next((str(value) for key, value in sent if key == REQUEST_ID_KEY), "")


_BY_STATUS: dict[grpc.StatusCode, type[CamserveError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidInput,
    grpc.StatusCode.NOT_FOUND: errors.NotFound,
    grpc.StatusCode.FAILED_PRECONDITION: errors.Unsupported,
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.Overloaded,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.CANCELLED: errors.Cancelled,
    grpc.StatusCode.UNAVAILABLE: errors.Unavailable,
}

# Without the server's own words, gRPC's are of little help.
_SENTENCES = {
    grpc.StatusCode.DEADLINE_EXCEEDED: "no answer from {address} within the deadline",
    grpc.StatusCode.CANCELLED: "the call to {address} was cancelled",
    grpc.StatusCode.UNAVAILABLE: "no answer from {address}; is a camserve server running there? TLS must be "
    "the same on both sides ({details})",
    grpc.StatusCode.UNIMPLEMENTED: "{address} is not a camserve server, or one of another version ({details})",
}


def as_error(error: grpc.Call, address: str) -> CamserveError:
    """Returns the error of a failed call: the server's own class if it names one, else a class by status code."""
    details = error.details() or error.code().name
    # Not dict(...): the metadata of grpc.aio has `keys`, but is no mapping.
    metadata = {key: value for key, value in error.trailing_metadata() or ()}  # noqa: C416
    kind = str(metadata.get(ERROR_KEY))
    if kind == errors.Overloaded.__name__:
        return errors.Overloaded(details, _seconds(metadata.get(RETRY_KEY)))
    if kind in errors.KINDS:
        return errors.KINDS[kind](details)
    sentence = _SENTENCES.get(error.code(), "{details}")
    return _BY_STATUS.get(error.code(), errors.Internal)(sentence.format(address=address, details=details))
