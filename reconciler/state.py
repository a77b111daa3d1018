"""What was seen (Observation) and what is remembered between cycles (Memory); frozen values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from reconciler.hostlist import expand
from reconciler.naming import Comment, ReplicaName, Run

JobKey = tuple[int, int]
"""(job id, submit time): Slurm reuses ids, so an id alone is no key."""


class Phase(StrEnum):
    """What a Slurm state means for a replica."""

    PENDING = "pending"
    RUNNING = "running"
    ENDING = "ending"  # it serves nobody and still holds its GPUs
    ENDED = "ended"
    UNKNOWN = "unknown"  # a word that we don't know: alive as far as we can tell, so never touched


# Every state of Slurm 22.05 to 26.05, squeue(1) "JOB STATE CODES".
PHASES: Mapping[str, Phase] = {
    **dict.fromkeys(
        ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"),
        Phase.PENDING,
    ),
    **dict.fromkeys(
        (
            "RUNNING",
            "CONFIGURING",
            "RESIZING",
            "SIGNALING",
            "STOPPED",
            "SUSPENDED",
            "POWER_UP_NODE",
        ),
        Phase.RUNNING,
    ),
    **dict.fromkeys(("COMPLETING", "STAGE_OUT"), Phase.ENDING),
    **dict.fromkeys(
        (
            *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED"),
            *("NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "RECONFIG_FAIL", "REVOKED", "TIMEOUT"),
        ),
        Phase.ENDED,
    ),
}

# Not Slurm's: the state of a job whose line could not be read, so of Phase.UNKNOWN.
UNREADABLE = "UNREADABLE"


class Cause(StrEnum):
    """Why a job ended that nobody told to end."""

    ARGUMENTS = "the engine refuses its arguments"
    ENGINE = "the engine ended"
    IMAGE = "its image is missing"
    MEMORY = "out of memory"
    NODE = "the node failed"
    PREEMPTED = "preempted"
    WALLTIME = "its walltime ended"
    WEIGHTS = "its weights are missing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One Slurm job that bears our fleet's name and is our user's. Times are epoch seconds."""

    id: int
    submitted_at: int
    name: ReplicaName
    state: str  # Slurm's word
    reason: str  # Slurm's word, "None" when there is none
    nodes: str  # Slurm's list of them, as `gpu[1-2]`; "" while it waits
    started_at: int | None
    ends_at: int | None
    restarts: int
    comment: Comment | None  # None: unreadable, so nothing is known of its address
    exit_status: int | None = None  # of the batch script, once it has ended

    @property
    def key(self) -> JobKey:
        return (self.id, self.submitted_at)

    @property
    def node_names(self) -> tuple[str, ...]:
        return expand(self.nodes)

    @property
    def phase(self) -> Phase:
        return PHASES.get(self.state, Phase.UNKNOWN)

    @property
    def run(self) -> Run | None:
        """What the job published, unless it was requeued or moved since."""
        run = self.comment.run if self.comment else None
        if run is None or self.phase is not Phase.RUNNING:
            return None
        moved = run.node not in self.node_names or run.restarts != self.restarts
        return None if moved else run


class Health(StrEnum):
    """The answer of a replica's address to a probe."""

    READY = "ready"  # it proved who it is and it answers
    STARTING = "starting"  # the connection was refused: nothing listens (yet, or any more)
    SILENT = "silent"  # no answer in time: nothing is known
    SICK = "sick"  # the engine itself says that it is dead, or it can't complete one token
    IMPOSTOR = "impostor"  # something else answers there


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What one replica answered. `ongoing` is running plus waiting requests, None if not told."""

    health: Health
    ongoing: int | None = None
    tokens: float | None = None  # generated since the engine started; it stands still when hung
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Target:
    """An address that a gateway sends a model's requests to."""

    model: str
    job_id: int
    submitted_at: int
    address: str

    @property
    def key(self) -> JobKey:
        return (self.job_id, self.submitted_at)


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayView:
    """What one gateway runs. With an `error` nothing else is known, and it may still route."""

    name: str
    generation: str | None = None  # what the running configuration answers
    targets: tuple[Target, ...] = ()
    old_workers: int = 0  # still finishing requests of an earlier configuration
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """Everything seen in one look. None stands for what could not be read, never for nothing."""

    at: float
    jobs: tuple[Job, ...] | None
    jobs_error: str | None = None
    odd_lines: int = 0  # job lines that could not be read; each spoils only itself
    nodes: Mapping[str, str] | None = None  # Slurm's state words, lower case
    probes: Mapping[JobKey, Probe] = field(default_factory=dict)
    gateways: tuple[GatewayView, ...] = ()
    image_digests: Mapping[str, str] = field(default_factory=dict)  # image -> digest
    image_errors: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainClock:
    """Since when a leaving replica is off the gateways, and since when it has had no request."""

    since: float
    idle_since: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One job that ended by itself: where, why and when."""

    node: str
    cause: Cause
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Failures:
    """How often jobs of one revision have failed in a row, and when last."""

    count: int  # since a replica of it was ready; only failures that are the revision's
    last_at: float
    counted: frozenset[JobKey]
    recent: tuple[Failure, ...] = ()  # oldest first, those of nodes among them
    was_ready: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """An engine's token counter, and since when it stands still although there are requests."""

    tokens: float
    since: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What one look can't show. Losing it restarts timers and nothing else."""

    misses: Mapping[JobKey, int] = field(default_factory=dict)  # failed looks in a row
    drains: Mapping[JobKey, DrainClock] = field(default_factory=dict)
    failures: Mapping[str, Failures] = field(default_factory=dict)  # "model.revision" ->
    leads: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # model -> seconds
    led: frozenset[JobKey] = frozenset()  # whose lead time is among them
    progress: Mapping[JobKey, Progress] = field(default_factory=dict)
    emptied_at: float | None = None  # first look at which all known jobs were gone at once
