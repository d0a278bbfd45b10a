"""Answers a batch of what TorchServe hands over: the gateway's steps and plain clients' requests, pooled.

Every failure becomes an answer: over gRPC TorchServe turns an exception into "Prediction failed" for the whole batch
and ignores status codes, so errors travel in the body.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from google.protobuf.message import DecodeError

from camserve import wire
from camserve.errors import INTERNAL_MESSAGE, CamserveError, Internal, InvalidInput
from camserve.types import Item, StepResult
from camserve.worker import plain
from camserve.worker.answers import explanation
from camserve.worker.executor import Executor
from camserve.worker.v1 import step_pb2

log = logging.getLogger(__name__)

GATEWAY_KEY = "camserve"
"""The key under which the gateway sends a WorkerRequest."""


@dataclass(frozen=True)
class Answer:
    """What goes back to one caller."""

    body: bytes
    content_type: str = "application/octet-stream"
    status: int = 200
    """HTTP status for REST callers; TorchServe ignores it over gRPC."""


@dataclass(frozen=True)
class _Call:
    """One caller's part in the batch."""

    items: tuple[Item, ...]
    finish: Callable[[StepResult], Answer]
    """From the step's result, cut to this caller's items."""


class WorkerService:
    """The handler's logic, importable without TorchServe."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    def answer(self, batch: Sequence[Mapping[str, Any]]) -> list[Answer]:
        """One answer for each entry, in their order; the masked queries of the whole batch are pooled."""
        calls = [self._read(entry) for entry in batch]
        step = self._executor.execute([item for call in calls for item in call.items])
        answers, start = [], 0
        for call in calls:
            stop = start + len(call.items)
            own = replace(step, outcomes=step.outcomes[start:stop])
            answers.append(call.finish(own))
            start = stop
        return answers

    def _read(self, entry: Mapping[str, Any]) -> _Call:
        if GATEWAY_KEY in entry:
            return _guarded(lambda: self._gateway_call(bytes(entry[GATEWAY_KEY])), _gateway_error)
        return _guarded(lambda: self._plain_call(entry), _plain_error)

    def _gateway_call(self, data: bytes) -> _Call:
        try:
            request = step_pb2.WorkerRequest.FromString(data)
        except DecodeError:
            raise InvalidInput("not a camserve.worker.v1.WorkerRequest") from None
        if request.WhichOneof("request") == "describe":
            described = step_pb2.ModelDescription(
                model=wire.model_to_proto(self._executor.network.info), worker=self._executor.worker
            )
            return _Call((), lambda _: _gateway_answer(step_pb2.WorkerReply(describe=described)))
        return _step_call(request.step)

    def _plain_call(self, entry: Mapping[str, Any]) -> _Call:
        request = plain.parse(entry, self._executor.network.info)

        def finish(step: StepResult) -> Answer:
            (outcome,) = step.outcomes
            if isinstance(outcome, CamserveError):
                return _plain_error(outcome)
            answer = explanation(request.whole, outcome, step.stage_seconds, step.worker)
            return Answer(plain.render(request, answer), "application/json")

        return _Call((request.whole.item,), _guarded_finish(finish, _plain_error))


def _step_call(step: step_pb2.Step) -> _Call:
    """A step; an item that cannot be read is its own error and does not reach the executor."""
    read: list[Item | CamserveError] = []
    for message in step.items:
        try:
            read.append(wire.item_from_proto(message))
        except CamserveError as error:
            read.append(error)
    items = tuple(item for item in read if isinstance(item, Item))

    def finish(result: StepResult) -> Answer:
        done = iter(result.outcomes)
        outcomes = tuple(next(done) if isinstance(item, Item) else item for item in read)
        reply = wire.step_result_to_proto(replace(result, outcomes=outcomes))
        return _gateway_answer(step_pb2.WorkerReply(step=reply))

    return _Call(items, _guarded_finish(finish, _gateway_error))


def _guarded(read: Callable[[], _Call], as_answer: Callable[[CamserveError], Answer]) -> _Call:
    """The call, or one without items that answers with the error."""
    try:
        return read()
    except Exception as error:
        answer = as_answer(_typed(error))
        return _Call((), lambda _: answer)


def _guarded_finish(
    finish: Callable[[StepResult], Answer], as_answer: Callable[[CamserveError], Answer]
) -> Callable[[StepResult], Answer]:
    def guarded(step: StepResult) -> Answer:
        try:
            return finish(step)
        except Exception as error:
            return as_answer(_typed(error))

    return guarded


def _typed(error: Exception) -> CamserveError:
    if isinstance(error, CamserveError):
        return error
    log.error("a request failed", exc_info=error)
    return Internal(INTERNAL_MESSAGE)


def _gateway_answer(reply: step_pb2.WorkerReply) -> Answer:
    return Answer(reply.SerializeToString(), "application/protobuf")


def _gateway_error(error: CamserveError) -> Answer:
    return _gateway_answer(step_pb2.WorkerReply(error=wire.error_to_proto(error)))


def _plain_error(error: CamserveError) -> Answer:
    return Answer(plain.render_error(error), "application/json", status=500 if isinstance(error, Internal) else 400)
