"""plan(): from what is wanted, seen and remembered to what to do now. Pure.

Jobs are classified once, into sets that never change; then the plan is filled in a fixed order:
gaps, duplicates, not in the spec, stale, unhealthy, surplus, missing, routes, and last what each
leaving replica's next step is.
"""

from collections.abc import Iterable, Mapping, Sequence

from reconciler.memory import CONFIRM_S, unconfirmed
from reconciler.plan import (
    Action,
    Leaving,
    ModelView,
    Note,
    NoteKind,
    Plan,
    Reason,
    Route,
    Status,
    Submit,
)
from reconciler.planner.drain import next_steps
from reconciler.planner.guard import not_in_spec, within_blast_radius
from reconciler.planner.model import Part, decide
from reconciler.planner.seen import Seen
from reconciler.planner.views import observation_notes, quota_note, replica_view
from reconciler.routes import key_in_use, render_gateway
from reconciler.spec import Fleet
from reconciler.state import (
    JobKey,
    Keyring,
    Memory,
    Observation,
    Pause,
    Phase,
    Target,
    Trust,
)
from reconciler.usage import exhausted

__all__ = ["plan"]


def plan(
    fleet: Fleet,
    observation: Observation,
    memory: Memory,
    allow_destroy: frozenset[str] = frozenset(),
    pauses: Sequence[Pause] = (),
) -> Plan:
    """Return what to do now. Same input, same plan.

    `allow_destroy` names the models whose serving replicas may end because the spec's edit takes
    away their block, or more than its blast radius. `pauses` name what is to be left alone.
    Without a job listing that can be trusted the plan is empty but for its notes: unknown is never
    taken for absent.
    """
    blind = _gaps(observation, memory)
    if blind:
        return _empty_plan(fleet, observation, blind)
    seen = Seen(fleet, observation, memory, pauses)
    parts = [decide(model, seen) for model in fleet.models]
    parts = [*within_blast_radius(parts, seen, allow_destroy), not_in_spec(seen, allow_destroy)]
    leaving = {job.key: reason for part in parts for job, reason in part.leaving}
    submits, budget_notes = _within_budget(fleet, seen, parts)
    targets = _targets(seen, leaving)
    routes, route_notes = _route(fleet, seen, targets)
    steps, step_notes = next_steps(seen, leaving)
    notes = [note for part in parts for note in part.notes] + budget_notes + route_notes
    return Plan(
        fleet=fleet.fleet,
        at=observation.at,
        actions=(*submits, *routes, *steps),
        notes=tuple(notes + step_notes + observation_notes(seen, leaving)),
        models=tuple(part.view for part in parts if part.view is not None),
        replicas=tuple(replica_view(job, seen, leaving) for job in seen.live),
        leaving=tuple(
            Leaving(key=job.key, reason=leaving[job.key])
            for job in seen.live
            if job.key in leaving and not seen.may_get_requests(job)
        ),
        gpus_held=seen.gpus_held,
        gpus_budget=fleet.budget.gpus,
        aborted=tuple(seen.aborted.values()),
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
    return _key_gaps(observation)


def _key_gaps(observation: Observation) -> tuple[Note, ...]:
    """Return a note if the keys can't be read, or are not there although jobs were given some.

    No replica can be asked or routed to without them, and none may be made in their place.
    """
    why, keyring = observation.keyring_error, observation.keyring
    if keyring is not None:
        protected = [job for job in observation.jobs or () if job.comment and job.comment.keys]
        live = [job for job in protected if job.phase is not Phase.ENDED]
        if keyring.ids or not live:
            return ()
        why = f"job {live[0].id} has keys, and secret_dir holds none (is it mounted?)"
    text = f"{why}; nothing is submitted or ended, and routes stay"
    return (Note(kind=NoteKind.NO_KEYS, subject="secrets", text=text),)


def _empty_plan(fleet: Fleet, observation: Observation, notes: tuple[Note, ...]) -> Plan:
    return Plan(
        fleet=fleet.fleet,
        at=observation.at,
        actions=(),
        notes=notes,
        models=tuple(
            ModelView(
                name=model.name,
                revision=None,
                wanted=sum(variant.replicas for variant in model.variants),
                ready=0,
            )
            for model in fleet.models
        ),
        replicas=(),
        leaving=(),
        gpus_held=0,
        gpus_budget=fleet.budget.gpus,
    )


def _within_budget(
    fleet: Fleet, seen: Seen, parts: Iterable[Part]
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
                needs = "1 GPU" if submit.gpus == 1 else f"{submit.gpus} GPUs"
                text = f"needs {needs}; {held} of the budget's {fleet.budget.gpus} are held"
                if submit.reason is Reason.STALE and not fleet.defaults.rollout.max_unavailable:
                    text += "; with rollout.max_unavailable an old replica would go first"
                note = Note(kind=NoteKind.BUDGET, subject=str(submit.name), text=text)
                notes.append(note)
    return fit, notes


def _targets(seen: Seen, leaving: Mapping[JobKey, Reason]) -> list[Target]:
    """Return who gets requests: who is ready and stays, and as it was who can't be judged.

    Silence alone does not take a model's last replicas away: a busy engine, or our own network, is
    more likely than its end, and without them each request fails. So it is with a canary that was
    given up.
    """
    targets: list[Target] = []
    silent: list[Target] = []
    canaries = _canaries(seen)
    given_up = {key for one in seen.aborted.values() for key in one.jobs}
    routed = {target.job_id: target for target in seen.routed.values()}
    for job in seen.live:
        if job.key in leaving:
            continue
        status = seen.status(job)
        if status is Status.READY and job.run is not None:
            target = Target(
                model=job.name.model,
                job_id=job.id,
                submitted_at=job.submitted_at,
                address=job.run.address,
                keys=job.comment.keys if job.comment is not None else (),
                weight=seen.weight(job),
                canary=canaries.get(job.key, ""),
            )
            (silent if job.key in given_up else targets).append(target)
        elif status is Status.UNKNOWN and job.id in routed:
            targets.append(routed[job.id])  # by its id: its submit time may be what is unreadable
        elif status is Status.SILENT and seen.is_routed_where_it_is(job):
            silent.append(seen.routed[job.key])
    served = {target.model for target in targets}
    return targets + [target for target in silent if target.model not in served]


def _canaries(seen: Seen) -> Mapping[JobKey, str]:
    """Return the jobs whose share of the requests is their own, each with its revision."""
    return {
        job.key: job.name.revision
        for model in seen.fleet.models
        if model.canary is not None and model.canary.share is not None
        for job in seen.canary_jobs(model.name)
    }


def _external(fleet: Fleet, seen: Seen) -> tuple[Mapping[str, str], list[Note]]:
    """Return the id of the key for each model whose fallback may be asked; notes for the others."""
    keys, errors = seen.observation.external_keys, seen.observation.external_errors
    ids, notes = {}, []
    for model in fleet.models:
        if model.fallback is None:
            continue
        if model.fallback.key_file in keys:
            ids[model.name] = keys[model.fallback.key_file]
        else:
            text = f"no fallback: {errors.get(model.fallback.key_file, 'its key was not read')}"
            notes.append(Note(kind=NoteKind.FALLBACK, subject=model.name, text=text))
    return ids, notes


def _route(fleet: Fleet, seen: Seen, targets: list[Target]) -> tuple[list[Action], list[Note]]:
    """Return the change for every gateway that runs something else; notes for the unreachable."""
    trust, targets = _trusted(seen, targets)
    views = seen.observation.gateways
    running = {name for view in views for name in view.exhausted}
    spent = exhausted(fleet, seen.observation.usage, running)
    external, external_notes = _external(fleet, seen)
    wanted = render_gateway(fleet, targets, trust, spent, external).generation
    notes = [
        Note(kind=NoteKind.GATEWAY, subject=view.name, text=view.error)
        for view in views
        if view.error is not None
    ]
    notes += [quota_note(name, fleet, seen.observation) for name in spent] + external_notes
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
            trust=trust,
            exhausted=spent,
            external=tuple(external.items()),
        )
    ], notes


def _trusted(seen: Seen, targets: list[Target]) -> tuple[Trust | None, list[Target]]:
    """Return what the gateways show to protected targets, and the targets that take it."""
    keyring = seen.observation.keyring or Keyring()
    key = key_in_use(keyring.ids, targets)
    if key is None:
        return None, [target for target in targets if not target.keys]
    taking = [target for target in targets if not target.keys or key in target.keys]
    return Trust(key=key, authority=keyring.authority), taking
