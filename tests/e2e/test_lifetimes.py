"""A replica's life: its walltime ends, its node is wanted, its block is deleted."""

from collections.abc import Callable

from tests.e2e.checks import lost, running, under_load
from tests.lab.fleet import Fleet
from tests.lab.load import Request
from tests.lab.wait import wait_for


def _applied(fleet: Fleet) -> Fleet:
    fleet.run("apply", "--wait", "--timeout", "90s")
    return fleet


def _ids(fleet: Fleet) -> set[int]:
    return {replica["job_id"] for replica in fleet.replicas() if replica["routed"]}


def _until(fleet: Fleet, done: Callable[[], bool], timeout_s: float) -> list[Request]:
    """Have `fleet run` at work under constant load until it is done; return all requests."""
    with running(fleet, interval="2"):
        return under_load(
            fleet, lambda: wait_for("the change", done, timeout_s=timeout_s), tokens=60
        )


def test_a_walltime_ends_without_a_lost_request(fleet: Fleet) -> None:
    """The successor serves before the predecessor drains, well within its walltime."""
    fleet.edit("replicas: 2", "replicas: 1")
    fleet.edit('walltime: "4:00:00"', 'walltime: "2:00"')
    fleet.edit("startup_timeout_s: 600", "startup_timeout_s: 40")
    fleet.edit("drain_timeout_s: 60", "drain_timeout_s: 10")
    before = _ids(_applied(fleet))
    requests = _until(fleet, lambda: bool(_ids(fleet)) and not _ids(fleet) & before, 150)
    assert lost(requests) == []
    ended = {job[0]: job[2] for job in fleet.jobs()}
    assert "TIMEOUT" not in ended.values()


def test_a_node_that_is_wanted_is_left_without_a_lost_request(fleet: Fleet) -> None:
    """`scontrol update state=drain` is enough: the replica moves, then its job ends."""
    _applied(fleet)
    victim = fleet.replicas()[0]
    drain = ["scontrol", "update", f"nodename={victim['node']}", "state=drain", "reason=wanted"]
    fleet.lab.run("login", drain, user="root")
    requests = _until(fleet, lambda: _moved(fleet, str(victim["node"])), 90)
    assert lost(requests) == []


def _moved(fleet: Fleet, node: str) -> bool:
    replicas = fleet.replicas()
    routed = [replica for replica in replicas if replica["routed"]]
    return len(routed) == 2 and all(replica["node"] != node for replica in replicas)


def test_R33_a_deleted_block_is_served_until_it_is_allowed_to_go(fleet: Fleet) -> None:
    """An accident in git ends nothing; the plan says how to go on, and then it goes on."""
    before = _ids(_applied(fleet))
    text = fleet.spec_file.read_text()
    fleet.edit("name: tiny", "name: other")
    fleet.edit("served_names: [demo/tiny-llama]", "served_names: []")
    fleet.edit("replicas: 2", "replicas: 0")
    said = fleet.run("apply")
    assert "apply --allow-destroy tiny" in said
    assert _ids(fleet) == before
    fleet.run("apply", "--wait", "--timeout", "60s", "--allow-destroy", "tiny")
    assert fleet.replicas() == []
    assert text != fleet.spec_file.read_text()
