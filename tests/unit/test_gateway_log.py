"""`gateway.sh log` on real files: each line once, over rotations, truncation and crashes."""

import gzip
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from reconciler.adapters import nginx
from reconciler.adapters.nginx import NginxGateways
from reconciler.adapters.ports import LogPart
from reconciler.errors import GatewayFailed
from tests.unit.build import fleet
from tests.unit.test_usage import line


@dataclass
class Log:
    """A gateway's folder with its access log, and who reads it."""

    folder: Path
    adapter: NginxGateways
    programs: Path
    position: str = ""
    written: int = 0

    @property
    def path(self) -> Path:
        return self.folder / "access.log"

    def write(self, count: int = 1, to: Path | None = None) -> None:
        with (to or self.path).open("ab") as file:
            for _ in range(count):
                file.write(line(id=f"{self.written:032}"))
                self.written += 1

    def part(self) -> LogPart:
        part = self.adapter.log("gateway", self.position)
        self.position = part.position
        return part

    def read(self) -> list[int]:
        """Read all there is now; which lines those were."""
        found = []
        while True:
            part = self.part()
            found += [int(json.loads(one)["id"]) for one in part.lines.splitlines()]
            if not part.lines or part.ended:
                return found


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Log:
    programs, folder = tmp_path / "bin", tmp_path / "gateway"
    for path in (programs, folder):
        path.mkdir()
    clock = programs / "date"
    clock.write_text(f"#!/bin/sh\necho $(($(/bin/date +%s) + $(cat {programs}/later)))\n")
    clock.chmod(0o755)
    (programs / "later").write_text("0\n")
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    record = {"directory": str(folder), "hosts": [{"name": "gateway"}]}
    return Log(folder, NginxGateways(fleet(gateway=record).gateway, "demo"), programs)


def settle(log: Log) -> None:
    """Let so much time pass that nobody writes to a rotated file any more."""
    (log.programs / "later").write_text("11\n")


def test_lines_are_read_once_and_in_order(log: Log) -> None:
    """No log, an empty one, a growing one; between two reads nothing is read twice."""
    assert log.part() == LogPart(lines=b"", position="", ended=True)
    log.path.touch()
    assert log.part() == LogPart(lines=b"", position="", ended=True)
    log.write(3)
    assert log.read() == [0, 1, 2]
    assert log.part().lines == b""
    log.write(2)
    assert log.read() == [3, 4]


def test_half_a_line_waits_for_its_end(log: Log) -> None:
    """What NGINX has written in part is read when it is whole."""
    log.write(2)
    text = log.path.read_bytes()
    log.path.write_bytes(text[:-10])
    assert log.read() == [0]
    log.path.write_bytes(text)
    assert log.read() == [1]


def test_read_is_bounded_and_goes_on(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backlog comes in parts, each of whole lines; only the last one says that it ends."""
    monkeypatch.setattr(nginx, "_LOG_MOST", 1000)
    log.write(10)
    parts = [log.part() for _ in range(5)]
    assert [part.lines.count(b"\n") for part in parts] == [2, 2, 2, 2, 2]
    assert [part.ended for part in parts] == [False] * 4 + [True]


def test_line_longer_than_a_read_stops_nothing(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is passed over in pieces."""
    monkeypatch.setattr(nginx, "_LOG_MOST", 1000)
    log.path.write_bytes(b"x" * 2500 + b"\n")
    log.write(1)
    parts = [log.part() for _ in range(4)]
    assert sum(len(part.lines) for part in parts) == log.path.stat().st_size
    assert b"".join(part.lines for part in parts).endswith(line(id=f"{0:032}"))


def test_rotated_log_is_finished_first(log: Log) -> None:
    """What is written to the old file until NGINX opens the new one is not lost."""
    log.write(2)
    assert log.read() == [0, 1]
    rotated = log.path.rename(log.folder / "access.log.1")
    log.write(1, to=rotated)
    assert log.read() == [2]
    log.write(1, to=log.path)
    assert log.read() == []  # NGINX's other workers may still write to the old one
    log.write(1, to=rotated)
    assert log.read() == [4]
    settle(log)
    assert log.read() == [3]
    log.write(1)
    assert log.read() == [5]


def test_several_rotations_at_once_are_read_in_their_order(log: Log) -> None:
    """A reconciler that was away for days reads each file, the oldest first."""
    log.write(2)
    assert log.read() == [0, 1]
    log.write(1)
    for at in (3, 2, 1):
        shutil.move(log.path, log.folder / f"access.log-2026030{4 - at}")
        log.write(1)
        os.utime(log.folder / f"access.log-2026030{4 - at}", (at * -100 + time.time(),) * 2)
    settle(log)
    assert log.read() == [2, 3, 4, 5]


def test_first_read_begins_with_the_oldest_log(log: Log) -> None:
    """Lost counts come back, as far as the logs are still there; compressed ones are left out."""
    log.write(1)
    log.path.rename(log.folder / "access.log.1")
    (log.folder / "access.log.2.gz").write_bytes(gzip.compress(line()))
    log.write(1)
    settle(log)
    assert log.read() == [0, 1]


def test_log_that_was_copied_and_truncated_is_read_to_its_end(log: Log) -> None:
    """The copy has the lines that were not read yet; it begins like the file that they were in."""
    log.write(3)
    assert log.read() == [0, 1, 2]
    log.write(2)
    shutil.copyfile(log.path, log.folder / "access.log.1")
    assert log.read() == [3, 4]
    log.write(1)
    shutil.copyfile(log.path, log.folder / "access.log.1")
    os.truncate(log.path, 0)
    assert log.read() == [5]
    log.write(20)
    settle(log)
    assert log.read() == list(range(6, 26))


@pytest.mark.parametrize("gone", [Path.unlink, lambda path: os.truncate(path, 0)])
def test_file_that_is_gone_is_said_once_and_the_next_one_read(
    log: Log, gone: Callable[[Path], object]
) -> None:
    """Whoever removes a log before it was read loses lines, and hears of it."""
    log.write(3)
    part = log.part()
    assert (part.lines.count(b"\n"), part.lost) == (3, False)
    gone(log.path)
    assert log.part() == LogPart(lines=b"", position=log.position, ended=True)
    log.write(2)
    part = log.part()
    assert (part.lines.count(b"\n"), part.lost) == (2, True)
    log.write(1)
    part = log.part()
    assert (part.lines.count(b"\n"), part.lost) == (1, False)


def test_log_that_can_not_be_read_is_an_error_and_moves_nothing(log: Log) -> None:
    """Unknown is never nothing: the position stays."""
    log.write(1)
    assert log.read() == [0]
    position = log.position
    shutil.rmtree(log.folder)
    with pytest.raises(GatewayFailed, match="can't be read"):
        log.part()
    assert log.position == position
