"""The plan: what to do now, in order, and what is not done although it differs. JSON both ways."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from reconciler.naming import ReplicaName
from reconciler.state import Aborted, JobKey, Target, Traffic, Trust


class Reason(StrEnum):
    """Why an action is taken; one per action."""

    MISSING = "missing"
    STALE = "stale"
    DUPLICATE = "duplicate"
    NOT_IN_SPEC = "not in spec"
    UNHEALTHY = "unhealthy"
    STARTUP_TIMEOUT = "startup timeout"
    SURPLUS = "surplus"
    EXPIRING = "expiring"
    MAINTENANCE = "maintenance"
    QUARANTINE_OVER = "quarantine over"
    ABORTED = "aborted"


class NoteKind(StrEnum):
    """Why something that differs is left as it is for now."""

    NO_LISTING = "no listing"
    SUSPICIOUS_LISTING = "suspicious listing"
    NO_KEYS = "no keys"
    ODD_LINES = "odd lines"
    UNKNOWN_STATE = "unknown state"
    IMAGE_UNKNOWN = "image unknown"
    SUSPENDED = "suspended"
    PAUSED = "paused"
    BACKOFF = "backoff"
    HALTED = "halted"
    QUARANTINE = "quarantine"
    GUARD = "guard"
    EXPIRING = "expiring"
    BUDGET = "budget"
    ROLLING = "rolling"
    PENDING = "pending"
    STARTING = "starting"
    SILENT = "silent"
    SICK = "sick"
    IMPOSTOR = "impostor"
    OBSERVER = "observer"
    DRAINING = "draining"
    GATEWAY = "gateway"
    LOG = "log"
    QUOTA = "quota"
    ABORTED = "aborted"
    FALLBACK = "fallback"
    LEFT_OVER = "left over"  # of the cycle itself, so never in a plan that is only looked at


# With one of these nothing at all was decided.
BLIND = frozenset({NoteKind.NO_LISTING, NoteKind.SUSPICIOUS_LISTING, NoteKind.NO_KEYS})
# With one of these, something was not seen and so nothing was decided for it (exit code 4).
UNOBSERVED = BLIND | {NoteKind.IMAGE_UNKNOWN, NoteKind.GATEWAY}


class Status(StrEnum):
    """What a replica is doing, in one word."""

    PENDING = "pending"
    STARTING = "starting"
    READY = "ready"
    SILENT = "silent"
    SICK = "sick"
    IMPOSTOR = "impostor"
    LEAVING = "leaving"
    DRAINING = "draining"
    ENDING = "ending"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRef:
    """A job, verified by all of these before anything is done to it."""

    id: int
    submitted_at: int
    name: ReplicaName

    @property
    def key(self) -> JobKey:
        return (self.id, self.submitted_at)


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """Submit one job of this name."""

    kind: Literal["submit"] = "submit"
    name: ReplicaName
    gpus: int
    reason: Reason
    walltime_s: int | None = None  # less than the spec's, so that replicas don't end together
    exclude: tuple[str, ...] = ()  # nodes in quarantine
    succeeds: JobKey | None = None  # the job that it is to replace


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Make these gateways send requests to exactly these targets."""

    kind: Literal["route"] = "route"
    gateways: tuple[str, ...]
    generation: str
    targets: tuple[Target, ...]
    added: tuple[str, ...]
    removed: tuple[str, ...]
    trust: Trust | None = None  # None: no target is protected
    exhausted: tuple[str, ...] = ()  # tenants to refuse
    external: tuple[tuple[str, str], ...] = ()  # model with a fallback, and the id of its key


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    """Tell the job's shell (USR1) to let its engine finish and end."""

    kind: Literal["drain"] = "drain"
    job: JobRef
    reason: Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """End the job now: it is pending, or past its drain timeout."""

    kind: Literal["cancel"] = "cancel"
    job: JobRef
    pending: bool
    reason: Reason


