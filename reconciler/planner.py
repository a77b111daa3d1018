"""plan(): from what is wanted, seen and remembered to what to do now. Pure.

Jobs are classified once, into sets that never change; then the plan is filled in a fixed order:
gaps, duplicates, not in the spec, stale, unhealthy, surplus, missing, routes, and last what each
leaving replica's next step is.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from reconciler.failures import backoff_until, halted, quarantined
from reconciler.memory import CONFIRM_S, unconfirmed
from reconciler.naming import ReplicaName
from reconciler.plan import (
    Action,
    Cancel,
    Drain,
    JobRef,
    ModelView,
    Note,
    NoteKind,
    Plan,
    Reason,
    ReplicaView,
    Route,
    Status,
    Submit,
)
from reconciler.rollover import MARGIN_S, due, last_moment, staggered
from reconciler.routes import render_gateway
from reconciler.spec import Fleet, Model, parse_duration
from reconciler.state import (
    DrainClock,
    Health,
    Job,
    JobKey,
    Memory,
    Observation,
    Phase,
    Probe,
    Target,
)

# Two looks without an answer and a replica leaves the upstreams; it takes more to replace it.
MISSES_TO_DEROUTE = 2
MISSES_TO_REPLACE = 4
# vLLM answers /health while it is hung; a token takes milliseconds, a long prompt some seconds.
HUNG_S = 120.0
# The longest upload (client_body_timeout 60 s) could still reach an old worker's upstream, and
# the retry window comes on top.
IDLE_HOLD_S = 90.0

# Slurm's reasons that no waiting resolves (squeue(1) "JOB REASON CODES").
_NEVER_STARTS = frozenset(
    {"BadConstraints", "PartitionTimeLimit", "PartitionNodeLimit", "AssocMaxJobsLimit"}
    | {"InvalidAccount", "InvalidQOS", "JobHeldUser", "JobHeldAdmin", "AccountNotAllowed"}
    | {"launch failed requeued held", "QOSNotAllowed", "DependencyNeverSatisfied"}
)


def plan(
    fleet: Fleet,
    observation: Observation,
    memory: Memory,
    allow_destroy: frozenset[str] = frozenset(),
) -> Plan:
    """Return what to do now. Same input, same plan.

    `allow_destroy` names the models whose serving replicas may end because their block is gone.
    Without a job listing that can be trusted the plan is empty but for its notes: unknown is never
    taken for absent.
    """
    blind = _gaps(observation, memory)
    if blind:
        return _empty_plan(fleet, observation, blind)
    seen = _Seen(fleet, observation, memory)
    parts = [_decide(model, seen) for model in fleet.models]
    parts.append(_not_in_spec(seen, allow_destroy))
    leaving = {job.key: reason for part in parts for job, reason in part.leaving}
    submits, budget_notes = _within_budget(fleet, seen, parts)
    targets = _targets(seen, leaving)
    routes, route_notes = _route(fleet, seen, targets)
    steps, step_notes = _steps(seen, leaving)
    notes = [note for part in parts for note in part.notes] + budget_notes + route_notes
    return Plan(
        fleet=fleet.fleet,
        at=observation.at,
        actions=(*submits, *routes, *steps),
        notes=tuple(notes + step_notes + _observation_notes(seen, leaving)),
        models=tuple(part.view for part in parts if part.view is not None),
        replicas=tuple(_view(job, seen, leaving) for job in seen.live),
        leaving=tuple(
            job.key for job in seen.live if job.key in leaving and not seen.may_get_requests(job)
        ),
        gpus_held=seen.gpus_held,
        gpus_budget=fleet.budget.gpus,
    )


def _gaps(observation: Observation, memory: Memory) -> tuple[Note, ...]:
    """Return notes if the listing is missing or not to be trusted yet."""
    if observation.jobs is None:
        text = (
            f"{observation.jobs_error or 'Slurm did not answer'}; nothing is submitted or cancelled"
        )
        return (Note(kind=NoteKind.NO_LISTING, subject="slurm", text=text),)
    if memory.emptied_at is not None and unconfirmed(memory, observation.at):
        return (
            Note(
                kind=NoteKind.SUSPICIOUS_LISTING,
                subject="slurm",
                text="every known job is gone at once; looking again before believing it",
                until=memory.emptied_at + CONFIRM_S,
            ),
        )
    return ()


def _empty_plan(fleet: Fleet, observation: Observation, notes: tuple[Note, ...]) -> Plan:
    return Plan(
        fleet=fleet.fleet,
        at=observation.at,
        actions=(),
        notes=notes,
        models=tuple(
            ModelView(name=model.name, revision=None, wanted=model.replicas, ready=0)
            for model in fleet.models
        ),
        replicas=(),
        leaving=(),
        gpus_held=0,
        gpus_budget=fleet.budget.gpus,
    )


class _Seen:
    """The observation, classified once. Read-only after construction."""

    def __init__(self, fleet: Fleet, observation: Observation, memory: Memory) -> None:
        self.fleet = fleet
        self.observation = observation
        self.memory = memory
        self.at = observation.at
        # Adapters leave foreign jobs out; that nothing is ever done to one does not rest on it.
        ours = (job for job in observation.jobs or () if job.name.fleet == fleet.fleet)
        self.live = tuple(
            sorted(
                (job for job in ours if job.phase is not Phase.ENDED),
                key=lambda job: (job.name, job.key),
            )
        )
        self.routed: Mapping[JobKey, Target] = {
            target.key: target for view in observation.gateways for target in view.targets
        }
        self.quarantined = quarantined(memory, observation.at)
        self.routed_addresses = frozenset(target.address for target in self.routed.values())
        self.observer_suspect = self._observer_suspect()
        self.statuses = {job.key: self._status(job) for job in self.live}
        # Once for all jobs: a search for each would cost models times jobs.
        self.models = {model.name: model for model in fleet.models}
        self.revisions = {
            model.name: _revision(model, observation.image_digests) for model in fleet.models
        }
        self._jobs_of: dict[str, list[Job]] = {}
        for job in self.live:
            self._jobs_of.setdefault(job.name.model, []).append(job)
        self.gpus_held = sum(self._gpus(job) for job in self.live)

    def jobs_of(self, model: str) -> Sequence[Job]:
        """Return the live jobs that bear a model's name, of any revision."""
        return self._jobs_of.get(model, ())

    def status(self, job: Job) -> Status:
        return self.statuses[job.key]

    def probe(self, job: Job) -> Probe | None:
        return self.observation.probes.get(job.key)

    def misses(self, job: Job) -> int:
        return self.memory.misses.get(job.key, 0)

    def hung(self, job: Job) -> bool:
        """Whether it has had requests for long, and not one token came of them."""
        progress = self.memory.progress.get(job.key)
        return progress is not None and self.at - progress.since >= HUNG_S

    def due(self, model: Model, jobs: Sequence[Job]) -> frozenset[JobKey]:
        """Return which of a model's jobs of one revision must have a successor now."""
        headroom = self.fleet.budget.gpus - self.gpus_held
        return due(
            jobs,
            at=self.at,
            leads=self.memory.leads.get(model.name, ()),
            drain_timeout_s=self.fleet.drain_timeout_s(model),
            slots=headroom // model.resources.gpus_total,
            nodes=self.observation.nodes or {},
        )

    def must_go(self, model: Model, job: Job) -> bool:
        """Whether only the drain is left of its walltime."""
        if job.ends_at is None or job.phase is not Phase.RUNNING:
            return False
        return self.at >= last_moment(job.ends_at, self.fleet.drain_timeout_s(model))

    def clock(self, job: Job) -> DrainClock:
        return self.memory.drains.get(job.key) or DrainClock(since=self.at)

    def is_routed(self, job: Job) -> bool:
        """Whether a gateway routes to it: requeued, it may have another key at its old address."""
        address = job.run.address if job.run is not None else None
        return job.key in self.routed or address in self.routed_addresses

    def may_get_requests(self, job: Job) -> bool:
        """Whether it answers, and a gateway routes to it or can't be asked whether it does."""
        serves = self.status(job) in (Status.READY, Status.SILENT)
        views = self.observation.gateways
        return serves and (self.is_routed(job) or any(view.error for view in views))

    def _observer_suspect(self) -> bool:
        """Most routed replicas silent at once: suspect the network here, not the fleet."""
        probes = [self.observation.probes.get(key) for key in self.routed]
        silent = sum(1 for probe in probes if probe is not None and probe.health is Health.SILENT)
        return silent >= 2 and 2 * silent > len(probes)

    def _status(self, job: Job) -> Status:
        if job.phase is Phase.PENDING:
            return Status.PENDING
        if job.phase is Phase.ENDING:
            return Status.ENDING
        if job.phase is Phase.UNKNOWN or job.comment is None:
            return Status.UNKNOWN
        if job.run is not None and job.run.draining:
            return Status.DRAINING
        return self._answering(job)

    def _answering(self, job: Job) -> Status:
        probe = self.probe(job)
        if probe is None or job.run is None:
            return Status.STARTING
        if probe.health is Health.READY:
            return Status.SICK if self.hung(job) else Status.READY
        if probe.health is Health.IMPOSTOR:
            return Status.IMPOSTOR
        # At another address, as after a requeue, it has everything to prove again.
        routed = self.routed.get(job.key)
        was_ready = routed is not None and routed.address == job.run.address
        if was_ready and (self.misses(job) < MISSES_TO_DEROUTE or self.observer_suspect):
            return Status.READY
        if probe.health is Health.SILENT:
            return Status.SILENT if was_ready or job.run.ready_at else Status.STARTING
        if probe.health is Health.STARTING and job.run.ready_at is None:
            return Status.STARTING
        return Status.SICK

    def _gpus(self, job: Job) -> int:
        """GPUs that count against the budget; what is unreadable counts as the spec says."""
        if job.phase is Phase.ENDING and self._node_is_down(job):
            return 0  # it serves nobody, and a dead node must not block its own replacement
        if job.comment is not None:
            return job.comment.gpus
        model = self.models.get(job.name.model)
        return model.resources.gpus_total if model else 1

    def _node_is_down(self, job: Job) -> bool:
        # Of a job that ends Slurm lists the nodes that it still holds.
        words = [(self.observation.nodes or {}).get(name, "") for name in job.node_names]
        return bool(words) and all(w.startswith("down") or w.endswith("*") for w in words)


