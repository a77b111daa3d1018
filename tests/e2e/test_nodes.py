"""A replica of several nodes, on the lab: one engine, one address, and all of it or nothing."""

import asyncio
from collections.abc import Callable, Iterable

import httpx
import pytest

from reconciler.hostlist import expand
from tests.e2e.test_fleet import THIEF
from tests.lab import Lab
from tests.lab.fleet import Fleet
from tests.lab.load import Load, in_flight
from tests.lab.wait import wait_for

LIVE = ("PENDING", "RUNNING", "COMPLETING")
RANKS = "resources: {nodes: 2, gpus: 1, cpus: 2, memory: 4G}"


@pytest.fixture
def wide(fleet: Fleet) -> Fleet:
    """A model of one replica on two nodes, one GPU on each, not yet applied."""
    fleet.edit("resources: {gpus: 1, cpus: 2, memory: 4G}", RANKS)
    fleet.edit("max-num-seqs: 16}", "max-num-seqs: 16, tensor-parallel-size: 2}")
    fleet.edit("replicas: 2", "replicas: 1")
    return fleet


@pytest.fixture
def served(wide: Fleet) -> Fleet:
    """The same, ready and routed."""
    wide.run("apply", "--wait", "--timeout", "90s")
    return wide


def _replica(fleet: Fleet) -> tuple[int, tuple[str, ...]]:
    """Return the routed replica's job and nodes."""
    (replica,) = [replica for replica in fleet.replicas() if replica["routed"]]
    return replica["job_id"], expand(replica["node"])


def _nothing_is_left(lab: Lab, nodes: Iterable[str]) -> bool:
    """Whether no process of a replica runs on these nodes, and no folder of one lies there."""
    look = "pgrep -a -u fleet; ls -d /tmp/fleet-[0-9]* 2>/dev/null"
    return not any(
        lab.run(node, ["sh", "-c", look], user="root", check=False).stdout for node in nodes
    )


def _wait_until_clean(lab: Lab, *nodes: str) -> None:
    wait_for(f"nothing to be left on {nodes}", lambda: _nothing_is_left(lab, nodes))


def _live(fleet: Fleet) -> list[str]:
    return [job[0] for job in fleet.jobs() if job[2] in LIVE]


def _replaced(fleet: Fleet, old: int, without: str = "") -> bool:
    routed = [replica for replica in fleet.replicas() if replica["routed"]]
    return any(
        replica["job_id"] != old and without not in expand(replica["node"]) for replica in routed
    )


def _lost(load: Load) -> list[str]:
    return [f"{r.id}: {r.status} {r.finish} {r.error}" for r in load.requests if not r.succeeded]


def _under_load(fleet: Fleet, change: Callable[[], object]) -> Load:
    async def go() -> Load:
        async with in_flight(fleet.url, "tiny", plain=4, streams=4, tokens=80) as load:
            await asyncio.to_thread(change)
        return load

    return asyncio.run(go())


def test_a_replica_of_two_nodes_serves_at_one_address(served: Fleet) -> None:
    """Two ranks on two nodes, one job, one route; the GPUs of both count."""
    _, nodes = _replica(served)
    assert len(nodes) == 2
    answer = httpx.post(
        f"{served.url}/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 3}
    )
    assert answer.status_code == 200
    status = served.status()
    assert (status["gpus_held"], len(served.jobs())) == (2, 1)
    headless = [
        served.lab.run(node, ["pgrep", "-fc", "standin.py.*--headless"], check=False).stdout.strip()
        for node in nodes
    ]
    assert headless == ["0", "1"]


