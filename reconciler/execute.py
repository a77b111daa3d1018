"""Performs a plan's actions, phase by phase; one model's error does not stop the others.

A phase is a run of actions of one kind; the next begins when all of it has ended. Each action is
written into the journal before it is done and after, by the calling thread; the calls themselves
run a bounded number at once.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import TypeVar

from reconciler.adapters.ports import Result, Secrets, Slurm, Store
from reconciler.batch import batch_script
from reconciler.errors import (
    FleetError,
    SlurmUnavailable,
    StateFailed,
    SubmitRejected,
    SubmitUnknown,
)
from reconciler.naming import ReplicaName
from reconciler.observe import World
from reconciler.plan import (
    Action,
    Cancel,
    Drain,
    JobRef,
    Note,
    NoteKind,
    Plan,
    Route,
    Submit,
    title,
)
from reconciler.routes import render_gateway
from reconciler.spec import Fleet, parse_duration
from reconciler.state import Credentials, JobKey, Recipe

Say = Callable[[str], None]
K = TypeVar("K")
T = TypeVar("T")

# A cycle ends: what was seen at its beginning must not be acted on for much longer than this.
DEADLINE_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Executed:
    """How a plan went: one line for each thing that failed, what is left, what Slurm refused."""

    errors: tuple[str, ...] = ()
    left_over: tuple[Note, ...] = ()
    refused: tuple[ReplicaName, ...] = ()


def execute(
    plan: Plan,
    fleet: Fleet,
    world: World,
    recipes: Iterable[Recipe],
    *,
    say: Say,
    clock: Callable[[], float] = time.monotonic,
    told_to_end: Callable[[], bool] = lambda: False,
) -> Executed:
    """Perform the plan. Never raises FleetError.

    A journal that can't be written is one line more, and stops nothing. What has not begun by the
    deadline, or when `told_to_end` says so, is left for the next cycle, which looks again first.
    """
    time_left = _TimeLeft(clock() + DEADLINE_S, clock, told_to_end)
    known = {(recipe.model.name, recipe.revision): recipe for recipe in recipes}
    present = _present(plan.actions, fleet, world.slurm)
    journal = _Journal(world.store, plan.at)
    errors: dict[int, FleetError] = {}
    begun = 0

    def begin(phase: Iterable[tuple[int, Action]]) -> Iterator[tuple[_Begun, Callable[[], str]]]:
        nonlocal begun
        for at, action in phase:
            if time_left.is_over():
                return
            begun += 1
            it = _Begun(at, action, journal.intend(action))
            yield it, partial(_perform, action, fleet, world, known, present, it.said.append)

    for _, phase in groupby(enumerate(plan.actions), key=lambda item: item[1].kind):
        for it, ended in _side_by_side(world.at_once, begin(phase)):
            error = _conclude(it, ended, journal)
            for line in it.said:
                say(line)
            if error is not None:
                errors[it.at] = error
    failed = [(plan.actions[at], errors[at]) for at in sorted(errors)]
    return _executed(len(plan.actions), begun, failed, time_left.over_because, journal.errors)


def _executed(
    total: int,
    begun: int,
    failed: Sequence[tuple[Action, FleetError]],
    over_because: str | None,
    journal: Iterable[str],
) -> Executed:
    """Return how it went: a line for each action that failed, for what is left, for the journal."""
    errors = [f"{title(action)}: {error}" for action, error in failed]
    left_over = []
    if over_because is not None:
        text = f"{total - begun} of {total} actions left for the next cycle: {over_because}"
        errors.append(text)
        left_over.append(text)
    unanswered = sum(isinstance(error, SubmitUnknown) for _, error in failed)
    if unanswered:
        # Slurm's rate limiter, for one, lets sbatch wait until its time is up.
        text = f"{unanswered} of {total} actions had no answer in time: the next cycle looks "
        left_over.append(f"{text}whether Slurm took them")
    return Executed(
        errors=(*errors, *journal),
        left_over=tuple(
            Note(kind=NoteKind.LEFT_OVER, subject="cycle", text=text) for text in left_over
        ),
        refused=tuple(
            action.name
            for action, error in failed
            if isinstance(action, Submit) and isinstance(error, SubmitRejected)
        ),
    )


@dataclass(slots=True)
class _TimeLeft:
    """How long actions may begin, and why no longer."""

    deadline: float
    clock: Callable[[], float]
    told_to_end: Callable[[], bool]
    over_because: str | None = None

    def is_over(self) -> bool:
        if self.over_because is None and self.told_to_end():
            self.over_because = "told to end"
        elif self.over_because is None and self.clock() >= self.deadline:
            self.over_because = "this one took too long"
        return self.over_because is not None


@dataclass(frozen=True, slots=True)
class _Begun:
    """An action that has begun: its place in the plan, its intent, and what is to be told of it."""

    at: int
    action: Action
    intent: int | None
    said: list[str] = field(default_factory=list)


def _side_by_side(
    at_once: int, calls: Iterable[tuple[K, Callable[[], T]]]
) -> Iterator[tuple[K, Future[T]]]:
    """Yield each call's key and result as it ends; at most `at_once` are under way.

    A call is drawn, on this thread, only when it can begin, and what has ended was yielded before:
    with `at_once` 1 this is a plain loop. An error of a call is its future's.
    """
    under_way: dict[Future[T], K] = {}

    def ended() -> Iterator[tuple[K, Future[T]]]:
        for future in wait(under_way, return_when=FIRST_COMPLETED).done:
            yield under_way.pop(future), future

    with ThreadPoolExecutor(at_once) as pool:
        for key, call in calls:
            under_way[pool.submit(call)] = key
            if len(under_way) == at_once:
                yield from ended()
        while under_way:
            yield from ended()


def _conclude(it: _Begun, ended: Future[str], journal: "_Journal") -> FleetError | None:
    """Write down how an action ended; return its error, if any."""
    try:
        journal.conclude(it.intent, Result.DONE, ended.result())
    except FleetError as error:
        unknown = isinstance(error, SubmitUnknown)
        journal.conclude(it.intent, Result.UNKNOWN if unknown else Result.FAILED, str(error))
        return error
    return None


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
            credentials = _credentials(recipe, action, world.secrets)
            job_id = world.slurm.submit(batch_script(recipe, action, credentials))
            say(f"submitted {action.name} as job {job_id}")
            return f"job {job_id}"
        case Route():
            _route(action, fleet, world, say)
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


def _credentials(recipe: Recipe, submit: Submit, secrets: Secrets) -> Credentials | None:
    if recipe.fleet.replica_access == "open":
        return None
    walltime_s = submit.walltime_s
    if walltime_s is None:
        walltime_s = parse_duration(recipe.fleet.slurm_for(recipe.model).walltime)
    return secrets.issue(recipe.model.name, walltime_s)


def _route(action: Route, fleet: Fleet, world: World, say: Say) -> None:
    external = dict(action.external)
    files = render_gateway(fleet, action.targets, action.trust, action.exhausted, external)
    if action.trust is not None or external:
        key_files = {
            model.name: model.fallback.key_file
            for model in fleet.models
            if model.fallback is not None and model.name in external
        }
        files = replace(files, secrets=world.secrets.gateway_files(action.trust, key_files))
    calls = ((name, partial(world.gateways.change, name, files)) for name in action.gateways)
    failed = {}
    for name, ended in _side_by_side(world.at_once, calls):
        try:
            ended.result()
        except FleetError as error:
            failed[name] = str(error)
        else:
            count = len(action.targets)
            replicas = f"{count} replica{'' if count == 1 else 's'}"
            say(f"gateway {name} runs generation {files.generation}: {replicas}")
    if failed:
        raise FleetError("; ".join(failed[name] for name in action.gateways if name in failed))


def _verify(job: JobRef, present: Mapping[JobKey, str]) -> None:
    """Slurm reuses ids: end a job only if id, submit time, name and user still agree."""
    if present.get(job.key) != str(job.name):
        raise FleetError("the job is not there any more; looking again in the next cycle")
