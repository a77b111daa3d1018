"""What one model needs: which replicas leave and why, which are submitted, what is held back."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from reconciler.failures import backoff_until, halted
from reconciler.naming import ReplicaName
from reconciler.plan import (
    ModelView,
    Note,
    NoteKind,
    Reason,
    Status,
    Submit,
)
from reconciler.planner.seen import Seen, drain_has_begun, progress, serves
from reconciler.planner.views import model_view
from reconciler.rollover import MARGIN_S, last_moment, staggered
from reconciler.spec import Model, parse_duration
from reconciler.state import (
    Job,
    JobKey,
)

MISSES_TO_REPLACE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What was decided for one model."""

    leaving: tuple[tuple[Job, Reason], ...] = ()
    submits: tuple[Submit, ...] = ()
    notes: tuple[Note, ...] = ()
    view: ModelView | None = None


def decide(model: Model, seen: Seen) -> Part:
    """Decide for one model of the spec."""
    jobs = seen.jobs_of(model.name)
    revision = seen.revisions[model.name]
    if revision is None:
        text = seen.observation.image_errors.get(model.image, "its image can't be read")
        note = Note(kind=NoteKind.IMAGE_UNKNOWN, subject=model.name, text=text)
        return Part(notes=(note,), view=model_view(model, None, jobs, seen))
    view = model_view(model, revision, jobs, seen)
    if model.suspend:
        note = Note(kind=NoteKind.SUSPENDED, subject=model.name, text="left alone by its spec")
        return Part(notes=(note,), view=view)
    expiring = seen.due(model, [job for job in jobs if job.name.revision == revision])
    leaving = _leaving(model, revision, jobs, expiring, seen)
    gone = {job.key for job, _ in leaving}
    staying = [job for job in jobs if job.key not in gone and serves(job, seen)]
    submits, notes = _missing(model, revision, jobs, staying, expiring, seen)
    notes += tuple(_expiring_note(model, job, seen) for job in staying if job.key in expiring)
    return Part(leaving=tuple(leaving), submits=submits, notes=notes, view=view)


def _expiring_note(model: Model, job: Job, seen: Seen) -> Note:
    text = "its successor is not ready yet; it goes on serving"
    drain_s = seen.fleet.drain_timeout_s(model)
    until = None if job.ends_at is None else last_moment(job.ends_at, drain_s)
    return Note(kind=NoteKind.EXPIRING, subject=str(job.name), text=text, until=until)


def _leaving(
    model: Model, revision: str, jobs: Sequence[Job], expiring: frozenset[JobKey], seen: Seen
) -> list[tuple[Job, Reason]]:
    """Return which jobs of a model leave and why; each job once, for its first reason."""
    chosen: dict[JobKey, tuple[Job, Reason]] = {}

    def choose(candidates: Iterable[Job], reason: Reason) -> None:
        for job in candidates:
            chosen.setdefault(job.key, (job, reason))

    known = [job for job in jobs if serves(job, seen) and seen.status(job) is not Status.UNKNOWN]
    choose(_duplicates(known, seen), Reason.DUPLICATE)
    for job in (job for job in jobs if seen.status(job) is Status.DRAINING):
        choose([job], Reason.SURPLUS if job.name.revision == revision else Reason.STALE)
    choose([job for job in known if seen.must_go(model, job)], Reason.EXPIRING)
    rest = [job for job in known if job.key not in chosen]
    current = [job for job in rest if job.name.revision == revision and job.key not in expiring]
    outgoing = [job for job in rest if job.name.revision != revision or job.key in expiring]
    for job in _outgoing_to_leave(model, current, outgoing, seen):
        choose([job], Reason.EXPIRING if job.key in expiring else Reason.STALE)
    choose([job for job in current if _is_unhealthy(job, seen)], Reason.UNHEALTHY)
    choose([job for job in current if _is_late(model, job, seen)], Reason.STARTUP_TIMEOUT)
    healthy = [job for job in current if job.key not in chosen]
    surplus = max(0, len(healthy) - model.replicas)
    choose(sorted(healthy, key=lambda job: _victim_order(job, seen))[:surplus], Reason.SURPLUS)
    return list(chosen.values())


def _duplicates(jobs: Sequence[Job], seen: Seen) -> list[Job]:
    """Return all but the best job of each name: the one that got furthest, then the oldest."""
    of_name: dict[ReplicaName, list[Job]] = {}
    for job in jobs:
        of_name.setdefault(job.name, []).append(job)
    extra: list[Job] = []
    for same in of_name.values():
        same.sort(key=lambda job: (-progress(job, seen), job.submitted_at, job.id))
        extra += same[1:]
    return extra


def _outgoing_to_leave(
    model: Model, current: Sequence[Job], outgoing: Sequence[Job], seen: Seen
) -> list[Job]:
    """Return which stale and expiring replicas may leave now: those that nobody would miss.

    A silent one may still serve, so it leaves only when enough others are ready without it.
    """
    serving = [job for job in outgoing if seen.status(job) is Status.READY]
    silent = [job for job in outgoing if seen.status(job) is Status.SILENT]
    idle = [job for job in outgoing if seen.status(job) not in (Status.READY, Status.SILENT)]
    ready = len(serving) + sum(1 for job in current if seen.status(job) is Status.READY)
    spare = ready - (model.replicas - seen.fleet.defaults.rollout.max_unavailable)
    if spare < 0:
        return idle
    return idle + silent + sorted(serving, key=lambda job: _victim_order(job, seen))[:spare]


def _is_unhealthy(job: Job, seen: Seen) -> bool:
    evident = seen.status(job) in (Status.SICK, Status.IMPOSTOR)
    return evident and (seen.misses(job) >= MISSES_TO_REPLACE or seen.hung(job))


