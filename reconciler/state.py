"""What was seen (Observation) and what is remembered between cycles (Memory); frozen values."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Self

from reconciler.hostlist import expand
from reconciler.naming import Comment, ReplicaName, Run
from reconciler.spec import Fleet, Model, Slurm, SlurmOverride

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

# Seen on 24.11: "ReqNodeNotAvail, Reserved for maintenance", and "ReqNodeNotAvail, May be reserved
# for other job" where only some nodes are.
_RESERVED = re.compile(r"ReqNodeNotAvail,.*reserved", re.IGNORECASE)

# Slurm's reasons that no waiting resolves (squeue(1) "JOB REASON CODES"): somebody's word, ...
_HELD = frozenset({"JobHeldUser", "JobHeldAdmin", "launch failed requeued held"})
# ... or what the job was submitted with.
_NEVER = frozenset(
    {"BadConstraints", "PartitionTimeLimit", "PartitionNodeLimit", "DependencyNeverSatisfied"}
    | {"InvalidAccount", "AccountNotAllowed", "InvalidQOS", "QOSNotAllowed"}
)

# Not Slurm's: the state of a job whose line could not be read, so of Phase.UNKNOWN.
UNREADABLE = "UNREADABLE"


class Cause(StrEnum):
    """Why a job ended that nobody wanted to end."""

    ARGUMENTS = "the engine refuses its arguments"
    ENGINE = "the engine ended"
    IMAGE = "its image is missing"
    KEYS = "its keys or its certificate are missing"
    MEMORY = "out of memory"
    NODE = "the node failed"
    PREEMPTED = "preempted"
    REFUSED = "Slurm refuses its job"
    STARTUP = "never ready in its startup timeout"
    UNHEALTHY = "it stopped answering"
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
    limit_s: int | None = None  # its walltime; None where Slurm has none
    excluded: str = ""  # Slurm's list of the nodes that it avoids
    gpus: int | None = None  # that it was submitted with; None where Slurm doesn't say

    @property
    def key(self) -> JobKey:
        return (self.id, self.submitted_at)

    @property
    def node_names(self) -> tuple[str, ...]:
        return expand(self.nodes)

    @property
    def avoids(self) -> frozenset[str]:
        """The nodes that it avoids because it was submitted so, not by a site's or a person's word.

        Empty while its comment is unreadable.
        """
        said = self.comment.avoids if self.comment else ""
        return frozenset(expand(said)).intersection(expand(self.excluded))

    @property
    def is_held(self) -> bool:
        """Whether it waits for somebody to release it."""
        return self.phase is Phase.PENDING and self.reason in _HELD

    @property
    def never_starts(self) -> bool:
        """Whether what it was submitted with lets it wait for ever."""
        return self.phase is Phase.PENDING and self.reason in _NEVER

    @property
    def waits_for_nodes(self) -> bool:
        """Whether it is its turn to start, by Slurm's word, and no node takes it."""
        turn = self.reason == "Resources" or self.reason.startswith("ReqNodeNotAvail")
        return self.phase is Phase.PENDING and turn

    @property
    def waits_for_reservation(self) -> bool:
        """Whether its walltime would reach into a reservation, by Slurm's word."""
        return self.phase is Phase.PENDING and bool(_RESERVED.match(self.reason))

    @property
    def phase(self) -> Phase:
        phase = PHASES.get(self.state, Phase.UNKNOWN)
        return Phase.PENDING if phase is Phase.ENDING and self._comes_back else phase

    @property
    def _comes_back(self) -> bool:
        """Whether it could not be launched: COMPLETING now, it waits again, --no-requeue or not.

        Slurm has counted the restart by then, and the job has not written of it.
        """
        run = self.comment.run if self.comment else None
        return self.restarts > (run.restarts if run else 0)

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
    tokens: float | None = None  # and steps since the engine started: they stand still when hung
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Target:
    """An address that a gateway sends a model's requests to."""

    model: str
    job_id: int
    submitted_at: int
    address: str
    keys: tuple[str, ...] = ()  # ids of those that it takes; without any it speaks plain HTTP
    weight: int = 1
    canary: str = ""  # its revision, if it is one that gets a share of its own

    @property
    def key(self) -> JobKey:
        return (self.job_id, self.submitted_at)


