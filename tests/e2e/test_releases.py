"""Releases and what people ask for on real Slurm: bad ones, tried ones, pauses, maintenances."""

from collections import Counter

import pytest

from tests.e2e.checks import lost, running, under
from tests.lab.fleet import Fleet
from tests.lab.load import Client
from tests.lab.wait import wait_for


def _applied(fleet: Fleet) -> set[int]:
    """Apply until converged; return the ids of the jobs that are routed."""
    fleet.run("apply", "--wait", "--timeout", "90s")
    return _routed(fleet)


def _routed(fleet: Fleet) -> set[int]:
    return {replica["job_id"] for replica in fleet.replicas() if replica["routed"]}


def _revisions(fleet: Fleet) -> Counter[str]:
    """How many routed replicas each revision has."""
    return Counter(r["name"]["revision"] for r in fleet.replicas() if r["routed"])


def test_what_served_is_kept_alive_while_a_release_fails(fleet: Fleet) -> None:
    """The old revision is gone from git; a replica of it that dies is replaced all the same."""
    before = _applied(fleet)
    [old] = _revisions(fleet)
    fleet.edit("max-num-seqs: 16", "max-num-seqs: 17")
    fleet.edit('STANDIN_TOKENS_PER_S: "20"', 'STANDIN_TOKENS_PER_S: "nonsense"')
    with fleet.lab.popen("login", fleet.command("run", "--interval", "1")) as service:
        wait_for("the release to fail", lambda: "backoff:" in fleet.run("plan"), timeout_s=90)
        victim = min(before)
        fleet.lab.run("login", ["scancel", str(victim)])
        wait_for(
            "another replica of the old revision",
            lambda: _revisions(fleet) == {old: 2} and victim not in _routed(fleet),
            timeout_s=90,
        )
        service.kill()


def test_canary_is_tried_beside_its_model_and_promoted(fleet: Fleet) -> None:
    """Two wanted revisions; promoted, its replica is the first of the release."""
    before = _applied(fleet)
    fleet.edit("    replicas: 2", "    canary: {args: {max-num-seqs: 17}}\n    replicas: 2")
    with_canary = _applied(fleet)
    assert with_canary > before
    [canary] = with_canary - before
    assert sorted(_revisions(fleet).values()) == [1, 2]
    fleet.edit("    canary: {args: {max-num-seqs: 17}}\n", "")
    fleet.edit("max-num-seqs: 16", "max-num-seqs: 17")
    promoted = _applied(fleet)
    assert canary in promoted
    assert not promoted & before


def test_canary_that_does_worse_is_given_up_by_itself(fleet: Fleet) -> None:
    """It refuses requests that the model takes: the log tells, and nobody has to."""
    fleet.edit('STANDIN_TOKENS_PER_S: "20"', 'STANDIN_TOKENS_PER_S: "1000"')
    before = _applied(fleet)
    canary = "canary: {share: 50, abort: {requests: 20}, args: {max-model-len: 64}}"
    fleet.edit("    replicas: 2", f"    {canary}\n    replicas: 2")
    [tried] = _applied(fleet) - before
    clients = [Client(url=fleet.url, how="raw", tokens=100) for _ in range(4)]
    with running(fleet):
        asked = under(clients, lambda: wait_for("its end", lambda: tried not in _live(fleet)))
        assert {request.status for request in asked} == {200, 400}
        assert lost(under(clients, lambda: None, at_least=100)) == []
    assert _routed(fleet) == _live(fleet) == before
    assert "is given up: " in fleet.run("explain", "tiny")
    assert "aborted" in fleet.run("events")


@pytest.mark.soak
def test_paused_model_is_left_alone_until_it_is_resumed(fleet: Fleet) -> None:
    """A job that ends meanwhile is not replaced, and loses its route."""
    before = _applied(fleet)
    fleet.run("pause", "tiny", "--reason", "an exercise", "--until", "1h")
    victim = min(before)
    fleet.lab.run("login", ["scancel", str(victim)])
    wait_for("its end", lambda: _live(fleet) == before - {victim})
    said = fleet.run("apply")
    assert "paused by fleet: an exercise" in said
    assert _routed(fleet) == _live(fleet) == before - {victim}
    fleet.run("resume", "tiny")
    assert len(_applied(fleet)) == 2


def _live(fleet: Fleet) -> set[int]:
    return {int(job[0]) for job in fleet.jobs() if job[2] in ("PENDING", "RUNNING", "COMPLETING")}


def test_replica_runs_before_a_maintenance_with_a_shorter_walltime(fleet: Fleet) -> None:
    """Slurm holds back what would reach into the reservation; half an hour is worth a start."""
    begin = "now+30minutes"
    create = ["reservationname=works", f"starttime={begin}", "duration=30", "nodes=ALL"]
    flags = ["flags=maint,ignore_jobs", "user=root"]
    fleet.lab.run("login", ["scontrol", "create", "reservation", *create, *flags], user="root")
    _applied(fleet)
    limits = ["squeue", "--noheader", "--states=RUNNING", "--format=%l"]
    shown = fleet.lab.run("login", limits).stdout.split()
    assert len(shown) == 2
    assert all(text.startswith(("28:", "27:", "29:")) for text in shown), shown
    assert "maintenance" in fleet.run("events")
