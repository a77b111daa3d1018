"""Memory and journal on disk: they come back equal, damage costs what it hit, one writes."""

import contextlib
import dataclasses
import enum
import json
import resource
import sqlite3
import subprocess
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from reconciler.adapters import store as module
from reconciler.adapters.ports import Result
from reconciler.adapters.store import FILE, SqliteStore, read_events
from reconciler.errors import LockHeld, StateFailed
from reconciler.naming import ReplicaName
from reconciler.plan import Action, Cancel, Drain, JobRef, Reason, Route, Submit
from reconciler.spec import Fleet, load_fleet
from reconciler.state import Memory, Target

NAME = ReplicaName(fleet="demo", model="tiny", revision="0123abcd", ordinal=0)
JOB = JobRef(id=7, submitted_at=999_000, name=NAME)
SUBMIT = Submit(name=NAME, gpus=1, reason=Reason.MISSING)
ROUTE = Route(
    gateways=("a", "b"),
    generation="0" * 8,
    targets=(Target(model="tiny", job_id=7, submitted_at=999_000, address="10.0.0.1:20000"),),
    added=("7",),
    removed=(),
)
DRAIN = Drain(job=JOB, reason=Reason.SURPLUS)
CANCEL = Cancel(job=JOB, pending=False, reason=Reason.STALE)


def sample(hint: Any) -> Any:
    """A value of a type that is not that of an empty memory, so that no field is forgotten."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return sample(arguments[0])
    if origin is Mapping:
        return {sample(arguments[0]): sample(arguments[1])}
    if origin is frozenset:
        return frozenset({sample(arguments[0])})
    if origin is tuple:
        return tuple(sample(item) for item in arguments if item is not ...)
    if dataclasses.is_dataclass(hint):
        kind: Any = hint
        return kind(**{name: sample(of) for name, of in typing.get_type_hints(hint).items()})
    if hint is Fleet:
        return load_fleet(Path(__file__).parents[2] / "specs" / "demo")
    if issubclass(hint, enum.Enum):
        return next(iter(hint))
    return {int: 3, float: 2.25, str: "model.0123abcd", bool: True}[hint]


FULL: Memory = sample(Memory)


@dataclasses.dataclass
class Kept:
    """A store under its lock, and what it has said."""

    store: SqliteStore
    said: list[str]


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Kept]:
    """Hold a folder's store as `apply` and `run` do."""
    said: list[str] = []
    store = SqliteStore(folder, said.append)
    with store.locked():
        yield Kept(store, said)


def saved(folder: Path, memory: Memory = FULL) -> Path:
    """Leave a memory in a folder; return its file."""
    with opened(folder) as kept:
        kept.store.save(memory)
    return folder / FILE


def sql(file: Path, statement: str, *values: Any) -> list[Any]:
    """Do one statement on a file, as anybody with sqlite3 can."""
    with contextlib.closing(sqlite3.connect(file)) as db, db:
        return db.execute(statement, values).fetchall()


# -- memory


@pytest.mark.parametrize("memory", [FULL, Memory()])
def test_memory_comes_back_equal(memory: Memory, tmp_path: Path) -> None:
    """What was saved is what is loaded: under the lock, by the next process, by a reader."""
    with opened(tmp_path) as kept:
        kept.store.save(FULL)
        kept.store.save(memory)
        assert kept.store.load() == memory
    with opened(tmp_path) as kept:
        assert kept.store.load() == memory
        assert SqliteStore(tmp_path).load() == memory
    assert kept.said == []


def test_memory_sample_has_every_field() -> None:
    """The value that these tests use differs from an empty memory in each field."""
    for field in dataclasses.fields(Memory):
        assert getattr(FULL, field.name) != getattr(Memory(), field.name), field.name


def test_memory_that_is_not_there_is_empty(tmp_path: Path) -> None:
    """A reader of a fleet that never ran knows nothing, and makes nothing."""
    assert SqliteStore(tmp_path / "none").load() == Memory()
    (tmp_path / FILE).touch()
    assert SqliteStore(tmp_path).load() == Memory()
    assert not (tmp_path / "none").exists()


