"""Each rule is broken on purpose, and the simulator must notice: its checks can fail.

A mutation replaces one function of the reconciler for the time of a few runs. The first violation
must be of one of the invariants that the rule serves.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import reconciler.cycle
import reconciler.execute
import reconciler.memory
import reconciler.observe
import reconciler.planner
import reconciler.planner.drain
import reconciler.planner.model
from reconciler.adapters import slurm_cli
from reconciler.batch import batch_script
from reconciler.errors import SubmitRejected, SubmitUnknown
from reconciler.naming import ReplicaName, parse_name
from reconciler.observe import observe
from reconciler.plan import Cancel, Drain, Status, Submit
from reconciler.planner.model import Part
from reconciler.planner.seen import Seen
from reconciler.spec import Slurm
from reconciler.state import Job, JobKey, Memory, Observation
from tests.simulation.run import simulate
from tests.simulation.script import read_script

# How many runs may pass before a mutation is noticed, and how long they are.
SEEDS = range(60)
CYCLES = 120

Patch = pytest.MonkeyPatch
Break = Callable[[Patch], None]


def absent_when_unknown(patch: Patch) -> None:
    """A listing that failed is taken for an empty one."""

    def looked(*arguments: Any) -> tuple[Observation, Any]:
        observation, pins = observe(*arguments)
        return replace(observation, jobs=observation.jobs or ()), pins

    patch.setattr(reconciler.cycle, "observe", looked)


def emptiness_believed(patch: Patch) -> None:
    """That every job is gone at once is believed at first sight."""
    patch.setattr(reconciler.planner, "unconfirmed", lambda *_: False)
    patch.setattr(reconciler.memory, "unconfirmed", lambda *_: False)


def submissions_forgotten(patch: Patch) -> None:
    """What was submitted is known only once a listing has shown it."""

    def remember(*arguments: Any) -> Memory:
        return replace(reconciler.memory.remember(*arguments), submitted=frozenset())

    patch.setattr(reconciler.cycle, "remember", remember)


def avoided_for_ever(patch: Patch) -> None:
    """A job that waits avoids the nodes of its submission, whatever becomes of them."""
    patch.setattr(Seen, "_avoids_in_vain", lambda *_: False)


def placed_for_ever(patch: Patch) -> None:
    """A job that waits stays where it was submitted to, whatever the spec says now."""
    patch.setattr(Slurm, "placement", None)


def observer_trusted(patch: Patch) -> None:
    """That nobody answers is never taken for the observer's own fault."""
    patch.setattr(Seen, "_observer_suspect", lambda _: False)


def no_singleton(patch: Patch) -> None:
    """Jobs are submitted without --dependency=singleton."""

    def script(*arguments: Any, **keys: Any) -> str:
        return batch_script(*arguments, **keys).replace("#SBATCH --dependency=singleton\n", "")

    patch.setattr(reconciler.execute, "batch_script", script)


def submitted_again(patch: Patch) -> None:
    """A submission whose outcome is unknown is repeated in the same cycle."""
    plain = reconciler.execute._perform

    def perform(*arguments: Any) -> str:
        try:
            return plain(*arguments)
        except SubmitUnknown:
            return plain(*arguments)

    patch.setattr(reconciler.execute, "_perform", perform)


def one_too_many(patch: Patch) -> None:
    """A model gets two more replicas than it lacks."""
    plain = reconciler.planner.model._missing

    def missing(*arguments: Any) -> tuple[tuple[Submit, ...], Any]:
        submits, notes = plain(*arguments)
        more = [
            replace(submit, name=replace(submit.name, ordinal=submit.name.ordinal + 10 * extra))
            for submit in submits
            for extra in (1, 2)
        ]
        return (*submits, *more), notes

    patch.setattr(reconciler.planner.model, "_missing", missing)


def nameless(patch: Patch) -> None:
    """A job's comment is not one that can be read."""

    def script(*arguments: Any, **keys: Any) -> str:
        return batch_script(*arguments, **keys).replace('"v":1', '"v":0')

    patch.setattr(reconciler.execute, "batch_script", script)


