"""Memory and journal in a SQLite file of this host.

Losing or breaking the file restarts timers and nothing else: Slurm holds every fact that matters.
Only the holder of the fleet's lock writes; everybody else reads, also while it is held.
"""

import functools
import json
import re
import sqlite3
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from reconciler.adapters import counting
from reconciler.adapters.lock import locked
from reconciler.adapters.ports import LogPart, Result
from reconciler.errors import StateFailed
from reconciler.plan import Action, Route, Submit
from reconciler.state import Memory
from reconciler.usage import DayKey, Tallies, Tally

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], T]

FILE = "state.sqlite"
# The statements that lead from each version of the schema to the next; a file's version is how many
# of them it has seen. Never change one that was released: append.
_MIGRATIONS: Sequence[Sequence[str]] = (
    (
        "CREATE TABLE memory (field TEXT PRIMARY KEY, value TEXT NOT NULL)",
        "CREATE TABLE journal (id INTEGER PRIMARY KEY, at REAL NOT NULL, kind TEXT NOT NULL,"
        " subject TEXT NOT NULL, job_id INTEGER, reason TEXT NOT NULL, action TEXT NOT NULL,"
        " result TEXT, detail TEXT)",
    ),
    (
        "CREATE TABLE log_read (gateway TEXT PRIMARY KEY, position TEXT NOT NULL,"
        " ended INTEGER NOT NULL)",
        "CREATE TABLE day (day TEXT, tenant TEXT, model TEXT, requests INTEGER, errors INTEGER,"
        " refused INTEGER, unfinished INTEGER, prompt_tokens INTEGER, completion_tokens INTEGER,"
        " first_bytes TEXT, PRIMARY KEY (day, tenant, model)) WITHOUT ROWID",
        "CREATE TABLE minute (minute INTEGER, model TEXT, requests INTEGER, errors INTEGER,"
        " refused INTEGER, unfinished INTEGER, prompt_tokens INTEGER, completion_tokens INTEGER,"
        " first_bytes TEXT, PRIMARY KEY (minute, model)) WITHOUT ROWID",
    ),
    (
        "CREATE TABLE trial (minute INTEGER, model TEXT, revision TEXT, side TEXT,"
        " requests INTEGER, errors INTEGER, refused INTEGER, unfinished INTEGER,"
        " prompt_tokens INTEGER, completion_tokens INTEGER, first_bytes TEXT,"
        " PRIMARY KEY (minute, model, revision, side)) WITHOUT ROWID",
    ),
)
_COLUMNS = ("id", "at", "kind", "subject", "job_id", "reason", "action", "result", "detail")
# Weeks of a busy fleet, and a few megabytes.
_JOURNAL_ROWS = 10_000
# Readers never block the one writer in WAL; only a recovery after a crash does, and it is short.
_BUSY_S = 5.0
_CORRUPT_KEPT = 3
# The file is no database, its pages don't fit together, or its tables are not of its version.
_DAMAGE = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR})

_ACTION: TypeAdapter[Action] = TypeAdapter(Action)


