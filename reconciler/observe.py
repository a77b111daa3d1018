"""One look at the world: each adapter is asked once; what can't be read is recorded as unknown."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

from reconciler.adapters.ports import (
    Engines,
    Gateways,
    ImagePin,
    Images,
    LogPart,
    Secrets,
    Slurm,
    Store,
)
from reconciler.errors import GatewayFailed, SecretsFailed, SlurmUnavailable, StateFailed
from reconciler.memory import must_ask_maintenances
from reconciler.spec import Fleet
from reconciler.state import GatewayView, Job, JobKey, Keyring, Memory, Observation, Probe
from reconciler.usage import tally

T = TypeVar("T")


def booted_at() -> float:
    """Return when this host started, by its clock (epoch seconds): later if that jumps ahead."""
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


# Slurm looks at walltimes every half minute or so; what it lets run for so long past one has none
# that this host could tell.
OVERDUE_S = 300.0
# Of each cycle, for the gateways' logs: tens of thousands of lines.
LOGS_S = 2.0


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


def with_usage(
    observation: Observation, fleet: Fleet, world: World, problems: Mapping[str, str]
) -> Observation:
    """Return the observation with what is counted of the gateways' logs; unknown if unreadable."""
    names = frozenset(host.name for host in fleet.gateway.hosts)
    try:
        usage, traffic, trials = world.store.usage(observation.at, names)
    except StateFailed:
        return replace(observation, log_problems=problems)
    return replace(observation, usage=usage, traffic=traffic, trials=trials, log_problems=problems)


def observe(
    fleet: Fleet, world: World, at: float, booted: float, memory: Memory
) -> tuple[Observation, Mapping[str, ImagePin]]:
    """Return what is seen now, and the images' pins. Unknown is never taken for absent.

    `at` and `booted` (when this host started) are of one clock, read at once.
    """
    gateways = world.gateways.look()
    pins, image_errors = world.images.pins(fleet)
    keyring, keyring_error = _keyring(world.secrets)
    key_files = {model.fallback.key_file for model in fleet.models if model.fallback is not None}
    external_keys, external_errors = world.secrets.external_keys(sorted(key_files))
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
        external_keys=external_keys,
        external_errors=external_errors,
    ), pins


def _keyring(secrets: Secrets) -> tuple[Keyring | None, str | None]:
    try:
        return secrets.keyring(), None
    except SecretsFailed as error:
        return None, str(error)


def count_logs(
    world: World, views: Iterable[GatewayView], clock: Callable[[], float] = time.monotonic
) -> Mapping[str, str]:
    """Count what the gateways have logged since it was last done. The caller holds the lock.

    Returns one line for each log that could not be read as it should. No part of a log is begun
    after LOGS_S; what is left is counted by the next cycles. A part and its position are written
    at once, so that no line is lost or counted twice, whenever this process ends.
    """
    deadline = clock() + LOGS_S
    waiting = [view.name for view in views if view.error is None]
    problems: dict[str, str] = {}
    try:
        positions = dict(world.store.log_positions())
        with ThreadPoolExecutor(world.at_once) as pool:
            while waiting and clock() < deadline:
                asked = {
                    name: pool.submit(world.gateways.log, name, positions.get(name, ""))
                    for name in waiting
                }
                waiting = []
                for name, answer in asked.items():
                    try:
                        part = answer.result()
                    except GatewayFailed as error:
                        problems[name] = f"its log is not counted: {error}"
                        continue
                    problem = _count(world.store, name, part, known=name in positions)
                    if problem is not None:
                        problems[name] = problem
                    positions[name] = part.position
                    if part.lines and not part.ended:
                        waiting.append(name)
    except StateFailed as error:
        problems["logs"] = f"not counted: {error}"
    return problems


def _count(store: Store, name: str, part: LogPart, *, known: bool) -> str | None:
    """Count a part of a log; return what is wrong with it, in one line, if anything is."""
    tallies = tally(part.lines)
    if part.lines or not known:
        store.count(name, part, tallies)
    if part.lost:
        return "lines of its log are lost: a file was compressed or removed before it was read"
    if tallies.odd_lines:
        return f"lines of its log that could not be read: {tallies.odd_lines}"
    return None


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
