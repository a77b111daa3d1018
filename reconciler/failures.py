"""Why jobs of a revision ended, how long to hold it back, and which nodes to avoid. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from reconciler.hostlist import expand
from reconciler.naming import ReplicaName
from reconciler.state import Cause, Failure, Failures, Job, JobKey, Memory, Observation, Phase

# The first failure costs seconds (it may be chance), the tenth ten minutes.
BACKOFF_FIRST_S = 10.0
BACKOFF_MOST_S = 600.0
# A revision that failed this often in a row without ever being ready is a bad release. It is tried
# again once in a while, as what it lacked may have been provisioned since.
HALT_AFTER = 5
HALT_S = 3600.0
# Two failures on one node, and none elsewhere, are the node's; it is avoided for this long.
QUARANTINE_AFTER = 2
QUARANTINE_S = 1800.0
# Of a revision that has no job any more nothing is worth keeping longer.
FORGOTTEN_S = 7 * 86_400.0
# What is remembered of one revision: enough for every rule above.
_REMEMBERED = 20

# The job script's own words (replica.sh), and vLLM's for a command line that it can't parse.
_STATUSES = {
    2: Cause.ARGUMENTS,
    66: Cause.WEIGHTS,
    69: Cause.IMAGE,
    71: Cause.NODE,
    77: Cause.KEYS,
}
_STATES = {
    **dict.fromkeys(("NODE_FAIL", "BOOT_FAIL", "LAUNCH_FAILED", "RECONFIG_FAIL"), Cause.NODE),
    "OUT_OF_MEMORY": Cause.MEMORY,
    "PREEMPTED": Cause.PREEMPTED,
    **dict.fromkeys(("TIMEOUT", "DEADLINE"), Cause.WALLTIME),
}
# A replica is replaced at once after these: they say nothing of its revision.
_NOT_THE_REVISIONS = frozenset({Cause.NODE, Cause.PREEMPTED, Cause.WALLTIME})
# So often may nodes fail in a quarantine's time before the next try waits.
_NODES_AT_ONCE = 2
# The same on every node: trying more nodes will not help.
_EVERYWHERE = frozenset({Cause.ARGUMENTS, Cause.IMAGE, Cause.KEYS, Cause.WEIGHTS})
_NONE = Failures(count=0, last_at=0.0, counted=frozenset())
_NODES_OWN = frozenset(
    {Cause.NODE, Cause.ENGINE, Cause.IMAGE, Cause.KEYS}
    | {Cause.STARTUP, Cause.UNHEALTHY, Cause.WEIGHTS}
)


def cause(job: Job) -> Cause | None:
    """Return why a job ended, None if it lives or was told to end.

    An engine that ends by itself has failed whatever its status: vLLM's is 0 when it dies.
    """
    if job.phase is not Phase.ENDED or job.state in ("CANCELLED", "REVOKED"):
        return None
    if job.comment is not None and job.comment.run is not None and job.comment.run.draining:
        return None
    if job.state == "FAILED" and not job.nodes:
        return None  # refused at once: that was counted when sbatch said so
    if job.state in _STATES:
        return _STATES[job.state]
    return _STATUSES.get(job.exit_status or 0, Cause.ENGINE)


def learn_failures(
    memory: Memory, observation: Observation, ready: frozenset[JobKey]
) -> Mapping[str, Failures]:
    """Count each ended job once; a replica that became ready since clears its revision's count.

    One that has long been ready says nothing of why another keeps failing.
    """
    failures = dict(memory.failures)
    jobs = sorted(observation.jobs or (), key=lambda job: job.key)
    listed = {job.key for job in jobs}
    for job in jobs:
        revision = _revision(job)
        seen = failures.get(revision)
        told = memory.drains.get(job.key) if job.phase is Phase.ENDED else None
        # One that was told to end failed only if that was for a fault, whatever its end looks like.
        why = cause(job) if told is None else told.cause
        if (why is None and told is None) or (seen is not None and job.key in seen.counted):
            continue
        before = seen or _NONE
        before = replace(before, counted=(before.counted & listed) | {job.key})
        if why is not None:
            before = _with(before, Failure(node=job.nodes, cause=why, at=observation.at))
        failures[revision] = before
    for job in (job for job in jobs if job.key in ready):
        seen = failures.get(_revision(job))
        if seen is not None:
            mended = _ready_since(job) > seen.last_at
            count = 0 if mended else seen.count
            failures[_revision(job)] = replace(seen, count=count, was_ready=True)
    alive = {_revision(job) for job in jobs}
    return {
        revision: seen
        for revision, seen in failures.items()
        if revision in alive or observation.at - max(_times(seen)) < FORGOTTEN_S
    }


def _times(failures: Failures) -> list[float]:
    return [failures.last_at, *(failure.at for failure in failures.recent)]


def learn_refusals(memory: Memory, names: Iterable[ReplicaName], at: float) -> Memory:
    """Count once for each revision that Slurm refused its submissions in a cycle: none is there."""
    failures = dict(memory.failures)
    for revision in sorted({f"{name.model}.{name.revision}" for name in names}):
        failure = Failure(node="", cause=Cause.REFUSED, at=at)
        failures[revision] = _with(failures.get(revision) or _NONE, failure)
    return replace(memory, failures=failures, submitted=memory.submitted.difference(names))


def _revision(job: Job) -> str:
    return f"{job.name.model}.{job.name.revision}"


def _ready_since(job: Job) -> int:
    """Return when a ready job became so by its own word, which its comment may still lack."""
    published = job.run.ready_at if job.run is not None else None
    return job.submitted_at if published is None else published


def _with(before: Failures, failure: Failure) -> Failures:
    counts = failure.cause not in _NOT_THE_REVISIONS or _nodes_fail(before, failure)
    return replace(
        before,
        count=before.count + counts,
        last_at=failure.at if counts else before.last_at,
        recent=(*before.recent, failure)[-_REMEMBERED:],
    )


def _nodes_fail(before: Failures, failure: Failure) -> bool:
    """Whether node after node has failed: many jobs that one takes along are one failure."""
    times = {
        one.at
        for one in before.recent
        if one.cause is Cause.NODE and failure.at - one.at < QUARANTINE_S
    }
    return (
        failure.cause is Cause.NODE
        and len(times - {failure.at}) >= _NODES_AT_ONCE
        and (failure.at not in times)
    )


def backoff_until(failures: Failures | None) -> float:
    """Return when the next job of a revision may be submitted (epoch seconds)."""
    if failures is None or failures.count == 0:
        return 0.0
    if halted(failures) is not None:
        return failures.last_at + HALT_S
    # Capped before the power is taken: a count of thousands would overflow a float.
    delay_s = BACKOFF_FIRST_S * 2.0 ** min(failures.count - 1, 16)
    return failures.last_at + min(delay_s, BACKOFF_MOST_S)


def halted(failures: Failures) -> str | None:
    """Return why a revision is a bad release, None if it may still be chance."""
    in_a_row = failures.recent[-failures.count :] if failures.count else ()
    # Of one that was ready only its arguments can't be what its nodes lack now.
    for why in sorted({Cause.ARGUMENTS} if failures.was_ready else _EVERYWHERE):
        alike = [failure for failure in in_a_row if failure.cause is why]
        if alike and not _common_nodes(alike):
            return f"{why} on {' and '.join(sorted({failure.node for failure in alike}))}"
    # A limit of Slurm's passes, as does what nodes lack; they say nothing against the release.
    others = (Cause.REFUSED, Cause.NODE)
    passing = sum(1 for failure in in_a_row if failure.cause in others)
    if failures.count - passing >= HALT_AFTER and not failures.was_ready:
        last = f", the last: {in_a_row[-1].cause}" if in_a_row else ""
        return f"{failures.count} failures and never ready{last}"
    return None


def _common_nodes(failures: Sequence[Failure]) -> frozenset[str]:
    """Return the nodes that had a part in every failure: a job has one, or several."""
    names = [frozenset(expand(failure.node) or ("",)) for failure in failures]
    return frozenset.intersection(*names) if names else frozenset()


def quarantined(memory: Memory, at: float) -> Mapping[str, float]:
    """Return the nodes to avoid and until when: several failures there, and none elsewhere.

    Where a job itself says that it is for its node's sake, others elsewhere don't matter.
    """
    until: dict[str, float] = {}
    counts: dict[str, int] = {}
    for failures in memory.failures.values():
        recent = [
            failure
            for failure in failures.recent
            if failure.cause in _NODES_OWN and at - failure.at < QUARANTINE_S
        ]
        shared = _common_nodes(recent)
        for failure in recent:
            for node in expand(failure.node) or ("",):
                if node in shared or failure.cause is Cause.NODE:
                    counts[node] = counts.get(node, 0) + 1
                    until[node] = max(until.get(node, 0.0), failure.at + QUARANTINE_S)
    return {node: until[node] for node in sorted(until) if counts[node] >= QUARANTINE_AFTER}