Action = Annotated[Submit | Route | Drain | Cancel, Field(discriminator="kind")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """What is held back, why, and until when (epoch seconds) if that is known."""

    kind: NoteKind
    subject: str  # a model, a replica or a gateway
    text: str
    until: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaView:
    """One live job as people see it."""

    name: ReplicaName
    job_id: int
    status: Status
    routed: bool
    current: bool  # of the wanted revision
    node: str
    address: str
    since: int | None  # when the job was submitted
    ends_at: int | None
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelView:
    """One model of the spec: how many replicas are wanted, and how many answer."""

    name: str
    revision: str | None
    wanted: int
    ready: int
    canary: str | None = None  # the revision of its canary
    wanted_since: float | None = None  # so many; None: from now on, or not known
    traffic: Traffic | None = None  # None: not known


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaving:
    """A replica that leaves, and that no gateway can send requests to any more."""

    key: JobKey
    reason: Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that one cycle decided, and what it saw of each replica."""

    fleet: str
    at: float
    actions: tuple[Action, ...]
    notes: tuple[Note, ...]
    models: tuple[ModelView, ...]
    replicas: tuple[ReplicaView, ...]
    leaving: tuple[Leaving, ...]  # whose drain clocks run
    gpus_held: int
    gpus_budget: int
    aborted: tuple[Aborted, ...] = ()  # canaries that are given up, in this cycle or before

    @property
    def observed(self) -> bool:
        """Whether all that decisions need was seen."""
        return not any(note.kind in UNOBSERVED for note in self.notes)

    @property
    def converged(self) -> bool:
        """Whether there is nothing to do and nothing to wait for."""
        left_alone = (NoteKind.SUSPENDED, NoteKind.PAUSED)
        alone = {note.subject for note in self.notes if note.kind in left_alone}
        settled = all(view.ready == view.wanted for view in self.models if view.name not in alone)
        extra = any(
            not view.current or view.status is not Status.READY or not view.routed
            for view in self.replicas
            if view.name.model not in alone
        )
        return self.observed and settled and not self.actions and not extra


_ADAPTER = TypeAdapter(Plan)
# Differences named in one line.
_SHOWN = 3


def to_json(plan: Plan) -> str:
    """Return the plan as JSON; `from_json` gives an equal plan back."""
    return _ADAPTER.dump_json(plan, indent=2).decode()


def from_json(text: str) -> Plan:
    """Return the plan that `to_json` wrote. Raises pydantic.ValidationError for anything else."""
    return _ADAPTER.validate_json(text)


def title(action: Action) -> str:
    """Return an action in a few words: what is done, and to whom."""
    match action:
        case Submit():
            return f"submit {action.name}"
        case Route():
            return f"route to {', '.join(action.gateways)}"
        case Drain() | Cancel():
            return f"{action.kind} {action.job.name}"


def differences(reviewed: Plan, now: Plan) -> str | None:
    """Return in one line how the actions of two plans differ, None if they don't.

    Their order says nothing, and neither do a submission's walltime and excluded nodes: those
    follow from the clock. A route's generation counts: it is what the gateways would run.
    """
    was, are = (Counter(map(_essence, plan.actions)) for plan in (reviewed, now))
    gone = [title(action) for action in (was - are).elements()]
    new = [title(action) for action in (are - was).elements()]
    changed = [what for what in new if what in gone]
    parts = {
        "changed": changed,
        "new": [what for what in new if what not in changed],
        "gone": [what for what in gone if what not in changed],
    }
    return "; ".join(f"{how}: {_some(what)}" for how, what in parts.items() if what) or None


def _essence(action: Action) -> Action:
    if isinstance(action, Submit):
        return replace(action, walltime_s=None, exclude=())
    return action


def _some(texts: Sequence[str]) -> str:
    """Return the first few, and how many more there are."""
    more = len(texts) - _SHOWN
    return ", ".join(texts[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def summary(plan: Plan) -> Mapping[str, int]:
    """Return how many actions of each kind the plan has, kinds without any left out."""
    counts: dict[str, int] = {}
    for action in plan.actions:
        counts[action.kind] = counts.get(action.kind, 0) + 1
    return counts
