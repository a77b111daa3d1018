"""The gateways' log: what a line says, what lines add up to, and what follows from it."""

import json
import math
from typing import Any

import pytest

from reconciler.render import usage_text
from reconciler.state import Traffic, Usage
from reconciler.usage import (
    Tally,
    day_of,
    exhausted,
    midnight_after,
    report,
    tally,
    traffic,
)
from tests.unit.build import fleet

NOON = 1_772_366_400.0  # 2026-03-01 12:00 UTC


def line(**keys: Any) -> bytes:
    """One line of the log, as NGINX writes it."""
    record = {
        "at": NOON,
        "id": "0123456789abcdef0123456789abcdef",
        "tenant": "alice",
        "model": "tiny",
        "replica": "77",
        "upstream": "10.0.0.1:20000",
        "tries": "200",
        "path": "/v1/completions",
        "status": "200",
        "in": 200,
        "out": 900,
        "seconds": 1.5,
        "first_byte": 0.25,
        "finish": "length",
        "prompt_tokens": 10,
        "completion_tokens": 20,
        "pieces": 22,
        "error": "",
        **keys,
    }
    return json.dumps(record).encode() + b"\n"


def one(**keys: Any) -> Tally:
    """The sums of one line."""
    [sums] = tally(line(**keys)).days.values()
    return sums


def test_lines_add_up_by_day_tenant_and_model() -> None:
    """The UTC day of the line's own time counts."""
    late = NOON + 12 * 3600
    text = line() + line(at=late - 0.001) + line(at=late) + line(tenant="bob") + line(model="big")
    found = tally(text)
    assert {key: sums.requests for key, sums in found.days.items()} == {
        ("2026-03-01", "alice", "tiny"): 2,
        ("2026-03-02", "alice", "tiny"): 1,
        ("2026-03-01", "bob", "tiny"): 1,
        ("2026-03-01", "alice", "big"): 1,
    }
    sums = found.days["2026-03-01", "alice", "tiny"]
    assert (sums.prompt_tokens, sums.completion_tokens, sums.tokens) == (20, 40, 60)
    assert found.odd_lines == 0


@pytest.mark.parametrize(
    ("keys", "errors", "refused", "unfinished"),
    [
        ({}, 0, 0, 0),
        ({"status": "503", "error": "model_not_ready", "first_byte": None}, 1, 1, 0),
        ({"status": "503", "error": "", "finish": "whole"}, 1, 1, 0),
        ({"status": "502", "error": "", "finish": "whole"}, 1, 1, 0),
        ({"status": "429", "error": "insufficient_quota"}, 1, 0, 0),
        ({"status": "404", "error": "model_not_found", "model": ""}, 1, 0, 0),
        ({"status": "503", "error": "", "model": ""}, 1, 0, 0),
        ({"finish": "cut", "prompt_tokens": None, "completion_tokens": None}, 1, 0, 1),
        ({"finish": "error", "prompt_tokens": None, "completion_tokens": None}, 1, 0, 1),
        ({"finish": "abort"}, 1, 0, 0),
        ({"finish": "left", "prompt_tokens": None, "completion_tokens": None}, 0, 0, 1),
        ({"status": "499", "finish": "left", "prompt_tokens": None, "first_byte": None}, 0, 0, 0),
    ],
)
def test_what_counts_as_error_and_as_demand_without_a_replica(
    keys: dict[str, Any], errors: int, refused: int, unfinished: int
) -> None:
    """A client that leaves is no error of ours; what found no replica is demand."""
    sums = one(**keys)
    assert (sums.errors, sums.refused, sums.unfinished) == (errors, refused, unfinished)


def test_request_whose_end_nobody_saw_counts_by_its_pieces() -> None:
    """Nobody told its prompt, and that its replica died is not its caller's fault."""
    sums = one(finish="cut", prompt_tokens=None, completion_tokens=None)
    assert (sums.prompt_tokens, sums.completion_tokens) == (0, 22)


@pytest.mark.parametrize(
    ("keys", "tokens"),
    [
        ({"in": 4000}, 1022),
        ({"in": 4000, "first_byte": None, "pieces": 0, "status": "499"}, 1000),
        ({"in": 4000, "replica": "", "pieces": 0, "status": "499"}, 0),
        ({"in": 4000, "prompt_tokens": 10, "completion_tokens": 20}, 30),
    ],
    ids=["amid a stream", "before it began", "before a replica was asked", "after the end"],
)
def test_client_that_leaves_pays_for_its_prompt(keys: dict[str, Any], tokens: int) -> None:
    """A token for each four bytes, once a replica had it; what the engine told goes before."""
    unknown = {"prompt_tokens": None, "completion_tokens": None}
    assert one(**{"finish": "left", **unknown, **keys}).tokens == tokens


