"""The next step of each leaving replica, or what it waits for. One step a cycle, never blocking."""

from collections.abc import Mapping

from reconciler.plan import (
    Action,
    Cancel,
    Drain,
    JobRef,
    Note,
    NoteKind,
    Reason,
    Status,
)
from reconciler.planner.seen import Seen
from reconciler.state import (
    Job,
    JobKey,
    Phase,
)

# The longest upload (client_body_timeout 60 s) could still reach an old worker's upstream, and
# the retry window comes on top.
IDLE_HOLD_S = 90.0


def next_steps(seen: Seen, leaving: Mapping[JobKey, Reason]) -> tuple[list[Action], list[Note]]:
    """Return the next step of each leaving replica, or the note of what it waits for."""
    actions: list[Action] = []
    notes: list[Note] = []
    for job in seen.live:
        if job.key not in leaving:
            continue
        ref = JobRef(id=job.id, submitted_at=job.submitted_at, name=job.name)
        reason = leaving[job.key]
        timeout_s = _drain_timeout_s(job, seen)
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


def _drain_timeout_s(job: Job, seen: Seen) -> int:
    """Return how long a replica may drain; once its model's block is gone, what that said last."""
    model = seen.models.get(job.name.model)
    kept = seen.memory.kept.get(job.name.model)
    if model is not None:
        return seen.fleet.drain_timeout_s(model)
    if kept is not None:
        return kept.fleet.drain_timeout_s(kept.model)
    return seen.fleet.defaults.drain_timeout_s


def _waits_for(job: Job, seen: Seen) -> str | None:
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
