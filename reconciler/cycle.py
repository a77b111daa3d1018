"""One cycle: look, remember, plan, act."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from reconciler.adapters.ports import ImagePin
from reconciler.errors import StateFailed
from reconciler.execute import Say, execute
from reconciler.memory import learn, remember
from reconciler.observe import World, observe
from reconciler.plan import Plan
from reconciler.planner import plan
from reconciler.spec import Fleet
from reconciler.state import Pause, Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a cycle decided, and one line for each thing that failed."""

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
    memory = world.store.load()
    observation, pins = observe(fleet, world, at, memory)
    memory = learn(memory, observation)
    return plan(fleet, observation, memory, allow_destroy, pauses), pins


def recipes(fleet: Fleet, pins: Mapping[str, ImagePin], commit: str | None) -> Iterator[Recipe]:
    """Yield what jobs of each revision in the spec are made of, where the image can be read."""
    for variant in (variant for model in fleet.models for variant in model.variants):
        pin = pins.get(variant.image)
        if pin is not None:
            program, digest = pin.program, pin.digest
            yield Recipe.of(fleet, variant, digest=digest, program=program, commit=commit)


def cycle(
    fleet: Fleet,
    world: World,
    *,
    at: float,
    commit: str | None,
    say: Say,
    allow_destroy: frozenset[str] = frozenset(),
    pauses: Sequence[Pause] = (),
) -> Outcome:
    """Run one cycle at the time `at` (epoch seconds). The caller holds the lock."""
    memory = world.store.load()
    observation, pins = observe(fleet, world, at, memory)
    memory = learn(memory, observation)
    decided = plan(fleet, observation, memory, allow_destroy, pauses)
    ours = list(recipes(fleet, pins, commit))
    memory = remember(memory, decided, ours)
    errors = []
    try:
        world.store.save(memory)
    except StateFailed as error:
        # Lost memory costs caution only; not healing the fleet would cost requests.
        errors.append(f"memory: {error}")
    errors += execute(decided, fleet, world, [*memory.kept.values(), *ours], say=say)
    return Outcome(plan=decided, errors=tuple(errors))