def _revision(model: Model, digests: Mapping[str, str]) -> str | None:
    """Return the revision that is wanted of a model, None while its image can't be read."""
    digest = digests.get(model.image)
    return None if digest is None else model.revision(digest)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """What was decided for one model."""

    leaving: tuple[tuple[Job, Reason], ...] = ()
    submits: tuple[Submit, ...] = ()
    notes: tuple[Note, ...] = ()
    view: ModelView | None = None


def _decide(model: Model, seen: _Seen) -> _Part:
    """Decide for one model of the spec."""
    jobs = seen.jobs_of(model.name)
    revision = seen.revisions[model.name]
    if revision is None:
        text = seen.observation.image_errors.get(model.image, "its image can't be read")
        note = Note(kind=NoteKind.IMAGE_UNKNOWN, subject=model.name, text=text)
        return _Part(notes=(note,), view=_model_view(model, None, jobs, seen))
    view = _model_view(model, revision, jobs, seen)
    if model.suspend:
        note = Note(kind=NoteKind.SUSPENDED, subject=model.name, text="left alone by its spec")
        return _Part(notes=(note,), view=view)
    expiring = seen.due(model, [job for job in jobs if job.name.revision == revision])
    leaving = _leaving(model, revision, jobs, expiring, seen)
    gone = {job.key for job, _ in leaving}
    staying = [job for job in jobs if job.key not in gone and _serves(job, seen)]
    submits, notes = _missing(model, revision, jobs, staying, expiring, seen)
    notes += tuple(_expiring_note(model, job, seen) for job in staying if job.key in expiring)
    return _Part(leaving=tuple(leaving), submits=submits, notes=notes, view=view)


