"""A simulated Slurm and the processes of its jobs, in virtual time.

What it does is what a real Slurm does: tests/contract asks both the same. A job that was told to
end is COMPLETING before it is gone, an ended one leaves the list after MinJobAge, singleton lets go
at COMPLETING, a requeued job keeps its id and gets a new submit time, ids are given out again after
a crash, and what ends on a node without power is COMPLETING until Slurm notices.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random

from reconciler.errors import SubmitRejected
from reconciler.spec import parse_duration
from tests.simulation.timeline import Timeline

FLEET = "sim"
USER = "fleet"

LIVE = frozenset({"PENDING", "CONFIGURING", "RUNNING", "COMPLETING"})
STARTED = frozenset({"CONFIGURING", "RUNNING"})
HOLDS_GPUS = frozenset({"CONFIGURING", "RUNNING", "COMPLETING"})

# How the job script ends (reconciler/failures.py): what it is that does not work.
STATUSES = {"ends": 0, "crash": 1, "oom": 137, "arguments": 2, "weights": 66, "image": 69}
NODE_STATUS = 71
# How long the nodes are taken away.
MAINTENANCE_S = 900.0

# The longest walltime of each partition.
PARTITIONS = {"gpu": 7 * 86_400, "debug": 1800}
LONGEST_COMMENT = 1024
# A requeued job waits this long before it may start again.
REQUEUED_S = 121.0
# So long it is tried to reach the node of a job that has just started.
LAUNCH_TRIED_S = 6.0
# A node that registers again says what it runs; of a job as young as this Slurm expects no word.
YOUNG_S = 20.0

_OPTION = re.compile(r"^#SBATCH --([a-z-]+)=(.*)$", re.MULTILINE)
_SHUTDOWN = re.compile(r"--shutdown-timeout=(\d+)")
_BEHAVIOUR = re.compile(r"SIM_BEHAVIOUR=([a-z]+)")


@dataclass(slots=True, eq=False)
class Engine:
    """The engine process of a running job, and the job's shell around it."""

    address: str
    trap: bool = False  # the shell handles USR1; before that the signal would end the job
    listens: bool = False
    completes: bool = True
    mode: str = "well"  # well, hung, stuck, sick, impostor
    metrics: bool = True
    draining: bool = False  # its shell has had USR1
    ready_at: int | None = None
    streams: list[float] = field(default_factory=list)  # when each request in flight will end

    @property
    def answers(self) -> bool:
        """Whether it goes on with the requests that it has."""
        return self.listens and self.completes and self.mode == "well"

    @property
    def serves(self) -> bool:
        """Whether it takes a request that arrives now."""
        return self.answers and not self.draining

    def ongoing(self, now: float) -> int:
        """How many requests are in flight."""
        self.streams = [end for end in self.streams if end > now]
        return len(self.streams)


@dataclass(slots=True, eq=False)
class SimJob:
    """One job as slurmctld knows it, and the engine that it runs."""

    serial: int
    id: int
    submitted_at: int
    name: str
    user: str
    gpus: int
    walltime_s: int
    drain_timeout_s: int
    singleton: bool
    behaviour: str
    exclude: frozenset[str]
    requeues: bool
    limit_s: int  # of its partition
    base: str  # the comment that it was submitted with
    comment: str
    random: Random
    script: str = ""
    state: str = "PENDING"
    shown: str | None = None  # a state word that squeue shows instead
    reason: str = "None"
    node: str = ""
    started_at: int | None = None
    ends_at: int | None = None
    restarts: int = 0
    exit_status: int = 0
    eligible_at: float = 0.0
    held: bool = False
    life: int = 0  # each start, requeue and end begins another; older callbacks are void
    engine: Engine | None = None
    told_at: float | None = None  # when the reconciler told it to drain
    listed: bool = False  # a listing has shown it to the reconciler
    remembered: bool = False  # and the reconciler's process knows that
    saved: bool = False  # and so does the next one
    cancelled_at: float | None = None
    final: str = ""  # what it is once it is no longer COMPLETING
    requeued: bool = False  # COMPLETING, and then it waits again

    @property
    def key(self) -> tuple[int, int]:
        return (self.id, self.submitted_at)

    @property
    def live(self) -> bool:
        return self.state in LIVE

    @property
    def serves(self) -> bool:
        """Whether its engine takes requests."""
        return self.engine is not None and self.engine.serves

    @property
    def ours(self) -> bool:
        """Whether the reconciler submitted it: only then it has a comment from the start."""
        return self.user == USER and bool(self.base)


