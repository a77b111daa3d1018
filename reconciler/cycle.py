"""One cycle: look, remember, plan, act."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from reconciler.adapters.ports import ImagePin
from reconciler.batch import read_recipe
from reconciler.errors import PlanDiffers, SlurmUnavailable, StateFailed
from reconciler.execute import Say, execute
from reconciler.failures import learn_refusals
from reconciler.memory import learn, remember
from reconciler.observe import World, count_logs, observe, with_usage
from reconciler.plan import Cancel, Drain, Plan, Status, differences
from reconciler.planner import plan
from reconciler.spec import Fleet
from reconciler.state import Memory, Observation, Pause, Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a cycle decided and left over, and one line for each thing that failed."""

    plan: Plan
    errors: tuple[str, ...]


def look(
    fleet: Fleet,
    world: World,
    at: float,
    allow_destroy: frozenset[str] = frozenset(),
    pauses: Sequence[Pause] = (),
) -> tuple[Plan, Mapping[str, ImagePin]]:
    """Return the plan for the world as it is now; nothing is changed, nothing is remembered."""
    observation, pins, memory = _looked(fleet, world, at)
    observation = with_usage(observation, fleet, world, {})
    return plan(fleet, observation, memory, allow_destroy, pauses), pins


def _looked(
    fleet: Fleet, world: World, at: float
) -> tuple[Observation, Mapping[str, ImagePin], Memory]:
    booted = world.booted_at()  # first: by the clock that `at` was told by, should that jump now
    memory = world.store.load()
    observation, pins = observe(fleet, world, at, booted, memory)
    return observation, pins, learn(memory, observation)


def recipes(fleet: Fleet, pins: Mapping[str, ImagePin], commit: str | None) -> Iterator[Recipe]:
    """Yield what jobs of each revision in the spec are made of, where the image can be read."""
    for variant in (variant for model in fleet.models for variant in model.variants):
        pin = pins.get(variant.image)
        if pin is not None:
            program, digest = pin.program, pin.digest
            yield Recipe.of(fleet, variant, digest=digest, program=program, commit=commit)


def _placed(fleet: Fleet, kept: Mapping[str, Recipe]) -> Iterator[Recipe]:
    """Yield what was kept for when a release fails, to be submitted where the spec says now."""
    for model in fleet.models:
        if model.name in kept:
            yield kept[model.name].placed(fleet.slurm_for(model))


def _recovered(decided: Plan, memory: Memory, world: World) -> Iterator[Recipe]:
    """Yield what a serving replica of an old revision is made of, if memory has lost that.

    One a cycle, and only while Slurm need not be asked whether a job that ends is still there.
    """
    if any(isinstance(action, Drain | Cancel) for action in decided.actions):
        return
    old = [view for view in decided.replicas if not view.current and view.status is Status.READY]
    lost = [view for view in old if view.name.model not in memory.kept]
    for view in lost[:1]:
        try:
            recipe = read_recipe(world.slurm.script(view.job_id))
        except SlurmUnavailable:
            return
        if recipe is not None and recipe.revision == view.name.revision:
            yield recipe


def cycle(
    fleet: Fleet,
    world: World,
    *,
    at: float,
    commit: str | None,
    say: Say,
    allow_destroy: frozenset[str] = frozenset(),
    pauses: Sequence[Pause] = (),
    reviewed: Plan | None = None,
    told_to_end: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Run one cycle at the time `at` (epoch seconds). The caller holds the lock.

    Raises PlanDiffers, and does nothing, unless the actions are those of the `reviewed` plan.
    Once `told_to_end` is true, what has begun is finished and written down, and no more begins.
    """
    observation, pins, memory = _looked(fleet, world, at)
    problems = count_logs(world, observation.gateways)
    observation = with_usage(observation, fleet, world, problems)
    decided = plan(fleet, observation, memory, allow_destroy, pauses)
    differ = differences(reviewed, decided) if reviewed is not None else None
    if differ is not None:
        raise PlanDiffers(f"the plan is not the reviewed one, nothing was done: {differ}")
    ours = [*recipes(fleet, pins, commit), *_recovered(decided, memory, world)]
    memory = remember(memory, decided, ours)
    errors = _saved(memory, world)
    known = [*_placed(fleet, memory.kept), *ours]
    done = execute(decided, fleet, world, known, say=say, told_to_end=told_to_end)
    if done.refused:
        errors = _saved(learn_refusals(memory, done.refused, at), world)
    told = replace(decided, notes=(*decided.notes, *done.left_over))
    return Outcome(plan=told, errors=(*errors, *done.errors))


def _saved(memory: Memory, world: World) -> tuple[str, ...]:
    """Save the memory; return the line that says why it could not be.

    Lost memory costs caution only; not healing the fleet would cost requests.
    """
    try:
        world.store.save(memory)
    except StateFailed as error:
        return (f"memory: {error}",)
    return ()
