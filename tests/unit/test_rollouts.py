"""Releases that fail, and releases tried on a few replicas: what served goes on serving."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from reconciler.memory import learn, remember
from reconciler.plan import NoteKind, Plan, Reason
from reconciler.planner import plan
from reconciler.spec import Fleet, Model
from reconciler.state import (
    Cause,
    DrainClock,
    Failures,
    Health,
    Job,
    Memory,
    Recipe,
)
from tests.unit.build import (
    AT,
    DIGEST,
    OLD,
    ended,
    fleet,
    job,
    leaving,
    model_record,
    notes,
    observation,
    revision,
    submits,
    view,
)

BEFORE = fleet(model_record(args={"seed": 1}))
AFTER = fleet(model_record(args={"seed": 2}))
GOOD, BAD = revision(BEFORE), revision(AFTER)
KEPT = Recipe.of(BEFORE, BEFORE.models[0], digest=DIGEST, program="/opt/engine", commit="c0ffee")
HOUR = 3600


def served(**changes: Any) -> tuple[Job, Job]:
    """The two replicas of the good revision."""
    return job(GOOD, id=1, ordinal=0, **changes), job(GOOD, id=2, ordinal=1)


def failing(count: int = 5, last_at: float = AT) -> Memory:
    """The new revision has failed so often; what served before is remembered."""
    failures = Failures(count=count, last_at=last_at, counted=frozenset())
    return Memory(failures={f"tiny.{BAD}": failures}, kept={"tiny": KEPT})


def decide(jobs: Sequence[Job], memory: Memory, wanted: Fleet = AFTER, **keys: Any) -> Plan:
    routed = [one for one in jobs if one.run is not None and one.run.ready_at is not None]
    seen = observation(*jobs, gateways=[view(wanted, *routed)], **keys)
    return plan(wanted, seen, memory)


def submitted(decided: Plan) -> list[tuple[str, int, str]]:
    """Revision, ordinal and reason of each submission."""
    return [(s.name.revision, s.name.ordinal, s.reason) for s in submits(decided)]


# --- another slurm block ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slurm", "moves"),
    [
        ({}, False),
        ({"walltime": "24:00:00"}, False),  # the same, in other words
        ({"log_dir": "/elsewhere"}, False),
        *(({key: "other"}, True) for key in ("partition", "account", "qos")),
        ({"walltime": "12:00:00"}, True),
    ],
)
def test_job_waits_where_the_slurm_block_says_now(slurm: dict[str, str], moves: bool) -> None:
    """It may never start where it waits, as for its walltime; what runs there already goes on."""
    block = {"partition": "gpu", "walltime": "1-00:00:00", "log_dir": "/shared/logs"}
    before = fleet(slurm=block)
    after = fleet(slurm={**block, **slurm})
    old = before.slurm_for(before.models[0]).placement
    rev = revision(after)
    assert rev == revision(before)
    waits = job(rev, id=1, state="PENDING", reason="PartitionTimeLimit", placement=old)
    runs = job(rev, id=2, ordinal=1, placement=old)
    decided = decide([waits, runs], Memory(), after)
    assert ended(decided) == ({1: "cancel: stale"} if moves else {})
    assert submitted(decided) == ([(rev, 2, Reason.STALE)] if moves else [])


@pytest.mark.parametrize(
    ("reason", "goes"),
    [("PartitionTimeLimit", True), ("Priority", False), ("JobHeldUser", False)],
)
def test_unreadable_job_that_can_not_start_is_submitted_anew(reason: str, goes: bool) -> None:
    """Nothing tells where it was to run, and it can't write its comment anew before it starts."""
    wanted = fleet(model_record(replicas=1))
    waits = job(revision(wanted), state="PENDING", reason=reason, vandalised=True)
    assert ended(decide([waits], Memory(), wanted)) == ({1: "cancel: stale"} if goes else {})


def test_job_of_the_kept_revision_waits_where_the_slurm_block_says_now() -> None:
    """Its recipe is of an older spec: where jobs go is no part of it."""
    moved = fleet(model_record(args={"seed": 2}, slurm={"partition": "other"}))
    for wanted, moves in ((AFTER, False), (moved, True)):
        old = AFTER.slurm_for(AFTER.models[0]).placement
        serves, waits = (
            job(GOOD, id=1),
            job(GOOD, id=2, ordinal=1, state="PENDING", placement=old),
        )
        decided = decide([serves, waits], failing(), wanted)
        assert ended(decided) == ({2: "cancel: stale"} if moves else {})