@dataclass(slots=True, eq=False)
class Node:
    """One node. `word` is what sinfo says; a node without power may still be called idle."""

    name: str
    ip: str
    gpus: int
    power: bool = True
    drained: bool = False  # by an administrator
    answers: bool = True  # as slurmctld knows it, which learns it late
    down: bool = False  # it did not answer for too long
    free: int = 0
    broken: bool = False  # what starts there ends at once

    @property
    def usable(self) -> bool:
        """Whether slurmctld would start a job there, which may have no power by now."""
        return self.answers and not self.drained and not self.down


def _word(node: Node, states: set[str]) -> str:
    """A node's state by itself and by those of its live jobs."""
    if node.down:
        return "down"
    if node.drained:
        return "draining" if states else "drained"
    if states == {"COMPLETING"}:
        return "completing"
    return "mixed" if states else "idle"


class Cluster:
    """slurmctld, its nodes and the jobs' own processes."""

    def __init__(
        self, timeline: Timeline, seed: int, *, nodes: int, gpus_per_node: int, min_job_age_s: float
    ) -> None:
        self._timeline = timeline
        self._seed = seed
        self._min_job_age_s = min_job_age_s
        self._serial = 0
        self._next_id = 100
        self._kicked = False
        self.kill_wait_s = 30.0
        self.up = True
        self.maintenance_at: float | None = None  # nothing may run into it
        self.jobs: dict[int, SimJob] = {}  # by id: what slurmctld knows, ended ones for a while
        self.engines: dict[str, SimJob] = {}  # by address
        self.nodes = [
            Node(f"node{at}", f"10.0.0.{at}", gpus_per_node, free=gpus_per_node)
            for at in range(1, nodes + 1)
        ]

    # -- what is there

    @property
    def ours(self) -> list[SimJob]:
        """The live jobs that the reconciler has submitted."""
        return [job for job in self.jobs.values() if job.ours and job.live]

    def node(self, name: str) -> Node | None:
        return next((node for node in self.nodes if node.name == name), None)

    def words(self) -> Mapping[str, str]:
        return {node.name: self.word(node) for node in self.nodes}

    def word(self, node: Node) -> str:
        """What sinfo says of a node."""
        states = {job.state for job in self.jobs.values() if job.node == node.name and job.live}
        return _word(node, states) + ("" if node.answers else "*")

    # -- submitting and scheduling

    def accept(self, script: str, user: str = USER) -> SimJob:
        """Take a job as sbatch's slurmctld does; its options are the script's #SBATCH lines.

        Raises SubmitRejected; a job that no node could ever run is listed as FAILED all the same.
        """
        options = dict(_OPTION.findall(script))
        shutdown, behaviour = _SHUTDOWN.search(script), _BEHAVIOUR.search(script)
        comment = options["comment"].strip("'")
        partition = options.get("partition", "gpu")
        exclude = frozenset(filter(None, options.get("exclude", "").split(",")))
        self._refuse(partition, exclude, comment)
        job = self.add(
            name=options["job-name"],
            user=user,
            gpus=int(options["gres"].removeprefix("gpu:")),
            walltime_s=parse_duration(options["time"]),
            exclude=exclude,
            requeues="#SBATCH --no-requeue" not in script,
            limit_s=PARTITIONS[partition],
            drain_timeout_s=int(shutdown[1]) if shutdown else 0,
            singleton=options.get("dependency") == "singleton",
            behaviour=behaviour[1] if behaviour else "good",
            comment=comment,
        )
        job.held = "#SBATCH --hold\n" in script
        if not any(self._could_run(node, job) for node in self.nodes):
            job.started_at = job.ends_at = job.submitted_at
            job.reason = "BadConstraints"
            self._ended(job, "FAILED")
            raise SubmitRejected("sbatch: Requested node configuration is not available")
        job.script = script
        return job

    def _refuse(self, partition: str, exclude: frozenset[str], comment: str) -> None:
        """Raise SubmitRejected for what does not become a job at all."""
        if partition not in PARTITIONS:
            raise SubmitRejected("sbatch: Invalid partition name specified")
        if any(self.node(name) is None for name in exclude):
            raise SubmitRejected("sbatch: Invalid node name specified")
        if len(comment) > LONGEST_COMMENT:
            raise SubmitRejected("sbatch: Pathname of a file, directory or other too long")

    def _could_run(self, node: Node, job: SimJob) -> bool:
        """Whether the job fits the node, were it empty."""
        return node.name not in job.exclude and node.gpus >= job.gpus

    def add(
        self,
        *,
        name: str,
        user: str,
        gpus: int,
        walltime_s: int,
        comment: str,
        drain_timeout_s: int = 0,
        singleton: bool = False,
        behaviour: str = "good",
        exclude: frozenset[str] = frozenset(),
        requeues: bool = True,
        limit_s: int = PARTITIONS["gpu"],
    ) -> SimJob:
        """Put a job into the queue."""
        self._serial += 1
        job = SimJob(
            serial=self._serial,
            id=self._next_id,
            submitted_at=int(self._timeline.now),
            name=name,
            user=user,
            gpus=gpus,
            walltime_s=walltime_s,
            drain_timeout_s=drain_timeout_s,
            singleton=singleton,
            behaviour=behaviour,
            exclude=exclude,
            requeues=requeues,
            limit_s=limit_s,
            base=comment,
            comment=comment,
            random=Random(self._seed * 1_000_003 + self._serial),
        )
        job.eligible_at = self._timeline.now + job.random.choice((0.2, 0.5, 1.0, 3.0, 15.0))
        self._next_id += 1
        self.jobs[job.id] = job
        self.kick(job.eligible_at - self._timeline.now)
        return job

    def kick(self, delay_s: float = 0.3) -> None:
        """Let the scheduler run soon."""
        self._timeline.after(max(delay_s, 0.1), self._schedule)

    def _schedule(self) -> None:
        if not self.up:
            return
        waiting = [job for job in self.jobs.values() if job.state == "PENDING"]
        if not waiting:
            return
        for job in sorted(waiting, key=lambda job: job.serial):
            self._consider(job)
        # Only the first in the queue waits for Resources; those behind it, for their turn.
        behind = [job for job in waiting if job.state == "PENDING" and job.reason == "Resources"]
        for job in sorted(behind, key=lambda job: job.serial)[1:]:
            job.reason = "Priority"

    def _consider(self, job: SimJob) -> None:
        """Start a waiting job, or say what it waits for."""
        fit = [node for node in self.nodes if self._could_run(node, job)]
        usable = [node for node in fit if node.usable]
        node = next((node for node in usable if node.free >= job.gpus), None)
        if job.held:
            job.reason = "JobHeldUser"
        elif job.walltime_s > job.limit_s:
            job.reason = "PartitionTimeLimit"
        elif job.singleton and self._has_predecessor(job):
            job.reason = "Dependency"
        elif job.eligible_at > self._timeline.now:
            job.reason = "Priority" if job.restarts == 0 else "BeginTime"
        elif self._reaches_into_maintenance(job):
            job.reason = "ReqNodeNotAvail, Reserved for maintenance"
        elif node is not None:
            self._start(job, node)
        elif usable:
            job.reason = "Resources"
            self._expect(job, min(self._ends_on(node) for node in usable))
        else:
            names = ",".join(node.name for node in fit)
            job.reason = f"ReqNodeNotAvail, UnavailableNodes:{names}"

    def _has_predecessor(self, job: SimJob) -> bool:
        """Whether singleton holds a job: for one that has started, or waits and came before."""
        return any(
            other.state in STARTED or (other.state == "PENDING" and other.id < job.id)
            for other in self.jobs.values()
            if (other.name, other.user) == (job.name, job.user) and other is not job
        )

    def _ends_on(self, node: Node) -> int:
        """When the first job of a node must end."""
        ends = [
            job.ends_at
            for job in self.jobs.values()
            if job.node == node.name and job.state in HOLDS_GPUS and job.ends_at is not None
        ]
        return max(min(ends, default=0), int(self._timeline.now))

    def _expect(self, job: SimJob, start: float) -> None:
        """Say when a waiting job would start, as squeue shows it: in the fields of a start."""
        job.started_at, job.ends_at = int(start), int(start) + job.walltime_s

    def _reaches_into_maintenance(self, job: SimJob) -> bool:
        begin, now = self.maintenance_at, self._timeline.now
        if begin is None or now >= begin + MAINTENANCE_S:
            return False
        return now + job.walltime_s > begin

    def _start(self, job: SimJob, node: Node) -> None:
        node.free -= job.gpus
        job.life += 1
        now = self._timeline.now
        job.node, job.reason = node.name, "None"
        job.started_at, job.ends_at = int(now), int(now) + job.walltime_s
        job.state = "CONFIGURING" if job.random.random() < 0.2 else "RUNNING"
        self._later(job, job.walltime_s, lambda: self._time_is_up(job))
        if job.state == "CONFIGURING":
            self._later(job, job.random.uniform(1, 20), lambda: self._launch(job, node))
        else:
            self._launch(job, node)

    def _launch_failed(self, job: SimJob) -> None:
        """Its node gave no answer: the job is requeued, also one that is not to be.

        Until the node is known to be down, or answers, it is COMPLETING, and counted as restarted.
        """
        job.ends_at = int(self._timeline.now)
        job.state, job.requeued = "COMPLETING", True
        job.restarts += 1
        if self._has_power(job):
            self.put_back(job)

    def _time_is_up(self, job: SimJob) -> None:
        if job.ends_at is not None and job.ends_at <= self._timeline.now:
            self.end(job, "TIMEOUT", reason="TimeLimit")

    def _later(self, job: SimJob, delay_s: float, happen: Callable[[], None]) -> None:
        """Let something happen to this life of a job: not after it was requeued or has ended."""
        life = job.life

        def happen_if_alive() -> None:
            if job.life == life:
                happen()

        self._timeline.after(delay_s, happen_if_alive)

    # -- the job's own processes (reconciler/replica.sh and the engine)

    def _launch(self, job: SimJob, node: Node) -> None:
        job.state = "RUNNING"
        if not node.power:
            self._later(job, LAUNCH_TRIED_S, lambda: self._launch_failed(job))
            return
        if not job.ours:
            self._later(job, job.random.uniform(20, 400), lambda: self.end(job, "COMPLETED"))
            return
        port = 20_000 + (job.serial * 7) % 9_973
        engine = Engine(address=f"{node.ip}:{port}")
        job.engine, job.told_at = engine, None
        self.engines[engine.address] = job
        random = job.random
        trap_s = random.uniform(0.3, 3)
        deaf = job.behaviour == "deaf"  # it never gets as far as its trap

        def set_trap() -> None:
            engine.trap = True
            self._later(job, random.uniform(0.2, 2), lambda: self.publish(job))

        if not deaf:
            self._later(job, trap_s, set_trap)
        status = NODE_STATUS if node.broken else STATUSES.get(job.behaviour)
        if status is not None:
            final = "FAILED" if status else "COMPLETED"
            final = "OUT_OF_MEMORY" if job.behaviour == "oom" else final
            self._later(job, random.uniform(3, 12), lambda: self.end(job, final, status=status))
        elif job.behaviour not in ("hang", "deaf"):
            engine.completes = job.behaviour != "sick"
            self._later(job, trap_s + random.uniform(8, 40), lambda: self._answers(job, engine))

    def _answers(self, job: SimJob, engine: Engine) -> None:
        engine.listens = True

        def notice() -> None:
            engine.ready_at = int(self._timeline.now)
            self.publish(job)

        self._later(job, job.random.uniform(0.2, 1.2), notice)

    def publish(self, job: SimJob) -> None:
        """Write what is true now into the job's comment; tried again while slurmctld is down."""
        engine = job.engine
        if engine is None:
            return
        if not self.up:
            self._later(job, 2.0, lambda: self.publish(job))
            return
        run = {
            "node": job.node,
            "restarts": job.restarts,
            "address": engine.address,
            "trap_ready": engine.trap,
            "ready": engine.ready_at,
            "draining": engine.draining,
        }
        job.comment = f'{job.base.removesuffix("}")},"run":{json.dumps(run)}}}'

    def slow_start(self, job: SimJob) -> None:
        """Let the engine of a job load for ever."""
        if job.engine is not None:
            job.engine = Engine(address=job.engine.address, trap=True)
            job.behaviour = "hang"
            job.life += 1
            self._later(job, job.walltime_s, lambda: self._time_is_up(job))
            self.publish(job)

    # -- ends

    def signal(self, job: SimJob) -> None:
        """USR1 to the batch shell alone."""
        engine = job.engine
        if job.state != "RUNNING" or engine is None:
            return
        if not engine.trap:
            self.end(job, "FAILED", reason="RaisedSignal:10(User defined signal 1)")
            return
        if engine.draining:
            return
        engine.draining = True
        self.publish(job)
        deadline = self._timeline.now + job.drain_timeout_s
        self._finish(job, engine, deadline)

    def _finish(self, job: SimJob, engine: Engine, deadline: float) -> None:
        """End the job when its engine has answered the requests in flight, or cuts them."""
        now = self._timeline.now
        if job.node and not self._has_power(job):
            return
        if engine.ongoing(now) == 0 or now >= deadline or engine.mode != "well":
            self.end(job, "FAILED" if job.random.random() < 0.2 else "COMPLETED")
            return
        wait_s = min(max(engine.streams), deadline) - now
        self._later(job, max(wait_s, 0.1), lambda: self._finish(job, engine, deadline))

    def cancel(self, job: SimJob) -> None:
        """scancel: TERM to every process of the job at once, which cuts every stream."""
        job.cancelled_at = self._timeline.now
        if job.state == "PENDING":
            job.started_at = job.ends_at = int(self._timeline.now)
            self._ended(job, "CANCELLED")
        elif job.state in STARTED:
            # vLLM with streams in flight ends within moments, or at KillWait.
            slow = job.random.random() < 0.3 or job.behaviour == "stubborn"
            self.end(job, "CANCELLED", completing_s=self.kill_wait_s if slow else 1.0)

    def end(
        self,
        job: SimJob,
        final: str,
        *,
        status: int = 0,
        completing_s: float | None = None,
        reason: str = "None",
    ) -> None:
        """End a started job: COMPLETING first, for as long as its node needs."""
        if job.state not in STARTED:
            return
        self._forget_engine(job)
        job.life += 1
        job.state, job.exit_status = "COMPLETING", status
        job.reason = "NonZeroExitCode" if status else reason
        job.ends_at = int(self._timeline.now)
        job.final = final
        # On a node without power it stays so until Slurm notices.
        if self._has_power(job):
            wait_s = job.random.uniform(0.3, 4) if completing_s is None else completing_s
            self._later(job, wait_s, lambda: self._completed(job))
        self.kick()

    def _completed(self, job: SimJob) -> None:
        if self._has_power(job):
            self._ended(job, job.final)

    def _ended(self, job: SimJob, final: str) -> None:
        node = self.node(job.node)
        if node is not None and job.state in HOLDS_GPUS:
            node.free += job.gpus
        self._forget_engine(job)
        job.life += 1
        job.state, job.shown = final, None
        self._timeline.after(self._min_job_age_s, lambda: self._purge(job))
        self.kick()

    def _purge(self, job: SimJob) -> None:
        if not job.live and self.jobs.get(job.id) is job:
            del self.jobs[job.id]

    def _forget_engine(self, job: SimJob) -> None:
        if job.engine is not None:
            self.engines.pop(job.engine.address, None)
        job.engine = None

    def _has_power(self, job: SimJob) -> bool:
        node = self.node(job.node)
        return node is not None and node.power

    def requeue(self, job: SimJob) -> bool:
        """`scontrol requeue` by the job's owner. Returns whether the job may be requeued."""
        if not job.requeues or job.state not in STARTED:
            return False
        self.put_back(job)
        return True

    def put_back(self, job: SimJob) -> None:
        """Put a job back into the queue: same id, old comment, another key, soon another node.

        Slurm does so with one that could not be launched, also if it is not to be requeued.
        """
        node = self.node(job.node)
        if node is not None:
            node.free += job.gpus
        self._forget_engine(job)
        job.life += 1
        job.state, job.reason, job.node = "PENDING", "BeginTime", ""
        job.restarts += not job.requeued
        job.told_at, job.requeued = None, False
        job.submitted_at = int(self._timeline.now)
        job.eligible_at = self._timeline.now + REQUEUED_S
        self._expect(job, job.eligible_at)
        self.kick(REQUEUED_S + 0.1)

    def start_now(self, job: SimJob) -> None:
        """`scontrol update StartTime=now`: whatever it was to wait for."""
        job.eligible_at = self._timeline.now
        self.kick()

    def hold(self, job: SimJob) -> None:
        """`scontrol hold` by the job's owner, of one that waits."""
        job.held, job.reason = True, "JobHeldUser"

    def release(self, job: SimJob) -> None:
        """End a hold."""
        job.held = False
        self.kick()

    def comment(self, job: SimJob, text: str) -> bool:
        """`scontrol update comment=` by the job's owner. Returns whether it was taken."""
        if job.state not in ("PENDING", "CONFIGURING", "RUNNING") or len(text) > LONGEST_COMMENT:
            return False
        job.comment = text
        return True

    # -- what goes wrong with machines

    def cut_power(self, node: Node, *, timeout_s: float) -> None:
        """Take a node's power: its engines answer no more, and Slurm notices much later."""
        node.power = False
        for job in list(self.jobs.values()):
            if job.node == node.name and job.engine is not None:
                job.engine.mode, job.engine.streams = "hung", []
        self._timeline.after(timeout_s / 2, lambda: self._gets_no_answer(node))
        self._timeline.after(timeout_s, lambda: self._notice(node))

    def _gets_no_answer(self, node: Node) -> None:
        node.answers = node.power

    def _notice(self, node: Node) -> None:
        if not node.power:
            node.down = True
            self._lose_jobs(node)

    def down_node(self, node: Node) -> None:
        """An administrator says that a node is down: its jobs are lost at once."""
        node.down = True
        self._lose_jobs(node)

    def _lose_jobs(self, node: Node, *, older_than_s: float = 0.0) -> None:
        """End what runs on a node that is down, or came back without it; requeue what may be."""
        now = self._timeline.now
        for job in [job for job in self.jobs.values() if job.node == node.name]:
            if job.state == "COMPLETING" and job.requeued:
                self.put_back(job)
            elif job.state == "COMPLETING":
                self._ended(job, job.final)
            elif job.state in STARTED and now - (job.started_at or now) >= older_than_s:
                self._lose(job)

    def _lose(self, job: SimJob) -> None:
        if not self.requeue(job):
            job.reason, job.ends_at = "NodeDown", int(self._timeline.now)
            self._ended(job, "NODE_FAIL")

    def drain_node(self, node: Node) -> None:
        """An administrator drains a node: what runs there goes on, nothing new starts."""
        node.drained = True

    def resume_node(self, node: Node) -> None:
        """End an administrator's drain or word that it is down, and whatever was broken there."""
        node.broken = node.drained = False
        node.down = node.down and not node.power
        self.kick()

    def restore_power(self, node: Node) -> None:
        """Give a node its power back: what it ran is gone, and Slurm may not know that at once."""
        if node.power:
            return
        node.power = node.answers = True
        node.down = False
        self._lose_jobs(node, older_than_s=YOUNG_S)
        for job in self.jobs.values():
            if job.node == node.name and job.state == "RUNNING":
                self._forget_engine(job)
                self._lose_later(job)
        self.kick()

    def _lose_later(self, job: SimJob) -> None:
        self._later(job, job.random.uniform(30, 600), lambda: self._lose(job))

    def crash(self) -> bool:
        """slurmctld is killed: it forgets its last submission and gives that id out again.

        A pending job that was cancelled a moment before comes back. Returns whether it forgot one.
        """
        self.up = False
        now = self._timeline.now
        for job in self.jobs.values():
            if (
                job.state == "CANCELLED"
                and not job.node
                and job.cancelled_at is not None
                and now - job.cancelled_at < 5
            ):
                job.state, job.listed = "PENDING", False
        last = self.jobs.get(self._next_id - 1)
        if last is None or now - last.submitted_at > 20:
            return False
        if last.state in HOLDS_GPUS:
            node = self.node(last.node)
            if node is not None:
                node.free += last.gpus
        self._forget_engine(last)
        last.life += 1
        last.state = "FORGOTTEN"
        del self.jobs[last.id]
        self._next_id -= 1
        return True

    def start_again(self) -> None:
        """slurmctld answers again."""
        self.up = True
        self.kick()
