"""The evidence log: its chain, full files, crashes and full disks; and what `verify` says of what was done to it."""

from __future__ import annotations

import json
import resource
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from camserve.cli.commands import camserve
from camserve.errors import InvalidInput, InvalidOption, Unavailable
from camserve.evidence.canonical import canonical, sha256
from camserve.evidence.log import FIRST, EvidenceLog, full_files
from camserve.evidence.record import FORM
from camserve.evidence.verify import Broken, verify

LARGE = 2**20


def record(name: str = "one", size: int = 0) -> dict[str, object]:
    return {"record": FORM, "request_id": name, "filling": "x" * size}


@contextmanager
def opened(path: Path, max_bytes: int = LARGE) -> Iterator[EvidenceLog]:
    log = EvidenceLog(path, max_bytes)
    try:
        yield log
    finally:
        log.close()


def written(path: Path, names: Sequence[str], max_bytes: int = LARGE, size: int = 0) -> list[str]:
    """Appends a record of each name; returns their lines."""
    with opened(path, max_bytes) as log:
        return [log.append(record(name, size)).result(60) for name in names]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "evidence.jsonl"


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n")[:-1]


def test_each_line_holds_the_hash_of_the_line_before(path: Path):
    lines = written(path, "abc")
    assert path.read_text() == "".join(f"{line}\n" for line in lines)
    found = [json.loads(line) for line in lines]
    assert [one["number"] for one in found] == [1, 2, 3]
    assert [one["previous"] for one in found] == [FIRST, *(sha256(line.encode()) for line in lines[:2])]
    assert lines == [canonical(one) for one in found]
    held = verify([path])
    assert (held.records, held.first, held.last, held.torn_bytes) == (3, 1, 3, 0)
    assert held.digest == sha256(lines[-1].encode())


def test_a_log_that_is_opened_again_goes_on(path: Path):
    written(path, "ab")
    written(path, "c")
    assert verify([path]).records == 3


