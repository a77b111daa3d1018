"""The gateways' access log: lines in, sums out. Pure.

One line of JSON is one request (its fields: reconciler/gateway.conf). The sums of the parts of a
log, in any order, add up to those of the whole.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from reconciler.naming import REVISION
from reconciler.spec import Fleet
from reconciler.state import Traffic, Trial, Usage

# What a model's traffic is told of: short enough to follow a rush, long enough to count something.
WINDOW_MINUTES = 5
# What a trial is judged by: long enough for models that few ask.
TRIAL_MINUTES = 60
_DAY_S = 86400
# Bounds of the histogram of times to the first byte: each is this many times the one before.
_RATIO = 2 ** (1 / 4)
_FIRST_BOUND_S = 0.001
_BUCKETS = 88  # up to 3,800 s: longer than a replica may take to answer
# The answers of a gateway that found no replica, or none that took the request.
_NOT_READY = "model_not_ready"
_NO_REPLICA = frozenset({502, 503, 504})
# An answer of status 200 that failed all the same.
_FAILED = frozenset({"abort", "cut", "error"})
_TRIAL = re.compile(rf"(canary|rest)\.({REVISION})")
_LONGEST_WORD = 100  # of the spec's names and our codes
# Of a prompt in words; who sends an image as text pays too much if they leave.
_BYTES_OF_A_TOKEN = 4
_MOST = 10**12  # of anything in one request: a bad line must not overflow a sum


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """Sums over some requests. `first_bytes` counts times to the first byte by bucket."""

    requests: int = 0
    errors: int = 0  # answered with 400 or more, or begun and not ended whole by our side
    refused: int = 0  # of these: no replica was there to answer
    unfinished: int = 0  # whose tokens the engine had no time to tell; their pieces are counted
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_bytes: Mapping[int, int] = field(default_factory=dict)

    @classmethod
    def total(cls, parts: Sequence["Tally"]) -> "Tally":
        """Return the sums of some sums."""
        counts: dict[int, int] = {}
        for part in parts:
            for bucket, count in part.first_bytes.items():
                counts[bucket] = counts.get(bucket, 0) + count
        return cls(
            requests=sum(part.requests for part in parts),
            errors=sum(part.errors for part in parts),
            refused=sum(part.refused for part in parts),
            unfinished=sum(part.unfinished for part in parts),
            prompt_tokens=sum(part.prompt_tokens for part in parts),
            completion_tokens=sum(part.completion_tokens for part in parts),
            first_bytes=counts,
        )

    @property
    def tokens(self) -> int:
        """What counts against a tenant's budget."""
        return self.prompt_tokens + self.completion_tokens

    def percentiles(self) -> tuple[float, float, float] | None:
        """Return p50, p95 and p99 of the time to the first byte in seconds; None without any.

        Each is the geometric middle of its bucket: off by 9 % at most, from 1 ms to an hour.
        """
        if not self.first_bytes:
            return None
        p50, p95, p99 = (_percentile(self.first_bytes, share) for share in (0.5, 0.95, 0.99))
        return p50, p95, p99