def gone_models_forgotten(patch: Patch) -> None:
    """What is not in the spec is left to itself."""
    patch.setattr(reconciler.planner, "not_in_spec", lambda *_: Part())


def draining_forgotten(patch: Patch) -> None:
    """A live job whose comment can't be read is left out of the plan."""

    def looked(*arguments: Any) -> tuple[Observation, Any]:
        observation, pins = observe(*arguments)
        jobs = observation.jobs
        known = None if jobs is None else tuple(job for job in jobs if job.comment is not None)
        return replace(observation, jobs=known), pins

    patch.setattr(reconciler.cycle, "observe", looked)


def foreign_adopted(patch: Patch) -> None:
    """Names that are only like ours count as ours."""

    def parse(text: str) -> ReplicaName | None:
        parts = text.split(".")
        if parse_name(text) is not None or len(parts) != 4 or parts[3] not in ("0", "1"):
            return parse_name(text)
        return ReplicaName(fleet=parts[0], model=parts[1], revision=parts[2], ordinal=int(parts[3]))

    patch.setattr(slurm_cli, "parse_name", parse)


def budget_ignored(patch: Patch) -> None:
    """Everything that is missing is submitted, whatever the budget."""

    def within(_fleet: Any, _seen: Any, parts: Sequence[Part]) -> tuple[list[Submit], list[Any]]:
        return [submit for part in parts for submit in part.submits], []

    patch.setattr(reconciler.planner, "_within_budget", within)


def ending_ones_are_free(patch: Patch) -> None:
    """A job that is COMPLETING does not count against the budget."""
    plain = Seen._gpus

    def gpus(seen: Seen, job: Job) -> int:
        return 0 if job.state == "COMPLETING" else plain(seen, job)

    patch.setattr(Seen, "_gpus", gpus)


def unproven_routed(patch: Patch) -> None:
    """A replica that has published its address gets requests."""
    plain = Seen._answering

    def answering(seen: Seen, job: Job) -> Status:
        return plain(seen, job) if job.run is None else Status.READY

    patch.setattr(Seen, "_answering", answering)


def old_proof_kept(patch: Patch) -> None:
    """A requeued job need not prove again what it proved at its old address."""

    def proven(jobs: Sequence[Job] | None, _gateways: Any) -> list[JobKey]:
        return [job.key for job in jobs or ()]

    patch.setattr(reconciler.observe, "_proven", proven)


def signalled_while_routed(patch: Patch) -> None:
    """USR1 does not wait for the gateways."""
    plain = reconciler.planner.drain._waits_for

    def waits_for(job: Job, seen: Seen) -> str | None:
        run = job.run
        return None if run is not None and run.trap_ready else plain(job, seen)

    patch.setattr(reconciler.planner.drain, "_waits_for", waits_for)


def old_workers_ignored(patch: Patch) -> None:
    """USR1 does not wait for old workers."""

    def looked(*arguments: Any) -> tuple[Observation, Any]:
        observation, pins = observe(*arguments)
        views = tuple(replace(view, old_workers=0) for view in observation.gateways)
        return replace(observation, gateways=views), pins

    patch.setattr(reconciler.cycle, "observe", looked)


def unreachable_forgotten(patch: Patch) -> None:
    """A gateway that can't be asked is taken for one that routes nothing."""

    def looked(*arguments: Any) -> tuple[Observation, Any]:
        observation, pins = observe(*arguments)
        views = tuple(view for view in observation.gateways if view.error is None)
        return replace(observation, gateways=views), pins

    patch.setattr(reconciler.cycle, "observe", looked)


def signalled_before_its_trap(patch: Patch) -> None:
    """USR1 does not wait for the job's trap."""
    patch.setattr(reconciler.planner.drain, "_waits_for", lambda *_: None)


def cut_off(patch: Patch) -> None:
    """What leaves is cancelled at once instead of drained."""
    plain = reconciler.planner.drain.next_steps

    def steps(*arguments: Any) -> tuple[list[Any], list[Any]]:
        actions, notes = plain(*arguments)
        return [_cancelled(action) for action in actions], notes

    patch.setattr("reconciler.planner.next_steps", steps)


