"""Performs a plan's actions in order; one model's error does not stop the others.

Each action is written into the journal before it is done and after.
"""

import time
from collections.abc import Callable, Iterable, Mapping

from reconciler.adapters.ports import Gateways, Result, Slurm, Store
from reconciler.batch import batch_script
from reconciler.errors import FleetError, SlurmUnavailable, StateFailed, SubmitUnknown
from reconciler.observe import World
from reconciler.plan import Action, Cancel, Drain, JobRef, Plan, Route, Submit
from reconciler.routes import render_gateway
from reconciler.spec import Fleet
from reconciler.state import JobKey, Recipe

Say = Callable[[str], None]

# A cycle ends: what was seen at its beginning must not be acted on for much longer than this.
DEADLINE_S = 120.0


def execute(
    plan: Plan,
    fleet: Fleet,
    world: World,
    recipes: Iterable[Recipe],
    *,
    say: Say,
    clock: Callable[[], float] = time.monotonic,
) -> list[str]:
    """Perform the plan; return one line for each action that failed. Never raises FleetError.

    A journal that can't be written is one line more, and stops nothing. What has not begun by the
    deadline is left for the next cycle, which looks again first.
    """
    deadline = clock() + DEADLINE_S
    known = {(recipe.model.name, recipe.revision): recipe for recipe in recipes}
    present = _present(plan.actions, fleet, world.slurm)
    journal = _Journal(world.store, plan.at)
    errors = []
    for at, action in enumerate(plan.actions):
        if clock() >= deadline:
            left = len(plan.actions) - at
            total = len(plan.actions)
            errors.append(
                f"{left} of {total} actions left for the next cycle: this one took too long"
            )
            break
        intent = journal.intend(action)
        try:
            done = _perform(action, fleet, world, known, present, say)
        except FleetError as error:
            errors.append(f"{_title(action)}: {error}")
            unknown = isinstance(error, SubmitUnknown)
            journal.conclude(intent, Result.UNKNOWN if unknown else Result.FAILED, str(error))
        else:
            journal.conclude(intent, Result.DONE, done)
    return errors + journal.errors


class _Journal:
    """The journal of one cycle: what it can't write it reports once."""

    def __init__(self, store: Store, at: float) -> None:
        self._store = store
        self._at = at
        self.errors: list[str] = []

    def intend(self, action: Action) -> int | None:
        try:
            return self._store.intend(self._at, action)
        except StateFailed as error:
            self._failed(error)
            return None

    def conclude(self, intent: int | None, result: Result, detail: str) -> None:
        if intent is None:
            return
        try:
            self._store.conclude(intent, result, " ".join(detail.split()))
        except StateFailed as error:
            self._failed(error)

    def _failed(self, error: StateFailed) -> None:
        if not self.errors:
            self.errors.append(f"journal: {error}")


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
    recipes: Mapping[tuple[str, str], Recipe],
    present: Mapping[JobKey, str],
    say: Say,
) -> str:
    """Do one action; return what the journal should know of it beside that it is done."""
    match action:
        case Submit():
            recipe = recipes.get((action.name.model, action.name.revision))
            if recipe is None:
                raise FleetError("nothing is known any more of what its revision is made of")
            job_id = world.slurm.submit(batch_script(recipe, action))
            say(f"submitted {action.name} as job {job_id}")
            return f"job {job_id}"
        case Route():
            _route(action, fleet, world.gateways, say)
            return f"generation {action.generation}"
        case Drain():
            _verify(action.job, present)
            world.slurm.drain(action.job)
            say(f"told job {action.job.id} ({action.job.name}) to drain: {action.reason}")
        case Cancel():
            _verify(action.job, present)
            world.slurm.cancel(action.job, pending=action.pending)
            say(f"cancelled job {action.job.id} ({action.job.name}): {action.reason}")
    return ""


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
