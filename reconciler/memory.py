"""How memory follows from what was seen and decided. Pure; losing memory restarts timers only."""

from collections.abc import Iterable, Mapping, Set
from dataclasses import replace

from reconciler.failures import learn_failures
from reconciler.plan import BLIND, ModelView, Plan, Reason, Status, Submit
from reconciler.state import (
    UNREADABLE,
    Cause,
    DrainClock,
    Health,
    Job,
    JobKey,
    Maintenances,
    Memory,
    Observation,
    Phase,
    Progress,
    Recipe,
    Scaling,
)

# Of each model; a high percentile of these says how early a successor must be submitted.
LEADS_KEPT = 20
# A clock that is kept right by small steps must not seem to jump, nor cost a write each time.
JUMP_S = 1.0
# A listing that has lost every known job at once must still say so this much later.
CONFIRM_S = 5.0
# Reservations change seldom, and the question takes the place of the one for the nodes' states.
MAINTENANCES_S = 60.0
FORGET_MAINTENANCES_S = 600.0
# What a replica was told to end for, and is its revision's failure all the same.
_FAULTS = {Reason.STARTUP_TIMEOUT: Cause.STARTUP, Reason.UNHEALTHY: Cause.UNHEALTHY}


def learn(memory: Memory, observation: Observation) -> Memory:
    """Return what is known after a look: misses, idle times, failures, a suspicious emptiness."""
    if observation.jobs is None:
        return memory
    memory = _by_this_clock(memory, observation)
    emptied = replace(memory, emptied_at=_emptied_at(memory, observation))
    if unconfirmed(emptied, observation.at):
        return emptied
    return replace(
        emptied,
        # Believed, and there are jobs again: the next emptiness is another one.
        emptied_at=None if observation.jobs else emptied.emptied_at,
        misses=_misses(memory, observation),
        drains=_idle(memory, observation),
        failures=learn_failures(memory, observation, _ready(observation)),
        leads=_leads(memory, observation),
        led=_led(memory, observation),
        progress=_progress(memory, observation),
        maintenances=_maintenances(memory, observation),
    )


def unconfirmed(memory: Memory, at: float) -> bool:
    """Whether every known job has gone at once, and too recently to be believed."""
    return memory.emptied_at is not None and at - memory.emptied_at < CONFIRM_S


def remember(memory: Memory, plan: Plan, recipes: Iterable[Recipe] = ()) -> Memory:
    """Return the memory with what the plan begins: drains, submissions; what serves, what doesn't.

    `recipes` are those of the spec and what was found again of others; a model's wanted revision
    is kept once a replica of it is ready, any other that is ready only if nothing is kept.
    """
    # When nothing could be decided the plan says nothing, so it forgets nothing either.
    if any(note.kind in BLIND for note in plan.notes):
        return memory
    drains = {
        leaving.key: memory.drains.get(leaving.key)
        or DrainClock(since=plan.at, cause=_FAULTS.get(leaving.reason))
        for leaving in plan.leaving
    }
    submitted = frozenset(one.name for one in plan.actions if isinstance(one, Submit))
    return replace(
        memory,
        drains=drains,
        submitted=submitted,
        # That what was known is gone has been confirmed: not that this will be.
        emptied_at=None if submitted else memory.emptied_at,
        kept=_kept(memory, plan, recipes),
        aborted={one.model: one for one in plan.aborted},
        scaled={view.name: _scaling(memory, view, plan.at) for view in plan.models},
    )


def _scaling(memory: Memory, view: ModelView, at: float) -> Scaling:
    before = memory.scaled.get(view.name)
    if before is not None and before.replicas == view.wanted:
        return before
    return Scaling(replicas=view.wanted, since=at)


def _kept(memory: Memory, plan: Plan, recipes: Iterable[Recipe]) -> Mapping[str, Recipe]:
    ready = {
        (view.name.model, view.name.revision)
        for view in plan.replicas
        if view.status is Status.READY
    }
    wanted = {(view.name, view.revision) for view in plan.models}
    # Of a model whose block is gone too, as long as jobs of it are left: they end as it said.
    models = {view.name for view in plan.models} | {view.name.model for view in plan.replicas}
    kept = {name: recipe for name, recipe in memory.kept.items() if name in models}
    for recipe in recipes:
        name = recipe.model.name
        key = (name, recipe.revision)
        if key in ready and (key in wanted or name not in kept):
            kept[name] = recipe
    return kept


def _by_this_clock(memory: Memory, observation: Observation) -> Memory:
    """Return the memory with its times as the clock would have told them that tells them now.

    A clock that has jumped moves them along, so no timer gains or loses; a host that has started
    anew seems to have jumped, which starts timers again. None lies after now.
    """
    jump_s = _jump_s(memory, observation)

    def moved(at: float) -> float:
        return min(at + jump_s, observation.at)

    def moved_if_any(at: float | None) -> float | None:
        return None if at is None else moved(at)

    return replace(
        memory,
        drains={
            key: replace(clock, since=moved(clock.since), idle_since=moved_if_any(clock.idle_since))
            for key, clock in memory.drains.items()
        },
        failures={
            revision: replace(
                seen,
                last_at=moved(seen.last_at),
                recent=tuple(replace(one, at=moved(one.at)) for one in seen.recent),
            )
            for revision, seen in memory.failures.items()
        },
        progress={
            key: replace(seen, since=moved(seen.since)) for key, seen in memory.progress.items()
        },
        scaled={
            name: replace(seen, since=moved(seen.since)) for name, seen in memory.scaled.items()
        },
        emptied_at=moved_if_any(memory.emptied_at),
        booted_at=observation.booted_at if jump_s or memory.booted_at is None else memory.booted_at,
    )


