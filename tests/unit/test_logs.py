"""The log of the commands: one JSON object for each record, whoever made it."""

import asyncio
import io
import json
import logging
import os
import warnings
from datetime import UTC, datetime, timedelta

import pytest
from click.testing import CliRunner
from prometheus_client import generate_latest
from structlog.contextvars import bind_contextvars, clear_contextvars

from camserve import logs
from camserve.cli import camserve
from camserve.gateway.ops.metrics import Metrics
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
    logging.getLogger().handlers[0].flush()
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
        logging.getLogger().handlers[0].flush()
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
    logging.getLogger().handlers[0].flush()
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


def test_nobody_waits_for_a_log_that_nobody_reads():
    """Lines beyond the pipe and the queue are dropped and counted; once somebody reads, the log says how many."""
    reading, writing = os.pipe()
    with os.fdopen(reading, encoding="utf-8") as read, os.fdopen(writing, "w", encoding="utf-8") as stream:
        writer = logs.Writer(stream, most_lines=10)
        for number in range(1000):
            writer.handle(logging.makeLogRecord({"msg": f"{number} {'x' * 1000}"}))
        assert 0 < writer.lost < 1000
        told = 0
        while told < writer.lost:
            line = read.readline()
            told += int(line.split()[0]) if "lines of the log were lost" in line else 0
        assert told == writer.lost
        writer.close()


def test_lost_lines_of_the_process_are_counted():
    logs.set_up("json", "info", stream := io.StringIO())
    assert logs.lost_lines() == 0
    stream.close()
    logging.getLogger("camserve").warning("nobody reads this")
    logging.getLogger().handlers[0].flush()
    assert logs.lost_lines() == 1
    assert "camserve_log_lines_lost_total 1.0" in generate_latest(Metrics().registry).decode()


def test_a_pipe_whose_reader_is_gone_harms_nobody(capfd):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", encoding="utf-8") as stream:
        logs.set_up("json", "info", stream)
        for _ in range(3):
            logging.getLogger("camserve").warning("nobody reads this")
        logging.getLogger().handlers[0].flush()
        assert logs.lost_lines() == 3
    assert capfd.readouterr() == ("", "")


def test_a_pipe_that_others_have_made_non_blocking_loses_nothing():
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with os.fdopen(reading, encoding="utf-8") as read, os.fdopen(writing, "w", encoding="utf-8") as stream:
        writer = logs.Writer(stream)
        for number in range(500):
            writer.handle(logging.makeLogRecord({"msg": f"{number} {'x' * 1000}"}))
        assert [int(read.readline().split()[0]) for _ in range(500)] == list(range(500))
        writer.close()


def test_a_record_that_cannot_be_formatted_is_counted_and_not_raised(capfd):
    logs.set_up("json", "info", io.StringIO())
    logging.getLogger("camserve").warning("%d", "no number")
    assert logs.lost_lines() == 1
    assert capfd.readouterr() == ("", "")


def test_without_a_stderr_nothing_is_written(monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    logs.set_up("auto", "info")
    logging.getLogger("camserve").warning("nobody reads this")
    logging.getLogger().handlers[0].flush()


def test_letters_that_the_stream_does_not_have_are_escaped(tmp_path):
    with (tmp_path / "log").open("w", encoding="ascii") as stream:
        logs.set_up("console", "info", stream)
        logging.getLogger("camserve").warning("caffè")
        logging.getLogger().handlers[0].flush()
    assert "caff\\xe8" in (tmp_path / "log").read_text(encoding="ascii")


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
