"""Counting the gateways' logs into the store: each line once, whatever ends the process."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from reconciler.adapters.ports import LogPart
from reconciler.adapters.store import FILE, SqliteStore, read_days
from reconciler.errors import GatewayFailed, StateFailed
from reconciler.observe import World, count_logs, with_usage
from reconciler.plan import NoteKind
from reconciler.planner import plan
from reconciler.state import GatewayView, Memory
from reconciler.usage import Tallies, Tally, day_of, tally
from tests.unit.build import fleet, notes, observation
from tests.unit.test_usage import line

AT = 4e9  # what is more than a year ago, by the clock on the wall, is not kept
DAY = day_of(AT)
VIEWS = (GatewayView(name="a"), GatewayView(name="b"))


class Killed(BaseException):
    """The process ends here."""


@dataclass
class Gateways:
    """Logs of one line a part; the position is the number of lines that were read."""

    logs: dict[str, list[bytes]] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    asked: int = 0

    def log(self, name: str, position: str) -> LogPart:
        self.asked += 1
        if name in self.broken:
            raise GatewayFailed(f"gateway {name}: no route to host")
        begin, lines = int(position or 0), self.logs.get(name, [])
        part = b"".join(lines[begin : begin + 1])
        end = begin + bool(part)
        return LogPart(lines=part, position=str(end), ended=end == len(lines))


@dataclass
class Dying:
    """A store whose process is killed at the given call, before or after it takes effect."""

    store: SqliteStore
    at: int
    after: bool
    calls: int = 0

    def log_positions(self) -> Mapping[str, str]:
        return self.store.log_positions()

    def count(self, gateway: str, part: LogPart, tallies: Tallies) -> None:
        self.calls += 1
        if self.calls == self.at and not self.after:
            raise Killed
        self.store.count(gateway, part, tallies)
        if self.calls == self.at:
            raise Killed


def world(gateways: object, store: object) -> World:
    unused: Any = None
    given: Any = {"gateways": gateways, "store": store}
    return World(slurm=unused, engines=unused, images=unused, secrets=unused, **given)


@contextmanager
def opened(folder: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(folder)
    with store.locked():
        yield store


def requests(folder: Path) -> int:
    return sum(sums.requests for sums in (read_days(folder, "0000", "9999") or {}).values())


def lines(count: int, **keys: Any) -> list[bytes]:
    return [line(at=AT, **keys) for _ in range(count)]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", [1, 2, 3, 5, 7])
def test_R05_process_killed_while_counting_neither_loses_nor_doubles_a_line(
    tmp_path: Path, at: int, after: bool
) -> None:
    """Sums and position are one transaction; the next cycle goes on from there."""
    gateways = Gateways({"a": lines(5), "b": lines(3)})
    with opened(tmp_path) as store, pytest.raises(Killed):
        count_logs(world(gateways, Dying(store, at, after)), VIEWS)
    assert requests(tmp_path) == at - (not after)
    with opened(tmp_path) as store:
        assert count_logs(world(gateways, store), VIEWS) == {}
    assert requests(tmp_path) == 8


def test_quiet_gateways_are_asked_once_and_nothing_is_written(tmp_path: Path) -> None:
    """A cycle without requests costs one question to each gateway, and no write to the disk."""
    gateways = Gateways({"a": lines(2), "b": []})
    with opened(tmp_path) as store:
        count_logs(world(gateways, store), VIEWS)
        gateways.asked = 0
        watched = Dying(store, at=0, after=False)
        count_logs(world(gateways, watched), VIEWS)
    assert (gateways.asked, watched.calls) == (2, 0)


def test_backlog_does_not_hold_a_cycle_up(tmp_path: Path) -> None:
    """After its seconds a cycle goes on; the next one counts further."""
    gateways = Gateways({"a": lines(10)})
    clock = iter([0.0, 0.5, 1.0, 2.5, 0.0, 0.1, *[0.2] * 20])
    with opened(tmp_path) as store:
        here = world(gateways, store)
        count_logs(here, VIEWS, lambda: next(clock))
        assert requests(tmp_path) == 2
        usage, *_ = store.usage(AT, frozenset({"a"}))
        assert (usage.tokens_today, usage.complete) == ({"alice": 60}, False)
        count_logs(here, VIEWS, lambda: next(clock))
        assert requests(tmp_path) == 10
        assert store.usage(AT, frozenset({"a"}))[0].complete


def test_log_that_can_not_be_read_is_a_note_and_stops_no_other(tmp_path: Path) -> None:
    """The cycle goes on; a gateway that can't be reached at all is not asked again."""
    gateways = Gateways({"a": lines(1), "b": lines(1)}, broken={"a"})
    unreachable = GatewayView(name="c", error="gateway c: no answer")
    with opened(tmp_path) as store:
        problems = count_logs(world(gateways, store), (*VIEWS, unreachable))
        seen = with_usage(observation(at=AT), fleet(), world(gateways, store), problems)
    assert problems == {"a": "its log is not counted: gateway a: no route to host"}
    [note] = notes(plan(fleet(), seen, Memory()), NoteKind.LOG)
    assert (note.subject, note.text) == ("a", problems["a"])
    assert requests(tmp_path) == 1


