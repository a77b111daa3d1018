"""Performs a plan's actions in order; one model's error does not stop the others."""

from collections.abc import Callable, Iterable, Mapping

from reconciler.adapters.ports import Gateways, ImagePin, Slurm
from reconciler.batch import batch_script
from reconciler.errors import FleetError, SlurmUnavailable
from reconciler.observe import World
from reconciler.plan import Action, Cancel, Drain, JobRef, Plan, Route, Submit
from reconciler.routes import render_gateway
from reconciler.spec import Fleet
from reconciler.state import JobKey

Say = Callable[[str], None]


def execute(
    plan: Plan,
    fleet: Fleet,
    world: World,
    pins: Mapping[str, ImagePin],
    *,
    commit: str | None,
    say: Say,
) -> list[str]:
    """Perform the plan; return one line for each action that failed. Never raises FleetError."""
    present = _present(plan.actions, fleet, world.slurm)
    errors = []
    for action in plan.actions:
        try:
            _perform(action, fleet, world, pins, present, commit, say)
        except FleetError as error:
            errors.append(f"{_title(action)}: {error}")
    return errors


def _present(actions: Iterable[Action], fleet: Fleet, slurm: Slurm) -> Mapping[JobKey, str]:
    """Return the jobs that exist right now, asked once and only if a job is to be ended."""
    if not any(isinstance(action, Drain | Cancel) for action in actions):
        return {}
    try:
        return {job.key: str(job.name) for job in slurm.jobs(fleet.fleet).jobs}
    except SlurmUnavailable:
        return {}  # nothing is verified, so nothing is ended in this cycle


def _perform(
    action: Action,
    fleet: Fleet,
    world: World,
    pins: Mapping[str, ImagePin],
    present: Mapping[JobKey, str],
    commit: str | None,
    say: Say,
) -> None:
    match action:
        case Submit():
            model = fleet.model(action.name.model)
            if model is None:
                raise FleetError("its model is not in the spec")
            program = pins[model.image].program
            script = batch_script(fleet, model, action.name, program=program, commit=commit)
            say(f"submitted {action.name} as job {world.slurm.submit(script)}")
        case Route():
            _route(action, fleet, world.gateways, say)
        case Drain():
            _verify(action.job, present)
            world.slurm.drain(action.job)
            say(f"told job {action.job.id} ({action.job.name}) to drain: {action.reason}")
        case Cancel():
            _verify(action.job, present)
            world.slurm.cancel(action.job, pending=action.pending)
            say(f"cancelled job {action.job.id} ({action.job.name}): {action.reason}")


def _route(action: Route, fleet: Fleet, gateways: Gateways, say: Say) -> None:
    files = render_gateway(fleet, action.targets)
    failed = []
    for name in action.gateways:
        try:
            gateways.change(name, files)
        except FleetError as error:
            failed.append(str(error))
        else:
            count = len(action.targets)
            replicas = f"{count} replica{'' if count == 1 else 's'}"
            say(f"gateway {name} runs generation {files.generation}: {replicas}")
    if failed:
        raise FleetError("; ".join(failed))


def _verify(job: JobRef, present: Mapping[JobKey, str]) -> None:
    """Slurm reuses ids: end a job only if id, submit time, name and user still agree."""
    if present.get(job.key) != str(job.name):
        raise FleetError("the job is not there any more; looking again in the next cycle")


def _title(action: Action) -> str:
    match action:
        case Submit():
            return f"submit {action.name}"
        case Route():
            return f"route to {', '.join(action.gateways)}"
        case Drain() | Cancel():
            return f"{action.kind} {action.job.name}"