def _cancelled(action: Any) -> Any:
    if isinstance(action, Drain):
        return Cancel(job=action.job, pending=False, reason=action.reason)
    return action


def released_at_once(patch: Patch) -> None:
    """The old revision goes as soon as there is a new one."""

    def leave(_case: Any, _current: Any, outgoing: Sequence[Job]) -> list[Job]:
        return list(outgoing)

    patch.setattr(reconciler.planner.model, "_outgoing_to_leave", leave)


def one_stops_all(patch: Patch) -> None:
    """The first action that fails ends the cycle."""
    plain = reconciler.execute._perform

    def perform(*arguments: Any) -> str:
        try:
            return plain(*arguments)
        except SubmitRejected as error:
            raise RuntimeError(str(error)) from error

    patch.setattr(reconciler.execute, "_perform", perform)


def asked_twice(patch: Patch) -> None:
    """Each cycle looks twice."""

    def looked(*arguments: Any) -> tuple[Observation, Any]:
        observe(*arguments)
        return observe(*arguments)

    patch.setattr(reconciler.cycle, "observe", looked)


def verified_one_by_one(patch: Patch) -> None:
    """Each action asks Slurm for all jobs again."""
    plain = reconciler.execute._perform

    def perform(action: Any, fleet: Any, world: Any, *rest: Any) -> str:
        reconciler.execute._present([action], fleet, world.slurm)
        return plain(action, fleet, world, *rest)

    patch.setattr(reconciler.execute, "_perform", perform)


# Invariant 0 stands for liveness: the fleet does not become what the spec says.
MUTATIONS: Mapping[Break, frozenset[int]] = {
    absent_when_unknown: frozenset({1}),
    emptiness_believed: frozenset({1}),
    observer_trusted: frozenset({1}),
    no_singleton: frozenset({2}),
    submitted_again: frozenset({2}),
    one_too_many: frozenset({2}),
    nameless: frozenset({3}),
    gone_models_forgotten: frozenset({0}),
    draining_forgotten: frozenset({3}),
    foreign_adopted: frozenset({0, 4}),
    budget_ignored: frozenset({5}),
    ending_ones_are_free: frozenset({5}),
    unproven_routed: frozenset({6}),
    old_proof_kept: frozenset({6}),
    signalled_while_routed: frozenset({7}),
    old_workers_ignored: frozenset({7}),
    unreachable_forgotten: frozenset({7}),
    signalled_before_its_trap: frozenset({7}),
    cut_off: frozenset({7}),
    released_at_once: frozenset({8}),
    one_stops_all: frozenset({9}),
    asked_twice: frozenset({10, 11}),
    verified_one_by_one: frozenset({11}),
}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_a_broken_rule_is_noticed(mutation: Break, monkeypatch: Patch) -> None:
    """A reconciler with one rule broken violates an invariant that the rule serves."""
    mutation(monkeypatch)
    for seed in SEEDS:
        violation = simulate(seed, CYCLES).violation
        if violation is not None:
            assert violation.number in MUTATIONS[mutation], str(violation)
            return
    pytest.fail(f"{mutation.__doc__} Nobody noticed in {len(SEEDS)} runs.")


# What so few runs meet by chance, by the named case that is about it.
RARE: Mapping[Break, tuple[str, int]] = {
    submissions_forgotten: ("submitted_jobs_vanish", 1),
    avoided_for_ever: ("quarantine_over_while_a_job_waits", 0),
    placed_for_ever: ("waits_in_the_wrong_partition", 0),
}


@pytest.mark.parametrize("mutation", RARE, ids=lambda mutation: mutation.__name__)
def test_a_rule_that_is_seldom_needed_is_noticed(mutation: Break, monkeypatch: Patch) -> None:
    """The named case, which holds otherwise, violates the invariant that the rule serves."""
    mutation(monkeypatch)
    name, number = RARE[mutation]
    path = Path(__file__).parent / "cases" / f"{name}.txt"
    script = read_script(path.read_text(encoding="utf-8"))
    violation = simulate(script.seed, script.cycles, script.events).violation
    assert violation is not None
    assert violation.number == number