def _is_late(model: Model, job: Job, seen: Seen) -> bool:
    if seen.status(job) is not Status.STARTING or job.started_at is None:
        return False
    return seen.at - job.started_at > seen.fleet.startup_timeout_s(model)


def _victim_order(job: Job, seen: Seen) -> tuple[int, bool, bool, float, int, int]:
    """Sort key, first to leave first: who got least far, then whose drain has begun, and so on."""
    probe = seen.probe(job)
    load = probe.ongoing if probe is not None and probe.ongoing is not None else 0
    draining = job.key in seen.memory.drains
    ends = float("inf") if job.ends_at is None else job.ends_at
    routed = job.key in seen.routed
    return (progress(job, seen), not draining, routed, ends, load, -job.name.ordinal)


def _missing(
    model: Model,
    revision: str,
    jobs: Sequence[Job],
    staying: Sequence[Job],
    expiring: frozenset[JobKey],
    seen: Seen,
) -> tuple[tuple[Submit, ...], tuple[Note, ...]]:
    """Return the submissions that a model lacks, or the note that says why not yet."""
    ours = [job for job in staying if job.name.revision == revision]
    current = [job for job in ours if job.key not in expiring]
    others = [job for job in jobs if job.name.revision != revision and serves(job, seen)]
    need = model.replicas - len(current)
    if need <= 0:
        return (), ()
    room = model.replicas + seen.fleet.defaults.rollout.max_surge - len(current) - len(others)
    count = min(need, max(0, room)) if others else need
    notes = []
    if count < need:
        text = f"{need - count} more of revision {revision} follow when old replicas have left"
        notes.append(Note(kind=NoteKind.ROLLING, subject=model.name, text=text))
    held = _held(model, revision, seen)
    if held is not None:
        return (), (*notes, held)
    names = _free_names(model, revision, jobs, count, seen)
    predecessors = _without_successor([job for job in ours if job.key in expiring], jobs)
    reasons = [Reason.EXPIRING] * len(predecessors) + [
        Reason.STALE if others else Reason.MISSING
    ] * count
    return tuple(
        Submit(
            name=name,
            gpus=model.resources.gpus,
            reason=reasons[at],
            walltime_s=_walltime_s(model, name.ordinal, seen),
            exclude=tuple(seen.quarantined),
            succeeds=predecessors[at].key if at < len(predecessors) else None,
        )
        for at, name in enumerate(names)
    ), tuple(notes)


def _held(model: Model, revision: str, seen: Seen) -> Note | None:
    """Return why no job of this revision may be submitted now, or None."""
    failures = seen.memory.failures.get(f"{model.name}.{revision}")
    until = backoff_until(failures)
    if failures is None or until <= seen.at:
        return None
    bad = halted(failures)
    if bad is not None:
        text = f"revision {revision} is halted: {bad}; what serves goes on serving"
        return Note(kind=NoteKind.HALTED, subject=model.name, text=text, until=until)
    last = f", the last: {failures.recent[-1].cause}" if failures.recent else ""
    times = "1 failure" if failures.count == 1 else f"{failures.count} failures"
    text = f"held: {times} on revision {revision}{last}"
    return Note(kind=NoteKind.BACKOFF, subject=model.name, text=text, until=until)


def _free_names(
    model: Model, revision: str, jobs: Sequence[Job], count: int, seen: Seen
) -> list[ReplicaName]:
    """Return so many names with the lowest ordinals that no live job of the model holds."""
    taken = {job.name.ordinal for job in jobs}
    free = [ordinal for ordinal in range(len(taken) + count) if ordinal not in taken]
    return [
        ReplicaName(fleet=seen.fleet.fleet, model=model.name, revision=revision, ordinal=ordinal)
        for ordinal in free[:count]
    ]


def _without_successor(expiring: Sequence[Job], jobs: Sequence[Job]) -> list[Job]:
    """Return the expiring jobs that no live job names as its predecessor, soonest end first."""
    succeeded = {job.comment.succeeds for job in jobs if job.comment is not None}
    open_ = [job for job in expiring if job.key not in succeeded]
    return sorted(open_, key=lambda job: (job.ends_at or float("inf"), job.key))


def _walltime_s(model: Model, ordinal: int, seen: Seen) -> int:
    fleet = seen.fleet
    floor_s = fleet.startup_timeout_s(model) + fleet.drain_timeout_s(model) + round(MARGIN_S)
    walltime_s = parse_duration(fleet.slurm_for(model).walltime)
    return min(walltime_s, staggered(walltime_s, ordinal, floor_s=floor_s))


def not_in_spec(seen: Seen, allow_destroy: frozenset[str]) -> Part:
    """Let go of jobs whose model is gone from the spec; serving ones only when told by name."""
    known = {model.name for model in seen.fleet.models}
    gone = [
        job
        for job in seen.live
        if job.name.model not in known and seen.status(job) not in (Status.ENDING, Status.UNKNOWN)
    ]
    guarded = {job.name.model for job in gone if _is_guarded(job, seen)} - allow_destroy
    notes = [
        Note(
            kind=NoteKind.GUARD,
            subject=name,
            text=f"gone from the spec, and it serves or is protected; "
            f"to end it: apply --allow-destroy {name}",
        )
        for name in sorted(guarded)
    ]
    free = (job for job in gone if job.name.model not in guarded or drain_has_begun(job, seen))
    return Part(
        leaving=tuple((job, Reason.NOT_IN_SPEC) for job in free),
        notes=tuple(notes),
    )


def _is_guarded(job: Job, seen: Seen) -> bool:
    if drain_has_begun(job, seen):
        return False
    protected = job.comment is not None and job.comment.protect
    return protected or seen.status(job) is Status.READY or job.key in seen.routed
