"""One look at the world: each adapter is asked once; what can't be read is recorded as unknown."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from reconciler.adapters.ports import Engines, Gateways, ImagePin, Images, Secrets, Slurm, Store
from reconciler.errors import SecretsFailed, SlurmUnavailable
from reconciler.memory import must_ask_maintenances
from reconciler.spec import Fleet
from reconciler.state import GatewayView, Job, JobKey, Keyring, Memory, Observation, Probe

T = TypeVar("T")


def booted_at() -> float:
    """Return when this host started, by its clock (epoch seconds): later if that jumps ahead."""
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


# Slurm looks at walltimes every half minute or so; what it lets run for so long past one has none
# that this host could tell.
OVERDUE_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Everything outside of the process, one adapter each."""

    slurm: Slurm
    engines: Engines
    gateways: Gateways
    images: Images
    secrets: Secrets
    store: Store
    booted_at: Callable[[], float] = booted_at
    # Calls that change something, side by side. Slurm's rate limiter takes bursts of 30 a user.
    at_once: int = 8


def observe(
    fleet: Fleet, world: World, at: float, booted: float, memory: Memory
) -> tuple[Observation, Mapping[str, ImagePin]]:
    """Return what is seen now, and the images' pins. Unknown is never taken for absent.

    `at` and `booted` (when this host started) are of one clock, read at once.
    """
    gateways = world.gateways.look()
    pins, image_errors = world.images.pins(fleet)
    keyring, keyring_error = _keyring(world.secrets)
    jobs: tuple[Job, ...] | None = None
    jobs_error: str | None = None
    odd_lines = 0
    try:
        listing = world.slurm.jobs(fleet.fleet)
        jobs_error = _clock_ahead(listing.jobs, at)
        if jobs_error is None:
            jobs, odd_lines = listing.jobs, listing.odd_lines
    except SlurmUnavailable as error:
        jobs_error = str(error)
    # Two questions here, and one before anything is ended: three to Slurm in a cycle.
    must_ask = must_ask_maintenances(memory, jobs or (), at)
    probes: Mapping[JobKey, Probe] = world.engines.probe(jobs or (), _proven(jobs, gateways))
    return Observation(
        at=at,
        jobs=jobs,
        jobs_error=jobs_error,
        odd_lines=odd_lines,
        nodes=_known(world.slurm.nodes) if jobs and not must_ask else None,
        maintenances=_known(lambda: tuple(world.slurm.maintenances())) if must_ask else None,
        probes=probes,
        gateways=gateways,
        image_digests={name: pin.digest for name, pin in pins.items()},
        image_errors=image_errors,
        booted_at=booted,
        keyring=keyring,
        keyring_error=keyring_error,
    ), pins


def _keyring(secrets: Secrets) -> tuple[Keyring | None, str | None]:
    try:
        return secrets.keyring(), None
    except SecretsFailed as error:
        return None, str(error)


def _clock_ahead(jobs: Iterable[Job], at: float) -> str | None:
    """Return why this host's clock can't be trusted to judge a walltime, or None if it can.

    Slurm ends jobs by its own clock. By one that is ahead a whole fleet would seem to be past its
    end, and leave at once. One job that runs on says nothing: a site may have an OverTimeLimit.
    """
    over = [at - job.ends_at for job in jobs if job.state == "RUNNING" and job.ends_at is not None]
    overdue = [seconds for seconds in over if seconds > OVERDUE_S]
    if 2 * len(overdue) <= len(over):
        return None
    return (
        f"{len(overdue)} of {len(over)} jobs run up to {max(overdue) / 60:.0f} min past their "
        "walltime: this host's clock is ahead of Slurm's, or Slurm has an OverTimeLimit"
    )


def _proven(jobs: Iterable[Job] | None, gateways: Iterable[GatewayView]) -> Iterator[JobKey]:
    """Yield who is routed to where it is now; a requeued job has everything to prove again."""
    routed = {(target.key, target.address) for view in gateways for target in view.targets}
    for job in jobs or ():
        if job.run is not None and (job.key, job.run.address) in routed:
            yield job.key


def _known(ask: Callable[[], T]) -> T | None:
    """Return Slurm's answer, or None: to know no node's state, and no maintenance, is cautious."""
    try:
        return ask()
    except SlurmUnavailable:
        return None