def test_odd_and_lost_lines_are_said(tmp_path: Path) -> None:
    """What can't be read is counted; a file that is gone is told of, once."""
    gateways = Gateways({"a": [b"{\n"], "b": []})
    with opened(tmp_path) as store:
        problems = count_logs(world(gateways, store), VIEWS)
        assert problems == {"a": "lines of its log that could not be read: 1"}
        lost = LogPart(lines=line(), position="1", ended=True, lost=True)
        given: Any = SimpleNamespace(log=lambda *_: lost)
        assert "are lost" in count_logs(world(given, store), VIEWS[:1])["a"]


def test_R32_disk_that_is_full_loses_no_line(tmp_path: Path) -> None:
    """What can't be written is counted when it can; until then it is a note."""
    gateways = Gateways({"a": lines(3)})

    class Full(Dying):
        def count(self, gateway: str, part: LogPart, tallies: Tallies) -> None:
            raise StateFailed(f"{gateway} {part.position} {tallies.odd_lines}: No space left")

    with opened(tmp_path) as store:
        problems = count_logs(world(gateways, Full(store, 0, False)), VIEWS[:1])
        assert problems == {"logs": "not counted: a 1 0: No space left"}
        count_logs(world(gateways, store), VIEWS[:1])
    assert requests(tmp_path) == 3


def test_R32_lost_file_costs_history_and_is_read_again(tmp_path: Path) -> None:
    """As far as the logs are still there; until all is counted nothing is known to be whole."""
    gateways = Gateways({"a": lines(3)})
    with opened(tmp_path) as store:
        count_logs(world(gateways, store), VIEWS[:1])
    (tmp_path / FILE).write_bytes(b"no database")
    with opened(tmp_path) as store:
        usage, traffic, _ = store.usage(AT, frozenset({"a"}))
        assert (usage.complete, traffic) == (False, None)
        count_logs(world(gateways, store), VIEWS[:1])
    assert requests(tmp_path) == 3


def test_reader_without_the_lock_sees_what_is_counted(tmp_path: Path) -> None:
    """`fleet status` and `fleet plan` need no lock; before the first count nothing is known."""
    reader = SqliteStore(tmp_path)
    names = frozenset({"a"})
    assert reader.usage(AT, names)[1] is None
    assert read_days(tmp_path, DAY, DAY) is None
    gateways = Gateways({"a": [line(at=AT), line(at=AT, model="cold", status="503")]})
    with opened(tmp_path) as store:
        count_logs(world(gateways, store), VIEWS[:1])
        usage, traffic, _ = reader.usage(AT, names)
    assert usage.tokens_today == {"alice": 60}
    assert traffic is not None
    assert {model: one.refused for model, one in traffic.items()} == {"tiny": 0, "cold": 1}
    assert reader.usage(AT + 86400, names)[0].tokens_today == {}


def test_file_of_the_version_before_is_no_error_to_readers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until a cycle of this version has migrated it, nothing is counted in it."""
    with monkeypatch.context() as older:
        from reconciler.adapters import store as module

        older.setattr(module, "_MIGRATIONS", module._MIGRATIONS[:1])
        with opened(tmp_path) as store:
            store.save(Memory())
    assert SqliteStore(tmp_path).usage(AT, frozenset())[1] is None
    assert read_days(tmp_path, DAY, DAY) == {}


def test_days_are_kept_for_more_than_a_year_and_minutes_for_one_hour(tmp_path: Path) -> None:
    """Counts by day are history, those by minute are what traffic is told from."""
    old, now = line(at=1e6), line(at=AT)
    part = LogPart(lines=b"", position="", ended=True)
    with opened(tmp_path) as store:
        store.count("a", part, tally(old + now))
        days = read_days(tmp_path, "0000", "9999") or {}
    assert [day for day, _, _ in days] == [DAY]


def test_sums_are_the_same_in_the_store_as_outside(tmp_path: Path) -> None:
    """Part after part, what is read back is what the whole log adds up to."""
    texts = [line(at=AT + at, first_byte=at / 7, tenant="ab"[at % 2]) for at in range(1, 40)]
    with opened(tmp_path) as store:
        for text in texts:
            store.count("a", LogPart(lines=text, position="1"), tally(text))
        expected = tally(b"".join(texts)).days
        assert read_days(tmp_path, "0000", "9999") == expected
    assert Tally.total([*expected.values()]).requests == 39
