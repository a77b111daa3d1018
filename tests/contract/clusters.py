"""One cluster as the contract's cases see it, and the two that they run on: real and simulated."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

from reconciler.adapters.ports import Slurm
from reconciler.naming import ReplicaName
from tests.contract.slurm import LabSlurm
from tests.lab import Lab
from tests.lab.wait import LabError, wait_for
from tests.simulation.cluster import Cluster as SimSlurmctld
from tests.simulation.cluster import Node, SimJob
from tests.simulation.timeline import Timeline
from tests.simulation.world import SimWorld

T = TypeVar("T")

FLEET = "contract"
GPUS_PER_NODE = 4
# As tests/lab/files/slurm.conf has them.
MIN_JOB_AGE_S, KILL_WAIT_S, NODE_TIMEOUT_S = 10.0, 5.0, 20.0
# Slurm looks for jobs out of walltime twice a minute; what a test waits for comes sooner than that.
PATIENCE_S = 120.0


@dataclass(frozen=True, slots=True)
class Body:
    """What a job does: by the simulator's word for it, and in bash for a real node."""

    behaviour: str
    bash: str


_PUBLISH = """
publish() {
  scontrol update jobid=$SLURM_JOB_ID comment='{"v":1,"gpus":1,"commit":null,"run":{"node":"'\
$SLURMD_NODENAME'","restarts":'${SLURM_RESTART_COUNT:-0}',"address":"10.0.0.9:20000",\
"trap_ready":true,"ready":null,"draining":'$1'}}'
}
trap 'publish true; exit 0' USR1
publish false
while true; do sleep 600 & wait $!; done
"""
# As replica.sh does: it publishes that it has its trap, and on USR1 that it drains, and ends.
REPLICA = Body("good", _PUBLISH)
DEAF = Body("deaf", "sleep 600")  # it never gets as far as its trap
STUBBORN = Body("stubborn", "trap '' TERM; sleep 600 & wait; sleep 600")  # it ends at KillWait
ENDS = Body("ends", "exit 0")
REFUSES = Body("arguments", "exit 2")

COMMENT = '{"v":1,"gpus":1,"commit":null}'


def name(ordinal: int = 0, model: str = "tiny") -> ReplicaName:
    """The name of a replica of the fleet that all cases are about."""
    return ReplicaName(fleet=FLEET, model=model, revision="0123abcd", ordinal=ordinal)


def script(
    job_name: object,
    body: Body = REPLICA,
    *options: str,
    gpus: int = 1,
    comment: str = COMMENT,
    walltime: str = "0:10:00",
) -> str:
    """A batch script; `options` are more of sbatch's, without their dashes."""
    lines = (
        *(f"job-name={job_name}", "output=/dev/null", "mem=100M", f"gres=gpu:{gpus}"),
        *(f"time={walltime}", f"comment='{comment}'", *options),
    )
    head = [f"#SBATCH --{line}" for line in lines]
    return "\n".join(["#!/bin/bash", *head, f"# SIM_BEHAVIOUR={body.behaviour}", body.bash, ""])


class Cluster(Protocol):
    """A Slurm of four nodes of four GPUs, what its users and administrators do, and its faults."""

    nodes: Sequence[str]

    @property
    def slurm(self) -> Slurm:
        """The adapter."""

    def until(self, what: str, ask: Callable[[], T | None]) -> T:
        """Let time pass until the answer is true, and return it."""

    def now(self) -> float:
        """The cluster's clock."""

    def at_once(self, *calls: Callable[[], T]) -> list[T]:
        """Make several calls, side by side if they take their time."""

    def failing(self, fault: str) -> Slurm:
        """The adapter, whose next call meets a fault (tests/simulation/faults.py)."""

    def submit_as_other(self, text: str) -> int:
        """Another user's sbatch. Returns the job's id."""

    def scancel(self, job_id: int) -> None:
        """The owner's scancel, by hand."""

    def requeue(self, job_id: int) -> bool:
        """The owner's `scontrol requeue`. Returns whether Slurm does so."""

    def start_now(self, job_id: int) -> None:
        """End the wait that a requeued job begins with."""

    def release(self, job_id: int) -> None:
        """The owner's `scontrol release` of a job that was submitted with --hold."""

    def comment(self, job_id: int, text: str) -> bool:
        """The owner's `scontrol update comment`. Returns whether Slurm takes it."""

    def end_walltime(self, job_id: int) -> None:
        """Let a running job's walltime be over now."""

    def drain_node(self, node: str) -> None:
        """An administrator drains a node."""

    def down_node(self, node: str) -> None:
        """An administrator says that a node is down."""

    def resume_node(self, node: str) -> None:
        """An administrator takes a node into use again."""

    def cut_power(self, node: str) -> None:
        """Take a node's power."""

    def restore_power(self, node: str) -> None:
        """Give it back."""

    def stop_controller(self) -> None:
        """Stop slurmctld in order."""

    def kill_controller(self) -> None:
        """Kill slurmctld: it may forget its last moments."""

    def start_controller(self) -> None:
        """Start it again; returns when it answers."""