# --- a halted release -------------------------------------------------------------------------


def test_halted_release_replaces_an_old_replica_that_died() -> None:
    """The old revision is gone from git, and it alone serves: it must not decay."""
    decided = decide(served()[:1], failing())
    assert submitted(decided) == [(GOOD, 1, Reason.MISSING)]
    assert leaving(decided) == {}


def test_halted_release_replaces_an_old_replica_before_its_walltime_ends() -> None:
    """Its successor names it, so that it is known for one also when memory is lost."""
    first, second = served(ends_at=int(AT) + 150)
    decided = decide([first, second], failing())
    assert submitted(decided) == [(GOOD, 2, Reason.EXPIRING)]
    assert submits(decided)[0].succeeds == first.key


def test_old_replica_leaves_when_its_successor_of_the_same_revision_is_ready() -> None:
    """As in any rollover: two serve, so the one whose walltime ends may go."""
    first, second = served(ends_at=int(AT) + 150)
    third = job(GOOD, id=3, ordinal=2)
    comment = third.comment
    assert comment is not None
    third = replace(third, comment=replace(comment, succeeds=first.key))
    decided = decide([first, second, third], failing())
    assert leaving(decided) == {1: Reason.EXPIRING}
    assert submits(decided) == []


def test_successor_of_an_old_replica_that_is_not_routed_yet_does_not_go_in_its_place() -> None:
    """It would be submitted again, and again."""
    first, second = served(ends_at=int(AT) + 150)
    third = job(GOOD, id=3, ordinal=2)
    jobs = [first, second, third]
    seen = observation(*jobs, gateways=[view(AFTER, first, second)])
    assert leaving(plan(AFTER, seen, failing())) == {1: Reason.EXPIRING}


@pytest.mark.parametrize("state", ["PENDING", "RUNNING"])
def test_old_replica_that_starts_is_not_cancelled_between_two_tries(state: str) -> None:
    """The hold has passed and the new revision is tried again; what replaces the old one stays."""
    starting = job(GOOD, id=3, ordinal=2, state=state, ready_at=None)
    trial = job(BAD, id=4, ordinal=3, ready_at=None)
    jobs = [served()[0], starting, trial]
    healths = {3: Health.STARTING, 4: Health.STARTING}
    decided = decide(jobs, failing(count=1, last_at=AT - HOUR), healths=healths)
    assert leaving(decided) == {}
    assert submits(decided) == []


def test_old_replica_that_starts_leaves_once_the_release_is_ready() -> None:
    """Enough of the new revision serve: nothing of the old one is wanted any more."""
    new = job(BAD, id=5, ordinal=4), job(BAD, id=6, ordinal=5)
    starting = job(GOOD, id=3, ordinal=2, ready_at=None)
    decided = decide([*new, starting], failing(count=1), healths={3: Health.STARTING})
    assert leaving(decided) == {3: Reason.STALE}


def test_release_that_does_not_fail_replaces_no_old_replica() -> None:
    """A rolling update goes forward: what dies on the way is replaced by the new revision."""
    memory = replace(failing(), failures={})
    assert {one for one, _, _ in submitted(decide(served()[:1], memory))} == {BAD}


def test_old_revision_that_fails_too_is_held_as_any_other() -> None:
    """Its weights may be gone by now."""
    memory = failing()
    failures = Failures(count=3, last_at=AT, counted=frozenset())
    memory = replace(memory, failures={**memory.failures, f"tiny.{GOOD}": failures})
    decided = decide(served()[:1], memory)
    assert submitted(decided) == []
    assert [note.text.split()[-1] for note in notes(decided, NoteKind.BACKOFF)]


def test_halted_release_and_its_old_revision_stay_within_replicas_and_surge() -> None:
    """The next try takes the surge, not the place of what is replaced."""
    decided = decide(served()[:1], failing(count=1, last_at=AT - HOUR))
    assert sorted(one for one, _, _ in submitted(decided)) == sorted([GOOD, BAD])


# --- what is kept -----------------------------------------------------------------------------


