"""When a replica's successor must be submitted, so that no walltime ends unserved. Pure.

A successor is due at `end - drain - margin - lead * ceil(rank / slots)`: lead is the model's own
queue wait plus load time as measured, and as much again, rank the job's place among those that end
soonest, slots how many successors the budget has room for at once.
"""

import math
from collections.abc import Mapping, Sequence

from reconciler.spec import MARGIN_S
from reconciler.state import Job, JobKey

# Before a model's first measured start: a busy queue and a large model.
LEAD_DEFAULT_S = 600.0
# A few measurements don't tell how long it takes on a bad day, nor how late a busy host is.
LEAD_SPARE = 2.0
LEAD_LEAST_S = 30.0
# Replicas that start together must not end together: each ordinal gets so much less walltime.
STAGGER = 0.025
STAGGERED = 8


def lead_s(leads: Sequence[float]) -> float:
    """Return LEAD_SPARE times the 90th percentile of what was measured, LEAD_LEAST_S at least.

    Without any measurement it is LEAD_DEFAULT_S.
    """
    if not leads:
        return LEAD_DEFAULT_S
    ordered = sorted(leads)
    measured = ordered[min(len(ordered) - 1, math.ceil(0.9 * len(ordered)) - 1)]
    return max(LEAD_LEAST_S, LEAD_SPARE * measured)


def due(
    jobs: Sequence[Job],
    *,
    at: float,
    leads: Sequence[float],
    drain_timeout_s: float,
    slots: int,
    nodes: Mapping[str, str],
) -> frozenset[JobKey]:
    """Return the running jobs of one model and revision that must have a successor now.

    A job that another one names as its predecessor stays due, also when memory is lost.
    """
    succeeded = {job.comment.succeeds for job in jobs if job.comment is not None}
    lead = lead_s(leads)
    keys = {job.key for job in jobs if job.key in succeeded}
    drained = {name for name, word in nodes.items() if word.startswith("drain")}
    keys |= {job.key for job in jobs if drained.intersection(job.node_names)}
    ending = [(job.ends_at, job) for job in jobs if job.ends_at is not None and job.run]
    ending.sort(key=lambda pair: (pair[0], pair[1].key))
    for rank, (ends_at, job) in enumerate(ending, start=1):
        last = last_moment(ends_at, drain_timeout_s)
        start = last - lead * math.ceil(rank / max(1, slots))
        # A walltime shorter than the lead must not replace a job as soon as it starts.
        half = (last + (job.started_at or job.submitted_at)) / 2
        if at >= max(start, half):
            keys.add(job.key)
    return frozenset(keys)


def last_moment(ends_at: float, drain_timeout_s: float) -> float:
    """Return when a replica must leave at the latest to finish its requests in its walltime."""
    return ends_at - drain_timeout_s - MARGIN_S


def staggered(walltime_s: int, ordinal: int, *, floor_s: int) -> int:
    """Return the walltime of one replica: less for higher ordinals, never below the floor."""
    return max(floor_s, round(walltime_s * (1 - STAGGER * (ordinal % STAGGERED))))
