"""The log of the commands: one JSON object for each record, whoever made it."""

import asyncio
import io
import json
import logging
import warnings
from datetime import UTC, datetime, timedelta

import pytest
from click.testing import CliRunner
from structlog.contextvars import bind_contextvars, clear_contextvars

from camserve import logs
from camserve.cli import camserve
from camserve.supervisor.process import TorchServe
from camserve.supervisor.settings import WorkerSettings


@pytest.fixture(autouse=True)
def own_logging():
    """The set-up of the tests' own run comes back afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)
    clear_contextvars()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines(stream: io.StringIO) -> list[dict]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_record_of_any_library_is_one_json_object():
    logs.set_up("json", "info", stream := io.StringIO())
    logging.getLogger("any.library").warning("two\nlines of %s", "text", extra={"model": "lite0", "methods": ["a"]})
    (line,) = lines(stream)
    said = datetime.fromisoformat(line.pop("timestamp"))
    assert said.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - said) < timedelta(minutes=1)
    assert line == {
        "level": "warning",
        "logger": "any.library",
        "event": "two\nlines of text",
        "model": "lite0",
        "methods": ["a"],
    }
    assert stream.getvalue().index("timestamp") < stream.getvalue().index("event") < stream.getvalue().index("model")


def test_a_traceback_is_in_its_line_and_shows_no_variables():
    for log_format in ("json", "console"):
        logs.set_up(log_format, "info", stream := io.StringIO())
        secret = "hunter" + "2"
        try:
            raise ValueError("of a length", len(secret))
        except ValueError:
            logging.getLogger("camserve").exception("it failed")
        assert "ValueError: ('of a length', 7)" in stream.getvalue()
        assert secret not in stream.getvalue()
        assert len(stream.getvalue().splitlines()) == 1 or log_format == "console"


def test_only_what_is_important_enough_is_written():
    logs.set_up("json", "warning", stream := io.StringIO())
    logging.getLogger("camserve").info("no")
    logging.getLogger("camserve").warning("yes")
    assert [line["event"] for line in lines(stream)] == ["yes"]


def test_a_warning_is_a_line_too():
    logs.set_up("json", "info", stream := io.StringIO())
    warnings.warn("old ways", stacklevel=1)
    (line,) = lines(stream)
    assert line["logger"] == "py.warnings"
    assert "old ways" in line["event"]


@pytest.mark.parametrize(
    ("log_format", "stream", "is_json"),
    [
        ("auto", io.StringIO(), True),
        ("auto", Terminal(), False),
        ("json", Terminal(), True),
        ("console", io.StringIO(), False),
    ],
)
def test_people_get_another_form_than_machines(log_format, stream, is_json):
    logs.set_up(log_format, "info", stream)
    logging.getLogger("camserve").info("hello", extra={"model": "lite0"})
    text = stream.getvalue()
    assert text.startswith("{") == is_json
    assert ("\x1b[" in text) == (not is_json and stream.isatty())


async def test_each_line_has_the_id_of_its_own_request():
    logs.set_up("json", "info", stream := io.StringIO())

    async def call(name: str) -> None:
        bind_contextvars(request_id=name)
        await asyncio.sleep(0)
        logging.getLogger("camserve").info("of %s", name)

    await asyncio.gather(*(asyncio.create_task(call(name)) for name in "abc"))
    assert [(line["request_id"], line["event"]) for line in lines(stream)] == [(name, f"of {name}") for name in "abc"]


def test_torchserves_lines_keep_their_level(tmp_path):
    logs.set_up("json", "info", stream := io.StringIO())
    server = TorchServe(WorkerSettings(store=tmp_path))
    for line in (b"WARN  WorkerThread it died", b"ERROR ModelServer \xff", b"INFO  MODEL_LOG up", b"Traceback:", b""):
        server._take(line)
    assert [(line["logger"], line["level"]) for line in lines(stream)] == [
        ("camserve.torchserve", level) for level in ("warning", "error", "info", "info")
    ]


@pytest.mark.parametrize("command", ["serve", "gateway", "worker"])
def test_the_commands_that_serve_log_as_the_settings_say(command, monkeypatch, tmp_path):
    chosen = []
    monkeypatch.setattr("camserve.logs.set_up", lambda *given: chosen.append(given))
    for name in ("supervisor.serve", "supervisor.serve_worker", "gateway.ops.shutdown.serve_alone"):
        monkeypatch.setattr(f"camserve.{name}", _nothing)
    monkeypatch.setenv("CAMSERVE_LOG_FORMAT", "console")
    monkeypatch.setenv("CAMSERVE_LOG_LEVEL", "error")
    result = CliRunner().invoke(camserve, [command], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert chosen == [("console", "error")]


async def _nothing(*_: object) -> None:
    pass
