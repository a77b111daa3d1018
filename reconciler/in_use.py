"""Which images may not be removed: what the spec, a live job or memory names."""

from collections.abc import Mapping

from reconciler.batch import read_recipe
from reconciler.errors import FleetError
from reconciler.observe import World
from reconciler.spec import Fleet
from reconciler.state import Job, Phase


def images_in_use(fleet: Fleet, world: World) -> Mapping[str, tuple[str, ...]]:
    """Return each program (a SIF, or what runs without a container) with who names it.

    Raises a FleetError if that is not known of even one of them: then nothing may be removed.
    """
    named: dict[str, list[str]] = {}
    pins, errors = world.images.pins(fleet)
    if errors:
        raise FleetError(f"it is not known what is in use: {'; '.join(errors.values())}")
    for name, pin in pins.items():
        named.setdefault(pin.program, []).append(f"the spec as {name}")
    for model, recipe in world.store.load().kept.items():
        named.setdefault(recipe.program, []).append(f"what served {model} last")
    # Jobs of one revision have one image: one of their scripts is enough.
    live = [job for job in world.slurm.jobs(fleet.fleet).jobs if job.phase is not Phase.ENDED]
    first = {(job.name.model, job.name.revision): job for job in reversed(live)}
    programs = {revision: _program(world, job) for revision, job in first.items()}
    for job in live:
        program = programs[job.name.model, job.name.revision]
        named.setdefault(program, []).append(f"job {job.id}")
    return {program: tuple(who) for program, who in sorted(named.items())}


def _program(world: World, job: Job) -> str:
    recipe = read_recipe(world.slurm.script(job.id))
    if recipe is None:
        raise FleetError(f"it is not known what is in use: job {job.id} has no script of ours")
    return recipe.program
