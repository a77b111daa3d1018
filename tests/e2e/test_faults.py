"""Faults of the cluster itself, under requests: what must not be lost is not."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import httpx
import pytest

from tests.e2e.checks import assert_settled, live, lost, routed, running, under_load
from tests.lab.fleet import Fleet, gateway_log
from tests.lab.load import Load, in_flight
from tests.lab.wait import wait_for


@pytest.fixture
def served(fleet: Fleet) -> Fleet:
    """Two replicas, ready and routed."""
    fleet.run("apply", "--wait", "--timeout", "90s")
    return fleet


def _during(fleet: Fleet, change: Callable[[], object]) -> list[str]:
    """Make a change with requests in flight and `fleet run` at work; return what was lost."""

    async def go() -> Load:
        async with in_flight(fleet.url, "tiny", plain=4, streams=4, tokens=100) as load:
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
    before = live(served)

    def restart() -> None:
        served.lab.stop_daemon("login", "slurmctld", kill=True)
        served.run("plan", check=False)
        served.lab.start_daemon("login", "slurmctld")
        wait_for("slurmctld", lambda: "nothing to do" in served.run("plan", check=False))

    assert _during(served, restart) == []
    assert live(served) == before


def test_a_job_cancelled_by_hand_is_replaced(served: Fleet) -> None:
    """Whoever cancelled it: the spec says two, so there are two again."""
    victim = str(served.replicas()[0]["job_id"])
    served.lab.run("login", ["scancel", victim])
    wait_for("its end", lambda: victim not in live(served))
    served.run("apply", "--wait", "--timeout", "60s")
    assert len(routed(served)) == 2
    assert victim not in routed(served)


def test_a_vandalised_comment_costs_no_request_and_no_job(served: Fleet) -> None:
    """Nothing is known of that job any more, so its route stays as it is and it is left alone."""
    before = routed(served)
    vandal = ["scontrol", "update", f"jobid={before[0]}", "comment=oops |\n'\""]
    assert _during(served, lambda: served.lab.run("login", vandal)) == []
    said = served.run("apply")
    assert "its comment can't be read; left alone" in said
    assert live(served) == before
    assert httpx.get(f"{served.url}/v1/models").status_code == 200


def _be_patient(fleet: Fleet) -> None:
    """Let Slurm wait as a site's does: the lab's 10 s would end a job before any test of it."""
    conf = "/etc/slurm/slurm.conf"
    patient = ["sed", "-i", "s/^SlurmdTimeout=.*/SlurmdTimeout=300/", conf]
    fleet.lab.run("login", patient, user="root")
    fleet.lab.run("login", ["scontrol", "reconfigure"], user="root")


def test_a_short_cut_of_a_nodes_cable_replaces_nothing(served: Fleet) -> None:
    """Silence is not death: out of the routes while it lasts, back in when it ends, same job."""
    before = live(served)
    node = str(served.replicas()[0]["node"])
    _be_patient(served)
    with served.lab.popen("login", served.command("run", "--interval", "1")) as service:
        served.lab.cut_link(node)
        try:
            wait_for("it to leave the routes", lambda: len(routed(served)) == 1, timeout_s=30)
        finally:
            served.lab.mend_link(node)
        wait_for("it to come back", lambda: len(routed(served)) == 2, timeout_s=60)
        service.kill()
    assert live(served) == before


def test_slurmd_killed_leads_to_a_replacement_elsewhere(served: Fleet) -> None:
    """Slurm gives the node up; its job is replaced, and its engine gets no more requests."""
    victim = served.replicas()[0]
    node = str(victim["node"])
    with served.lab.popen("login", served.command("run", "--interval", "1")) as service:
        served.lab.stop_daemon(node, "slurmd", kill=True)
        served.wait_until_healed(without=node, timeout_s=90)
        service.kill()
    assert str(victim["job_id"]) not in routed(served)


def test_a_cut_between_gateway_and_node_costs_only_streams_begun_there(served: Fleet) -> None:
    """The reconciler reaches the node, so jobs and routes stay; NGINX goes elsewhere meanwhile.

    An answer that had begun there can't be saved, which is a stream but for a moment. All else is
    tried again on another replica, whether it came before the cut or during it.
    """
    before, victim = live(served), served.replicas()[0]
    node = str(victim["node"])

    def cut() -> None:
        served.lab.cut_between("gateway", node)
        assert lost(under_load(served, lambda: None)) == []

    with running(served):
        requests = under_load(served, cut, streams=4, tokens=120)
        assert "nothing to do" in served.run("plan")
        served.lab.mend_between("gateway", node)
        assert lost(under_load(served, lambda: None)) == []
    gone = [request for request in requests if not request.succeeded]
    assert lost([request for request in gone if not request.chunks]) == []
    tried = gateway_log(served.lab)
    assert {tried[request.id][-1] for request in gone} <= {victim["address"]}
    assert live(served) == before
    assert_settled(served, replicas=2)


@pytest.mark.soak
def test_a_cut_between_login_and_node_costs_nothing(served: Fleet) -> None:
    """Unheard of is not dead: the gateway still reaches it, so what it was sent ends whole.

    New requests go elsewhere until it answers again; its job is left alone, and a note says why.
    """
    _be_patient(served)
    before, victim = live(served), served.replicas()[0]
    node = str(victim["node"])

    def cut_and_mend() -> None:
        served.lab.cut_between("login", node)
        wait_for("it to leave the routes", lambda: len(routed(served)) == 1, timeout_s=30)
        said = served.run("plan")
        assert f"{_name(victim)}  silent:  no answer in time" in said
        served.lab.mend_between("login", node)
        wait_for("it to come back", lambda: len(routed(served)) == 2, timeout_s=60)

    with running(served):
        assert lost(under_load(served, cut_and_mend, streams=4, tokens=120)) == []
    assert live(served) == before
    assert_settled(served, replicas=2)


def _name(replica: Mapping[str, Any]) -> str:
    name = replica["name"]
    return ".".join(str(name[part]) for part in ("fleet", "model", "revision", "ordinal"))


def test_R31_a_clock_that_jumps_ends_no_job_and_costs_no_request(fleet: Fleet) -> None:
    """An hour ahead, further than the walltime, and back: nothing is submitted, ended or lost."""
    fleet.edit('walltime: "4:00:00"', 'walltime: "50:00"')
    fleet.run("apply", "--wait", "--timeout", "90s")
    before = live(fleet)

    def jump() -> None:
        for hours in (1, 0, -1, 0):
            _apply_at(fleet, hours)
            _apply_at(fleet, hours)
            assert live(fleet) == routed(fleet) == before

    assert lost(under_load(fleet, jump)) == []
    assert_settled(fleet, replicas=2)


def test_R31_a_clock_that_jumps_during_a_drain_cuts_no_stream(fleet: Fleet) -> None:
    """What a replica that leaves was given to do ends whole, whatever the clock says meanwhile."""
    fleet.run("apply", "--wait", "--timeout", "90s")
    fleet.edit("replicas: 2", "replicas: 1")

    def drain() -> None:
        for hours in (0, 1, 0, -1, 0):
            _apply_at(fleet, hours)
        fleet.run("apply", "--wait", "--timeout", "60s")

    assert lost(under_load(fleet, drain, tokens=200)) == []
    assert_settled(fleet, replicas=1)


# All hosts of a lab share the kernel's clock, and a time namespace has no other CLOCK_REALTIME.
# So the jump is made where the reconciler reads the time, in Python; Slurm, ssh and the kernel
# keep the right time, as they do where slurmctld is a host of its own.
_SHIFTED_CLOCK = """
import os, time
right = time.time
time.time = lambda: right() + 3600 * float(os.environ["HOURS_AHEAD"])
"""


def _apply_at(fleet: Fleet, hours: float) -> None:
    """Run one cycle of a reconciler whose clock is so many hours ahead."""
    folder = fleet.lab.shared / "clock"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(_SHIFTED_CLOCK)
    shifted = {"PYTHONPATH": "/shared/clock", "HOURS_AHEAD": str(hours)}
    done = fleet.lab.run("login", fleet.command("apply"), env=shifted, check=False)
    assert done.returncode in (0, 4), done.stdout + done.stderr  # 4: so it decides nothing


def test_two_login_nodes_that_know_nothing_of_each_other_do_no_harm(fleet: Fleet) -> None:
    """Each has its own state and lock; Slurm's singleton and one way to choose names are enough."""
    first, second = (("--state-dir", f"/tmp/{name}") for name in ("first", "second"))
    with running(fleet, options=first), running(fleet, options=second):
        wait_for("two replicas", lambda: len(routed(fleet)) == 2, timeout_s=90)
        before = set(routed(fleet))
        fleet.edit("max-num-seqs: 16", "max-num-seqs: 17")

        def updated() -> bool:
            now = routed(fleet)
            return len(now) == 2 and before.isdisjoint(now) and before.isdisjoint(live(fleet))

        requests = under_load(fleet, lambda: wait_for("the update", updated, timeout_s=180))
        assert lost(requests) == []
        assert_settled(fleet, replicas=2)
