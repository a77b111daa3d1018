"""From any start, a perfect world becomes what the spec says, and stays so."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

from hypothesis import given, settings

from reconciler.plan import Plan, Reason, Submit
from tests.property.perfect import Perfect, start
from tests.property.worlds import World, worlds
from tests.unit.build import AT

SETTINGS = settings(settings.get_profile("property"), max_examples=80)
# Each replica may have to wait for the one before it, and a halted revision for its hour.
CYCLES = 80


def settle(perfect: Perfect) -> list[Plan]:
    """The plans until nothing is left to do or to wait for."""
    plans = [perfect.cycle()]
    while not plans[-1].converged and len(plans) < CYCLES:
        plans.append(perfect.cycle())
    return plans


@SETTINGS
@given(worlds(roomy=True))
def test_perfect_world_converges_and_stays(world: World) -> None:
    """Plans applied again and again end in the empty plan, and it is the plan from then on."""
    perfect = start(world)
    plans = settle(perfect)
    assert plans[-1].converged, [plans[-1].actions, plans[-1].notes]
    # At the same time again: a little later the next walltime may need a successor.
    perfect.at, perfect.step_s = plans[-1].at, 1.0
    for _ in range(3):
        again = perfect.cycle()
        assert (again.actions, again.converged) == ((), True)


@SETTINGS
@given(worlds(roomy=True))
def test_perfect_world_never_holds_more_than_its_budget(world: World) -> None:
    """At every step: what is held stays within the budget, or shrinks towards it."""
    plans = settle(start(world))
    for before, after in pairwise(plans):
        assert after.gpus_held <= max(before.gpus_held, after.gpus_budget)


@SETTINGS
@given(worlds(roomy=True))
def test_perfect_world_replaces_each_job_once(world: World) -> None:
    """No job is submitted over and over on the way: a step forward is never taken back."""
    perfect = start(world)
    plans = settle(perfect)
    submitted = Counter(
        action.name.model
        for decided in plans
        for action in decided.actions
        if isinstance(action, Submit) and action.reason is not Reason.EXPIRING
    )
    for model in world.fleet.models:
        assert submitted[model.name] <= model.replicas


@SETTINGS
@given(worlds(roomy=True))
def test_perfect_world_keeps_serving_on_the_way(world: World) -> None:
    """Once as many serve as are wanted, less what the spec lets be missing, so it stays."""
    perfect = start(without_haste(world))
    spare = world.fleet.defaults.rollout.max_unavailable
    most = Counter(name.model for name in perfect.serving())
    for _ in range(CYCLES):
        decided = perfect.cycle()
        serving = Counter(name.model for name in perfect.serving())
        for model in world.fleet.models:
            enough = max(0, model.replicas - spare)
            assert serving[model.name] >= min(most[model.name], enough), model.name
        most |= serving
        if decided.converged:
            return


def without_haste(world: World) -> World:
    """The same world in which no walltime ends before a successor can be there."""
    jobs = tuple(
        replace(job, ends_at=None if job.ends_at is None else max(job.ends_at, int(AT) + 10_000))
        for job in world.observation.jobs or ()
    )
    return replace(world, observation=replace(world.observation, jobs=jobs))
