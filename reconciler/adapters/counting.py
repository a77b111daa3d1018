"""What the gateways' logs add up to, in SQLite; called by the store, within its transactions.

A row for each day, tenant and model, one for each minute and model, and one for each minute and
side of a canary's trial.
"""

import json
import sqlite3
from collections.abc import Mapping

from reconciler.state import Traffic, Trial, Usage
from reconciler.usage import (
    TRIAL_MINUTES,
    DayKey,
    Tallies,
    Tally,
    day_of,
    first_minute,
    traffic,
    trials,
)

# More than a year, so that a month can be compared with that of the year before.
_DAYS_KEPT = 400
_MINUTES_KEPT = 60
_SUMS = ("requests", "errors", "refused", "unfinished", "prompt_tokens", "completion_tokens")
Counted = tuple[Usage, Mapping[str, Traffic] | None, Mapping[str, Trial]]
NOTHING: Counted = (Usage(tokens_today={}, complete=False), None, {})
_KEYS = {
    "day": ("day", "tenant", "model"),
    "minute": ("minute", "model"),
    "trial": ("minute", "model", "revision", "side"),
}


def add(db: sqlite3.Connection, tallies: Tallies) -> None:
    """Add these sums to what is there, and forget what is too old to be asked for."""
    for day, sums in tallies.days.items():
        _add(db, "day", day, sums)
    for minute, sums in tallies.minutes.items():
        _add(db, "minute", minute, sums)
    for trial, sums in tallies.trials.items():
        _add(db, "trial", trial, sums)
    db.execute("DELETE FROM day WHERE day < date('now', ?)", (f"-{_DAYS_KEPT} days",))
    now = "CAST(strftime('%s', 'now') AS INTEGER) / 60"
    for table in ("minute", "trial"):
        db.execute(f"DELETE FROM {table} WHERE minute < {now} - ?", (_MINUTES_KEPT,))  # noqa: S608


def usage(db: sqlite3.Connection, at: float, gateways: frozenset[str]) -> Counted:
    """Return today's tokens by tenant, each model's traffic and each trial, as of the time `at`."""
    if not _exists(db):
        return NOTHING
    read = dict(db.execute("SELECT gateway, ended FROM log_read"))
    if not read:
        return NOTHING
    spent = db.execute(
        "SELECT tenant, sum(prompt_tokens + completion_tokens) FROM day WHERE day = ?"
        " GROUP BY tenant",
        (day_of(at),),
    )
    tokens = {str(tenant): int(count) for tenant, count in spent if tenant}
    rows = _select(db, "minute", "minute >= ?", (first_minute(at),))
    minutes = {(int(minute), str(model)): tally for (minute, model), tally in rows.items()}
    since = first_minute(at, TRIAL_MINUTES)
    rows = _select(db, "trial", "minute >= ?", (since,)) if _exists(db, "trial") else {}
    tried = {
        (int(minute), str(model), str(revision), str(side)): tally
        for (minute, model, revision, side), tally in rows.items()
    }
    known = Usage(tokens_today=tokens, complete=all(read.get(name) for name in gateways))
    return known, traffic(minutes, at), trials(tried, at)


def days(db: sqlite3.Connection, first: str, last: str) -> Mapping[DayKey, Tally]:
    """Return the sums of the days from `first` to `last`."""
    rows = _select(db, "day", "day BETWEEN ? AND ?", (first, last)) if _exists(db) else {}
    return {
        (str(day), str(tenant), str(model)): sums for (day, tenant, model), sums in rows.items()
    }


def _exists(db: sqlite3.Connection, table: str = "log_read") -> bool:
    """Whether a table is there; a file of an earlier version is migrated by who writes."""
    return bool(db.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (table,)).fetchone())


def _add(db: sqlite3.Connection, table: str, key: tuple[str | int, ...], tally: Tally) -> None:
    where = " AND ".join(f"{name} = ?" for name in _KEYS[table])
    sums = Tally.total([tally, *_select(db, table, where, key).values()])
    row = (*key, *(getattr(sums, name) for name in _SUMS), json.dumps(sums.first_bytes))
    marks = ", ".join("?" * len(row))
    db.execute(f"INSERT OR REPLACE INTO {table} VALUES ({marks})", row)  # noqa: S608


def _select(
    db: sqlite3.Connection, table: str, where: str, values: tuple[str | int, ...]
) -> Mapping[tuple[str | int, ...], Tally]:
    keys = _KEYS[table]
    columns = ", ".join((*keys, *_SUMS, "first_bytes"))
    rows = db.execute(f"SELECT {columns} FROM {table} WHERE {where}", values)  # noqa: S608
    sums = ((row[: len(keys)], _tally(row[len(keys) :])) for row in rows)
    return {key: tally for key, tally in sums if tally is not None}


def _tally(row: tuple[int | str, ...]) -> Tally | None:
    """Return a row's sums; one that is damaged is as if it were not there."""
    *sums, counts = row
    try:
        first_bytes = {int(bucket): int(count) for bucket, count in json.loads(str(counts)).items()}
        return Tally(first_bytes=first_bytes, **dict(zip(_SUMS, map(int, sums), strict=True)))
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
