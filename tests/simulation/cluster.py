"""A simulated Slurm and the processes of its jobs, in virtual time.

What it does is what ../shared facts say that Slurm 22.05 to 26.05 does: a job that was told to end
is COMPLETING before it is gone, an ended one leaves the list after MinJobAge, singleton lets go at
COMPLETING, ids are given out again after a crash, a dead node keeps its jobs COMPLETING.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random

from reconciler.spec import parse_duration
from tests.simulation.timeline import Timeline

FLEET = "sim"
USER = "fleet"

LIVE = frozenset({"PENDING", "CONFIGURING", "RUNNING", "COMPLETING"})
STARTED = frozenset({"CONFIGURING", "RUNNING"})
HOLDS_GPUS = frozenset({"CONFIGURING", "RUNNING", "COMPLETING"})

# How the job script ends (reconciler/failures.py): what it is that does not work.
STATUSES = {"crash": 1, "oom": 137, "arguments": 2, "weights": 66, "image": 69}
NODE_STATUS = 71
# How long the nodes are taken away.
MAINTENANCE_S = 900.0

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
    legible: bool = True  # its comment could be read there
    remembered: bool = False  # and the reconciler's process knows that
    saved: bool = False  # and so does the next one
    cancelled_at: float | None = None

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
    word: str = "idle"
    free: int = 0
    broken: bool = False  # what starts there ends at once

    @property
    def usable(self) -> bool:
        return self.power and self.word == "idle"


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
        # Asked whether a job that fits only where it must not run has to wait.
        self.excludes: Callable[[], bool] = lambda: True
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
        return {node.name: node.word for node in self.nodes}

    # -- submitting and scheduling

    def accept(self, script: str) -> SimJob:
        """Take a job as sbatch's slurmctld does; its options are the script's #SBATCH lines."""
        options = dict(_OPTION.findall(script))
        shutdown, behaviour = _SHUTDOWN.search(script), _BEHAVIOUR.search(script)
        comment = options["comment"].strip("'")
        job = self.add(
            name=options["job-name"],
            user=USER,
            gpus=int(options["gres"].removeprefix("gpu:")),
            walltime_s=parse_duration(options["time"]),
            exclude=frozenset(filter(None, options.get("exclude", "").split(","))),
            drain_timeout_s=int(shutdown[1]) if shutdown else 0,
            singleton=options.get("dependency") == "singleton",
            behaviour=behaviour[1] if behaviour else "good",
            comment=comment,
        )
        job.script = script
        return job

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
        running = {(j.name, j.user) for j in self.jobs.values() if j.state in STARTED}
        for job in sorted(waiting, key=lambda job: job.serial):
            self._consider(job, running)

    def _consider(self, job: SimJob, running: set[tuple[str, str]]) -> None:
        """Start a waiting job, or say what it waits for."""
        if job.held:
            job.reason = "JobHeldUser"
        elif job.eligible_at > self._timeline.now:
            job.reason = "Priority" if job.restarts == 0 else "BeginTime"
        elif job.singleton and (job.name, job.user) in running:
            job.reason = "Dependency"
        elif self._reaches_into_maintenance(job):
            job.reason = "ReqNodeNotAvail, Reserved for maintenance"
        elif (node := self._node_for(job)) is None:
            job.reason = "Resources"
        else:
            running.add((job.name, job.user))
            self._start(job, node)

    def _reaches_into_maintenance(self, job: SimJob) -> bool:
        begin, now = self.maintenance_at, self._timeline.now
        if begin is None or now >= begin + MAINTENANCE_S:
            return False
        return now + job.walltime_s > begin

    def _node_for(self, job: SimJob) -> Node | None:
        fit = [node for node in self.nodes if node.usable and node.free >= job.gpus]
        allowed = [node for node in fit if node.name not in job.exclude]
        if fit and not allowed and not self.excludes():
            return fit[0]
        return allowed[0] if allowed else None

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

    def _time_is_up(self, job: SimJob) -> None:
        if job.ends_at is not None and job.ends_at <= self._timeline.now:
            self.end(job, "TIMEOUT")

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
        if not job.ours:
            self._later(job, job.random.uniform(20, 400), lambda: self.end(job, "COMPLETED"))
            return
        port = 20_000 + (job.serial * 7) % 9_973
        engine = Engine(address=f"{node.ip}:{port}")
        job.engine, job.told_at = engine, None
        self.engines[engine.address] = job
        random = job.random
        trap_s = random.uniform(0.3, 3)

        def set_trap() -> None:
            engine.trap = True
            self._later(job, random.uniform(0.2, 2), lambda: self.publish(job))

        self._later(job, trap_s, set_trap)
        status = NODE_STATUS if node.broken else STATUSES.get(job.behaviour)
        if status is not None:
            final = "OUT_OF_MEMORY" if job.behaviour == "oom" else "FAILED"
            self._later(job, random.uniform(3, 12), lambda: self.end(job, final, status=status))
        elif job.behaviour != "hang":
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
            self.end(job, "FAILED", reason="JobLaunchFailure")
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
            self._ended(job, "CANCELLED")
        elif job.state in STARTED:
            # vLLM with streams in flight ends within moments, or at KillWait.
            slow = job.random.random() < 0.3
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
        job.state, job.reason, job.exit_status = "COMPLETING", reason, status
        job.ends_at = int(self._timeline.now)
        if self._has_power(job):
            wait_s = job.random.uniform(0.3, 4) if completing_s is None else completing_s
            self._later(job, wait_s, lambda: self._ended(job, final))
        elif job.random.random() < 0.5:
            self._ended(job, final)
        else:
            job.shown = None  # it stays COMPLETING until its node answers again

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

    def requeue(self, job: SimJob, *, new_time: bool) -> None:
        """Put a started job back into the queue: same id, old comment, soon another node."""
        node = self.node(job.node)
        if node is not None:
            node.free += job.gpus
        self._forget_engine(job)
        job.life += 1
        job.state, job.reason, job.node = "PENDING", "BeginTime", ""
        job.started_at = job.ends_at = job.told_at = None
        job.restarts += 1
        job.eligible_at = self._timeline.now + 20
        if new_time:
            job.submitted_at = int(self._timeline.now)
        self.kick(20.1)

    # -- what goes wrong with machines

    def cut_power(self, node: Node, *, timeout_s: float) -> None:
        """Take a node's power: its engines answer no more, and Slurm notices much later."""
        node.power = False
        for job in list(self.jobs.values()):
            if job.node == node.name and job.engine is not None:
                job.engine.mode, job.engine.streams = "hung", []
        self._timeline.after(timeout_s, lambda: self._notice(node))

    def _notice(self, node: Node) -> None:
        if node.power:
            return
        node.word = "down*"  # whatever it was before
        for job in list(self.jobs.values()):
            if job.node == node.name and job.state in STARTED:
                self.end(job, "NODE_FAIL")

    def drain_node(self, node: Node) -> None:
        """An administrator drains a node: what runs there goes on, nothing new starts."""
        node.word = "draining"

    def resume_node(self, node: Node) -> None:
        """End an administrator's drain, and whatever was broken there."""
        node.broken = False
        if node.word == "draining":
            node.word = "idle"
        self.kick()

    def restore_power(self, node: Node) -> None:
        """Give a node its power back: what it ran is gone."""
        if node.power:
            return
        node.power, node.word = True, "idle"
        for job in list(self.jobs.values()):
            if job.node == node.name and job.state in STARTED:
                self.end(job, "NODE_FAIL")
            elif job.node == node.name and job.state == "COMPLETING":
                self._ended(job, "NODE_FAIL")
        self.kick()

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