def test_memory_that_did_not_change_is_not_written(tmp_path: Path) -> None:
    """A quiet cycle costs no write; a changed field costs its own row."""
    saved(tmp_path)
    with opened(tmp_path) as kept:
        memory = kept.store.load()
        wal = tmp_path / f"{FILE}-wal"
        kept.store.save(memory)
        assert wal.stat().st_size == 0
        sql(tmp_path / FILE, "UPDATE memory SET value = '5.0' WHERE field = 'emptied_at'")
        kept.store.save(dataclasses.replace(memory, misses={}))
        assert kept.store.load() == dataclasses.replace(memory, misses={}, emptied_at=5.0)


def test_somebody_else_who_writes_delays_and_harms_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A person with sqlite3 in the file: memory is read meanwhile, a write says why it fails."""
    monkeypatch.setattr(module, "_BUSY_S", 0.1)
    file = saved(tmp_path)
    with opened(tmp_path) as kept:
        with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as person:
            person.execute("BEGIN IMMEDIATE")
            assert kept.store.load() == FULL
            with pytest.raises(StateFailed, match="can't be written: database is locked"):
                kept.store.intend(1.0, SUBMIT)
            assert kept.store.load() == FULL
        kept.store.intend(1.0, SUBMIT)
    assert kept.said == []


def test_R32_row_of_garbled_text_costs_its_field_only(tmp_path: Path) -> None:
    """Bytes that are no text at all spoil their own row."""
    sql(saved(tmp_path), "UPDATE memory SET value = CAST(x'5bff' AS TEXT) WHERE field = 'misses'")
    with opened(tmp_path) as kept:
        assert kept.store.load() == dataclasses.replace(FULL, misses={})
        assert len(kept.said) == 1


def test_reader_makes_no_file_that_has_just_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It opens what is there and nothing else."""
    with monkeypatch.context() as patched:
        patched.setattr(Path, "exists", lambda _: True)
        with pytest.raises(StateFailed, match="unable to open database file"):
            read_events(tmp_path)
    assert [*tmp_path.iterdir()] == []


def test_memory_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    """A save that fails at its last row leaves the first ones as they were too."""
    file = saved(tmp_path)
    last = dataclasses.fields(Memory)[-1].name
    trigger = f"CREATE TRIGGER fail BEFORE INSERT ON memory WHEN NEW.field = '{last}'"
    sql(file, f"{trigger} BEGIN SELECT RAISE(ABORT, 'no'); END")
    with opened(tmp_path) as kept, pytest.raises(StateFailed, match="can't be written: no"):
        kept.store.save(Memory())
    assert SqliteStore(tmp_path).load() == FULL


def test_only_the_holder_of_the_lock_writes(tmp_path: Path) -> None:
    """Writing without the lock is a mistake of the program, not something to survive."""
    with pytest.raises(RuntimeError, match="only the holder of the lock writes"):
        SqliteStore(tmp_path).save(FULL)


# -- damage


@pytest.mark.parametrize(
    "value",
    [
        *("", "{", "null", "[1]", "[" * 100_000, '"x"', '[[[1,2],"x"]]', "[[[1,2,3],1]]"),
        *(5, b"\xff\xfe", "\0"),
    ],
)
def test_R32_row_that_can_not_be_read_costs_its_field_only(value: Any, tmp_path: Path) -> None:
    """One line names the field, the others are as they were, and the next save mends it."""
    sql(saved(tmp_path), "UPDATE memory SET value = ? WHERE field = 'misses'", value)
    with opened(tmp_path) as kept:
        assert kept.store.load() == dataclasses.replace(FULL, misses={})
        assert kept.said == ['what memory holds of "misses" can\'t be read: it starts again']
        kept.store.save(FULL)
    with opened(tmp_path) as kept:
        assert kept.store.load() == FULL
        assert kept.said == []