def _expiring_note(model: Model, job: Job, seen: _Seen) -> Note:
    text = "its successor is not ready yet; it goes on serving"
    drain_s = seen.fleet.drain_timeout_s(model)
    until = None if job.ends_at is None else last_moment(job.ends_at, drain_s)
    return Note(kind=NoteKind.EXPIRING, subject=str(job.name), text=text, until=until)


def _model_view(model: Model, revision: str | None, jobs: Sequence[Job], seen: _Seen) -> ModelView:
    ready = sum(1 for job in jobs if seen.status(job) is Status.READY)
    return ModelView(name=model.name, revision=revision, wanted=model.replicas, ready=ready)


def _serves(job: Job, seen: _Seen) -> bool:
    """Whether the job serves or is going to: it counts as a replica that we have."""
    return seen.status(job) not in (Status.DRAINING, Status.ENDING)


def _leaving(
    model: Model, revision: str, jobs: Sequence[Job], expiring: frozenset[JobKey], seen: _Seen
) -> list[tuple[Job, Reason]]:
    """Return which jobs of a model leave and why; each job once, for its first reason."""
    chosen: dict[JobKey, tuple[Job, Reason]] = {}

    def choose(candidates: Iterable[Job], reason: Reason) -> None:
        for job in candidates:
            chosen.setdefault(job.key, (job, reason))

    known = [job for job in jobs if _serves(job, seen) and seen.status(job) is not Status.UNKNOWN]
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


