"""Answers a batch of what TorchServe hands over: the gateway's steps and plain clients' requests, pooled.

Every failure becomes an answer: over gRPC TorchServe turns an exception into "Prediction failed" for the whole batch
and ignores status codes, so errors travel in the body. Where the device no longer works there is no answer: the process
ends, and TorchServe, which fails what was asked with "Worker died", starts another.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from camserve import images
from camserve.codecs import plain
from camserve.codecs import step as codec
from camserve.errors import INTERNAL_MESSAGE, CamserveError, Internal
from camserve.finalise.results import Results
from camserve.images import MAX_BYTES, MAX_PIXELS
from camserve.types import Item, StepResult
from camserve.types.request import RequestLimits
from camserve.worker.answers import explanation
from camserve.worker.device import BrokenDevice
from camserve.worker.executor import Executor

log = logging.getLogger(__name__)

GATEWAY_KEY = "camserve"
"""The key under which the gateway sends a WorkerRequest."""

BROKEN_DEVICE = 70
"""Exit status of a worker whose device no longer works."""

PLAIN_LIMITS = RequestLimits(
    image_bytes=MAX_BYTES,
    image_pixels=MAX_PIXELS,
    methods=16,
    layers=8,
    targets=100,
    map_pixels=128 * 10**6,
    message_bytes=64 * 2**20,
    name_characters=256,
    text_characters=1000,
    option_bytes=256 * 2**10,
)
"""The bounds of a plain client's request: those that a gateway has by default."""


@dataclass(frozen=True)
class Answer:
    """Holds what goes back to one caller."""

    body: bytes
    content_type: str = "application/octet-stream"
    status: int = 200
    """HTTP status for REST callers; TorchServe ignores it over gRPC."""


@dataclass(frozen=True)
class _Entry:
    """Holds what one caller's entry of the batch asks, and how it is answered."""

    items: tuple[Item, ...]
    finish: Callable[[StepResult], Answer]
    """Function that makes the answer from the step's result, cut to this caller's items."""


class WorkerService:
    """Answers what the handler gets; importable without TorchServe.

    Args:
        executor: the executor of the items.
        limits: how large the requests of plain clients may be; those of a gateway were checked there.
        end: function that ends the process at once, without the clean-up that would wait for the device.
    """

    def __init__(
        self, executor: Executor, limits: RequestLimits = PLAIN_LIMITS, end: Callable[[int], object] = os._exit
    ) -> None:
        images.silence_libtiff()
        self._executor = executor
        self._limits = limits
        self._end = end

    def answer(self, batch: Sequence[Mapping[str, Any]]) -> list[Answer]:
        """Returns one answer for each entry, in their order; the masked queries of the whole batch are pooled.

        It does not return where the device no longer works.
        """
        try:
            return self._answered(batch)
        except BrokenDevice:
            log.critical("the device no longer works; this worker ends, to be started anew", exc_info=True)
            for handler in logging.getLogger().handlers:
                handler.flush()
            self._end(BROKEN_DEVICE)
            raise

    def _answered(self, batch: Sequence[Mapping[str, Any]]) -> list[Answer]:
        entries = [self._read(data) for data in batch]
        step = self._executor.execute([item for entry in entries for item in entry.items])
        answers, start = [], 0
        for entry in entries:
            stop = start + len(entry.items)
            own = replace(step, outcomes=step.outcomes[start:stop])
            answers.append(entry.finish(own))
            start = stop
        return answers

    def _read(self, data: Mapping[str, Any]) -> _Entry:
        if GATEWAY_KEY in data:
            return _guarded(lambda: self._gateway_entry(bytes(data[GATEWAY_KEY])), _gateway_error)
        return _guarded(lambda: self._plain_entry(data), _plain_error)

    def _gateway_entry(self, data: bytes) -> _Entry:
        read = codec.request_from_bytes(data)
        if read is None:
            described = codec.description_to_bytes(self._executor.network.info, self._executor.worker)
            return _Entry((), lambda _: _gateway_answer(described))
        return _step_entry(read)

    def _plain_entry(self, data: Mapping[str, Any]) -> _Entry:
        asked = plain.decode(data, self._limits)
        results = Results(asked.request.fit(self._executor.network.info, self._limits))
        item = results.next_item()
        assert item is not None, "the first item of a request asks something"

        def finish(step: StepResult) -> Answer:
            (outcome,) = step.outcomes
            if isinstance(outcome, CamserveError):
                return _plain_error(outcome)
            found = explanation(results, item, step, outcome, self._executor.answer)
            return Answer(plain.encode(found, asked.format), "application/json")

        return _Entry((item,), _guarded_finish(finish, _plain_error))


class Refusal:
    """Answers every caller why the model cannot be served.

    A worker that ended instead would be started anew for ever, and nobody would know why.

    Args:
        error: what its loading has failed with.
    """

    def __init__(self, error: CamserveError) -> None:
        self._error = error

    def answer(self, batch: Sequence[Mapping[str, Any]]) -> list[Answer]:
        """Returns the same error for each entry, as its caller reads it."""
        return [_gateway_error(self._error) if GATEWAY_KEY in data else _plain_error(self._error) for data in batch]


def _step_entry(read: Sequence[Item | CamserveError]) -> _Entry:
    """Returns the entry of a step; an item that could not be read is its own error and does not reach the executor."""
    items = tuple(item for item in read if isinstance(item, Item))

    def finish(result: StepResult) -> Answer:
        done = iter(result.outcomes)
        outcomes = tuple(next(done) if isinstance(item, Item) else item for item in read)
        return _gateway_answer(codec.result_to_bytes(replace(result, outcomes=outcomes)))

    return _Entry(items, _guarded_finish(finish, _gateway_error))


def _guarded(read: Callable[[], _Entry], as_answer: Callable[[CamserveError], Answer]) -> _Entry:
    """Returns the entry that was read, or one without items that answers with the error."""
    try:
        return read()
    except Exception as error:
        answer = as_answer(_typed(error))
        return _Entry((), lambda _: answer)


def _guarded_finish(
    finish: Callable[[StepResult], Answer], as_answer: Callable[[CamserveError], Answer]
) -> Callable[[StepResult], Answer]:
    def guarded(step: StepResult) -> Answer:
        try:
            return finish(step)
        except BrokenDevice:
            raise
        except Exception as error:
            return as_answer(_typed(error))

    return guarded


def _typed(error: Exception) -> CamserveError:
    if isinstance(error, CamserveError):
        return error
    log.error("a request failed", exc_info=error)
    return Internal(INTERNAL_MESSAGE)


def _gateway_answer(reply: bytes) -> Answer:
    return Answer(reply, "application/protobuf")


def _gateway_error(error: CamserveError) -> Answer:
    return _gateway_answer(codec.error_to_bytes(error))


def _plain_error(error: CamserveError) -> Answer:
    return Answer(plain.encode_error(error), "application/json", status=500 if isinstance(error, Internal) else 400)