def must_ask_maintenances(memory: Memory, jobs: Iterable[Job], at: float) -> bool:
    """Whether Slurm must be asked for its reservations: a job waits for one, and it is long ago."""
    known = memory.maintenances
    due = known is None or not 0 <= at - known.asked_at < MAINTENANCES_S
    return due and any(job.waits_for_reservation for job in jobs)


def _maintenances(memory: Memory, observation: Observation) -> Maintenances | None:
    """Return what is known of maintenances; what was asked long ago may have changed since."""
    if observation.maintenances is not None:
        return Maintenances(asked_at=observation.at, begin=observation.maintenances)
    known = memory.maintenances
    if known is None or not 0 <= observation.at - known.asked_at < FORGET_MAINTENANCES_S:
        return None
    return known


def _jump_s(memory: Memory, observation: Observation) -> float:
    before, now = memory.booted_at, observation.booted_at
    if before is None or now is None or abs(now - before) < JUMP_S:
        return 0.0
    return now - before


def _misses(memory: Memory, observation: Observation) -> Mapping[JobKey, int]:
    """Count failed looks; that nothing listens yet at a replica that loads is no failure."""
    routed = _routed(observation)
    loading = {
        job.key
        for job in observation.jobs or ()
        if job.run is not None and job.run.ready_at is None and job.key not in routed
    }
    # Those not asked are known all the same: they must not vanish unnoticed either.
    known = {job.key: 0 for job in observation.jobs or () if _is_here(job)}
    return known | {
        key: 0
        if probe.health is Health.READY or (probe.health is Health.STARTING and key in loading)
        else memory.misses.get(key, 0) + 1
        for key, probe in observation.probes.items()
    }


def _is_here(job: Job) -> bool:
    """Whether a later listing must show the job too; what could not be read has no key."""
    unknown = job.phase is Phase.UNKNOWN and job.state != UNREADABLE
    return unknown or job.phase in (Phase.PENDING, Phase.RUNNING)


def _ready(observation: Observation) -> frozenset[JobKey]:
    probes = observation.probes.items()
    return frozenset(key for key, probe in probes if probe.health is Health.READY)


def _routed(observation: Observation) -> frozenset[JobKey]:
    return frozenset(target.key for view in observation.gateways for target in view.targets)


def _idle(memory: Memory, observation: Observation) -> Mapping[JobKey, DrainClock]:
    """Return the drains' clocks; one that is routed to again, whoever did that, has none."""
    routed, drains = _routed(observation), {}
    for key, clock in memory.drains.items():
        if key in routed:
            continue
        probe = observation.probes.get(key)
        idle = probe is not None and probe.ongoing == 0
        since = (clock.idle_since or observation.at) if idle else None
        drains[key] = replace(clock, idle_since=since)
    return drains


def _leads(memory: Memory, observation: Observation) -> Mapping[str, tuple[float, ...]]:
    """Return each model's latest lead times: from submission until its engine was ready."""
    leads = dict(memory.leads)
    for job in _newly_ready(memory, observation):
        if job.run is not None and job.run.ready_at is not None:
            lead = float(max(0, job.run.ready_at - job.submitted_at))
            leads[job.name.model] = (*leads.get(job.name.model, ()), lead)[-LEADS_KEPT:]
    return leads


def _newly_ready(memory: Memory, observation: Observation) -> list[Job]:
    jobs = observation.jobs or ()
    return [job for job in jobs if job.run and job.run.ready_at and job.key not in memory.led]


def _led(memory: Memory, observation: Observation) -> frozenset[JobKey]:
    listed = {job.key for job in observation.jobs or ()}
    return (memory.led & listed) | {job.key for job in _newly_ready(memory, observation)}


def _progress(memory: Memory, observation: Observation) -> Mapping[JobKey, Progress]:
    """Return since when each busy engine's token counter stands still."""
    progress = {}
    for key, probe in observation.probes.items():
        if probe.tokens is None or not probe.ongoing:
            continue
        before = memory.progress.get(key)
        stands = before is not None and before.tokens == probe.tokens
        since = before.since if before is not None and stands else observation.at
        progress[key] = Progress(tokens=probe.tokens, since=since)
    return progress


def _emptied_at(memory: Memory, observation: Observation) -> float | None:
    """Return since when all that is known is gone; before it was listed, a job has but its name."""
    jobs = observation.jobs or ()
    known: Set[object] = _routed(observation) | memory.misses.keys() | memory.drains.keys()
    listed: Set[object] = {job.key for job in jobs}
    if not known:
        known, listed = memory.submitted, {job.name for job in jobs}
    if not known or known & listed:
        return None
    return memory.emptied_at if memory.emptied_at is not None else observation.at
