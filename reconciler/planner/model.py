"""What one model needs: which replicas leave and why, which are submitted, what is held back."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

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
from reconciler.planner.seen import Seen, progress, serves
from reconciler.planner.views import model_view
from reconciler.rollover import last_moment, staggered
from reconciler.spec import Model, parse_duration
from reconciler.state import (
    Aborted,
    Cause,
    Health,
    Job,
    JobKey,
    Recipe,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What was decided for one model."""

    leaving: tuple[tuple[Job, Reason], ...] = ()
    submits: tuple[Submit, ...] = ()
    notes: tuple[Note, ...] = ()
    view: ModelView | None = None


def decide(model: Model, seen: Seen) -> Part:
    """Decide for one model of the spec: for its canary, and for everything else of it."""
    alone = left_alone(model.name, model.suspend, seen)
    if alone is not None:
        return Part(notes=(alone,), view=model_view(model, seen))
    unknown = [variant.image for variant, revision in seen.variants[model.name] if not revision]
    parts = [_unreadable(model, unknown[0], seen)] if unknown else []
    for case in [*_cases(model, seen)][::-1]:  # the model before its canary
        # Both may lack replicas of one revision, where what was ready last is the canary now.
        new = {submit.name.ordinal for part in parts for submit in part.submits}
        parts.append(_decide(replace(case, taken=case.taken | new)))
    if model.name in seen.aborted:
        parts.append(_given_up(seen.aborted[model.name], parts[0], seen))
    return Part(
        leaving=tuple(pair for part in parts for pair in part.leaving),
        submits=tuple(submit for part in parts for submit in part.submits),
        notes=tuple(note for part in parts for note in part.notes),
        view=model_view(model, seen),
    )


def _unreadable(model: Model, image: str, seen: Seen) -> Part:
    """Say which image can't be read. Whatever is wanted of it, what ends soon drains in time."""
    text = seen.observation.image_errors.get(image, "its image can't be read")
    note = Note(kind=NoteKind.IMAGE_UNKNOWN, subject=model.name, text=text)
    [(_, wanted), *_] = seen.variants[model.name]
    leaving = [
        (job, Reason.EXPIRING)
        for job in seen.jobs_of(model.name)
        if job.name.revision != wanted  # which is decided like any other
        and serves(job, seen)
        and not seen.is_unknown(job)
        and seen.must_go(model, job)
    ]
    return Part(leaving=tuple(leaving), notes=(note,))


def _given_up(aborted: Aborted, model: Part, seen: Seen) -> Part:
    """Let go of a canary that was given up, but for what alone serves where anybody should."""
    [(plain, _)] = seen.variants[aborted.model]
    going = {*aborted.jobs, *(job.key for job, _ in model.leaving)}
    jobs = seen.jobs_of(aborted.model)
    others = [job for job in jobs if job.key not in going]
    served = plain.replicas == 0 or any(seen.status(job) is Status.READY for job in others)
    stays = {Status.UNKNOWN, Status.ENDING} | (set() if served else {Status.READY, Status.SILENT})
    leaving = [
        (job, Reason.ABORTED)
        for job in jobs
        if job.key in aborted.jobs and seen.status(job) not in stays
    ]
    text = f"canary {aborted.revision} is given up: {aborted.why}; change it or remove it"
    note = Note(kind=NoteKind.ABORTED, subject=aborted.model, text=text)
    return Part(leaving=tuple(leaving), notes=(note,))