def _duplicates(jobs: Sequence[Job], seen: _Seen) -> list[Job]:
    """Return all but the best job of each name: the one that got furthest, then the oldest."""
    of_name: dict[ReplicaName, list[Job]] = {}
    for job in jobs:
        of_name.setdefault(job.name, []).append(job)
    extra: list[Job] = []
    for same in of_name.values():
        same.sort(key=lambda job: (-_progress(job, seen), job.submitted_at, job.id))
        extra += same[1:]
    return extra


def _outgoing_to_leave(
    model: Model, current: Sequence[Job], outgoing: Sequence[Job], seen: _Seen
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


def _is_unhealthy(job: Job, seen: _Seen) -> bool:
    evident = seen.status(job) in (Status.SICK, Status.IMPOSTOR)
    return evident and (seen.misses(job) >= MISSES_TO_REPLACE or seen.hung(job))


def _is_late(model: Model, job: Job, seen: _Seen) -> bool:
    if seen.status(job) is not Status.STARTING or job.started_at is None:
        return False
    return seen.at - job.started_at > seen.fleet.startup_timeout_s(model)


def _progress(job: Job, seen: _Seen) -> int:
    order = (Status.PENDING, Status.STARTING, Status.SICK, Status.SILENT, Status.READY)
    status = seen.status(job)
    return order.index(status) if status in order else 0


def _victim_order(job: Job, seen: _Seen) -> tuple[int, bool, bool, float, int, int]:
    """Sort key, first to leave first: who got least far, then whose drain has begun, and so on."""
    probe = seen.probe(job)
    load = probe.ongoing if probe is not None and probe.ongoing is not None else 0
    draining = job.key in seen.memory.drains
    ends = float("inf") if job.ends_at is None else job.ends_at
    routed = job.key in seen.routed
    return (_progress(job, seen), not draining, routed, ends, load, -job.name.ordinal)


def _missing(
    model: Model,
    revision: str,
    jobs: Sequence[Job],
    staying: Sequence[Job],
    expiring: frozenset[JobKey],
    seen: _Seen,
) -> tuple[tuple[Submit, ...], tuple[Note, ...]]:
    """Return the submissions that a model lacks, or the note that says why not yet."""
    ours = [job for job in staying if job.name.revision == revision]
    current = [job for job in ours if job.key not in expiring]
    others = [job for job in jobs if job.name.revision != revision and _serves(job, seen)]
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
            gpus=model.resources.gpus_total,
            reason=reasons[at],
            walltime_s=_walltime_s(model, name.ordinal, seen),
            exclude=tuple(seen.quarantined),
            succeeds=predecessors[at].key if at < len(predecessors) else None,
        )
        for at, name in enumerate(names)
    ), tuple(notes)


def _held(model: Model, revision: str, seen: _Seen) -> Note | None:
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
    model: Model, revision: str, jobs: Sequence[Job], count: int, seen: _Seen
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


def _walltime_s(model: Model, ordinal: int, seen: _Seen) -> int:
    fleet = seen.fleet
    floor_s = fleet.startup_timeout_s(model) + fleet.drain_timeout_s(model) + round(MARGIN_S)
    walltime_s = parse_duration(fleet.slurm_for(model).walltime)
    return min(walltime_s, staggered(walltime_s, ordinal, floor_s=floor_s))


def _not_in_spec(seen: _Seen, allow_destroy: frozenset[str]) -> _Part:
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
    free = (job for job in gone if job.name.model not in guarded or _drain_has_begun(job, seen))
    return _Part(
        leaving=tuple((job, Reason.NOT_IN_SPEC) for job in free),
        notes=tuple(notes),
    )