DayKey = tuple[str, str, str]
"""(UTC day as 2026-11-30, tenant, model); what a request did not name is ""."""
MinuteKey = tuple[int, str]
"""(minutes since the epoch, model)."""
TrialKey = tuple[int, str, str, str]
"""(minutes since the epoch, model, its canary's revision, `canary` or `rest`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tallies:
    """What a part of a log adds up to. `odd_lines` could not be read."""

    days: Mapping[DayKey, Tally] = field(default_factory=dict)
    minutes: Mapping[MinuteKey, Tally] = field(default_factory=dict)
    trials: Mapping[TrialKey, Tally] = field(default_factory=dict)
    odd_lines: int = 0


@dataclass(frozen=True, slots=True)
class _Request:
    """One line, as far as it is counted."""

    at: float
    tenant: str
    model: str
    trial: re.Match[str] | None  # while a canary is tried: which side it was sent to
    retried: bool  # the first replica that was asked did not answer
    tally: Tally


def tally(lines: bytes) -> Tallies:
    """Return the sums of whole lines. What can't be read is counted, never an error."""
    days: dict[DayKey, list[Tally]] = {}
    minutes: dict[MinuteKey, list[Tally]] = {}
    trials: dict[TrialKey, list[Tally]] = {}
    odd_lines = 0
    for line in lines.split(b"\n"):
        if not line:
            continue
        request = _request(line)
        if request is None:
            odd_lines += 1
            continue
        day = (day_of(request.at), request.tenant, request.model)
        days.setdefault(day, []).append(request.tally)
        if request.model:
            minute = (int(request.at // 60), request.model)
            minutes.setdefault(minute, []).append(request.tally)
            if request.trial is not None:
                side, revision = request.trial.groups()
                failed = bool(request.tally.errors) or request.retried
                tried = replace(request.tally, errors=int(failed))
                trials.setdefault((*minute, revision, side), []).append(tried)
    return Tallies(
        days={key: Tally.total(parts) for key, parts in days.items()},
        minutes={key: Tally.total(parts) for key, parts in minutes.items()},
        trials={key: Tally.total(parts) for key, parts in trials.items()},
        odd_lines=odd_lines,
    )


def traffic(minutes: Mapping[MinuteKey, Tally], at: float) -> Mapping[str, Traffic]:
    """Return what each model was asked for in the last minutes before `at`."""
    first = first_minute(at)
    parts: dict[str, list[Tally]] = {}
    for (minute, model), part in minutes.items():
        if first <= minute:
            parts.setdefault(model, []).append(part)
    return {model: _traffic(of, WINDOW_MINUTES) for model, of in sorted(parts.items())}


def trials(minutes: Mapping[TrialKey, Tally], at: float) -> Mapping[str, Trial]:
    """Return what each canary, and the rest of its model, did in the last hour before `at`.

    Its keys are `model.revision`.
    """
    first = first_minute(at, TRIAL_MINUTES)
    sides: dict[str, dict[str, list[Tally]]] = {}
    for (minute, model, revision, side), part in minutes.items():
        if first <= minute:
            both = sides.setdefault(f"{model}.{revision}", {"canary": [], "rest": []})
            both[side].append(part)
    return {
        tried: Trial(**{side: _traffic(parts, TRIAL_MINUTES) for side, parts in both.items()})
        for tried, both in sorted(sides.items())
    }


def _traffic(parts: Sequence[Tally], minutes: int) -> Traffic:
    sums = Tally.total(parts)
    return Traffic(
        minutes=minutes,
        requests=sums.requests,
        errors=sums.errors,
        refused=sums.refused,
        first_byte_s=sums.percentiles(),
    )


def report(
    days: Mapping[DayKey, Tally], tenant: str | None = None, model: str | None = None
) -> Mapping[str, Any]:
    """Return what `fleet usage --json` prints: a row for each day, tenant and model, and their sum.

    With a `tenant` or `model` only its rows. Times to the first byte are in seconds.
    """
    chosen = {
        key: sums
        for key, sums in sorted(days.items())
        if tenant in (None, key[1]) and model in (None, key[2])
    }
    rows = [
        {"day": day, "tenant": who, "model": what, **_row(sums)}
        for (day, who, what), sums in chosen.items()
    ]
    return {"rows": rows, "total": _row(Tally.total([*chosen.values()]))}


def _row(sums: Tally) -> Mapping[str, Any]:
    times = sums.percentiles()
    return {
        "requests": sums.requests,
        "errors": sums.errors,
        "refused": sums.refused,
        "unfinished": sums.unfinished,
        "prompt_tokens": sums.prompt_tokens,
        "completion_tokens": sums.completion_tokens,
        "first_byte_s": None if times is None else [round(time, 4) for time in times],
    }


def exhausted(fleet: Fleet, usage: Usage | None, running: Iterable[str]) -> tuple[str, ...]:
    """Return the tenants whose tokens of today are spent, sorted.

    `running` are those that the gateways refuse now: while not all of today's requests are counted,
    it is not known that one of them has tokens left, so they stay; and nobody is added unseen.
    """
    limits = {
        tenant.name: tenant.tokens_per_day
        for tenant in fleet.tenants
        if tenant.tokens_per_day is not None
    }
    spent = usage.tokens_today if usage else {}
    over = {name for name, limit in limits.items() if spent.get(name, 0) >= limit}
    if usage is None or not usage.complete:
        over |= limits.keys() & set(running)
    return tuple(sorted(over))


def first_minute(at: float, minutes: int = WINDOW_MINUTES) -> int:
    """Return the first minute (since the epoch) of so many that end with that of `at`."""
    return int(at // 60) - minutes + 1


def day_of(at: float) -> str:
    """Return the UTC day of a time (epoch seconds), as 2026-11-30."""
    return _day(int(at // _DAY_S))


@lru_cache(maxsize=1000)
def _day(number: int) -> str:
    return str(datetime.fromtimestamp(number * _DAY_S, UTC).date())


def midnight_after(at: float) -> float:
    """Return when the UTC day of `at` ends (epoch seconds)."""
    return (at // _DAY_S + 1) * _DAY_S


def _request(line: bytes) -> _Request | None:
    """Return what a line says, or None if it is not one of ours."""
    try:
        # A path may hold any byte, and a request that came by it counts all the same.
        record = json.loads(line.decode(errors="replace"))
        at = record["at"]
        if isinstance(at, bool) or not 0 <= at < 1e11:
            return None
        return _Request(
            float(at),
            _word(record, "tenant"),
            _word(record, "model"),
            _TRIAL.fullmatch(_word({"trial": "", **record}, "trial")),
            "," in _word(record, "tries") or ":" in _word(record, "tries"),
            _counted(record),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _counted(record: Mapping[str, Any]) -> Tally:
    status = int(record["status"])
    model, finish, error = (_word(record, name) for name in ("model", "finish", "error"))
    refused = bool(model) and (error == _NOT_READY or status in _NO_REPLICA)
    told = record["prompt_tokens"] is not None
    # The engine was at work on it, and leaving must not make that free.
    left = finish == "left" and _word(record, "replica") != "" and not told
    guessed = _count(record["in"]) // _BYTES_OF_A_TOKEN if left else 0
    first_byte = record["first_byte"]
    answered = status == 200 and first_byte is not None
    return Tally(
        requests=1,
        # 499 is a client that left; nobody failed.
        errors=int((status >= 400 and status != 499) or finish in _FAILED),
        refused=int(refused),
        unfinished=int(answered and not told),
        prompt_tokens=_count(record["prompt_tokens"]) if told else guessed,
        completion_tokens=_count(record["completion_tokens"] if told else record["pieces"]),
        first_bytes={_bucket(first_byte): 1} if answered else {},
    )


def _word(record: Mapping[str, Any], name: str) -> str:
    value = record[name]
    if not isinstance(value, str) or len(value) > _LONGEST_WORD or not value.isprintable():
        raise ValueError(f"not a word: {name}")
    return value


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MOST:
        raise ValueError(f"not a count: {value!r}")
    return value


def _bucket(seconds: object) -> int:
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < 1e9:
        raise ValueError(f"not a time: {seconds!r}")
    if seconds <= _FIRST_BOUND_S:
        return 0
    return min(_BUCKETS, math.ceil(math.log(seconds / _FIRST_BOUND_S, _RATIO)))


def _percentile(counts: Mapping[int, int], share: float) -> float:
    rank = math.ceil(share * sum(counts.values()))
    for bucket in sorted(counts):
        rank -= counts[bucket]
        if rank <= 0:
            break
    middle: float = _RATIO ** (bucket - 0.5 if bucket else 0)
    return _FIRST_BOUND_S * middle