def left_alone(model: str, suspended: bool, seen: Seen) -> Note | None:
    """Return why nothing of a model is submitted or ended now, None if it may be."""
    if suspended:
        return Note(kind=NoteKind.SUSPENDED, subject=model, text="left alone by its spec")
    pause = seen.pause(model)
    if pause is None:
        return None
    text = f"paused by {pause.by}: {pause.reason}"
    return Note(kind=NoteKind.PAUSED, subject=model, text=text, until=pause.until)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """One revision that is wanted of a model, and the jobs that it answers for."""

    model: Model
    revision: str
    jobs: Sequence[Job]
    expiring: frozenset[JobKey]  # of these, what must have a successor now
    # While the wanted revision fails, what was ready last is replaced from its recipe: its
    # replicas reach their walltime too, and nothing else serves.
    fallback: Recipe | None
    taken: frozenset[int]  # ordinals of all live jobs of the model
    canary: bool
    seen: Seen

    @property
    def held(self) -> Note | None:
        """Why no job of the revision may be submitted now, None if it may be."""
        return _held(self.model.name, self.revision, self.seen)

    @property
    def max_unavailable(self) -> int:
        """How many may be missing for a while; none for the sake of what may not be submitted.

        The model itself has spent that for its canary, unless no other step is left: where the
        budget has no room for the canary's successor.
        """
        spent = self.canary and self.seen.gpus_free >= self.model.resources.gpus_total
        if spent or self.held is not None:
            return 0
        return self.seen.fleet.defaults.rollout.max_unavailable

    @property
    def max_surge(self) -> int:
        """How many more than are wanted; of a canary one at least, as none of it may be missing."""
        surge = self.seen.fleet.defaults.rollout.max_surge
        return max(1, surge) if self.canary else surge

    def is_current(self, job: Job) -> bool:
        return job.name.revision == self.revision and self.seen.outdated(job) is None

    def is_fallback(self, job: Job) -> bool:
        if self.fallback is None or self.seen.outdated(job) is not None:
            return False
        return job.name.revision == self.fallback.revision

    def is_expiring(self, job: Job) -> bool:
        return job.key in self.expiring

    def ready(self, jobs: Iterable[Job]) -> int:
        return sum(1 for job in jobs if self.seen.status(job) is Status.READY)


def _cases(model: Model, seen: Seen) -> Iterator[_Case]:
    """Yield the canary, and the model itself, which answers for every job that is nobody else's.

    While an image can't be read, only what is surely the model's is decided: any other job may be
    of the revision that is not known.
    """
    jobs = seen.jobs_of(model.name)
    (plain, wanted), *canaries = seen.variants[model.name]
    if wanted is None:
        return
    if any(revision is None for _, revision in canaries):
        own = [job for job in jobs if job.name.revision == wanted]
        yield _case(plain, wanted, own, None, seen)
        return
    rest = {job.key for job in jobs}
    if model.name in seen.aborted:
        rest -= {*seen.aborted[model.name].jobs}
    for canary, revision in canaries:
        canarys = seen.canary_jobs(model.name)
        rest -= {job.key for job in canarys}
        yield _case(canary, revision or "", canarys, None, seen, canary=True)
    own = [job for job in jobs if job.key in rest]
    yield _case(plain, wanted, own, seen.fallback(model, wanted), seen)


def _case(
    model: Model,
    revision: str,
    jobs: Sequence[Job],
    fallback: Recipe | None,
    seen: Seen,
    *,
    canary: bool = False,
) -> _Case:
    kept_alive = {revision} if fallback is None else {revision, fallback.revision}
    expiring = [
        seen.due(model, [job for job in jobs if job.name.revision == one])
        for one in sorted(kept_alive)
    ]
    return _Case(
        model=model,
        revision=revision,
        jobs=jobs,
        expiring=frozenset[JobKey]().union(*expiring),
        fallback=fallback,
        taken=frozenset(job.name.ordinal for job in seen.jobs_of(model.name)),
        canary=canary,
        seen=seen,
    )


def _decide(case: _Case) -> Part:
    leaving = _leaving(case)
    gone = {job.key for job, _ in leaving}
    staying = [job for job in case.jobs if job.key not in gone and serves(job, case.seen)]
    submits, notes = _missing(case, staying)
    notes += tuple(_expiring_note(case, job) for job in staying if case.is_expiring(job))
    notes += tuple(_outdated_notes(case, staying))
    return Part(leaving=tuple(leaving), submits=submits, notes=notes)