def test_records_of_many_threads_are_one_chain(path: Path):
    with opened(path, 4000) as log:
        futures = []
        lock = threading.Lock()

        def append(thread: int) -> None:
            for number in range(25):
                future = log.append(record(f"{thread}-{number}"))
                with lock:
                    futures.append(future)

        threads = [threading.Thread(target=append, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        lines = [future.result(60) for future in futures]
    files = [*full_files(path), path]
    assert len(files) > 5
    assert verify(files).records == 200
    assert sorted(lines) == sorted(line.decode() for file in files for line in lines_of(file))


def test_a_full_file_is_kept_and_the_chain_goes_on(path: Path):
    written(path, "abcde", max_bytes=1000, size=200)
    written(path, "fg", max_bytes=1000, size=200)
    files = sorted([*full_files(path), path])
    assert [file.name for file in files] == [
        "evidence.000000000001.jsonl",
        "evidence.000000000003.jsonl",
        "evidence.000000000005.jsonl",
        "evidence.jsonl",
    ]
    assert all(file.stat().st_size <= 1000 for file in files)
    assert verify(list(reversed(files))).records == 7
    later = verify(files[1:])  # the first ones were deleted when their time was over
    assert (later.first, later.last, later.records) == (3, 7, 5)
    with pytest.raises(Broken, match=r"jsonl, line 1: records 3 to 4 are missing before record 5"):
        verify([files[0], *files[2:]])


def test_a_full_file_is_never_written_over(path: Path, caplog: pytest.LogCaptureFixture):
    """Each gateway counts from 1, and an operator copies files back by hand."""
    theirs = [path.with_name(f"evidence.{number:012d}.jsonl") for number in (1, 2, 5)]
    with opened(path, max_bytes=1000) as log:
        for name in "abcdef":
            log.append(record(name, 200)).result(60)
            if name == "a":
                for file in theirs:
                    file.write_text(f"what lies in {file}")
    assert [file.read_text() for file in theirs] == [f"what lies in {file}" for file in theirs]
    ours = sorted({path, *full_files(path)} - {*theirs})
    full = ["evidence.000000000003.jsonl", "evidence.000000000004.jsonl"]
    assert [file.name for file in ours] == [*full, "evidence.jsonl"]
    assert verify(ours).records == 6
    assert "there is a file of number 1 already, the full one is" in caplog.text


def test_a_file_that_cannot_be_renamed_leaves_no_other_behind(path: Path, monkeypatch: pytest.MonkeyPatch):
    def refused(*paths: object) -> None:
        raise OSError("no")

    with opened(path, max_bytes=500) as log:
        log.append(record("a", 300)).result(60)
        with monkeypatch.context() as patch:
            patch.setattr("os.rename", refused)
            with pytest.raises(Unavailable):
                log.append(record("lost", 300)).result(60)
        assert full_files(path) == []
        log.append(record("b", 300)).result(60)
    assert [file.name for file in full_files(path)] == ["evidence.000000000001.jsonl"]
    assert verify([*full_files(path), path]).records == 2


def test_a_log_goes_on_where_a_crash_came_between_two_files(path: Path):
    written(path, "ab")
    path.rename(path.with_name("evidence.000000000001.jsonl"))
    written(path, "c")
    assert verify([*full_files(path), path]).records == 3


def test_a_record_larger_than_a_file_is_written(path: Path):
    written(path, "ab", max_bytes=100, size=500)
    assert verify([*full_files(path), path]).records == 2


@pytest.mark.parametrize("torn", [b"{", b'{"record":"camserve', b"\x00\xff"])
def test_what_a_crash_left_of_a_line_is_cut_off(path: Path, torn: bytes):
    written(path, "ab")
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    held = verify([path])
    assert (held.records, held.torn_bytes) == (2, len(torn))
    written(path, "c")
    assert path.read_bytes().startswith(whole)
    assert verify([path]).records == 3


def test_a_file_that_holds_an_unfinished_line_alone_begins_anew(path: Path):
    path.write_bytes(b'{"record"')
    written(path, "a")
    assert verify([path]).records == 1


@pytest.mark.parametrize("last", [b"{}", b"not json", b"", b'{"record":"camserve.evidence.v1"}', b"[1]", b"\xff"])
def test_a_log_does_not_go_on_behind_what_is_none(path: Path, last: bytes):
    path.write_bytes(last + b"\n")
    with pytest.raises(InvalidOption, match="no evidence record"):
        EvidenceLog(path, LARGE)
    path.rename(path.with_name("away"))  # as the error says, and the start is tried again
    written(path, "a")
    assert verify([path]).records == 1


def test_two_logs_do_not_share_a_file(path: Path):
    with opened(path), pytest.raises(InvalidOption, match="another gateway"):
        EvidenceLog(path, LARGE)
    written(path, "a")


def test_a_log_that_cannot_be_written_stops_the_start(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(InvalidOption, match="cannot be written"):
        EvidenceLog(tmp_path / "file" / "evidence.jsonl", LARGE)
    (tmp_path / "folder").mkdir()
    with pytest.raises(InvalidOption, match="cannot be written"):
        EvidenceLog(tmp_path / "folder", LARGE)


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """Has this process's writes end at a size, some of them in the middle, as those on a full disk do."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_fails_records_and_leaves_the_chain_whole(path: Path):
    with opened(path) as log:
        log.append(record("a")).result(60)
        whole = path.stat().st_size
        with no_file_beyond(whole + 20):
            with pytest.raises(Unavailable, match="cannot write it now"):
                log.append(record("lost")).result(60)
            assert path.stat().st_size == whole
        log.append(record("b")).result(60)
    assert [json.loads(line)["request_id"] for line in lines_of(path)] == ["a", "b"]
    assert verify([path]).records == 2


def test_a_full_disk_at_the_end_of_a_file_fails_the_records_alone(path: Path):
    with opened(path, max_bytes=500) as log:
        log.append(record("a", 300)).result(60)
        with no_file_beyond(10), pytest.raises(Unavailable):
            log.append(record("lost", 300)).result(60)
        log.append(record("b", 300)).result(60)
        log.append(record("c", 300)).result(60)
    assert verify([*full_files(path), path]).records == 3


def test_a_file_that_was_moved_away_or_cut_does_not_stop_the_log(path: Path):
    with opened(path) as log:
        first = log.append(record("a")).result(60)
        path.rename(path.with_name("moved.jsonl"))
        log.append(record("b")).result(60)
        assert verify([path.with_name("moved.jsonl"), path]).records == 2
        path.write_bytes(b"")  # as logrotate's copytruncate does it
        log.append(record("c")).result(60)
    assert b"\x00" not in path.read_bytes()
    assert verify([path]).first == 3
    assert json.loads(first)["number"] == 1


def test_a_record_that_is_no_json_fails_alone(path: Path):
    with opened(path) as log:
        with pytest.raises(Exception, match="internal error"):
            log.append(record() | {"score": float("nan")}).result(60)
        log.append(record()).result(60)
    assert verify([path]).records == 1


def test_a_closed_log_takes_no_record(path: Path):
    with opened(path) as log:
        pass
    with pytest.raises(Unavailable):
        log.append(record()).result(60)


def changed(line: bytes) -> bytes:
    return canonical(json.loads(line) | {"request_id": "forged"}).encode()


def forged(lines: list[bytes]) -> bytes:
    """A record that fits behind the second line."""
    return canonical(record("forged") | {"number": 3, "previous": sha256(lines[1])}).encode()


BROKEN = {
    "changed": (lambda found: [*found[:2], changed(found[2]), *found[3:]], "line 3: record 3 was changed"),
    "removed": (lambda found: [*found[:2], *found[3:]], "line 3: record 3 is missing before record 4"),
    "several removed": (lambda found: [found[0], *found[4:]], "line 2: records 2 to 4 are missing before record 5"),
    "exchanged": (lambda found: [*found[:2], found[3], found[2], found[4]], "line 3: record 3 is missing"),
    "twice": (lambda found: [*found[:2], *found[1:]], "line 3: record 2 comes after record 2"),
    "inserted": (lambda found: [*found[:2], forged(found), *found[2:]], "line 4: record 3 comes after record 3"),
    "exchanged for a forged one": (
        lambda found: [*found[:2], forged(found), *found[3:]],
        "line 3: record 3 was changed",
    ),
    "another form": (lambda found: [*found[:2], found[2].replace(b":", b": ", 1), *found[3:]], "line 3: .* canonical"),
    "no json": (lambda found: [*found[:2], b"{", *found[3:]], "line 3: it is no JSON"),
    "a huge number": (
        lambda found: [*found[:2], b'{"a":1%s}' % (400 * b"0"), *found[3:]],
        "line 3: it is no JSON",
    ),
    "empty line": (lambda found: [*found[:2], b"", *found[2:]], "line 3: it is no JSON"),
    "no record": (lambda found: [*found[:2], b"{}", *found[3:]], "line 3: it is no record of form"),
    "a beginning that is none": (
        lambda found: [canonical(json.loads(found[0]) | {"previous": "f" * 64}).encode(), *found[1:]],
        "line 1: record 1 cannot begin a chain",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_whatever_is_done_to_a_line_is_seen(path: Path, what: str):
    written(path, "abcde")
    do, said = BROKEN[what]
    path.write_bytes(b"".join(line + b"\n" for line in do(lines_of(path))))
    with pytest.raises(Broken, match=said):
        verify([path])


def test_no_byte_can_be_changed(path: Path):
    """The last line's own hash is nowhere in the file: an anchor holds it."""
    anchor = sha256(written(path, "abcde")[-1].encode())
    content = path.read_bytes()
    last = content.rfind(b"\n", 0, -1)
    for at in range(0, len(content), 3):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x20]) + content[at + 1 :])
        with pytest.raises(Broken):
            verify([path], anchor if at > last else "")