@dataclass(frozen=True, slots=True, kw_only=True)
class Keyring:
    """What there is of the fleet's secrets, and nothing secret. Without ids none are made yet."""

    ids: tuple[str, ...] = ()  # of the backend keys, oldest first
    authority: str = ""  # 12 hex digits of the sha256 of who signs the replicas' certificates


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """What a gateway shows to protected replicas, and whom it believes; ids only."""

    key: str
    authority: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """Where a job finds what it proves itself with, and which of the keys are its own."""

    folder: str
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayView:
    """What one gateway runs. With an `error` nothing else is known, and it may still route."""

    name: str
    generation: str | None = None  # what the running configuration answers
    targets: tuple[Target, ...] = ()
    old_workers: int = 0  # still finishing requests of an earlier configuration
    exhausted: tuple[str, ...] = ()  # tenants that it refuses, as their tokens of the day are spent
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What one model was asked for in the last `minutes`, by the gateways' logs."""

    minutes: int
    requests: int
    errors: int
    refused: int  # of the errors: no replica was there, so this is demand that nothing else shows
    first_byte_s: tuple[float, float, float] | None  # p50, p95, p99; None: nobody was answered


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What a canary, and the rest of its model meanwhile, made of their requests.

    `errors` counts those too for which another replica had to step in.
    """

    canary: Traffic
    rest: Traffic


@dataclass(frozen=True, slots=True, kw_only=True)
class Aborted:
    """A canary that was given up, and why: until its model has one of another revision."""

    model: str
    revision: str
    why: str
    jobs: tuple[JobKey, ...]  # no others: a model may have more of that revision for its own sake


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What each tenant has had since midnight UTC: prompt and completion tokens."""

    tokens_today: Mapping[str, int]
    complete: bool  # every gateway's log was read to its end since counting began


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """Everything seen in one look. None stands for what could not be read, never for nothing."""

    at: float
    jobs: tuple[Job, ...] | None
    jobs_error: str | None = None
    odd_lines: int = 0  # job lines that could not be read; each spoils only itself
    nodes: Mapping[str, str] | None = None  # Slurm's state words, lower case
    maintenances: tuple[float, ...] | None = None  # when each begins; None: not asked
    probes: Mapping[JobKey, Probe] = field(default_factory=dict)
    gateways: tuple[GatewayView, ...] = ()
    image_digests: Mapping[str, str] = field(default_factory=dict)  # image -> digest
    image_errors: Mapping[str, str] = field(default_factory=dict)
    booted_at: float | None = None  # by this host's clock: it changes only when that jumps
    keyring: Keyring | None = Keyring()
    keyring_error: str | None = None
    usage: Usage | None = None
    traffic: Mapping[str, Traffic] | None = None  # by model; one that nobody asked for is not in it
    trials: Mapping[str, Trial] = field(default_factory=dict)  # "model.revision" of the canary ->
    external_keys: Mapping[str, str] = field(default_factory=dict)  # a fallback's key file -> id
    external_errors: Mapping[str, str] = field(default_factory=dict)  # key file -> why not
    log_problems: Mapping[str, str] = field(default_factory=dict)  # gateway -> what went unread


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause:
    """Somebody's word, outside of git, that a model or all of them are to be left alone."""

    model: str | None  # None: all
    reason: str
    by: str
    until: float | None = None  # None: until it is taken back

    def holds(self, model: str, at: float) -> bool:
        """Whether it is about this model, now."""
        return self.model in (None, model) and (self.until is None or at < self.until)


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """What people have said outside of git, each word until a time (epoch seconds)."""

    pauses: tuple[Pause, ...] = ()
    allowed: Mapping[str, float] = field(default_factory=dict)  # model -> see allow_destroy

    def allow_destroy(self, at: float) -> frozenset[str]:
        """Return the models whose serving replicas an edit of the spec may end now."""
        return frozenset(model for model, until in self.allowed.items() if at < until)

    def current(self, at: float) -> "Orders":
        """Return what still holds."""
        return Orders(
            pauses=tuple(pause for pause in self.pauses if pause.until is None or at < pause.until),
            allowed={model: until for model, until in self.allowed.items() if at < until},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainClock:
    """Since when a leaving replica is off the gateways, and since when it has had no request."""

    since: float
    idle_since: float | None = None
    cause: Cause | None = None  # what it failed by, None if it leaves for no fault of its own


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
class Scaling:
    """How many replicas of a model are wanted, its canary's included, and since when."""

    replicas: int
    since: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """An engine's token counter, and since when it stands still although there are requests."""

    tokens: float
    since: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Maintenances:
    """When reservations for maintenance begin, and when Slurm was asked."""

    asked_at: float
    begin: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All that jobs of one revision are made of: enough for another one after the spec's edit."""

    fleet: Fleet  # with this one model, and its image, alone
    digest: str  # of the image
    program: str  # the SIF, or what is started without a container
    commit: str | None

    @classmethod
    def of(
        cls, fleet: Fleet, model: Model, *, digest: str, program: str, commit: str | None
    ) -> Self:
        """Return the recipe of a model, or of one of its variants, of a fleet."""
        return cls(fleet=fleet.only(model), digest=digest, program=program, commit=commit)

    def placed(self, slurm: Slurm) -> Self:
        """Return the same recipe for jobs that go there."""
        model = self.model.model_copy(update={"slurm": SlurmOverride()})
        fleet = self.fleet.model_copy(update={"slurm": slurm, "models": (model,)})
        return replace(self, fleet=fleet)

    @property
    def model(self) -> Model:
        return self.fleet.models[0]

    @property
    def revision(self) -> str:
        return self.model.revision(self.digest, self.fleet.replica_access)


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What one look can't show. Losing it restarts timers and nothing else."""

    misses: Mapping[JobKey, int] = field(default_factory=dict)  # failed looks in a row
    drains: Mapping[JobKey, DrainClock] = field(default_factory=dict)
    failures: Mapping[str, Failures] = field(default_factory=dict)  # "model.revision" ->
    leads: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # model -> seconds
    led: frozenset[JobKey] = frozenset()  # whose lead time is among them
    progress: Mapping[JobKey, Progress] = field(default_factory=dict)
    kept: Mapping[str, Recipe] = field(default_factory=dict)  # model -> what was ready last
    aborted: Mapping[str, Aborted] = field(default_factory=dict)  # model -> its canary
    scaled: Mapping[str, Scaling] = field(default_factory=dict)  # model -> its last change
    maintenances: Maintenances | None = None  # while jobs wait for one
    submitted: frozenset[ReplicaName] = frozenset()  # or about to be, when this was remembered
    emptied_at: float | None = None  # first look at which all known jobs were gone at once
    booted_at: float | None = None  # the clock that all these times were told by