def recipe(wanted: Fleet, model: Model | None = None) -> Recipe:
    return Recipe.of(
        wanted, model or wanted.models[0], digest=DIGEST, program="/opt/engine", commit=None
    )


def test_recipe_of_a_revision_is_kept_once_a_replica_of_it_is_ready() -> None:
    """A release that never gets ready takes nothing's place."""
    starting = decide([job(BAD, ready_at=None)], Memory(), healths={1: Health.STARTING})
    memory = remember(Memory(kept={"tiny": KEPT}), starting, [recipe(AFTER)])
    assert memory.kept == {"tiny": KEPT}
    ready = decide([job(BAD)], Memory())
    memory = remember(Memory(kept={"tiny": KEPT}), ready, [recipe(AFTER)])
    assert memory.kept["tiny"].revision == BAD


def test_recipe_of_a_model_that_left_the_spec_is_dropped() -> None:
    """Nothing of it would be submitted again."""
    memory = Memory(kept={"gone": KEPT, "tiny": KEPT})
    assert set(remember(memory, decide([], Memory()), []).kept) == {"tiny"}


# --- a canary ---------------------------------------------------------------------------------

CANARY_MODELS = [model_record(args={"seed": 1}, canary={"replicas": 1, "args": {"seed": 2}})]
CANARY = fleet(*CANARY_MODELS)


def test_canary_is_a_second_wanted_revision() -> None:
    """Both are submitted, each as often as it is wanted, and no ordinal is used twice."""
    decided = decide([], Memory(), CANARY)
    assert [(name, reason) for name, _, reason in submitted(decided)] == [
        (GOOD, Reason.MISSING),
        (GOOD, Reason.MISSING),
        (BAD, Reason.MISSING),
    ]
    [shown] = decided.models
    assert (shown.revision, shown.canary, shown.wanted) == (GOOD, BAD, 3)


def test_canary_is_no_stale_half() -> None:
    """With both revisions ready there is nothing to do."""
    decided = decide([*served(), job(BAD, id=3, ordinal=2)], Memory(), CANARY)
    assert decided.actions == ()
    assert decided.converged


def test_canary_is_replaced_before_its_walltime_ends() -> None:
    """It lives as long as git says so, not as long as its job."""
    canary = job(BAD, id=3, ordinal=2, ends_at=int(AT) + 150)
    decided = decide([*served(), canary], Memory(), CANARY)
    assert submitted(decided) == [(BAD, 3, Reason.EXPIRING)]


def test_canary_that_fails_is_held_and_the_model_is_not() -> None:
    """A bad canary costs nothing but itself."""
    decided = decide(served()[:1], failing(), CANARY)
    assert submitted(decided) == [(GOOD, 1, Reason.MISSING)]
    assert [note.subject for note in notes(decided, NoteKind.HALTED)] == ["tiny"]


def test_canary_that_is_sick_is_replaced_once() -> None:
    """What is submitted in its place is the canary in the next cycle, while it still drains."""
    sick = job(BAD, id=3, ordinal=2)
    new = job(BAD, id=4, ordinal=3, state="PENDING")
    jobs = [*served(), sick, new]
    seen = observation(*jobs, healths={3: Health.SICK}, gateways=[view(CANARY, *served())])
    decided = plan(CANARY, seen, Memory(misses={sick.key: 9}))
    assert submitted(decided) == []
    assert leaving(decided) == {3: Reason.UNHEALTHY}


def test_canary_at_its_last_moment_holds_no_place() -> None:
    """The other one of its revision is the canary, and has a successor as soon as it needs one."""
    last = job(BAD, id=3, ordinal=2, ends_at=int(AT) + 90)
    other = job(BAD, id=4, ordinal=3, ends_at=int(AT) + 150)
    decided = decide([*served(), last, other], Memory(), CANARY)
    assert submitted(decided) == [(BAD, 4, Reason.EXPIRING)]
    assert leaving(decided) == {3: Reason.EXPIRING}


def test_canary_with_a_revoked_key_is_replaced_without_a_surge_too() -> None:
    """Else it could never be, and the key never be got rid of."""
    rollout = {"max_surge": 0, "max_unavailable": 1}
    defaults = {"startup_timeout_s": 600, "drain_timeout_s": 60, "rollout": rollout}
    wanted = fleet(*CANARY_MODELS, defaults=defaults)
    revoked = job(BAD, id=3, ordinal=2, keys=("cccccccc",))
    decided = decide([*served(), revoked], Memory(), wanted)
    assert submitted(decided) == [(BAD, 3, Reason.STALE)]
    assert leaving(decided) == {}