class SqliteStore:
    """The adapter for one fleet's state folder. `say` gets one line for each thing that is lost."""

    def __init__(self, folder: Path, say: Callable[[str], None] = lambda _: None) -> None:
        self._folder = folder
        self._file = folder / FILE
        self._say = say
        self._locked = False
        self._db: sqlite3.Connection | None = None
        self._inode: object = None  # of the open file
        self._rows: dict[str, str] = {}  # memory as the open file is known to have it
        self._unsaved: Memory | None = None

    def load(self) -> Memory:
        if self._unsaved is not None:
            # A full disk must not stop the clocks of a process that runs on.
            return self._unsaved
        try:
            rows = self._do(_memory_rows) if self._locked else _read(self._file, _memory_rows)
        except sqlite3.Error as error:
            self._say(f"{self._file} can't be read, so timers start again: {error}")
            rows = None
        self._rows = rows or {}
        return _memory(self._rows, self._say)

    def save(self, memory: Memory) -> None:
        rows = {name: field.dump(getattr(memory, name)) for name, field in _fields().items()}

        def work(db: sqlite3.Connection) -> None:
            # What did not change is not written: a quiet cycle costs no sync.
            changed = [item for item in rows.items() if self._rows.get(item[0]) != item[1]]
            db.executemany("INSERT OR REPLACE INTO memory VALUES (?, ?)", changed)

        self._unsaved = memory
        self._write(work)
        self._unsaved = None
        self._rows |= rows

    def intend(self, at: float, action: Action) -> int:
        row = (at, action.kind, *_about(action), _action_json(action))

        def work(db: sqlite3.Connection) -> int:
            added = db.execute(
                "INSERT INTO journal (at, kind, subject, job_id, reason, action)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                row,
            )
            number = added.lastrowid or 0
            db.execute("DELETE FROM journal WHERE id <= ?", (number - _JOURNAL_ROWS,))
            return number

        return self._write(work)

    def conclude(self, intent: int, result: Result, detail: str) -> None:
        values = (result, detail, intent)
        self._write(
            lambda db: db.execute("UPDATE journal SET result = ?, detail = ? WHERE id = ?", values)
        )

    def log_positions(self) -> Mapping[str, str]:
        return dict(self._write(lambda db: [*db.execute("SELECT gateway, position FROM log_read")]))

    def count(self, gateway: str, part: LogPart, tallies: Tallies) -> None:
        def work(db: sqlite3.Connection) -> None:
            # Once ended it stays so: what was not counted yet is then a cycle's requests.
            db.execute(
                "INSERT INTO log_read VALUES (?, ?, ?) ON CONFLICT (gateway) DO UPDATE"
                " SET position = excluded.position, ended = max(ended, excluded.ended)",
                (gateway, part.position, part.ended),
            )
            counting.add(db, tallies)

        self._write(work)

    def usage(self, at: float, gateways: frozenset[str]) -> counting.Counted:
        def work(db: sqlite3.Connection) -> counting.Counted:
            return counting.usage(db, at, gateways)

        if self._locked:
            return self._write(work)
        try:
            return _read(self._file, work) or counting.NOTHING
        except sqlite3.Error as error:
            raise StateFailed(f"{self._file} can't be read: {error}") from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        with locked(self._folder, self._say):
            self._locked = True
            try:
                self._check()
                yield
            finally:
                self._close()
                self._locked = False

    def _check(self) -> None:
        """Open the file now, so that a newer one is refused before anything is done."""
        try:
            self._do(lambda _: None)
        except sqlite3.Error as error:
            self._say(f"{self._file} can't be used; going on without memory: {error}")

    def _write(self, work: Work[T]) -> T:
        try:
            return self._do(work)
        except sqlite3.Error as error:
            raise StateFailed(f"{self._file} can't be written: {error}") from error

    def _do(self, work: Work[T]) -> T:
        """Do one transaction; a damaged file is set aside and a fresh one used. Raises Error."""
        if not self._locked:
            raise RuntimeError("only the holder of the lock writes")
        try:
            return self._transact(work)
        except sqlite3.DatabaseError as error:
            if not _is_damage(error):
                raise
            self._set_aside(error)
        return self._transact(work)

    def _transact(self, work: Work[T]) -> T:
        try:
            with self._connection() as db:
                db.execute("BEGIN")  # deferred: to load must not wait for anybody who writes
                return work(db)
        except sqlite3.Error:
            self._close()  # it is opened anew at the next use: the disk may be mended by then
            raise

    def _connection(self) -> sqlite3.Connection:
        if self._db is not None and self._inode != _inode(self._file):
            self._close()  # somebody moved the file away: nothing more goes there
        if self._db is None:
            self._db = _open(self._file)
            self._inode = _inode(self._file)
            self._rows = {}
        return self._db

    def _set_aside(self, error: sqlite3.Error) -> None:
        try:
            aside = _set_aside(self._file)
        except OSError:
            raise error from None  # the disk is read-only as well
        self._say(f"{self._file} is damaged ({error}): kept as {aside.name}; timers start again")

    def _close(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None


def read_events(folder: Path, last: int | None = None) -> list[dict[str, Any]] | None:
    """Return the journal's last rows, the oldest first, as records; None if there is none yet.

    Reads only, so it needs no lock. Raises StateFailed.
    """
    limit = _JOURNAL_ROWS if last is None else last

    def work(db: sqlite3.Connection) -> list[dict[str, Any]]:
        columns = ", ".join(_COLUMNS)
        rows = db.execute(f"SELECT {columns} FROM journal ORDER BY id DESC LIMIT ?", (limit,))  # noqa: S608
        return [_event(dict(zip(_COLUMNS, row, strict=True))) for row in rows][::-1]

    try:
        return _read(folder / FILE, work)
    except sqlite3.Error as error:
        raise StateFailed(f"{folder / FILE} can't be read: {error}") from error


def read_days(folder: Path, first: str, last: str) -> Mapping[DayKey, Tally] | None:
    """Return what is counted of the days from `first` to `last`; None if nothing ever was.

    Reads only, so it needs no lock. Raises StateFailed.
    """
    try:
        return _read(folder / FILE, lambda db: counting.days(db, first, last))
    except sqlite3.Error as error:
        raise StateFailed(f"{folder / FILE} can't be read: {error}") from error


def _event(row: dict[str, Any]) -> dict[str, Any]:
    if row["result"] is None:
        # Its process ended between intent and outcome, or it is being done right now.
        row |= {"result": str(Result.UNKNOWN), "detail": "no outcome was written"}
    try:
        action = json.loads(row["action"])
    except ValueError:
        action = None
    return row | {"action": action if isinstance(action, dict) else None}


# -- the file


def _open(file: Path) -> sqlite3.Connection:
    """Open the file for writing, made or migrated as needed. Raises StateFailed if it is newer."""
    db = sqlite3.connect(file, timeout=_BUSY_S, isolation_level=None)
    try:
        db.text_factory = _text
        version = _version(db, file)
        db.execute("PRAGMA journal_mode = WAL")
        # In WAL a commit is synced with FULL only; an intent must survive the loss of power.
        db.execute("PRAGMA synchronous = FULL")
        _migrate(db, version)
    except BaseException:
        db.close()
        raise
    return db


def _inode(file: Path) -> object:
    """Return what tells this file from another of its name; None if there is none."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _read(file: Path, work: Work[T]) -> T | None:
    """Do `work` on a read-only connection; None when there is no database yet."""
    if not file.exists():
        return None
    uri = f"{file.absolute().as_uri()}?mode=ro"
    with closing(sqlite3.connect(uri, uri=True, timeout=_BUSY_S, isolation_level=None)) as db:
        db.text_factory = _text
        return work(db) if _version(db, file) else None


def _text(data: bytes) -> str:
    """Decode what the file holds; a damaged byte spoils its row and not the reading."""
    return data.decode(errors="replace")


def _version(db: sqlite3.Connection, file: Path) -> int:
    """Return the schema's version, 0 for an empty file. Raises StateFailed if it is too new."""
    version = int(db.execute("PRAGMA user_version").fetchone()[0])
    if version > len(_MIGRATIONS):
        raise StateFailed(
            f"{file} is of schema {version}, this program knows {len(_MIGRATIONS)}: update it, "
            "or move the file away (timers start again)"
        )
    return version


def _migrate(db: sqlite3.Connection, version: int) -> None:
    """Bring the schema to the newest version, all or nothing."""
    if version == len(_MIGRATIONS):
        return
    with db:
        db.execute("BEGIN IMMEDIATE")
        for statement in (s for step in _MIGRATIONS[version:] for s in step):
            db.execute(statement)
        db.execute(f"PRAGMA user_version = {len(_MIGRATIONS)}")


def _is_damage(error: sqlite3.Error) -> bool:
    # The low byte is the kind; the rest tells where it was met.
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGE


def _set_aside(file: Path) -> Path:
    """Move a damaged file and what SQLite keeps beside it away; keep the last few. Raises OSError.

    Its WAL must go along: it would be played back into the fresh file.
    """
    kept = _corrupt(file)
    number = max(kept, default=0) + 1
    aside = file.with_name(f"{file.name}.corrupt-{number}")
    for suffix in ("-wal", "-shm", ""):
        part = file.with_name(file.name + suffix)
        if part.exists():
            part.rename(aside.with_name(aside.name + suffix))
    for old in sorted(kept)[: len(kept) + 1 - _CORRUPT_KEPT]:
        for path in kept[old]:
            path.unlink(missing_ok=True)
    return aside


def _corrupt(file: Path) -> Mapping[int, Sequence[Path]]:
    """Return the files set aside, by number."""
    found: dict[int, list[Path]] = {}
    for path in file.parent.iterdir():
        match = re.fullmatch(re.escape(file.name) + r"\.corrupt-([0-9]+)(-wal|-shm)?", path.name)
        if match is not None:
            found.setdefault(int(match[1]), []).append(path)
    return found


# -- memory: a row of JSON for each field


@dataclass(frozen=True, slots=True)
class _Field:
    """How one field of Memory becomes text. JSON's keys are texts, so other keys go into pairs."""

    adapter: TypeAdapter[Any]
    pairs: bool

    def dump(self, value: Any) -> str:
        return self.adapter.dump_json([*value.items()] if self.pairs else value).decode()

    def load(self, text: str) -> Any:
        """Return the value. Raises ValidationError."""
        value = self.adapter.validate_json(text)
        return dict(value) if self.pairs else value


@functools.cache
def _fields() -> Mapping[str, _Field]:
    hints = typing.get_type_hints(Memory)
    return {field.name: _field(hints[field.name]) for field in fields(Memory)}


def _field(hint: Any) -> _Field:
    if typing.get_origin(hint) is Mapping and typing.get_args(hint)[0] is not str:
        key, value = typing.get_args(hint)
        return _Field(TypeAdapter(list[tuple[key, value]]), pairs=True)  # type: ignore[valid-type]
    return _Field(TypeAdapter(hint), pairs=False)


def _memory_rows(db: sqlite3.Connection) -> dict[str, str]:
    return dict(db.execute("SELECT field, value FROM memory"))


def _memory(rows: Mapping[str, str], say: Callable[[str], None]) -> Memory:
    """Return the memory of these rows; one that can't be read is as if it were not there."""
    known: dict[str, Any] = {}
    for name, field in _fields().items():
        if name not in rows:
            continue
        try:
            known[name] = field.load(rows[name])
        except ValidationError:
            say(f'what memory holds of "{name}" can\'t be read: it starts again')
    return Memory(**known)


# -- journal


def _about(action: Action) -> tuple[str, int | None, str]:
    """Return what an action is done to: its subject, its job's id if it has one; and its reason."""
    match action:
        case Submit():
            return str(action.name), None, action.reason
        case Route():
            return ", ".join(action.gateways), None, ""
        case _:
            return str(action.job.name), action.job.id, action.reason


def _action_json(action: Action) -> str:
    # Not all targets: with a thousand replicas they would be a hundred kilobytes each time, and
    # what was added and removed tells the story.
    left_out = {"targets"} if isinstance(action, Route) else None
    return _ACTION.dump_json(action, exclude=left_out).decode()