def _drain_has_begun(job: Job, seen: _Seen) -> bool:
    """Whether a drain was allowed once: it goes on, nobody should have to say it twice."""
    return job.key in seen.memory.drains or seen.status(job) is Status.DRAINING


def _is_guarded(job: Job, seen: _Seen) -> bool:
    if _drain_has_begun(job, seen):
        return False
    protected = job.comment is not None and job.comment.protect
    return protected or seen.status(job) is Status.READY or job.key in seen.routed


def _within_budget(
    fleet: Fleet, seen: _Seen, parts: Iterable[_Part]
) -> tuple[list[Submit], list[Note]]:
    """Return the submissions that fit the budget, in the spec's order, and notes for the rest."""
    held = seen.gpus_held
    fit: list[Submit] = []
    notes: list[Note] = []
    for part in parts:
        for submit in part.submits:
            if held + submit.gpus <= fleet.budget.gpus:
                held += submit.gpus
                fit.append(submit)
            else:
                text = (
                    f"needs {submit.gpus} GPUs; {held} of the budget's {fleet.budget.gpus} are held"
                )
                note = Note(kind=NoteKind.BUDGET, subject=str(submit.name), text=text)
                notes.append(note)
    return fit, notes


def _targets(seen: _Seen, leaving: Mapping[JobKey, Reason]) -> list[Target]:
    """Return who gets requests: who is ready and stays, and as it was who can't be judged."""
    targets = []
    routed = {target.job_id: target for target in seen.routed.values()}
    for job in seen.live:
        if job.key in leaving:
            continue
        status = seen.status(job)
        if status is Status.READY and job.run is not None:
            targets.append(
                Target(
                    model=job.name.model,
                    job_id=job.id,
                    submitted_at=job.submitted_at,
                    address=job.run.address,
                )
            )
        elif status is Status.UNKNOWN and job.id in routed:
            targets.append(routed[job.id])  # by its id: its submit time may be what is unreadable
    return targets


def _route(fleet: Fleet, seen: _Seen, targets: list[Target]) -> tuple[list[Action], list[Note]]:
    """Return the change for every gateway that runs something else; notes for the unreachable."""
    wanted = render_gateway(fleet, targets).generation
    views = seen.observation.gateways
    notes = [
        Note(kind=NoteKind.GATEWAY, subject=view.name, text=view.error)
        for view in views
        if view.error is not None
    ]
    behind = [view for view in views if view.error is None and view.generation != wanted]
    if not behind:
        return [], notes
    before = {str(target.job_id) for view in behind for target in view.targets}
    after = {str(target.job_id) for target in targets}
    return [
        Route(
            gateways=tuple(view.name for view in behind),
            generation=wanted,
            targets=tuple(sorted(targets)),
            added=tuple(sorted(after - before)),
            removed=tuple(sorted(before - after)),
        )
    ], notes


def _steps(seen: _Seen, leaving: Mapping[JobKey, Reason]) -> tuple[list[Action], list[Note]]:
    """Return the next step of each leaving replica, or the note of what it waits for."""
    actions: list[Action] = []
    notes: list[Note] = []
    for job in seen.live:
        if job.key not in leaving:
            continue
        ref = JobRef(id=job.id, submitted_at=job.submitted_at, name=job.name)
        reason = leaving[job.key]
        model = seen.models.get(job.name.model)
        timeout_s = (
            seen.fleet.drain_timeout_s(model) if model else seen.fleet.defaults.drain_timeout_s
        )
        # The time to drain begins when no request can come any more.
        deadline = None if seen.may_get_requests(job) else seen.clock(job).since + timeout_s
        waits_for = _waits_for(job, seen)
        if job.phase is Phase.PENDING or (deadline is not None and seen.at >= deadline):
            actions.append(Cancel(job=ref, pending=job.phase is Phase.PENDING, reason=reason))
        elif waits_for is None:
            actions.append(Drain(job=ref, reason=reason))
        else:
            text = f"leaving ({reason}): {waits_for}"
            note = Note(kind=NoteKind.DRAINING, subject=str(job.name), text=text, until=deadline)
            notes.append(note)
    return actions, notes


