"""What people see of a plan beside its actions: each replica, each model, and why."""

from collections.abc import Mapping

from reconciler.plan import (
    ModelView,
    Note,
    NoteKind,
    Reason,
    ReplicaView,
    Status,
)
from reconciler.planner.seen import HUNG_S, Seen
from reconciler.spec import Fleet, Model
from reconciler.state import (
    Job,
    JobKey,
    Observation,
    Traffic,
)
from reconciler.usage import WINDOW_MINUTES, midnight_after


def model_view(model: Model, seen: Seen) -> ModelView:
    """Return a model with how much of it is wanted and ready, its canary included."""
    (_, revision), *canary = seen.variants[model.name]
    wanted = sum(variant.replicas for variant, _ in seen.variants[model.name])
    scaled = seen.memory.scaled.get(model.name)
    return ModelView(
        name=model.name,
        revision=revision,
        canary=canary[0][1] if canary else None,
        wanted=wanted,
        wanted_since=scaled.since if scaled is not None and scaled.replicas == wanted else None,
        ready=sum(1 for job in seen.jobs_of(model.name) if seen.status(job) is Status.READY),
        traffic=_traffic(model, seen.observation),
    )


def _traffic(model: Model, observation: Observation) -> Traffic | None:
    """Return what the model was asked for: nothing at all is known too, where any log was read."""
    if observation.traffic is None:
        return None
    nothing = Traffic(minutes=WINDOW_MINUTES, requests=0, errors=0, refused=0, first_byte_s=None)
    return observation.traffic.get(model.name, nothing)


def quota_note(tenant: str, fleet: Fleet, observation: Observation) -> Note:
    """Return who is refused, why, and until when."""
    [limit] = [one.tokens_per_day for one in fleet.tenants if one.name == tenant]
    usage = observation.usage
    known = usage is not None and tenant in usage.tokens_today
    had = f"{usage.tokens_today[tenant]:,}" if usage and known else "an unknown number"
    text = f"{had} of its {limit:,} tokens of today are spent; the gateway answers it 429"
    until = midnight_after(observation.at)
    return Note(kind=NoteKind.QUOTA, subject=f"tenant {tenant}", text=text, until=until)


def observation_notes(seen: Seen, leaving: Mapping[JobKey, Reason]) -> list[Note]:
    """Return what the look itself showed; what leaves has its step or its note already."""
    notes = []
    if seen.observation.odd_lines:
        count = seen.observation.odd_lines
        text = f"{count} of squeue's lines could not be read; those jobs are left alone"
        notes.append(Note(kind=NoteKind.ODD_LINES, subject="slurm", text=text))
    for name, problem in sorted(seen.observation.log_problems.items()):
        notes.append(Note(kind=NoteKind.LOG, subject=name, text=problem))
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


def _job_note(job: Job, seen: Seen) -> Note | None:
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


def _detail(job: Job, seen: Seen) -> str:
    """Return the one thing that a person would ask about this job."""
    status = seen.status(job)
    probe = seen.probe(job)
    if status is Status.PENDING:
        return f"Slurm: {job.reason}{_prospect(job, seen)}"
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


def _prospect(job: Job, seen: Seen) -> str:
    if job.is_held or job.never_starts:
        return "; waiting will not help"
    if job.waits_for_reservation and seen.before_maintenance_s() is not None:
        return "; too little is left before it for a shorter job"
    return ""


def replica_view(job: Job, seen: Seen, leaving: Mapping[JobKey, Reason]) -> ReplicaView:
    status = seen.status(job)
    if job.key in leaving and status is not Status.DRAINING:
        status = Status.LEAVING
    # While its image can't be read a model's revision is unknown: nothing counts as another one.
    wanted = {revision for _, revision in seen.variants.get(job.name.model, ())}
    differs = seen.outdated(job)
    current = None in wanted or (job.name.revision in wanted and differs is None)
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
        detail=leaving[job.key] if job.key in leaving else _detail(job, seen) or differs or "",
    )
