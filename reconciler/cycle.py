"""One cycle: look, remember, plan, act."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from reconciler.adapters.ports import ImagePin
from reconciler.errors import PlanDiffers, StateFailed
from reconciler.execute import Say, execute
from reconciler.memory import learn, remember
from reconciler.observe import World, observe
from reconciler.plan import Plan, differences
from reconciler.planner import plan
from reconciler.spec import Fleet


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a cycle decided, and one line for each thing that failed."""

    plan: Plan
    errors: tuple[str, ...]


def look(
    fleet: Fleet, world: World, at: float, allow_destroy: frozenset[str] = frozenset()
) -> tuple[Plan, Mapping[str, ImagePin]]:
    """Return the plan for the world as it is now; nothing is changed, nothing is remembered."""
    observation, pins = observe(fleet, world, at)
    memory = learn(world.store.load(), observation)
    return plan(fleet, observation, memory, allow_destroy), pins


def cycle(
    fleet: Fleet,
    world: World,
    *,
    at: float,
    commit: str | None,
    say: Say,
    allow_destroy: frozenset[str] = frozenset(),
    reviewed: Plan | None = None,
    told_to_end: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Run one cycle at the time `at` (epoch seconds). The caller holds the lock.

    Raises PlanDiffers, and does nothing, unless the actions are those of the `reviewed` plan.
    Once `told_to_end` is true, what has begun is finished and written down, and no more begins.
    """
    observation, pins = observe(fleet, world, at)
    memory = learn(world.store.load(), observation)
    decided = plan(fleet, observation, memory, allow_destroy)
    differ = differences(reviewed, decided) if reviewed is not None else None
    if differ is not None:
        raise PlanDiffers(f"the plan is not the reviewed one, nothing was done: {differ}")
    errors = []
    try:
        world.store.save(remember(memory, decided))
    except StateFailed as error:
        # Lost memory costs caution only; not healing the fleet would cost requests.
        errors.append(f"memory: {error}")
    errors += execute(decided, fleet, world, pins, commit=commit, say=say, told_to_end=told_to_end)
    return Outcome(plan=decided, errors=tuple(errors))
