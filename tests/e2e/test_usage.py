"""What tenants used, from the log of a real NGINX under load, while all around it changes."""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import httpx

from tests.e2e.checks import routed, running
from tests.lab.fleet import Fleet
from tests.lab.wait import wait_for

GATEWAY = "/var/lib/modelfleet/gateway"
KEYS = {"alice": "sk-alice", "bob": "sk-bob"}
PROMPT = "Once upon a time"  # the stand-in counts words
TOKENS = 20
BUDGET = 200


@dataclass
class Clients:
    """Requests of two tenants, streams and plain ones, and what each was answered."""

    url: str
    sent: Counter[str] = field(default_factory=Counter)
    ids: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    numbers: Iterator[int] = field(default_factory=count)

    @contextmanager
    def at_work(self, at_once: int = 6) -> Iterator[None]:
        """Send one request after the other from each of so many clients."""
        end = threading.Event()

        def work(at: int) -> None:
            with httpx.Client(timeout=60, trust_env=False) as client:
                while not end.is_set():
                    self.send(client, ("alice", "bob")[at % 2], stream=at % 3 == 0)

        with ThreadPoolExecutor(at_once) as pool:
            futures = [pool.submit(work, at) for at in range(at_once)]
            try:
                yield
            finally:
                end.set()
            for future in futures:
                future.result()

    def send(self, client: httpx.Client, tenant: str, *, stream: bool = False) -> int:
        """Send one request; return its status."""
        id = f"usage-{next(self.numbers)}"
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": TOKENS, "stream": stream}
        headers = {"Authorization": f"Bearer {KEYS[tenant]}", "X-Request-Id": id}
        answer = client.post(f"{self.url}/v1/completions", json=body, headers=headers)
        self.ids.append(id)
        if answer.status_code == 200 and '"finish_reason":"length"' in answer.text:
            self.sent[tenant] += 1
        else:
            self.failed.append(f"{id}: {answer.status_code} {answer.text[:300]}")
        return answer.status_code


def _with_tenants(fleet: Fleet, bob: str = "") -> None:
    hashes = {name: hashlib.sha256(key.encode()).hexdigest() for name, key in KEYS.items()}
    lines = [f"  - {{name: alice, key_sha256: [{hashes['alice']}]}}"]
    lines += [f"  - {{name: bob, key_sha256: [{hashes['bob']}]{bob}}}"]
    fleet.edit("\nmodels:\n", "\ntenants:\n" + "\n".join(lines) + "\nmodels:\n")


def _usage(fleet: Fleet) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(fleet.run("usage", "--days", "2", "--json"))
    return record


def _by_tenant(fleet: Fleet) -> dict[str, tuple[int, int, int]]:
    """Return requests, prompt and completion tokens of each tenant."""
    found: dict[str, tuple[int, int, int]] = {}
    for row in _usage(fleet)["rows"]:
        had = found.get(row["tenant"], (0, 0, 0))
        new = (row["requests"], row["prompt_tokens"], row["completion_tokens"])
        found[row["tenant"]] = (had[0] + new[0], had[1] + new[1], had[2] + new[2])
    return found


def _logged(fleet: Fleet) -> Counter[str]:
    """Return how often each request id stands in the gateway's logs, rotated ones too."""
    text = fleet.lab.run("gateway", ["sh", "-c", f"cat {GATEWAY}/access.log*"]).stdout
    return Counter(json.loads(line)["id"] for line in text.splitlines())


def _rotate(fleet: Fleet, number: int) -> None:
    """What logrotate does, to the letter: rename, then tell NGINX."""
    log, conf = f"{GATEWAY}/access.log", f"{GATEWAY}/current/nginx.conf"
    script = f"mv {log} {log}.{number} && /usr/sbin/nginx -s reopen -c {conf}"
    fleet.lab.run("gateway", ["sh", "-c", script])


def _wait_for_routes(fleet: Fleet, replicas: int) -> None:
    wait_for("the routes", lambda: len(routed(fleet)) == replicas, timeout_s=60)


def test_usage_is_what_clients_counted_over_reloads_rotations_and_kills(fleet: Fleet) -> None:
    """Each request stands in the log once and is counted once, whatever happens meanwhile."""
    _with_tenants(fleet)
    fleet.run("apply", "--wait", "--timeout", "90s")
    clients = Clients(fleet.url)
    with clients.at_work():
        for at, replicas in enumerate((3, 2, 3)):
            # Each ends with a kill -9 of the reconciler, amid whatever it does.
            with running(fleet):
                fleet.edit(f"replicas: {5 - replicas}", f"replicas: {replicas}")
                _wait_for_routes(fleet, replicas)
                _rotate(fleet, at)
    assert clients.failed == []
    expected = {
        tenant: (number, number * len(PROMPT.split()), number * TOKENS)
        for tenant, number in clients.sent.items()
    }
    with running(fleet):
        wait_for("all to be counted", lambda: _by_tenant(fleet) == expected, timeout_s=60)
    logged = _logged(fleet)
    assert {id: logged[id] for id in clients.ids} == dict.fromkeys(clients.ids, 1)
    assert sum(logged.values()) == len(clients.ids)
    total = _usage(fleet)["total"]
    assert (total["errors"], total["unfinished"]) == (0, 0)
    assert total["first_byte_s"]


def test_tenant_without_tokens_is_refused_until_midnight_and_others_are_served(
    fleet: Fleet,
) -> None:
    """Within about a cycle of the last token; what was spent beyond is what came in that time."""
    _with_tenants(fleet, bob=f", tokens_per_day: {BUDGET}")
    fleet.run("apply", "--wait", "--timeout", "90s")
    clients = Clients(fleet.url)
    with running(fleet), httpx.Client(timeout=60, trust_env=False) as client:
        wait_for(
            "bob to be refused",
            lambda: clients.send(client, "bob", stream=len(clients.ids) % 2 == 0) == 429,
            timeout_s=60,
        )
        assert "insufficient_quota" in clients.failed[0]
        each = len(PROMPT.split()) + TOKENS
        assert clients.sent["bob"] * each >= BUDGET
        assert clients.send(client, "alice") == 200
        assert "tenant bob" in fleet.run("plan")
        assert "the gateway answers it 429, until" in fleet.run("plan")
        fleet.edit(f"tokens_per_day: {BUDGET}", f"tokens_per_day: {BUDGET * 100}")
        wait_for("bob to be served", lambda: clients.send(client, "bob") == 200, timeout_s=60)


def test_demand_for_a_model_without_a_replica_is_seen(fleet: Fleet) -> None:
    """Requests that found nobody show in status and explain, although no engine tells of them."""
    _with_tenants(fleet)
    fleet.edit("replicas: 2", "replicas: 0")
    fleet.run("apply", "--wait", "--timeout", "90s")
    clients = Clients(fleet.url)
    with httpx.Client(timeout=60, trust_env=False) as client:
        assert [clients.send(client, "alice") for _ in range(3)] == [503] * 3
    with running(fleet):
        wait_for("them to be counted", lambda: _refused(fleet) == 3)
    assert "3 of them refused for want of a replica" in fleet.run("explain", "tiny")
    assert "REFUSED" in fleet.run("status")


def _refused(fleet: Fleet) -> int:
    [model] = fleet.status()["models"]
    return int((model["traffic"] or {"refused": 0})["refused"])