def _outdated_notes(case: _Case, staying: Iterable[Job]) -> Iterator[Note]:
    for job in staying:
        why = case.seen.outdated(job)
        if why is not None:
            text = f"{why}: it leaves when others serve in its place"
            yield Note(kind=NoteKind.ROLLING, subject=str(job.name), text=text)


def _expiring_note(case: _Case, job: Job) -> Note:
    text = "its successor is not ready yet; it goes on serving"
    drain_s = case.seen.fleet.drain_timeout_s(case.model)
    until = None if job.ends_at is None else last_moment(job.ends_at, drain_s)
    return Note(kind=NoteKind.EXPIRING, subject=str(job.name), text=text, until=until)


def _leaving(case: _Case) -> list[tuple[Job, Reason]]:
    """Return which jobs leave and why; each job once, for its first reason."""
    seen, model = case.seen, case.model
    chosen: dict[JobKey, tuple[Job, Reason]] = {}

    def choose(candidates: Iterable[Job], reason: Reason) -> None:
        for job in candidates:
            chosen.setdefault(job.key, (job, reason))

    known = [
        job for job in case.jobs if serves(job, seen) and seen.status(job) is not Status.UNKNOWN
    ]
    choose(_duplicates(known, seen), Reason.DUPLICATE)
    for job in (job for job in case.jobs if seen.status(job) is Status.DRAINING):
        choose([job], _draining_for(job, case))
    choose([job for job in known if seen.must_go(model, job)], Reason.EXPIRING)
    rest = [job for job in known if job.key not in chosen]
    current = [job for job in rest if case.is_current(job) and not case.is_expiring(job)]
    outgoing = [job for job in rest if not case.is_current(job) or case.is_expiring(job)]
    for job in (*current, *(job for job in outgoing if _comes_back(case, job))):
        fault = seen.fault(model, job)
        if fault is not None:
            choose([job], fault)
    outgoing = [job for job in outgoing if job.key not in chosen]
    returning = _returning(case, current, outgoing)
    for job in _outgoing_to_leave(case, current, [job for job in outgoing if job not in returning]):
        choose([job], Reason.EXPIRING if case.is_expiring(job) else Reason.STALE)
    healthy = [job for job in current if job.key not in chosen]
    # Nor may one go in the place of those of which this host can't tell whether they serve.
    surplus = 0 if seen.observer_suspect else max(0, len(healthy) - model.replicas)
    choose(sorted(healthy, key=lambda job: _victim_order(job, seen))[:surplus], Reason.SURPLUS)
    return list(chosen.values())


def _comes_back(case: _Case, job: Job) -> bool:
    """Whether a replica of the fallback does not serve yet."""
    starts = case.seen.status(job) in (Status.PENDING, Status.STARTING)
    return starts and case.is_fallback(job) and not case.is_expiring(job)


def _returning(case: _Case, current: Sequence[Job], outgoing: Sequence[Job]) -> list[Job]:
    """Return which replicas of the fallback that don't serve yet are still wanted."""
    candidates = [job for job in outgoing if _comes_back(case, job)]
    # What is neither wanted nor the fallback may be on its way out: it stands in for nothing.
    serving = [
        job
        for job in outgoing
        if case.seen.status(job) in (Status.READY, Status.SILENT)
        and case.is_fallback(job)
        and not case.is_expiring(job)
    ]
    wanted = case.model.replicas - case.ready(current) - len(serving)
    candidates.sort(key=lambda job: (-progress(job, case.seen), job.name))
    return candidates[: max(0, wanted)]


def _draining_for(job: Job, case: _Case) -> Reason:
    """Return why a replica drains that has been told to, as far as that is remembered."""
    cause = case.seen.clock(job).cause
    if cause is Cause.STARTUP:
        return Reason.STARTUP_TIMEOUT
    if cause is Cause.UNHEALTHY:
        return Reason.UNHEALTHY
    return Reason.SURPLUS if case.is_current(job) else Reason.STALE


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


