"""How memory follows from what was seen and decided. Pure; losing memory restarts timers only."""

from collections.abc import Mapping
from dataclasses import replace

from reconciler.plan import Plan
from reconciler.state import (
    FAILURES,
    DrainClock,
    Failures,
    Health,
    Job,
    JobKey,
    Memory,
    Observation,
    Phase,
)

# The first failure costs seconds (it may be chance), the tenth ten minutes.
BACKOFF_FIRST_S = 10.0
BACKOFF_MOST_S = 600.0
# A listing that has lost every known job at once must still say so this much later.
CONFIRM_S = 5.0


def learn(memory: Memory, observation: Observation) -> Memory:
    """Return what is known after a look: misses, idle times, failures, a suspicious emptiness."""
    if observation.jobs is None:
        return memory
    memory = _not_after(memory, observation.at)
    emptied = replace(memory, emptied_at=_emptied_at(memory, observation))
    if unconfirmed(emptied, observation.at):
        return emptied
    return replace(
        emptied,
        misses=_misses(memory, observation),
        drains=_idle(memory, observation),
        failures=_failures(memory, observation),
    )


def unconfirmed(memory: Memory, at: float) -> bool:
    """Whether every known job has gone at once, and too recently to be believed."""
    return memory.emptied_at is not None and at - memory.emptied_at < CONFIRM_S


def remember(memory: Memory, plan: Plan) -> Memory:
    """Return the memory with a clock for each replica that the plan makes leave."""
    drains = {key: memory.drains.get(key) or DrainClock(since=plan.at) for key in plan.leaving}
    # When jobs could not be listed the plan says nothing, so it forgets nothing either.
    return replace(memory, drains=drains if plan.observed or drains else memory.drains)


def backoff_until(failures: Failures | None) -> float:
    """Return when the next job of a revision may be submitted (epoch seconds)."""
    if failures is None or failures.count == 0:
        return 0.0
    # Capped before the power is taken: a count of thousands would overflow a float.
    delay_s = BACKOFF_FIRST_S * 2.0 ** min(failures.count - 1, 16)
    return failures.last_at + min(delay_s, BACKOFF_MOST_S)


def _not_after(memory: Memory, at: float) -> Memory:
    """Return the memory with no time after now: a clock set back must not stop any timer."""

    def past(since: float | None) -> float | None:
        return None if since is None else min(since, at)

    return replace(
        memory,
        drains={
            key: DrainClock(since=min(clock.since, at), idle_since=past(clock.idle_since))
            for key, clock in memory.drains.items()
        },
        failures={
            revision: replace(seen, last_at=min(seen.last_at, at))
            for revision, seen in memory.failures.items()
        },
        emptied_at=past(memory.emptied_at),
    )


def _misses(memory: Memory, observation: Observation) -> Mapping[JobKey, int]:
    """Count failed looks; that nothing listens yet at a replica that loads is no failure."""
    routed = _routed(observation)
    loading = {
        job.key
        for job in observation.jobs or ()
        if job.run is not None and job.run.ready_at is None and job.key not in routed
    }
    # Those not asked are known all the same: they must not vanish unnoticed either.
    known = {
        job.key: 0 for job in observation.jobs or () if job.phase in (Phase.PENDING, Phase.RUNNING)
    }
    return known | {
        key: 0
        if probe.health is Health.READY or (probe.health is Health.STARTING and key in loading)
        else memory.misses.get(key, 0) + 1
        for key, probe in observation.probes.items()
    }


def _routed(observation: Observation) -> frozenset[JobKey]:
    return frozenset(target.key for view in observation.gateways for target in view.targets)


def _idle(memory: Memory, observation: Observation) -> Mapping[JobKey, DrainClock]:
    drains = {}
    for key, clock in memory.drains.items():
        probe = observation.probes.get(key)
        idle = probe is not None and probe.ongoing == 0
        since = (clock.idle_since or observation.at) if idle else None
        drains[key] = replace(clock, idle_since=since)
    return drains


def _failures(memory: Memory, observation: Observation) -> Mapping[str, Failures]:
    """Count each failed job once; a replica that became ready clears its revision."""
    failures = dict(memory.failures)
    listed = {job.key for job in observation.jobs or ()}
    for job in observation.jobs or ():
        revision = f"{job.name.model}.{job.name.revision}"
        seen = failures.get(revision)
        probe = observation.probes.get(job.key)
        if probe is not None and probe.health is Health.READY and seen is not None:
            failures[revision] = replace(seen, count=0)
        counted = seen.counted if seen else frozenset()
        if _failed(job, memory) and job.key not in counted:
            failures[revision] = Failures(
                count=(seen.count if seen else 0) + 1,
                last_at=observation.at,
                counted=(counted & listed) | {job.key},
            )
    return failures


def _failed(job: Job, memory: Memory) -> bool:
    """Tell a failure from the end of a drain, whose engine may report its TERM as an error."""
    drained = job.key in memory.drains or bool(
        job.comment and job.comment.run and job.comment.run.draining
    )
    return job.state in FAILURES and not drained


def _emptied_at(memory: Memory, observation: Observation) -> float | None:
    known = _routed(observation) | memory.misses.keys() | memory.drains.keys()
    listed = {job.key for job in observation.jobs or ()}
    if not known or known & listed:
        return None
    return memory.emptied_at if memory.emptied_at is not None else observation.at