def test_what_was_removed_from_the_end_shows_by_an_anchor(path: Path):
    lines = written(path, "abc")
    anchor = sha256(lines[2].encode())
    assert verify([path], anchor).records == 3
    written(path, "d")
    assert verify([path], anchor).records == 4
    path.write_bytes(b"".join(line + b"\n" for line in lines_of(path)[:2]))
    assert verify([path]).records == 2
    with pytest.raises(Broken, match="no line has the hash"):
        verify([path], anchor)


def test_an_unfinished_line_in_a_full_file_is_no_crash(path: Path):
    written(path, "abcde", max_bytes=1000, size=200)
    first = sorted(full_files(path))[0]
    first.write_bytes(first.read_bytes()[:-1])
    with pytest.raises(Broken, match=r"000000000001.jsonl, line 2: it is cut off"):
        verify([*full_files(path), path])


def test_the_command_says_what_holds(path: Path):
    path.touch()
    runner = CliRunner()
    found = runner.invoke(camserve, ["evidence", "verify", str(path)])
    assert (found.exit_code, found.output) == (0, f"no records; anchor {FIRST}\n")
    lines = written(path, "ab")
    found = runner.invoke(camserve, ["evidence", "verify", str(path)])
    assert (found.exit_code, found.output) == (0, f"records 1 to 2 hold; anchor {sha256(lines[1].encode())}\n")
    path.write_bytes(lines_of(path)[1] + b"\n{")
    found = runner.invoke(camserve, ["evidence", "verify", str(path)])
    assert found.exit_code == 0
    assert found.output.splitlines()[:2] == [
        "records 1 to 1 are not in these files",
        "1 bytes of an unfinished line at the end: its reply has not left the server",
    ]
    with pytest.raises(InvalidInput, match="cannot read"):
        runner.invoke(camserve, ["evidence", "verify", str(path.with_name("none"))], catch_exceptions=False)