def _outgoing_to_leave(case: _Case, current: Sequence[Job], outgoing: Sequence[Job]) -> list[Job]:
    """Return which stale and expiring replicas may leave now: those that nobody would miss.

    A silent one may still serve, so it leaves only when enough others are ready without it.
    """
    seen = case.seen
    serving = [job for job in outgoing if seen.status(job) is Status.READY]
    silent = [job for job in outgoing if seen.status(job) is Status.SILENT]
    idle = [job for job in outgoing if seen.status(job) not in (Status.READY, Status.SILENT)]
    ready = len(serving) + case.ready(current)
    spare = ready - (case.model.replicas - case.max_unavailable)
    if spare < 0 or seen.observer_suspect:
        return idle

    def order(job: Job) -> tuple[Any, ...]:
        # What has just succeeded an expiring one, be it of the fallback or as short of time itself,
        # must not go in its place.
        expiring = case.is_expiring(job)
        lasting = case.is_fallback(job) and not expiring
        ends = job.ends_at if expiring and job.ends_at is not None else 0.0
        return (lasting, ends, *_victim_order(job, seen))

    return idle + silent + sorted(serving, key=order)[:spare]


def _victim_order(job: Job, seen: Seen) -> tuple[int, bool, bool, bool, float, int, int]:
    """Sort key, first to leave first: who got least far or is silent, whose drain has begun, ..."""
    probe = seen.probe(job)
    answers = probe is not None and probe.health is Health.READY
    load = probe.ongoing if probe is not None and probe.ongoing is not None else 0
    draining = job.key in seen.memory.drains
    ends = float("inf") if job.ends_at is None else job.ends_at
    routed = job.key in seen.routed
    return (progress(job, seen), answers, not draining, routed, ends, load, -job.name.ordinal)


def _missing(case: _Case, staying: Sequence[Job]) -> tuple[tuple[Submit, ...], tuple[Note, ...]]:
    """Return the submissions that a model lacks, or the notes that say why not yet."""
    seen, model, revision = case.seen, case.model, case.revision
    returning, notes = _missing_fallback(case, staying)
    current = [job for job in staying if case.is_current(job) and not case.is_expiring(job)]
    others = [job for job in case.jobs if not case.is_current(job) and serves(job, seen)]
    need = model.replicas - len(current)
    if need <= 0:
        return returning, notes
    old = len(others) + len(returning)
    room = model.replicas + case.max_surge - len(current) - old
    count = min(need, max(0, room)) if old else need
    if case.held is not None:
        return returning, (*notes, case.held)
    if count < need:
        text = f"{need - count} more of revision {revision} follow when old replicas have left"
        notes = (*notes, Note(kind=NoteKind.ROLLING, subject=model.name, text=text))
    taken = case.taken | {submit.name.ordinal for submit in returning}
    outgoing = [job for job in staying if case.is_current(job) and case.is_expiring(job)]
    reason = Reason.STALE if old else Reason.MISSING
    # What may be tried goes first: what is kept alive would take its room in the budget for ever.
    return (*_submits(case, model, revision, count, taken, outgoing, reason), *returning), notes


def _missing_fallback(
    case: _Case, staying: Sequence[Job]
) -> tuple[tuple[Submit, ...], tuple[Note, ...]]:
    """Return what is missing of the revision that was ready last, while the wanted one fails."""
    if case.fallback is None:
        return (), ()
    lasting = [job for job in staying if not case.is_expiring(job)]
    old = [job for job in lasting if not case.is_current(job) and not case.seen.outdated(job)]
    ready = case.ready(job for job in lasting if case.is_current(job))
    # What is tried meanwhile serves nobody yet, and takes its place all the same.
    most = case.model.replicas + case.max_surge
    # Not what has just left so that the release may be tried: they would take turns for ever.
    least = case.model.replicas - case.max_unavailable
    count = min(least - ready - len(old), most - len(lasting))
    if count <= 0:
        return (), ()
    model, revision = case.fallback.model, case.fallback.revision
    held = _held(model.name, revision, case.seen)
    if held is not None:
        return (), (held,)
    outgoing = [job for job in staying if case.is_fallback(job) and case.is_expiring(job)]
    return _submits(case, model, revision, count, case.taken, outgoing, Reason.MISSING), ()


