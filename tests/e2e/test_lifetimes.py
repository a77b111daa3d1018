"""A replica's life: its walltime ends, its node is wanted, its block is deleted."""

import asyncio
from collections.abc import Callable

from tests.lab.fleet import Fleet
from tests.lab.load import Load, in_flight
from tests.lab.wait import wait_for


def _applied(fleet: Fleet) -> Fleet:
    fleet.run("apply", "--wait", "--timeout", "90s")
    return fleet


def _ids(fleet: Fleet) -> set[int]:
    return {replica["job_id"] for replica in fleet.replicas() if replica["routed"]}


def _under_load(fleet: Fleet, done: Callable[[], bool], timeout_s: float) -> list[Load]:
    """Send requests, batch after batch, while `fleet run` works and until `done`."""

    async def go() -> list[Load]:
        loads = []
        waiting = asyncio.create_task(
            asyncio.to_thread(wait_for, "the change", done, timeout_s=timeout_s)
        )
        while not waiting.done():
            async with in_flight(fleet.url, "tiny", plain=2, streams=2, tokens=150) as load:
                loads.append(load)
        await waiting
        return loads

    with fleet.lab.popen("login", fleet.command("run", "--interval", "2")) as service:
        try:
            return asyncio.run(go())
        finally:
            service.kill()


def _lost(loads: list[Load]) -> list[str]:
    requests = [request for load in loads for request in load.requests]
    return [f"{r.id}: {r.status} {r.finish} {r.error}" for r in requests if not r.succeeded]


def test_a_walltime_ends_without_a_lost_request(fleet: Fleet) -> None:
    """The successor serves before the predecessor drains, well within its walltime."""
    fleet.edit("replicas: 2", "replicas: 1")
    fleet.edit('walltime: "4:00:00"', 'walltime: "2:00"')
    fleet.edit("startup_timeout_s: 600", "startup_timeout_s: 40")
    fleet.edit("drain_timeout_s: 60", "drain_timeout_s: 10")
    before = _ids(_applied(fleet))
    loads = _under_load(fleet, lambda: bool(_ids(fleet)) and not _ids(fleet) & before, 150)
    assert _lost(loads) == []
    ended = {job[0]: job[2] for job in fleet.jobs()}
    assert "TIMEOUT" not in ended.values()


def test_a_node_that_is_wanted_is_left_without_a_lost_request(fleet: Fleet) -> None:
    """`scontrol update state=drain` is enough: the replica moves, then its job ends."""
    _applied(fleet)
    victim = fleet.replicas()[0]
    drain = ["scontrol", "update", f"nodename={victim['node']}", "state=drain", "reason=wanted"]
    fleet.lab.run("login", drain, user="root")
    loads = _under_load(fleet, lambda: _moved(fleet, str(victim["node"])), 90)
    assert _lost(loads) == []


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
