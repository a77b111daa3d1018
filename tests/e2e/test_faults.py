"""Faults of the cluster itself, under requests: what must not be lost is not."""

import asyncio
from collections.abc import Callable

import httpx
import pytest

from tests.lab.fleet import Fleet
from tests.lab.load import Load, in_flight
from tests.lab.wait import wait_for

LIVE = ("PENDING", "RUNNING", "COMPLETING")


@pytest.fixture
def served(fleet: Fleet) -> Fleet:
    """Two replicas, ready and routed."""
    fleet.run("apply", "--wait", "--timeout", "90s")
    return fleet


def _live(fleet: Fleet) -> list[str]:
    return sorted(job[0] for job in fleet.jobs() if job[2] in LIVE)


def _routed(fleet: Fleet) -> list[str]:
    return sorted(str(r["job_id"]) for r in fleet.replicas() if r["routed"])


def _during(fleet: Fleet, change: Callable[[], object]) -> list[str]:
    """Make a change with requests in flight and `fleet run` at work; return what was lost."""

    async def go() -> Load:
        async with in_flight(fleet.url, "tiny", plain=4, streams=4, tokens=250) as load:
            await asyncio.to_thread(change)
        return load

    with fleet.lab.popen("login", fleet.command("run", "--interval", "1")) as service:
        try:
            load = asyncio.run(go())
        finally:
            service.kill()
    return [f"{r.id}: {r.status} {r.finish} {r.error}" for r in load.requests if not r.succeeded]


def test_slurmctld_killed_and_restarted_changes_nothing(served: Fleet) -> None:
    """Its jobs go on, the reconciler waits, and no job is submitted twice or cancelled."""
    before = _live(served)

    def restart() -> None:
        served.lab.stop_daemon("login", "slurmctld", kill=True)
        served.run("plan", check=False)
        served.lab.start_daemon("login", "slurmctld")
        wait_for("slurmctld", lambda: "nothing to do" in served.run("plan", check=False))

    assert _during(served, restart) == []
    assert _live(served) == before


def test_a_job_cancelled_by_hand_is_replaced(served: Fleet) -> None:
    """Whoever cancelled it: the spec says two, so there are two again."""
    victim = str(served.replicas()[0]["job_id"])
    served.lab.run("login", ["scancel", victim])
    wait_for("its end", lambda: victim not in _live(served))
    served.run("apply", "--wait", "--timeout", "60s")
    assert len(_routed(served)) == 2
    assert victim not in _routed(served)


def test_a_vandalised_comment_costs_no_request_and_no_job(served: Fleet) -> None:
    """Nothing is known of that job any more, so its route stays as it is and it is left alone."""
    before = _routed(served)
    vandal = ["scontrol", "update", f"jobid={before[0]}", "comment=oops |\n'\""]
    assert _during(served, lambda: served.lab.run("login", vandal)) == []
    said = served.run("apply")
    assert "its comment can't be read; left alone" in said
    assert _live(served) == before
    assert httpx.get(f"{served.url}/v1/models").status_code == 200


def test_a_short_cut_of_a_nodes_cable_replaces_nothing(served: Fleet) -> None:
    """Silence is not death: out of the routes while it lasts, back in when it ends, same job."""
    before = _live(served)
    node = str(served.replicas()[0]["node"])
    # A site's patience: the lab's own (10 s) would end the job before it is out of the routes.
    conf = "/etc/slurm/slurm.conf"
    patient = ["sed", "-i", "s/^SlurmdTimeout=.*/SlurmdTimeout=300/", conf]
    served.lab.run("login", patient, user="root")
    served.lab.run("login", ["scontrol", "reconfigure"], user="root")
    with served.lab.popen("login", served.command("run", "--interval", "1")) as service:
        served.lab.cut_link(node)
        try:
            wait_for("it to leave the routes", lambda: len(_routed(served)) == 1, timeout_s=30)
        finally:
            served.lab.mend_link(node)
        wait_for("it to come back", lambda: len(_routed(served)) == 2, timeout_s=60)
        service.kill()
    assert _live(served) == before


def test_slurmd_killed_leads_to_a_replacement_elsewhere(served: Fleet) -> None:
    """Slurm gives the node up; its job is replaced, and its engine gets no more requests."""
    victim = served.replicas()[0]
    node = str(victim["node"])
    with served.lab.popen("login", served.command("run", "--interval", "1")) as service:
        served.lab.stop_daemon(node, "slurmd", kill=True)
        served.wait_until_healed(without=node, timeout_s=90)
        service.kill()
    assert str(victim["job_id"]) not in _routed(served)