def test_row_of_another_program_is_ignored_and_kept(tmp_path: Path) -> None:
    """A field that a later program remembers survives an earlier one."""
    file = saved(tmp_path)
    sql(file, "INSERT INTO memory VALUES ('later', '1')")
    sql(file, "DELETE FROM memory WHERE field = 'misses'")
    with opened(tmp_path) as kept:
        assert kept.store.load() == dataclasses.replace(FULL, misses={})
        kept.store.save(Memory())
    assert kept.said == []
    assert sql(file, "SELECT value FROM memory WHERE field = 'later'") == [("1",)]


def no_database(file: Path) -> None:
    file.write_bytes(b'[[[[1,2],"x"]],[],{},null]' * 40)


def all_zero(file: Path) -> None:
    file.write_bytes(b"\0" * 8192)


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:5000])


def pages_overwritten(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100] + b"\xff" * 20_000)


def memory_page_overwritten(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[:4096] + b"\xa5" * 8192 + data[3 * 4096 :])


def no_tables(file: Path) -> None:
    sql(file, "DROP TABLE memory")


def other_columns(file: Path) -> None:
    sql(file, "ALTER TABLE memory RENAME COLUMN value TO worth")


def no_version(file: Path) -> None:
    sql(file, "PRAGMA user_version = -1")