@pytest.mark.parametrize(
    "text",
    [
        *(b"", b"{", b"[]", b"null", b"1", b'"at"', b"\xff\xfe", b"\0", b"{}", b'{"at": 1}'),
        *(b"[" * 100_000, line(at="now"), line(at=float("nan")), line(at=1e300), line(at=True)),
        *(line(at=-1), line(tenant=None), line(tenant=["x"]), line(tenant="x" * 101)),
        *(line(tenant="\ud800"), line(model="a\nb"), line(status="2x0"), line(status=None)),
        *(line(prompt_tokens=-1), line(prompt_tokens=1.5), line(prompt_tokens="9")),
        *(line(prompt_tokens=10**13), line(completion_tokens=None), line(first_byte="x")),
        *(line(first_byte=float("inf")), line(first_byte=-1), line(prompt_tokens=True)),
    ],
)
def test_line_that_can_not_be_read_is_counted_and_spoils_no_other(text: bytes) -> None:
    """Never an error: whatever stands in a log, the lines around it count."""
    found = tally(line() + text.rstrip(b"\n") + b"\n" + line())
    assert sum(sums.requests for sums in found.days.values()) == 2
    assert found.odd_lines == (1 if text else 0)


def test_percentiles_are_within_9_percent() -> None:
    """From a millisecond to an hour; one bucket's middle stands for all of it."""
    for seconds in (0.0011, 0.003, 0.05, 0.25, 1.0, 7.7, 600.0, 3600.0):
        times = one(first_byte=seconds).percentiles()
        assert times is not None
        assert all(abs(time / seconds - 1) < 0.0906 for time in times)
    assert one(first_byte=0).percentiles() == (0.001, 0.001, 0.001)


def test_percentiles_of_many_are_those_of_their_ranks() -> None:
    """One of a hundred that takes long is the p99's and not the p95's."""
    slow = b"".join(line(first_byte=10.0) for _ in range(2))
    text = b"".join(line(first_byte=0.1) for _ in range(98)) + slow
    [sums] = tally(text).days.values()
    times = sums.percentiles()
    assert times is not None
    assert [round(math.log10(time)) for time in times] == [-1, -1, 1]
    assert Tally().percentiles() is None


def test_traffic_is_that_of_the_last_minutes() -> None:
    """What is older is forgotten; a model without a replica has its demand."""
    cold = line(model="cold", status="503", error="model_not_ready", first_byte=None)
    text = line(at=NOON - 240) + line(at=NOON - 301) + cold + line(status="404", model="")
    found = traffic(tally(text).minutes, NOON + 1)
    assert found["cold"] == Traffic(minutes=5, requests=1, errors=1, refused=1, first_byte_s=None)
    assert found["tiny"].requests == 1
    assert set(found) == {"cold", "tiny"}


def tenants(**limits: int | None) -> Any:
    keys = {name: [f"{at:064x}"] for at, name in enumerate(limits)}
    return fleet(
        tenants=[
            {"name": name, "key_sha256": keys[name], "tokens_per_day": limit}
            for name, limit in limits.items()
        ]
    )


@pytest.mark.parametrize(
    ("usage", "running", "expected"),
    [
        (Usage(tokens_today={"a": 9, "b": 10, "c": 99}, complete=True), (), ("b",)),
        (Usage(tokens_today={"a": 9}, complete=True), ("a", "b"), ()),
        (Usage(tokens_today={"a": 9}, complete=False), ("a", "gone", "c"), ("a",)),
        (Usage(tokens_today={"b": 11}, complete=False), (), ("b",)),
        (None, (), ()),
        (None, ("b", "c", "gone"), ("b",)),
        (Usage(tokens_today={}, complete=True), (), ("zero",)),
    ],
)
def test_unknown_usage_neither_blocks_nor_frees_a_tenant(
    usage: Usage | None, running: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    """Only what is counted blocks; only when all is counted is a tenant free again."""
    limits: dict[str, int | None] = {"a": 10, "b": 10, "c": None}
    if expected == ("zero",):
        limits["zero"] = 0
    assert exhausted(tenants(**limits), usage, running) == expected


def test_days_are_utc() -> None:
    """A day ends at midnight UTC, wherever this host is."""
    assert day_of(NOON) == "2026-03-01"
    assert midnight_after(NOON) == NOON + 12 * 3600
    assert day_of(midnight_after(NOON)) == "2026-03-02"
    assert midnight_after(midnight_after(NOON)) == NOON + 36 * 3600


def test_usage_text_is_as_reviewed() -> None:
    """A row for each day, tenant and model, and the sum."""
    text = (
        line() * 3 + line(tenant="bob", model="big", first_byte=2) + line(status="401", tenant="")
    )
    record = json.loads(json.dumps(report(tally(text).days)))
    assert usage_text(record) == (
        "DAY (UTC)   TENANT  MODEL  REQUESTS  ERRORS  PROMPT  COMPLETION  FIRST BYTE P50/P95/P99\n"
        "2026-03-01  -       tiny   1         1       10      20          -\n"
        "2026-03-01  alice   tiny   3         0       30      60          0.23 / 0.23 / 0.23 s\n"
        "2026-03-01  bob     big    1         0       10      20          1.9 / 1.9 / 1.9 s\n"
        "all                        5         1       50      100         0.23 / 1.9 / 1.9 s"
    )
    assert "Nothing is counted" in usage_text(report(tally(text).days, tenant="nobody"))
    [row] = report(tally(text).days, model="big")["rows"]
    assert (row["tenant"], row["requests"]) == ("bob", 1)