# What stands in for Slurm's own command on PATH; the real one is called by its path.
_SHIMS = {
    "submit_lost_now": (
        "sbatch",
        '/usr/bin/sbatch "$@" >/dev/null\n'
        "echo 'sbatch: error: Socket timed out on send/recv operation' >&2; exit 1",
    ),
    "submit_lost_never": ("sbatch", "exec sleep 60"),
    "submit_lost_late": (
        "sbatch",
        "text=$(mktemp); cat >$text\n"
        '(sleep 1.5; /usr/bin/sbatch "$@" <$text) </dev/null >/dev/null 2>&1 &\nexec sleep 60',
    ),
    "listing_fails": (
        "squeue",
        "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1",
    ),
    "listing_partial": ("squeue", '/usr/bin/squeue "$@" | head -c -30'),
    "listing_garbled": ("squeue", '/usr/bin/squeue "$@" | sed s/RUNNING//'),
    "nodes_fail": ("sinfo", "exec sleep 60"),
    "cancel_lost": (
        "scancel",
        '/usr/bin/scancel "$@"\n'
        "echo 'scancel: error: Socket timed out on send/recv operation' >&2; exit 1",
    ),
    "drain_fails": ("scancel", "exec sleep 60"),
}


class RealCluster:
    """A lab's Slurm."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self.nodes: Sequence[str] = lab.nodes
        self.slurm: LabSlurm = LabSlurm(lab)
        self._adapters = [self.slurm]

    def until(self, what: str, ask: Callable[[], T | None]) -> T:
        return wait_for(what, ask, timeout_s=PATIENCE_S)

    def now(self) -> float:
        return time.time()

    def at_once(self, *calls: Callable[[], T]) -> list[T]:
        with ThreadPoolExecutor(len(calls)) as pool:
            return [done.result() for done in [pool.submit(call) for call in calls]]

    def failing(self, fault: str) -> Slurm:
        command, text = _SHIMS[fault]
        folder = self._lab.shared / "shims" / fault
        folder.mkdir(parents=True, exist_ok=True)
        shim = folder / command
        shim.write_text(f"#!/bin/bash\n{text}\n")
        shim.chmod(0o755)
        path = f"/shared/shims/{fault}:/usr/bin:/bin"
        adapter = LabSlurm(self._lab, env={"PATH": path}, timeout_s=1)
        self._adapters.append(adapter)
        return adapter

    def submit_as_other(self, text: str) -> int:
        sbatch = ["sbatch", "--parsable"]
        return int(self._lab.run("login", sbatch, user="mallory", input=text).stdout)

    def scancel(self, job_id: int) -> None:
        self._lab.run("login", ["scancel", str(job_id)])

    def requeue(self, job_id: int) -> bool:
        return self._scontrol("requeue", str(job_id))

    def start_now(self, job_id: int) -> None:
        # Only while it waits: on one that runs the command was seen to end it.
        squeue = ["squeue", "--noheader", "--format=%T", f"--jobs={job_id}"]

        def starts() -> bool:
            # At the moment of a requeue Slurm may not know the id.
            state = self._lab.run("login", squeue, check=False).stdout.strip()
            if state == "PENDING":
                self._scontrol("update", f"jobid={job_id}", "StartTime=now")
            return state == "RUNNING"

        wait_for("its start", starts, timeout_s=PATIENCE_S)

    def release(self, job_id: int) -> None:
        self._scontrol("release", str(job_id))

    def comment(self, job_id: int, text: str) -> bool:
        return self._scontrol("update", f"jobid={job_id}", f"comment={text}")

    def end_walltime(self, job_id: int) -> None:
        assert self._scontrol("update", f"jobid={job_id}", "EndTime=now", user="root")

    def drain_node(self, node: str) -> None:
        self._node(node, "drain")

    def down_node(self, node: str) -> None:
        self._node(node, "down")

    def resume_node(self, node: str) -> None:
        # Refused of a node that has come back by itself (ReturnToService).
        self._node(node, "resume")

    def cut_power(self, node: str) -> None:
        self._lab.power_cut(node)

    def restore_power(self, node: str) -> None:
        self._lab.power_on(node)

    def stop_controller(self) -> None:
        self._lab.stop_daemon("login", "slurmctld")

    def kill_controller(self) -> None:
        self._lab.stop_daemon("login", "slurmctld", kill=True)

    def start_controller(self) -> None:
        self._lab.start_daemon("login", "slurmctld")
        ping = ["scontrol", "ping"]
        wait_for("slurmctld", lambda: "UP" in self._lab.run("login", ping, check=False).stdout)

    def tidy(self) -> None:
        """Leave the lab as it was found, but for ended jobs, which are listed for a while."""
        for node in self.nodes:
            if not self._lab.is_on(node):
                self.restore_power(node)
        for node, word in self.slurm.nodes().items():
            if word.startswith(("drain", "down")):
                self.resume_node(node)
        for user in ("fleet", "mallory"):
            self._lab.run("login", ["scancel", f"--user={user}"], user=user)
        squeue = ["squeue", "--noheader", "--states=PENDING,RUNNING,COMPLETING"]
        wait_for("an empty queue", lambda: not self._lab.run("login", squeue).stdout)
        wait_for("idle nodes", lambda: set(self.slurm.nodes().values()) == {"idle"})

    def close(self) -> None:
        """End what was started for the adapters."""
        for adapter in self._adapters:
            adapter.close()

    def _node(self, node: str, state: str) -> None:
        self._scontrol("update", f"nodename={node}", f"state={state}", "reason=test", user="root")

    def _scontrol(self, *words: str, user: str = "fleet") -> bool:
        done = self._lab.run("login", ["scontrol", *words], user=user, check=False)
        return done.returncode == 0


class SimulatedCluster:
    """The simulator's Slurm: waiting lets its virtual time pass."""

    def __init__(self) -> None:
        self._timeline = Timeline()
        self._slurmctld = SimSlurmctld(
            self._timeline,
            seed=1,
            nodes=4,
            gpus_per_node=GPUS_PER_NODE,
            min_job_age_s=MIN_JOB_AGE_S,
        )
        self._slurmctld.kill_wait_s = KILL_WAIT_S
        self._world = SimWorld(self._timeline, self._slurmctld, gateways=())
        self.nodes: Sequence[str] = [node.name for node in self._slurmctld.nodes]
        self.slurm: Slurm = self._world.adapters.slurm

    def until(self, what: str, ask: Callable[[], T | None]) -> T:
        end = self._timeline.now + 10 * PATIENCE_S
        while self._timeline.now < end:
            if answer := ask():
                return answer
            self._timeline.advance(0.1)
        raise LabError(f"waited for {what}")

    def now(self) -> float:
        return self._timeline.now

    def at_once(self, *calls: Callable[[], T]) -> list[T]:
        return [call() for call in calls]

    def failing(self, fault: str) -> Slurm:
        self._world.armed[fault] = 1
        return self.slurm

    def submit_as_other(self, text: str) -> int:
        return self._slurmctld.accept(text, user="mallory").id

    def scancel(self, job_id: int) -> None:
        self._slurmctld.cancel(self._job(job_id))

    def requeue(self, job_id: int) -> bool:
        return self._slurmctld.requeue(self._job(job_id))

    def start_now(self, job_id: int) -> None:
        self._slurmctld.start_now(self._job(job_id))

    def release(self, job_id: int) -> None:
        self._slurmctld.release(self._job(job_id))

    def comment(self, job_id: int, text: str) -> bool:
        return self._slurmctld.comment(self._job(job_id), text)

    def end_walltime(self, job_id: int) -> None:
        self._slurmctld.end(self._job(job_id), "TIMEOUT", reason="TimeLimit")

    def drain_node(self, node: str) -> None:
        self._slurmctld.drain_node(self._node(node))

    def down_node(self, node: str) -> None:
        self._slurmctld.down_node(self._node(node))

    def resume_node(self, node: str) -> None:
        self._slurmctld.resume_node(self._node(node))

    def cut_power(self, node: str) -> None:
        self._slurmctld.cut_power(self._node(node), timeout_s=NODE_TIMEOUT_S)

    def restore_power(self, node: str) -> None:
        self._slurmctld.restore_power(self._node(node))

    def stop_controller(self) -> None:
        self._slurmctld.up = False

    def kill_controller(self) -> None:
        self._slurmctld.crash()

    def start_controller(self) -> None:
        self._slurmctld.start_again()

    def _job(self, job_id: int) -> SimJob:
        return self._slurmctld.jobs[job_id]

    def _node(self, node: str) -> Node:
        found = self._slurmctld.node(node)
        assert found is not None
        return found
