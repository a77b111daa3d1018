"""What an edit of the spec may not take away without somebody's word: the blast radius."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from reconciler.plan import Note, NoteKind, Reason, Status
from reconciler.planner.model import Part, left_alone
from reconciler.planner.seen import Seen, drain_has_begun
from reconciler.state import Job


def within_blast_radius(
    parts: Sequence[Part], seen: Seen, allow_destroy: frozenset[str]
) -> Iterator[Part]:
    """Yield the parts; where fewer replicas are wanted by too many at once, they stay for now.

    Zero replicas are wanted by nobody's mistake, and what is allowed by name does not count.
    """
    ready = sum(1 for job in seen.live if seen.status(job) is Status.READY)
    lost = sum(len(_lost(part, seen, allow_destroy)) for part in parts)
    if lost <= seen.fleet.blast_radius * ready:
        yield from parts
        return
    for part in parts:
        staying = {job.key for job in _lost(part, seen, allow_destroy)}
        if part.view is None or not staying:
            yield part
            continue
        text = (
            f"fewer replicas are wanted, and {lost} of the fleet's {ready} ready ones would end; "
            f"to let {len(staying)} go: apply --allow-destroy {part.view.name}"
        )
        note = Note(kind=NoteKind.GUARD, subject=part.view.name, text=text)
        leaving = tuple(pair for pair in part.leaving if pair[0].key not in staying)
        yield replace(part, leaving=leaving, notes=(*part.notes, note))


def _lost(part: Part, seen: Seen, allow_destroy: frozenset[str]) -> list[Job]:
    """Return the replicas that serve and would end because fewer are wanted.

    An edit that wants fewer may make them stale too, or their nodes may be wanted: then what is too
    many are those beyond what a rollout has at most.
    """
    if part.view is None or part.view.name in allow_destroy or part.view.wanted == 0:
        return []
    going = {
        reason: [
            job
            for job, why in part.leaving
            if why is reason
            and seen.status(job) is Status.READY
            and not drain_has_begun(job, seen)
            and not seen.must_go(seen.models[part.view.name], job)
        ]
        for reason in (Reason.SURPLUS, Reason.STALE, Reason.EXPIRING)
    }
    surplus = going.pop(Reason.SURPLUS)
    most = part.view.wanted + seen.fleet.defaults.rollout.max_surge
    too_many = max(0, part.view.ready - most - len(surplus))
    return surplus + [job for jobs in going.values() for job in jobs][:too_many]


def not_in_spec(seen: Seen, allow_destroy: frozenset[str]) -> Part:
    """Let go of jobs whose model is gone from the spec; serving ones only when told by name."""
    known = {model.name for model in seen.fleet.models}
    gone = [
        job
        for job in seen.live
        if job.name.model not in known and seen.status(job) not in (Status.ENDING, Status.UNKNOWN)
    ]
    alone = [left_alone(name, False, seen) for name in sorted({job.name.model for job in gone})]
    paused = {note.subject for note in alone if note is not None}
    gone = [job for job in gone if job.name.model not in paused]
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
        notes=(*(note for note in alone if note is not None), *notes),
    )


def _is_guarded(job: Job, seen: Seen) -> bool:
    if drain_has_begun(job, seen):
        return False
    protected = job.comment is not None and job.comment.protect
    return protected or seen.status(job) is Status.READY or job.key in seen.routed