DAMAGES = [
    *(no_database, all_zero, cut_short, pages_overwritten, memory_page_overwritten),
    *(no_tables, other_columns, no_version),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_R32_damaged_file_is_set_aside_and_a_fresh_one_used(damage: Any, tmp_path: Path) -> None:
    """One line says where it is kept; the fleet goes on with an empty memory, and writes again."""
    damage(saved(tmp_path))
    with opened(tmp_path) as kept:
        assert kept.store.load() == Memory()
        kept.store.save(FULL)
        kept.store.conclude(kept.store.intend(1.0, SUBMIT), Result.DONE, "")
    [line] = kept.said
    assert line.startswith(f"{tmp_path}/{FILE} is damaged (")
    assert line.endswith(f"): kept as {FILE}.corrupt-1; timers start again")
    assert (tmp_path / f"{FILE}.corrupt-1").stat().st_size > 0
    with opened(tmp_path) as kept:
        assert kept.store.load() == FULL
    assert kept.said == []


@pytest.mark.parametrize("damage", [no_database, pages_overwritten, other_columns])
def test_R32_damaged_file_is_left_alone_by_a_reader(damage: Any, tmp_path: Path) -> None:
    """`plan` says so and shows the fleet without memory; moving files is the writer's."""
    damage(saved(tmp_path))
    data, said = (tmp_path / FILE).read_bytes(), list[str]()
    assert SqliteStore(tmp_path, said.append).load() == Memory()
    assert len(said) == 1
    assert "can't be read, so timers start again" in said[0]
    assert (tmp_path / FILE).read_bytes() == data
    if damage is not other_columns:  # the journal has its own
        with pytest.raises(StateFailed, match="can't be read"):
            read_events(tmp_path)


def test_R32_file_damaged_under_a_running_reconciler_is_replaced(tmp_path: Path) -> None:
    """Whatever is written next finds a fresh file, and memory goes there whole."""
    with opened(tmp_path) as kept:
        kept.store.save(FULL)
        assert kept.store.load() == FULL
        kept.store._close()
        no_database(tmp_path / FILE)
        kept.store.save(FULL)
        assert kept.store.load() == FULL
    assert len(kept.said) == 1


def test_R32_file_moved_away_under_a_running_reconciler_is_made_anew(tmp_path: Path) -> None:
    """What is written next goes into a new file, memory whole."""
    with opened(tmp_path) as kept:
        kept.store.save(FULL)
        (tmp_path / FILE).rename(tmp_path / "away")
        kept.store.save(FULL)
        kept.store.intend(1.0, DRAIN)
    assert SqliteStore(tmp_path).load() == FULL
    assert len(read_events(tmp_path) or []) == 1


def test_R32_file_damaged_after_a_kill_is_survived_with_its_wal(tmp_path: Path) -> None:
    """Whether the WAL mends it or both are set aside: the fleet goes on, and the file is whole."""
    with writer(tmp_path):
        pass
    assert (tmp_path / f"{FILE}-wal").stat().st_size > 0
    no_database(tmp_path / FILE)
    with opened(tmp_path) as kept:
        kept.store.load()
        kept.store.save(FULL)
    assert sql(tmp_path / FILE, "PRAGMA integrity_check") == [("ok",)]
    assert SqliteStore(tmp_path).load() == FULL


def test_R32_damaged_wal_costs_its_own_commits(tmp_path: Path) -> None:
    """A torn write is what a WAL is for: what was committed before it is there."""
    file = saved(tmp_path)
    (tmp_path / f"{FILE}-wal").write_bytes(b"\xa5" * 5000)
    with opened(tmp_path) as kept:
        assert kept.store.load() == FULL
    assert file.exists()
    assert kept.said == []


def test_R32_last_three_damaged_files_are_kept(tmp_path: Path) -> None:
    """A disk that breaks files all the time is not filled with them."""
    for _ in range(5):
        no_database(saved(tmp_path))
        (tmp_path / f"{FILE}-wal").touch()
        with opened(tmp_path):
            pass
    kept = {f"{FILE}.corrupt-{number}{end}" for number in (3, 4, 5) for end in ("", "-wal")}
    assert {path.name for path in tmp_path.iterdir() if "corrupt" in path.name} == kept


def test_R32_folder_in_the_files_place_is_survived(tmp_path: Path) -> None:
    """What can't be opened is said once, and each write is one line's error."""
    (tmp_path / FILE).mkdir()
    with opened(tmp_path) as kept:
        assert kept.store.load() == Memory()
        with pytest.raises(StateFailed, match="can't be written: unable to open database file"):
            kept.store.save(FULL)
        assert kept.store.load() == FULL
    assert "going on without memory" in kept.said[0]


# -- a disk that takes nothing any more. The first argument is the folder of a disk of 400 KiB.

DISK = """
import dataclasses, json, os, subprocess, sys
from pathlib import Path
from reconciler.adapters.store import SqliteStore, read_events
from reconciler.errors import FleetError
from tests.unit.test_store import FULL, SUBMIT, Memory, Result
folder, told = Path(sys.argv[1]), {}
said = []
def attempt(what, do):
    try:
        told[what] = do()
    except FleetError as error:
        told[what] = str(error)
other = dataclasses.replace(FULL, misses={})
"""
FILL = """
def fill():
    with open(folder / "filler", "wb", buffering=0) as filler:
        try:
            while True:
                filler.write(bytes(4096))
        except OSError:
            pass
"""
RUNNING = """
store = SqliteStore(folder, said.append)
with store.locked():
    store.save(FULL)
    fill()
    attempt("intend", lambda: store.intend(1.0, SUBMIT))
    attempt("save", lambda: store.save(other))
    told["load"] = store.load() == other
    told["read"] = SqliteStore(folder).load() == FULL
    told["said"] = list(said)
    os.unlink(folder / "filler")
    attempt("mended", lambda: store.save(other))
    store.conclude(store.intend(2.0, SUBMIT), Result.DONE, "")
with SqliteStore(folder, said.append).locked():
    pass
told["after"] = SqliteStore(folder).load() == other
told["events"] = [event["result"] for event in read_events(folder)]
print(json.dumps(told))
"""
ONE_SHOT = """
store = SqliteStore(folder, said.append)
with store.locked():
    store.save(FULL)
stop()
store = SqliteStore(folder, said.append)
with store.locked():
    store.load()
    attempt("intend", lambda: store.intend(1.0, SUBMIT))
    attempt("save", lambda: store.save(other))
    told["load"] = store.load() == other
    told["said"] = list(said)
print(json.dumps(told))
"""


MENDED = """
def mount(how):
    subprocess.run(["mount", "-o", f"remount,{how}", folder], check=True)
os.chdir("/")
store = SqliteStore(folder, said.append)
if os.fork() == 0:
    with store.locked():
        store.save(FULL)
        os._exit(0)  # as a kill: the WAL stays, and with it the file can be opened read-only
os.wait()
mount("ro")
with store.locked():
    attempt("load", lambda: store.load() == FULL)
    attempt("save", lambda: store.save(other))
    mount("rw")
    attempt("mended", lambda: store.save(other))
told["after"] = SqliteStore(folder).load() == other
print(json.dumps(told))
"""


def on_a_small_disk(folder: Path, script: str) -> dict[str, Any]:
    """Run a script with a folder that is a disk of its own; return the JSON that it prints."""
    mount = 'mount -t tmpfs -o size=400k tmpfs "$1" && exec "$2" -c "$3" "$1"'
    argv = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh", str(folder)]
    done = subprocess.run(
        [*argv, sys.executable, script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def test_R32_disk_that_fills_up_is_reported_and_survived(tmp_path: Path) -> None:
    """Each write is one line; memory lives on in the process and is written when there is room."""
    told = on_a_small_disk(tmp_path, DISK + FILL + RUNNING)
    full = f"{tmp_path}/{FILE} can't be written: database or disk is full"
    assert told == {
        "intend": full,
        "save": full,
        "load": True,
        "read": True,
        "said": [],
        "mended": None,
        "after": True,
        "events": ["done"],
    }


@pytest.mark.parametrize(
    "stop",
    [
        FILL + "stop = fill\n",
        "def stop():\n    os.chdir('/')\n"
        "    subprocess.run(['mount', '-o', 'remount,ro', folder], check=True)\n",
    ],
    ids=["full", "read-only"],
)
def test_R32_disk_that_takes_nothing_at_the_start_is_reported_and_survived(
    stop: str, tmp_path: Path
) -> None:
    """The lock is held, and no error but StateFailed comes out."""
    told = on_a_small_disk(tmp_path, DISK + stop + ONE_SHOT)
    assert told["load"]
    for what in ("intend", "save"):
        assert told[what].startswith(f"{tmp_path}/{FILE} can't be written: ")
    assert any("going on without memory" in line for line in told["said"])


def test_R32_disk_that_was_read_only_for_a_while_is_written_again(tmp_path: Path) -> None:
    """The file is opened anew after an error: a file opened read-only would stay so."""
    told = on_a_small_disk(tmp_path, DISK + MENDED)
    assert "can't be written: " in told.pop("save")
    assert told.pop("load") in (True, False)
    assert told == {"mended": None, "after": True}


def test_R32_file_that_may_not_grow_is_reported_and_survived(tmp_path: Path) -> None:
    """A quota shows as an I/O error; what was committed stays."""
    saved(tmp_path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened(tmp_path) as kept:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
        try:
            with pytest.raises(StateFailed, match="can't be written: "):
                kept.store.intend(1.0, SUBMIT)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert kept.store.load() == FULL
        kept.store.intend(1.0, SUBMIT)


# -- versions


def test_R32_file_of_a_newer_program_is_refused(tmp_path: Path) -> None:
    """One line says what to do; nobody changes the file, nobody reads it wrongly."""
    sql(saved(tmp_path), "PRAGMA user_version = 99")
    data = (tmp_path / FILE).read_bytes()
    for use in (SqliteStore(tmp_path).locked().__enter__, SqliteStore(tmp_path).load):
        with pytest.raises(StateFailed) as caught:
            use()
        assert str(caught.value) == (
            f"{tmp_path}/{FILE} is of schema 99, this program knows 3: update it, or move the "
            "file away (timers start again)"
        )
    with pytest.raises(StateFailed, match="is of schema 99"):
        read_events(tmp_path)
    assert (tmp_path / FILE).read_bytes() == data


def test_older_file_is_migrated_and_keeps_what_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From this version to the next: in place, once; until then readers read the old one."""
    with opened(tmp_path) as kept:
        kept.store.save(FULL)
        kept.store.conclude(kept.store.intend(1.0, SUBMIT), Result.DONE, "job 7")
    step = ("ALTER TABLE journal ADD COLUMN took_s REAL", "UPDATE journal SET took_s = 0")
    monkeypatch.setattr(module, "_MIGRATIONS", (*module._MIGRATIONS, step))
    before = read_events(tmp_path)
    assert SqliteStore(tmp_path).load() == FULL
    for _ in range(2):
        with opened(tmp_path) as kept:
            assert kept.store.load() == FULL
    assert read_events(tmp_path) == before
    assert sql(tmp_path / FILE, "PRAGMA user_version") == [(4,)]
    assert sql(tmp_path / FILE, "SELECT took_s FROM journal") == [(0.0,)]


def test_migration_that_fails_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it or nothing; the fleet goes on without memory."""
    file = saved(tmp_path)
    step = ("ALTER TABLE journal ADD COLUMN took_s REAL", "INSERT INTO memory VALUES ('x', NULL)")
    with monkeypatch.context() as patched:
        patched.setattr(module, "_MIGRATIONS", (*module._MIGRATIONS, step))
        with opened(tmp_path) as kept, pytest.raises(StateFailed, match="NOT NULL"):
            kept.store.save(Memory())
        assert "going on without memory" in kept.said[0]
    assert sql(file, "PRAGMA user_version") == [(3,)]
    with opened(tmp_path) as kept:
        assert kept.store.load() == FULL
        kept.store.intend(1.0, SUBMIT)


# -- journal


def test_journal_tells_each_action_and_its_outcome(tmp_path: Path) -> None:
    """When, what, to whom, why, and how it ended; the oldest first."""
    outcomes: list[tuple[Action, Result, str]] = [
        (SUBMIT, Result.DONE, "job 7"),
        (ROUTE, Result.FAILED, "gateway a: broken"),
        (DRAIN, Result.DONE, ""),
        (CANCEL, Result.UNKNOWN, "timed out"),
    ]
    with opened(tmp_path) as kept:
        for at, (action, result, detail) in enumerate(outcomes):
            kept.store.conclude(kept.store.intend(100.5 + at, action), result, detail)
    told = read_events(tmp_path)
    assert told is not None
    assert [event["id"] for event in told] == [1, 2, 3, 4]
    assert [event["at"] for event in told] == [100.5, 101.5, 102.5, 103.5]
    assert [(e["kind"], e["subject"], e["job_id"], e["reason"]) for e in told] == [
        ("submit", str(NAME), None, "missing"),
        ("route", "a, b", None, ""),
        ("drain", str(NAME), 7, "surplus"),
        ("cancel", str(NAME), 7, "stale"),
    ]
    assert [(e["result"], e["detail"]) for e in told] == [(r, d) for _, r, d in outcomes]
    name = {"fleet": "demo", "model": "tiny", "revision": "0123abcd", "ordinal": 0}
    submit = {"kind": "submit", "name": name, "gpus": 1, "reason": "missing"}
    assert told[0]["action"].items() >= submit.items()
    assert read_events(tmp_path, 1) == told[3:]


def test_journal_of_a_route_does_not_grow_with_the_fleet(tmp_path: Path) -> None:
    """It keeps what changed: a thousand targets ten thousand times would be a gigabyte."""
    with opened(tmp_path) as kept:
        kept.store.intend(1.0, ROUTE)
    [event] = read_events(tmp_path) or []
    assert event["action"] == {
        "kind": "route",
        "gateways": ["a", "b"],
        "generation": "0" * 8,
        "added": ["7"],
        "removed": [],
        "trust": None,
        "exhausted": [],
        "external": [],
    }


def test_journal_is_not_there_before_the_first_run(tmp_path: Path) -> None:
    """None is not an empty journal, and looking makes no file."""
    assert read_events(tmp_path / "none") is None
    assert not (tmp_path / "none").exists()
    with opened(tmp_path):
        pass
    assert read_events(tmp_path) == []


def test_journal_keeps_the_last_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is for people, so it forgets; numbers are never used again."""
    assert module._JOURNAL_ROWS == 10_000
    monkeypatch.setattr(module, "_JOURNAL_ROWS", 5)
    for _ in range(2):
        with opened(tmp_path) as kept:
            for _ in range(6):
                kept.store.intend(1.0, DRAIN)
    rows = sql(tmp_path / FILE, "SELECT id FROM journal ORDER BY id")
    assert [number for (number,) in rows] == [8, 9, 10, 11, 12]


def test_journal_row_with_a_broken_action_is_shown_without_it(tmp_path: Path) -> None:
    """Bytes gone bad in one row don't hide the others."""
    with opened(tmp_path) as kept:
        kept.store.intend(1.0, DRAIN)
        kept.store.intend(2.0, DRAIN)
    bad = "UPDATE journal SET (action, detail) = (CAST(x'ff7b' AS TEXT), CAST(x'ff' AS TEXT))"
    sql(tmp_path / FILE, f"{bad} WHERE id = 1")
    first, second = read_events(tmp_path) or []
    assert first["action"] is None
    assert first["subject"] == str(NAME)
    assert second["action"]["kind"] == "drain"


def test_intent_is_synced_before_it_is_acted_on(tmp_path: Path) -> None:
    """WAL with a full sync: a committed intent survives the loss of power (sqlite.org/pragma)."""
    with opened(tmp_path) as kept:
        assert kept.store._db is not None
        assert kept.store._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert kept.store._db.execute("PRAGMA synchronous").fetchone() == (2,)


# Intends, says so, waits for a line, and goes on until it is killed. `sys.argv[2]` intents first.
WRITER = """
import os, sys
from pathlib import Path
from reconciler.adapters.store import SqliteStore
from tests.unit.test_store import SUBMIT, Result
store = SqliteStore(Path(sys.argv[1]))
with store.locked():
    store.conclude(store.intend(1.0, SUBMIT), Result.DONE, "job 7")
    store.intend(2.0, SUBMIT)
    print("intended", flush=True)
    for _ in sys.stdin:
        for at in range(300):
            store.conclude(store.intend(at, SUBMIT), Result.DONE, "")
        print("done", flush=True)
"""


@contextlib.contextmanager
def writer(folder: Path) -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, "-c", WRITER, str(folder)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "intended\n"
        try:
            yield other
        finally:
            other.kill()


def test_R05_kill_between_intent_and_outcome_leaves_the_intent(tmp_path: Path) -> None:
    """The next process, and everybody who looks, sees what may have happened."""
    with writer(tmp_path):
        pass
    with opened(tmp_path) as kept:
        kept.store.conclude(kept.store.intend(3.0, CANCEL), Result.FAILED, "no")
    assert [(e["at"], e["result"], e["detail"]) for e in read_events(tmp_path) or []] == [
        (1.0, "done", "job 7"),
        (2.0, "unknown", "no outcome was written"),
        (3.0, "failed", "no"),
    ]


def test_R34_readers_work_while_another_process_writes(tmp_path: Path) -> None:
    """`plan` and `events` read a whole state at any moment, and a second writer is refused."""
    with writer(tmp_path) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        with pytest.raises(LockHeld, match=f"process {other.pid} "), opened(tmp_path):
            pass
        other.stdin.write("\n")
        other.stdin.flush()
        seen = [0]
        while seen[-1] < 302:
            told = read_events(tmp_path) or []
            seen.append(len(told))
            assert all(event["result"] == "done" for event in told[2:-1])
            assert SqliteStore(tmp_path).load() == Memory()
        assert other.stdout.readline() == "done\n"
    assert seen == sorted(seen)
    assert len(set(seen)) > 3