def _waits_for(job: Job, seen: _Seen) -> str | None:
    """Return what must happen before the replica may be told to end, or None if it may now."""
    run = job.run
    if run is not None and run.draining:
        return "its engine finishes its requests"
    if run is None or not run.trap_ready:
        return "its job has not said yet that it can drain"
    views = seen.observation.gateways
    for view in views:
        if view.error is not None:
            return f"gateway {view.name} may still route to it: {view.error}"
    if seen.is_routed(job):
        return "it leaves the gateways first"
    if run.ready_at is None and seen.status(job) is Status.STARTING:
        return None  # never ready, so never routed: no request can be on its way
    for view in views:
        if view.generation is None:
            # A change was cut short: what a start of NGINX would read may still route to it.
            return f"gateway {view.name} is in the middle of a change"
    idle_since = seen.clock(job).idle_since
    idle = idle_since is not None and seen.at - idle_since >= IDLE_HOLD_S
    busy = [view.name for view in views if view.old_workers]
    if busy and not idle:
        return f"old workers of gateway {', '.join(busy)} still finish requests"
    return None


def _observation_notes(seen: _Seen, leaving: Mapping[JobKey, Reason]) -> list[Note]:
    """Return what the look itself showed; what leaves has its step or its note already."""
    notes = []
    if seen.observation.odd_lines:
        count = seen.observation.odd_lines
        text = f"{count} of squeue's lines could not be read; those jobs are left alone"
        notes.append(Note(kind=NoteKind.ODD_LINES, subject="slurm", text=text))
    for node, until in seen.quarantined.items():
        text = "several jobs failed there and none elsewhere; new ones avoid it"
        notes.append(Note(kind=NoteKind.QUARANTINE, subject=node, text=text, until=until))
    if seen.observer_suspect:
        text = "most replicas are silent at once: suspecting this host's network, routes stay"
        notes.append(Note(kind=NoteKind.OBSERVER, subject="probes", text=text))
    for job in (job for job in seen.live if job.key not in leaving):
        note = _job_note(job, seen)
        if note is not None:
            notes.append(note)
    return notes


def _job_note(job: Job, seen: _Seen) -> Note | None:
    kinds = {
        Status.PENDING: NoteKind.PENDING,
        Status.STARTING: NoteKind.STARTING,
        Status.SILENT: NoteKind.SILENT,
        Status.SICK: NoteKind.SICK,
        Status.IMPOSTOR: NoteKind.IMPOSTOR,
        Status.UNKNOWN: NoteKind.UNKNOWN_STATE,
    }
    kind = kinds.get(seen.status(job))
    if kind is None:
        return None
    return Note(kind=kind, subject=str(job.name), text=_detail(job, seen))


def _detail(job: Job, seen: _Seen) -> str:
    """Return the one thing that a person would ask about this job."""
    status = seen.status(job)
    probe = seen.probe(job)
    if status is Status.PENDING:
        never = "; waiting will not help" if job.reason in _NEVER_STARTS else ""
        return f"Slurm: {job.reason}{never}"
    if status is Status.UNKNOWN:
        what = "its comment can't be read" if job.comment is None else f"Slurm says {job.state}"
        return f"{what}; left alone"
    if status is Status.SICK and seen.hung(job):
        return f"hung: it has requests and made no token for {HUNG_S:.0f} s"
    if status is Status.STARTING and job.run is None:
        return "the job runs; its address is not published yet"
    if status is Status.STARTING:
        return "the engine loads"
    return probe.detail if probe is not None else ""


def _view(job: Job, seen: _Seen, leaving: Mapping[JobKey, Reason]) -> ReplicaView:
    status = seen.status(job)
    if job.key in leaving and status is not Status.DRAINING:
        status = Status.LEAVING
    # While its image can't be read a model's revision is unknown: nothing counts as another one.
    wanted = seen.revisions.get(job.name.model, "")
    current = wanted is None or job.name.revision == wanted
    return ReplicaView(
        name=job.name,
        job_id=job.id,
        status=status,
        routed=job.key in seen.routed,
        current=current,
        node=job.nodes,
        address=job.run.address if job.run else "",
        since=job.submitted_at,
        ends_at=job.ends_at,
        detail=leaving[job.key] if job.key in leaving else _detail(job, seen),
    )