def test_canary_that_was_promoted_counts_as_the_new_revision() -> None:
    """Its block is gone and its change is in the model: its replica is the first of the release."""
    canary = job(BAD, id=3, ordinal=2)
    decided = decide([*served(), canary], Memory())
    assert leaving(decided)
    assert set(leaving(decided).values()) == {Reason.STALE}
    assert 3 not in leaving(decided)


def test_canary_that_was_given_up_leaves() -> None:
    """Its block is gone and the model is as it was."""
    decided = decide([*served(), job(BAD, id=3, ordinal=2)], Memory(), BEFORE)
    assert leaving(decided) == {3: Reason.STALE}


def test_replica_of_neither_revision_is_stale() -> None:
    """It leaves as soon as the model's own revision serves without it."""
    jobs = [*served(), job(BAD, id=3, ordinal=2), job(OLD, id=4, ordinal=3)]
    assert leaving(decide(jobs, Memory(), CANARY)) == {4: Reason.STALE}


SWAPPED = fleet(model_record(args={"seed": 2}, canary={"replicas": 1, "args": {"seed": 1}}))


def test_old_revision_that_becomes_the_canary_serves_in_full_until_the_new_one_does() -> None:
    """One of the two is the canary by now; the other is a stale replica and leaves as such."""
    decided = decide(served(), Memory(), SWAPPED)
    assert leaving(decided) == {}
    assert {one for one, _, _ in submitted(decided)} == {BAD}
    new = job(BAD, id=5, ordinal=4), job(BAD, id=6, ordinal=5)
    assert leaving(decide([*served(), *new], Memory(), SWAPPED)) == {2: Reason.STALE}


def test_kept_revision_that_is_the_canary_is_submitted_once() -> None:
    """It stands in for the model, whose release fails, beside the canary that is wanted of it."""
    first = job(GOOD, id=1)
    decided = decide([first], failing(), SWAPPED)
    assert submitted(decided) == [(GOOD, 1, Reason.MISSING), (GOOD, 2, Reason.MISSING)]
    more = job(GOOD, id=2, ordinal=1), job(GOOD, id=3, ordinal=2)
    settled = decide([first, *more], failing(), SWAPPED)
    assert (submitted(settled), leaving(settled)) == ([], {})


# --- what the reconciler itself ends for a fault ------------------------------------------------


def test_startup_timeout_is_a_failure_of_the_revision() -> None:
    """A release that starts and never serves backs off like one that crashes."""
    late = job(GOOD, id=1, started_at=int(AT) - 2 * HOUR, ready_at=None)
    decided = decide([late], Memory(), BEFORE, healths={1: Health.STARTING})
    assert ended(decided) == {1: f"drain: {Reason.STARTUP_TIMEOUT}"}
    memory = remember(Memory(), decided)
    assert memory.drains[late.key].cause is Cause.STARTUP
    gone = replace(late, state="CANCELLED")
    memory = learn(memory, observation(gone, at=AT + 10))
    assert memory.failures[f"tiny.{GOOD}"].count == 1
    assert [failure.cause for failure in memory.failures[f"tiny.{GOOD}"].recent] == [Cause.STARTUP]
    again = learn(memory, observation(gone, at=AT + 20))
    assert again.failures[f"tiny.{GOOD}"].count == 1


def test_replica_that_left_for_no_fault_is_no_failure() -> None:
    """Surplus, stale and expiring replicas are told to end too, and did nothing wrong."""
    gone = job(GOOD, state="FAILED")
    memory = Memory(drains={gone.key: DrainClock(since=AT)})
    learnt = learn(memory, observation(gone, at=AT + 10))
    assert learnt.failures[f"tiny.{GOOD}"].count == 0


def test_reason_of_a_drain_is_remembered() -> None:
    """What drains for a fault says so until it has ended."""
    draining = job(GOOD, id=1, draining=True)
    memory = Memory(drains={draining.key: DrainClock(since=AT, cause=Cause.UNHEALTHY)})
    decided = decide([draining], memory, BEFORE)
    assert leaving(decided) == {1: Reason.UNHEALTHY}
