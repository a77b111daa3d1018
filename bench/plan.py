"""`python -m bench.plan`: how long plan() takes for 200 models of 5 replicas, in each situation.

The ratio is the time per replica against that of 20 models of 5: more than 1 is what does not
scale. Both are measured in turns and the best run counts: what else this machine does only adds.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from reconciler.planner import plan
from reconciler.spec import Fleet
from reconciler.state import Health, Job, Memory, Observation
from tests.unit.build import (
    OLD,
    fleet,
    job,
    misses,
    model_record,
    observation,
    revision,
    view,
)

RUNS = 15
REPLICAS = 5
SMALL, LARGE = 20, 200
HUNG = 50
# Of the issue that asked for it.
MOST_MS = 60.0
MOST_RATIO = 1.3


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """The arguments of one plan()."""

    fleet: Fleet
    observation: Observation
    memory: Memory = field(default_factory=Memory)


def wanted(models: int, replicas: int = REPLICAS) -> Fleet:
    """A spec of so many models."""
    records = [model_record(name=f"model-{at}", replicas=replicas) for at in range(models)]
    return fleet(*records, budget={"gpus": 2 * models * REPLICAS})


def running(spec: Fleet, of: str | None = None) -> list[Job]:
    """Five running replicas of each model, of the wanted revision or of `of`."""
    return [
        job(
            of or revision(spec, model.name),
            id=REPLICAS * at + ordinal + 1,
            model=model.name,
            ordinal=ordinal,
            ends_at=10_000_000,
        )
        for at, model in enumerate(spec.models)
        for ordinal in range(REPLICAS)
    ]


def settled(models: int) -> World:
    """Nothing to do."""
    spec = wanted(models)
    jobs = running(spec)
    return World(fleet=spec, observation=observation(*jobs, gateways=[view(spec, *jobs)]))


def empty(models: int) -> World:
    """Everything is to be submitted."""
    spec = wanted(models)
    return World(fleet=spec, observation=observation(gateways=[view(spec)]))


def waiting(models: int) -> World:
    """Everything was submitted and waits for its turn."""
    spec = wanted(models)
    placement = spec.slurm_for(spec.models[0]).placement
    jobs = [
        job(
            one.name.revision,
            id=one.id,
            model=one.name.model,
            ordinal=one.name.ordinal,
            state="PENDING",
            placement=placement,
        )
        for one in running(spec)
    ]
    return World(fleet=spec, observation=observation(*jobs, gateways=[view(spec)]))


def stale(models: int) -> World:
    """Each model has a new revision."""
    spec = wanted(models)
    jobs = running(spec, OLD)
    return World(fleet=spec, observation=observation(*jobs, gateways=[view(spec, *jobs)]))


def surplus(models: int) -> World:
    """Everything is to end."""
    spec = wanted(models, replicas=0)
    jobs = running(spec)
    return World(fleet=spec, observation=observation(*jobs, gateways=[view(spec, *jobs)]))


def expiring(models: int) -> World:
    """Every replica needs a successor now."""
    world = settled(models)
    jobs = [replace(one, ends_at=1_000_500) for one in world.observation.jobs or ()]
    return World(
        fleet=world.fleet, observation=observation(*jobs, gateways=world.observation.gateways)
    )


def silent(models: int) -> World:
    """Fifty engines have hung for long (all of them, in the small fleet half)."""
    spec = wanted(models)
    jobs = running(spec)
    hung = jobs[: min(HUNG, len(jobs) // 2)]
    seen = observation(
        *jobs,
        healths={one.id: Health.SILENT for one in hung},
        gateways=[view(spec, *jobs)],
    )
    return World(fleet=spec, observation=seen, memory=misses(9, *hung))


SITUATIONS: tuple[tuple[str, Callable[[int], World]], ...] = (
    ("nothing to do", settled),
    ("all missing", empty),
    ("all waiting", waiting),
    ("all stale", stale),
    ("all surplus", surplus),
    ("all expiring", expiring),
    (f"{HUNG} probes hang", silent),
)


def seconds(world: World) -> float:
    """How long one plan() takes."""
    began = time.perf_counter()
    plan(world.fleet, world.observation, world.memory)
    return time.perf_counter() - began


def measure(make: Callable[[int], World]) -> tuple[float, float]:
    """Return the best times of the small and of the large fleet, measured in turns."""
    small, large = make(SMALL), make(LARGE)
    pairs = [(seconds(small), seconds(large)) for _ in range(RUNS)]
    return min(small_s for small_s, _ in pairs), min(large_s for _, large_s in pairs)


def main() -> None:
    """Print the table."""
    print(f"{'plan()':16}  {f'{SMALL} x {REPLICAS}':>9}  {f'{LARGE} x {REPLICAS}':>9}  per replica")
    for title, make in SITUATIONS:
        small_s, large_s = measure(make)
        ratio = large_s / small_s * SMALL / LARGE
        print(f"{title:16}  {small_s * 1e3:6.1f} ms  {large_s * 1e3:6.1f} ms  x {ratio:.2f}")
    print(f"\nAt most {MOST_MS:.0f} ms, and x {MOST_RATIO} per replica.")


if __name__ == "__main__":
    main()
