"""Makes OpenTelemetry spans of calls and of their steps; off unless the settings say otherwise.

A call continues the trace of its client (W3C `traceparent` in the metadata). A step that several requests share is one
span in the trace of each of them, with the step's number: a trace then shows all that its request waited for, and each
trace is sampled on its own. A single span with links would be in one trace only.

OpenTelemetry is imported when tracing is on, and not before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from camserve import __version__
from camserve.errors import InvalidOption
from camserve.planning import Slice, Step

Attributes = Mapping[str, str | int | float | bool | Sequence[str]]
Tell = Callable[[Attributes, bool], None]
"""Adds attributes to a span, and sets whether it stands for a fault."""


class Tracing:
    """Makes no spans at all: it is used while tracing is off, and `OpenTelemetry` replaces it otherwise."""

    @contextmanager
    def call(self, method: str, metadata: Iterable[tuple[str, Any]]) -> Iterator[Tell]:
        """Has the call of a "package.Service/Method" run inside of a span; spans made in the block are its children."""
        yield _tell_nobody

    def current(self) -> Any:
        """Returns what stands for the span that this runs in, to be given to `step`."""
        return None

    @contextmanager
    def step(self, model: str, step: Step, parents: Sequence[Any]) -> Iterator[None]:
        """Has a step run inside of one span for each of its slices, whose parents are given in the same order."""
        yield

    def close(self) -> None:
        """Sends the spans that have not been sent yet, which may take some seconds."""


OFF = Tracing()
"""The tracing of a gateway whose settings switch it off."""

FLUSH_S = 5.0
"""Seconds that a stop waits for the last spans to be sent."""


def _tell_nobody(attributes: Attributes, fault: bool) -> None:
    pass


def tracing(on: bool) -> Tracing:
    """Returns tracing over OTLP, as the environment variables OTEL_* say, or tracing that does nothing.

    Raises:
        InvalidOption: OpenTelemetry is not installed.
    """
    return OpenTelemetry(_exporter()) if on else OFF


def _exporter() -> Any:
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    except ModuleNotFoundError as error:
        raise InvalidOption(f"tracing needs {error.name}: pip install 'camserve[tracing]'") from None
    return OTLPSpanExporter()


def _attributes(model: str, step: Step, slice_: Slice) -> Attributes:
    """Returns what a span tells of one slice of a step."""
    return {
        "camserve.model": model,
        "camserve.backend": step.backend,
        "camserve.step": step.number,
        "camserve.step.queries": step.queries,
        "camserve.step.items": len(step.slices),
        "camserve.queries": slice_.queries,
        "camserve.opening": slice_.opening,
        "camserve.copy": step.copy_of is not None,
    }


class OpenTelemetry(Tracing):
    """Makes spans through an OpenTelemetry provider of its own.

    Args:
        exporter: takes the spans that have ended.
    """

    def __init__(self, exporter: Any) -> None:
        from opentelemetry import propagate, trace
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        self._propagate = propagate
        self._trace = trace
        own = Resource({"service.name": "camserve", "service.version": __version__})
        self._provider = TracerProvider(resource=own.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("camserve", __version__)

    @contextmanager
    def call(self, method: str, metadata: Iterable[tuple[str, Any]]) -> Iterator[Tell]:
        """Does what `Tracing.call` says; the span is in the trace of the client, if the metadata name one."""
        carrier = {key: value for key, value in metadata if isinstance(value, str)}
        service, _, name = method.rpartition("/")
        attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}
        with self._tracer.start_as_current_span(
            method,
            context=self._propagate.extract(carrier),
            kind=self._trace.SpanKind.SERVER,
            attributes=attributes,
            record_exception=False,  # a refusal of ours is no fault
            set_status_on_exception=False,
        ) as span:

            def tell(attributes: Attributes, fault: bool) -> None:
                span.set_attributes(attributes)
                if fault:
                    span.set_status(self._trace.StatusCode.ERROR)

            yield tell

    def current(self) -> Any:
        """Returns the OpenTelemetry context of the span that this runs in."""
        return self._trace.set_span_in_context(self._trace.get_current_span())

    @contextmanager
    def step(self, model: str, step: Step, parents: Sequence[Any]) -> Iterator[None]:
        """Does what `Tracing.step` says; an error that ends the block is noted in every span of the step."""
        spans = [
            self._tracer.start_span(
                "camserve.step", parent, kind=self._trace.SpanKind.CLIENT, attributes=_attributes(model, step, slice_)
            )
            for slice_, parent in zip(step.slices, parents, strict=True)
        ]

        try:
            yield
        except BaseException as error:
            for span in spans:
                span.set_status(self._trace.StatusCode.ERROR, str(error) or type(error).__name__)
            raise
        finally:
            for span in spans:
                span.end()

    def close(self) -> None:
        """Sends the last spans; a collector that cannot be reached holds this up for `FLUSH_S` at most."""
        sending = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        sending.start()
        sending.join(FLUSH_S)
