"""Changes under constant load at two gateways: no request fails, none is cut short.

The load never pauses and never tries twice: the official client, another and a raw one, streams and
plain requests, bodies that take seconds to arrive. How each request ended is told by the engine's
own word and the end of the stream, not by the status alone.
"""

import hashlib
import os
from collections.abc import Iterator

import pytest

from tests.e2e.checks import (
    assert_settled,
    live,
    lost,
    mixed,
    reconfigure,
    routed,
    running,
    under,
    under_load,
)
from tests.lab import Lab
from tests.lab.fleet import Fleet, gateway_log
from tests.lab.load import Client
from tests.lab.wait import wait_for

BASE = "/var/lib/modelfleet/gateway/base.conf"
RELOADS = 200 if os.environ.get("SOAK") else 12


@pytest.fixture
def served() -> Iterator[Fleet]:
    """Two replicas, ready and routed by two gateways."""
    with Lab.start(f"gateways-{os.getpid()}", gateways=2) as lab:
        fleet = Fleet(lab)
        fleet.run("apply", "--wait", "--timeout", "90s")
        yield fleet


def _generations(fleet: Fleet) -> list[str]:
    """Return what each gateway says it runs."""
    ask = ["curl", "-s", "http://127.0.0.1:8091/generation"]
    return [fleet.lab.run(gateway, ask).stdout for gateway in fleet.lab.gateways]


def _wait_until_routed(fleet: Fleet, replicas: int, without: set[str]) -> None:
    """Wait until so many replicas are routed and none of `without` is still a job."""
    wait_for(
        f"{replicas} replicas, none of {sorted(without)}",
        lambda: len(routed(fleet)) == replicas and without.isdisjoint(live(fleet)),
        timeout_s=90,
    )


def test_planned_changes_under_constant_load_lose_no_request(served: Fleet) -> None:
    """Up, a rolling update that a refused configuration stops and a kill interrupts, and down."""

    def up() -> None:
        served.edit("replicas: 2", "replicas: 3")
        _wait_until_routed(served, 3, set())

    def begin_an_update_that_one_gateway_refuses() -> None:
        served.lab.run("gateway2", ["sed", "-i", "s/^http {/http { nonsense;/", BASE])
        served.edit("max-num-seqs: 16", "max-num-seqs: 32")
        refused = 'unknown directive "nonsense"'
        wait_for("the refusal", lambda: refused in served.run("events"), timeout_s=60)
        assert len(set(_generations(served))) == 2

    def changes() -> None:
        with running(served):
            up()
            before = set(routed(served))
            begin_an_update_that_one_gateway_refuses()
        # Killed (9) as the block ended. Nothing that gateway2 still routes to was told to end.
        assert before <= set(live(served))
        served.lab.run("gateway2", ["sed", "-i", "s/http { nonsense;/http {/", BASE])
        with running(served):
            _wait_until_routed(served, 3, before)
            served.edit("replicas: 3", "replicas: 2")
            assert_settled(served, replicas=2)

    requests = under_load(served, changes)
    assert lost(requests) == []
    assert len(set(_generations(served))) == 1


@pytest.mark.soak
def test_an_unreachable_gateway_holds_back_drains_and_nothing_else(served: Fleet) -> None:
    """The other one changes and serves on; status names the one; it catches up when it is back."""
    before = live(served)

    def change() -> None:
        served.lab.cut_link("gateway2")
        served.edit("replicas: 2", "replicas: 1")
        wait_for(
            "the other gateway to change", lambda: len(set(_generations(served))) == 2, timeout_s=60
        )
        said = served.run("status", check=False)
        assert "gateway2: gateway: gateway gateway2: " in said
        assert "gateway gateway2 may still route to it" in served.run("plan", check=False)
        assert live(served) == before
        served.lab.mend_link("gateway2")
        assert_settled(served, replicas=1)

    with running(served):
        first, second = served.urls
        assert lost(under(mixed(first, streams=3, tokens=40), change)) == []
    assert len(set(_generations(served))) == 1
    assert lost(under(mixed(second, streams=3, tokens=8), lambda: None)) == []


def test_reloads_in_a_row_lose_no_request(served: Fleet) -> None:
    """Old workers finish what they have; whoever asks next is served by the new ones."""
    hasty = [Client(url=url, how="raw", tokens=1) for url in served.urls for _ in range(8)]
    patient = [client for url in served.urls for client in mixed(url, streams=3, tokens=40)]

    def reload() -> None:
        before = set(_generations(served))
        reconfigure(served)
        wait_for("all to reload", lambda: before.isdisjoint(_generations(served)))

    def reloads() -> None:
        for _ in range(RELOADS):
            reload()

    with running(served, interval="0.1"):
        assert lost(under([*hasty, *patient], reloads)) == []


@pytest.mark.soak
def test_a_tenants_key_is_rotated_without_a_lost_request(served: Fleet) -> None:
    """Both keys are good until the old one is revoked, and after that only the new one."""

    def reloaded(verb: str, *words: str) -> str:
        before = set(_generations(served))
        said = served.tenant(verb, "scientist", *words)
        wait_for("all to reload", lambda: before.isdisjoint(_generations(served)))
        return said

    def load(key: str) -> list[Client]:
        return [one for url in served.urls for one in mixed(url, 3, 60, key)]

    def rotate() -> None:
        new.append(reloaded("rotate"))
        assert lost(under(load(new[0]), lambda: None)) == []

    new: list[str] = []
    with running(served):
        old = reloaded("add")
        assert lost(under(load(old), rotate)) == []
        digest = hashlib.sha256(old.encode()).hexdigest()
        assert lost(under(load(new[0]), lambda: reloaded("revoke", digest[:12]))) == []
    statuses = {request.status for request in under(load(old), lambda: None)}
    assert statuses == {401}


def test_a_power_cut_costs_only_the_streams_that_had_begun_there(served: Fleet) -> None:
    """All else is tried again elsewhere, and is answered within half a minute."""
    victim = served.replicas()[0]

    def cut() -> None:
        served.lab.power_cut(victim["node"])
        served.wait_until_healed(without=victim["node"], timeout_s=120)

    with running(served):
        requests = under_load(served, cut, streams=6)
    gone = [request for request in requests if not request.succeeded]
    assert lost([request for request in gone if not request.chunks]) == []
    tried = gateway_log(served.lab)
    assert {tried[request.id][-1] for request in gone} <= {victim["address"]}
    assert [r.id for r in requests if not r.stream and r.seconds > 30] == []
