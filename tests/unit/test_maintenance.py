"""Maintenances: what waits for one is shortened to run before it, if that is worth a start."""

from dataclasses import replace

import pytest

from reconciler.memory import (
    FORGET_MAINTENANCES_S,
    MAINTENANCES_S,
    learn,
    must_ask_maintenances,
)
from reconciler.plan import NoteKind, Plan, Reason
from reconciler.planner import plan
from reconciler.spec import MARGIN_S
from reconciler.state import Job, Maintenances, Memory
from tests.unit.build import (
    AT,
    ended,
    fleet,
    job,
    model_record,
    notes,
    observation,
    revision,
    submits,
)

FLEET = fleet(model_record(replicas=1))  # walltime 4 h, startup 600 s, drain 60 s
REV = revision(FLEET)
FLOOR_S = 600 + 60 + MARGIN_S
RESERVED = "ReqNodeNotAvail, Reserved for maintenance"
HOUR = 3600


def waiting(limit_s: int = 4 * HOUR, reason: str = RESERVED) -> Job:
    return replace(job(REV, state="PENDING", reason=reason), limit_s=limit_s)


def decide(begins_in_s: float, one: Job | None = None) -> Plan:
    memory = Memory(maintenances=Maintenances(asked_at=AT - 1, begin=(AT - 9, AT + begins_in_s)))
    return plan(FLEET, observation(one or waiting()), memory)


def test_job_that_waits_for_a_maintenance_is_replaced_by_a_shorter_one() -> None:
    """It ends a margin before the nodes are taken away."""
    decided = decide(2 * HOUR)
    assert ended(decided) == {1: f"cancel: {Reason.MAINTENANCE}"}
    [submit] = submits(decided)
    assert submit.walltime_s == 2 * HOUR - MARGIN_S


@pytest.mark.parametrize("reason", ["ReqNodeNotAvail, May be reserved for other job"])
def test_job_that_may_wait_for_one_is_shortened_too(reason: str) -> None:
    """Slurm's words where only some of the nodes are reserved."""
    assert submits(decide(2 * HOUR, waiting(reason=reason)))


@pytest.mark.parametrize("reason", ["Priority", "Resources", "ReqNodeNotAvail, UnavailableNodes:a"])
def test_job_that_waits_for_something_else_waits_on(reason: str) -> None:
    """A maintenance is no reason to give up a place in the queue."""
    assert decide(2 * HOUR, waiting(reason=reason)).actions == ()


def test_job_that_is_short_enough_waits_on() -> None:
    """Slurm knows something else that we don't: no job is replaced by the same again."""
    assert decide(2 * HOUR, waiting(limit_s=HOUR)).actions == ()


def test_what_was_cut_for_a_maintenance_is_not_cut_again() -> None:
    """It waits for something else, such as a reservation in progress: else it never got older."""
    limit_s = 2 * HOUR - int(MARGIN_S)
    earlier = int(AT) - 600
    cut = replace(waiting(limit_s), submitted_at=earlier)
    assert decide(2 * HOUR - 600, cut).actions == ()
    never_cut = replace(waiting(), submitted_at=earlier)
    assert ended(decide(2 * HOUR - 600, never_cut)) == {1: f"cancel: {Reason.MAINTENANCE}"}


@pytest.mark.parametrize("left_s", [FLOOR_S - 1, 0.0, -100.0])
def test_too_little_time_is_worth_no_start(left_s: float) -> None:
    """The note says why nothing starts."""
    decided = decide(left_s + MARGIN_S)
    assert decided.actions == ()
    [note] = notes(decided, NoteKind.PENDING)
    assert RESERVED in note.text


def test_shortest_walltime_is_worth_a_start() -> None:
    """Start, serve a little, drain."""
    [submit] = submits(decide(FLOOR_S + MARGIN_S))
    assert submit.walltime_s == FLOOR_S


def test_reservations_are_asked_for_only_while_a_job_waits_for_one() -> None:
    """And not in each cycle: the question takes the place of another one."""
    memory = Memory()
    assert not must_ask_maintenances(memory, [waiting(reason="Priority")], AT)
    assert must_ask_maintenances(memory, [waiting()], AT)
    memory = learn(memory, observation(waiting(), maintenances=(AT + HOUR,)))
    assert memory.maintenances == Maintenances(asked_at=AT, begin=(AT + HOUR,))
    assert not must_ask_maintenances(memory, [waiting()], AT + MAINTENANCES_S - 1)
    assert must_ask_maintenances(memory, [waiting()], AT + MAINTENANCES_S)
    assert must_ask_maintenances(memory, [waiting()], AT - 1)


def test_reservations_are_forgotten_when_they_may_have_changed() -> None:
    """A maintenance that was called off must not cut walltimes for ever."""
    memory = Memory(maintenances=Maintenances(asked_at=AT, begin=(AT + HOUR,)))
    later = AT + FORGET_MAINTENANCES_S
    assert learn(memory, observation(at=later - 1)).maintenances is not None
    assert learn(memory, observation(at=later)).maintenances is None
