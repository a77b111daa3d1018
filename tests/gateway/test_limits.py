"""No tenant gets more than it may, whatever it sends at once; and nobody else gets less."""

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import islice
from typing import Any

import pytest

from tests.gateway.front import CHAT, KEYS, Answer, Front, digest, tenants

BIG = {"model": "big"}
# Requests a second and the burst above of five tenants that send at once.
RATES = {"a": (5.0, 0), "b": (5.0, 10), "c": (40.0, None), "d": (0.5, 3), "e": (None, None)}
EACH = 60


def limited(name: str) -> dict[str, Any]:
    rate, burst = RATES[name]
    limits = {"requests_per_second": rate, "burst": burst}
    return {"name": name, "key_sha256": [digest(name)], **limits}


def ask(front: Front, key: str) -> Answer:
    return front.ask("POST", CHAT, BIG, key=key)


def test_no_tenant_is_over_its_rate_by_more_than_its_burst(front: Front) -> None:
    """Counted by all workers together, for each tenant alone, while all of them send at once."""
    front.change(tenants=[limited(name) for name in RATES])
    began = time.monotonic()
    with ThreadPoolExecutor(max_workers=20) as pool:
        asked = [(name, pool.submit(ask, front, name)) for _ in range(EACH) for name in RATES]
        answers = [(name, future.result()) for name, future in asked]
    seconds = time.monotonic() - began
    passed = Counter(name for name, answer in answers if answer.status == 200)
    for name, (rate, burst) in RATES.items():
        if rate is None:
            assert passed[name] == EACH
        else:
            above = rate if burst is None else burst
            assert 1 <= passed[name] <= rate * seconds + above + 1, (name, seconds)
    assert passed["b"] > 10  # its burst, at once
    for _, answer in answers:
        assert answer.status in (200, 429)
        if answer.status == 429:
            assert (answer.code, answer.headers["Retry-After"]) == ("rate_limit_exceeded", "1")


def test_tenant_has_no_more_requests_at_once_than_it_may(front: Front) -> None:
    """Three are held by the replicas, all others are refused meanwhile; another tenant's pass."""
    front.change(tenants=tenants(alice={"concurrency": 3}))
    del front.replicas.got[:]
    front.replicas.gate.clear()
    with ThreadPoolExecutor(max_workers=20) as pool:
        try:
            mine = [pool.submit(ask, front, KEYS["alice"]) for _ in range(12)]
            first = [future.result() for future in islice(as_completed(mine), 9)]
            others = [pool.submit(ask, front, KEYS["bob"]) for _ in range(4)]
        finally:
            front.replicas.gate.set()
        assert {(answer.status, answer.code) for answer in first} == {(429, "rate_limit_exceeded")}
        assert [future.result().status for future in others] == [200] * 4
        assert sorted(future.result().status for future in mine) == [200] * 3 + [429] * 9
    assert len(front.replicas.got) == 7
    assert ask(front, KEYS["alice"]).status == 200


def test_limit_changes_with_a_reload(front: Front) -> None:
    """No restart for another rate, burst or concurrency, and none for taking them away."""
    for limits in (
        {"requests_per_second": 1, "burst": 0},
        {"requests_per_second": 1, "burst": 5, "concurrency": 2},
        {"requests_per_second": 7, "concurrency": 3},
        {},
    ):
        front.change(tenants=tenants(alice=limits))
        assert ask(front, KEYS["alice"]).status in (200, 429)
    assert ask(front, KEYS["alice"]).status == 200


@pytest.mark.parametrize("many", [500])
def test_many_tenants_raise_no_warning(front: Front, many: int) -> None:
    """Of long names and each with limits of its own kind: NGINX has nothing to say about it."""
    records = [
        {
            "name": f"{'a' * 30}-{at}",
            "key_sha256": [digest(str(at))],
            "requests_per_second": 1 + at % 20,
            "concurrency": 1 + at % 20,
        }
        for at in range(many)
    ]
    front.change(tenants=records)
    assert "[warn]" not in front.nginx.check()
    assert ask(front, str(many - 1)).status == 200