def test_a_budget_that_holds_one_wide_replica_starts_one(wide: Fleet) -> None:
    """Two nodes of two GPUs are four: a second such replica waits, and the plan says for what."""
    wide.edit("nodes: 2, gpus: 1", "nodes: 2, gpus: 2")
    wide.edit("budget: {gpus: 4}", "budget: {gpus: 7}")
    said = wide.run("plan")
    assert "missing (4 GPUs)" in said
    wide.edit("replicas: 1", "replicas: 2")
    refused = wide.lab.run("login", wide.command("validate"), check=False)
    assert refused.returncode == 1
    assert "all replicas together need 8 GPUs, the budget is 7" in refused.stdout + refused.stderr


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.soak), 1])
def test_a_rank_that_ends_ends_the_job_and_it_is_replaced(served: Fleet, victim: int) -> None:
    """All or nothing: no process and no folder of the job stays on either node."""
    job, nodes = _replica(served)
    served.lab.run(nodes[victim], ["pkill", "-KILL", "-f", "standin.py serve"])
    wait_for("the job to end", lambda: str(job) not in _live(served))
    _wait_until_clean(served.lab, *nodes)
    served.run("apply", "--wait", "--timeout", "90s")
    assert _replaced(served, job)


@pytest.mark.soak
def test_a_power_cut_of_the_second_node_replaces_the_replica(served: Fleet) -> None:
    """Slurm ends the job for its dead node; the other ranks go, the successor is elsewhere."""
    job, (first, second) = _replica(served)
    with served.lab.popen("login", served.command("run", "--interval", "1")) as service:
        served.lab.power_cut(second)
        wait_for(
            "a successor", lambda: _replaced(served, job, without=second), timeout_s=120, say=print
        )
        service.kill()
    if first not in _replica(served)[1]:
        _wait_until_clean(served.lab, first)


def test_a_drain_under_load_loses_nothing_and_leaves_nothing(served: Fleet) -> None:
    """Rank 0 alone is told: its streams end whole, and then the other ranks go too."""
    job, nodes = _replica(served)
    served.edit("max-num-seqs: 16", "max-num-seqs: 32")
    load = _under_load(served, lambda: served.run("apply", "--wait", "--timeout", "90s"))
    assert _lost(load) == []
    assert _replaced(served, job)
    wait_for("the job to end", lambda: str(job) not in _live(served))
    _wait_until_clean(served.lab, *set(nodes).difference(_replica(served)[1]))


def test_what_the_second_node_lacks_ends_the_job_with_its_status(wide: Fleet) -> None:
    """Every node is checked: weights on the first one only are missing weights."""
    wide.edit("weights: /shared/models", "weights: /tmp/weights")
    for node in wide.lab.nodes[::2]:
        wide.lab.run(node, ["mkdir", "/tmp/weights"])
    wide.run("apply")
    wait_for("the job to fail", lambda: [job[2] for job in wide.jobs()] == ["FAILED"])
    assert "ExitCode=66:0" in wide.lab.run("login", ["scontrol", "show", "job", "1"]).stdout
    (log,) = (wide.lab.shared / "logs").iterdir()
    assert "/tmp/weights is not on this node: provision the weights" in log.read_text()
    _wait_until_clean(wide.lab, *wide.lab.nodes)


def test_a_port_lost_to_a_thief_starts_all_ranks_anew(wide: Fleet) -> None:
    """The others waited for a rank 0 that never came: each gets the new one's address."""
    thief = wide.lab.shared / "thief.sh"
    thief.write_text(THIEF)
    thief.chmod(0o755)
    wide.edit("/opt/modelfleet/src/tests/lab/standin.py", "/shared/thief.sh")
    wide.run("apply", "--wait", "--timeout", "90s")
    _, (_, second) = _replica(wide)
    assert (wide.lab.shared / "stolen").exists()
    ranks = wide.lab.run(second, ["pgrep", "-fc", "standin.py.*--headless"]).stdout.strip()
    assert ranks == "1"


def test_a_node_of_two_that_is_wanted_is_left(served: Fleet) -> None:
    """The second node in DRAIN moves the whole replica, as it can't stay without it."""
    job, (_, second) = _replica(served)
    drain = ["scontrol", "update", f"nodename={second}", "state=drain", "reason=test"]
    served.lab.run("login", drain, user="root")
    load = _under_load(served, lambda: served.run("apply", "--wait", "--timeout", "90s"))
    assert _lost(load) == []
    assert _replaced(served, job, without=second)