def _submits(
    case: _Case,
    model: Model,
    revision: str,
    count: int,
    taken: frozenset[int],
    outgoing: Sequence[Job],
    reason: Reason,
) -> tuple[Submit, ...]:
    """Return so many submissions of a revision; the first ones succeed what is outgoing of it."""
    seen = case.seen
    predecessors = _without_successor(outgoing, case.jobs)
    free = [ordinal for ordinal in range(len(taken) + count) if ordinal not in taken]
    return tuple(
        Submit(
            name=ReplicaName(
                fleet=seen.fleet.fleet, model=model.name, revision=revision, ordinal=ordinal
            ),
            gpus=model.resources.gpus_total,
            reason=Reason.EXPIRING if at < len(predecessors) else reason,
            walltime_s=_walltime_s(model, ordinal, seen),
            exclude=_excluded(model, revision, seen),
            succeeds=predecessors[at].key if at < len(predecessors) else None,
        )
        for at, ordinal in enumerate(free[:count])
    )


def _held(model: str, revision: str, seen: Seen) -> Note | None:
    """Return why no job of this revision may be submitted now, or None."""
    failures = seen.memory.failures.get(f"{model}.{revision}")
    until = backoff_until(failures)
    if failures is None or until <= seen.at:
        return None
    bad = halted(failures)
    if bad is not None:
        text = f"revision {revision} is halted: {bad}; what serves goes on serving"
        return Note(kind=NoteKind.HALTED, subject=model, text=text, until=until)
    last = f", the last: {failures.recent[-1].cause}" if failures.recent else ""
    times = "1 failure" if failures.count == 1 else f"{failures.count} failures"
    text = f"held: {times} on revision {revision}{last}"
    return Note(kind=NoteKind.BACKOFF, subject=model, text=text, until=until)


def _without_successor(expiring: Sequence[Job], jobs: Sequence[Job]) -> list[Job]:
    """Return the expiring jobs that no live job names as its predecessor, soonest end first."""
    succeeded = {job.comment.succeeds for job in jobs if job.comment is not None}
    open_ = [job for job in expiring if job.key not in succeeded]
    return sorted(open_, key=lambda job: (job.ends_at or float("inf"), job.key))


def _excluded(model: Model, revision: str, seen: Seen) -> tuple[str, ...]:
    """Return the nodes to avoid. sbatch refuses names that it does not know, and no node at all."""
    failures = seen.memory.failures.get(f"{model.name}.{revision}")
    if failures is not None and failures.recent and failures.recent[-1].cause is Cause.REFUSED:
        return ()
    known = seen.observation.nodes
    avoided = [node for node in seen.quarantined if known is None or node in known]
    return () if known is not None and len(avoided) == len(known) else tuple(avoided)


def _walltime_s(model: Model, ordinal: int, seen: Seen) -> int:
    """Return the walltime of one replica's job; while Slurm holds jobs back, until maintenance."""
    fleet = seen.fleet
    # Where a job goes is no part of its revision: of what was kept too the spec says it now.
    walltime_s = parse_duration(fleet.slurm_for(seen.models[model.name]).walltime)
    floor_s = fleet.least_walltime_s(model)
    walltime_s = min(walltime_s, staggered(walltime_s, ordinal, floor_s=floor_s))
    left_s = seen.before_maintenance_s()
    if left_s is None or left_s < floor_s:
        return walltime_s
    return min(walltime_s, int(left_s))
