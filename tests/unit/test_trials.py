"""Canaries that are tried: who gets their share, what is counted, when one is given up and how."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from reconciler.adapters.store import SqliteStore
from reconciler.memory import remember
from reconciler.observe import count_logs, with_usage
from reconciler.plan import NoteKind, Plan, Reason
from reconciler.planner import plan
from reconciler.spec import Abort, Fleet
from reconciler.state import Aborted, Health, Job, Memory, Recipe, Traffic, Trial
from reconciler.trials import verdict
from reconciler.usage import tally, trials
from tests.unit.build import (
    DIGEST,
    fleet,
    job,
    leaving,
    model_record,
    notes,
    observation,
    revision,
    route,
    routed_ids,
    submits,
    view,
)
from tests.unit.test_counting import AT as COUNTED_AT
from tests.unit.test_counting import Gateways, opened, world
from tests.unit.test_usage import NOON, line

TRIED: dict[str, Any] = {"share": 10, "args": {"seed": 2}}
MODEL = fleet(model_record())
WANTED = fleet(model_record(canary=TRIED))
OLD, NEW = revision(MODEL), revision(fleet(model_record(args={"seed": 2})))
JOBS = (job(OLD, id=1), job(OLD, id=2, ordinal=1), job(NEW, id=3, ordinal=2))


def side(requests: int = 1000, errors: int = 0, median: float | None = 0.5) -> Traffic:
    times = None if median is None else (median, 9.0, 9.0)
    return Traffic(minutes=60, requests=requests, errors=errors, refused=0, first_byte_s=times)


BAD = Trial(canary=side(errors=200), rest=side())


# --- the verdict


@pytest.mark.parametrize(
    ("canary", "rest", "expected"),
    [
        (side(), side(), None),
        (side(requests=99, errors=99), side(), None),
        (side(errors=999), side(requests=99), None),
        (side(requests=0, median=None), side(requests=0, median=None), None),
        (side(errors=50), side(), None),
        (side(errors=51), side(), "51 of its 1000 requests failed, 0 of 1000 elsewhere"),
        (side(errors=340), side(errors=300), None),
        (side(median=0.75), side(), None),
        (side(median=0.76), side(), "its median time to the first byte is 0.76 s, 0.5 s elsewhere"),
        (side(median=0.05), side(median=0.01), None),
        (side(median=0.07), side(median=0.01), "its median time to the first byte is 0.07 s"),
        (side(median=None), side(), None),
        (side(), side(median=None), None),
        (side(median=0.1), side(median=9), None),
    ],
)
def test_canary_is_given_up_for_what_is_worse_by_its_margin(
    canary: Traffic, rest: Traffic, expected: str | None
) -> None:
    """More errors or later first bytes than the rest, once both have had enough requests."""
    why = verdict(Trial(canary=canary, rest=rest), Abort())
    assert (why or "").startswith(expected or "")
    assert (why is None) == (expected is None)


@pytest.mark.parametrize(
    ("limits", "given_up"),
    [
        ({"errors_percent": 19}, True),
        ({"errors_percent": 20}, False),
        ({"errors_percent": 0, "requests": 1001}, False),
    ],
)
def test_margins_are_the_specs(limits: dict[str, int], given_up: bool) -> None:
    """A canary of which much is known to be worse may be told to go on all the same."""
    assert (verdict(BAD, Abort(**limits)) is not None) == given_up


# --- what is counted


def tried(**keys: Any) -> bytes:
    return line(**{"trial": f"canary.{NEW}", **keys})


def test_each_side_of_a_trial_is_counted_apart() -> None:
    """A request that needed a second replica is its side's error, and not its tenant's."""
    text = (
        tried() * 3
        + tried(status="500")
        + tried(tries="502, 200", first_byte=0.9)
        + tried(trial=f"rest.{NEW}") * 2
        + line()
    )
    found = tally(text)
    [trial] = trials(found.trials, NOON).values()
    assert (trial.canary.requests, trial.canary.errors) == (5, 2)
    assert (trial.rest.requests, trial.rest.errors) == (2, 0)
    [day] = found.days.values()
    assert (day.requests, day.errors) == (8, 1)


def test_line_of_an_older_gateway_is_of_no_trial() -> None:
    """It has no such field; a word that is none of ours says nothing either."""
    assert tally(line()).trials == {}
    odd = b"".join(tried(trial=word) for word in ("", "x", "canary.", f"canary.{NEW}.x"))
    found = tally(odd)
    assert (found.trials, found.odd_lines) == ({}, 0)


def test_trial_is_of_the_last_hour() -> None:
    """What is older says nothing of what the canary does now; another revision is another trial."""
    text = tried(at=NOON - 3601) + tried() + tried(trial="canary.01234567", status="500")
    found = trials(tally(text).trials, NOON)
    assert {key: one.canary.requests for key, one in found.items()} == {
        f"tiny.{NEW}": 1,
        "tiny.01234567": 1,
    }


def test_trial_is_kept_where_usage_is(tmp_path: Path) -> None:
    """Counted in any number of parts; a reader needs no lock, and an older file has none."""
    lines = [tried(at=COUNTED_AT), tried(at=COUNTED_AT, status="503")]
    gateways = Gateways({"gateway": lines})
    reader = SqliteStore(tmp_path)
    with opened(tmp_path) as store:
        here = world(gateways, store)
        count_logs(here, [view(WANTED)])
        seen = with_usage(observation(at=COUNTED_AT), WANTED, here, {})
    counted = seen.trials[f"tiny.{NEW}"]
    assert (counted.canary.requests, counted.canary.errors, counted.rest.requests) == (2, 1, 0)
    assert reader.usage(COUNTED_AT, frozenset({"gateway"}))[2] == seen.trials


# --- who gets requests


def decide(
    jobs: Sequence[Job] = JOBS,
    memory: Memory | None = None,
    wanted: Fleet = WANTED,
    trial: Trial | None = None,
    **keys: Any,
) -> Plan:
    tried = {} if trial is None else {f"tiny.{NEW}": trial}
    seen = observation(*jobs, gateways=[view(wanted, *jobs)], trials=tried, **keys)
    return plan(wanted, seen, memory or Memory())


def test_canary_with_a_share_is_routed_as_such() -> None:
    """Its targets bear its revision, so that requests are counted by it; others bear none."""
    change = route(decide())
    assert change is not None
    assert {one.job_id: one.canary for one in change.targets} == {1: "", 2: "", 3: NEW}
    plain = fleet(model_record(canary={"args": {"seed": 2}}))
    assert route(decide(wanted=plain)) is None


def test_no_more_than_the_canary_itself_is_tried() -> None:
    """What was the model's own revision serves on as such, though it is called the canary now."""
    swapped = fleet(
        model_record(args={"seed": 2}, canary={"share": 10, "args": {}, "env": {"A": "b"}})
    )
    other = swapped.models[0].variants[1].revision(DIGEST)
    jobs = [job(other, id=at, ordinal=at) for at in (1, 2, 3)]
    change = route(decide(jobs, wanted=swapped))
    assert change is not None
    assert [one.job_id for one in change.targets if one.canary] == [1]


def test_weight_is_that_of_a_replicas_own_revision() -> None:
    """The model's, its canary's, and while a release rolls that of the one before."""
    wanted = fleet(model_record(weight=2, canary={"weight": 5, "args": {"seed": 2}}))
    change = route(decide(wanted=wanted))
    assert change is not None
    assert {one.job_id: one.weight for one in change.targets} == {1: 2, 2: 2, 3: 5}
    before = fleet(model_record(weight=9))
    kept = Recipe.of(before, before.models[0], digest=DIGEST, program="/opt/engine", commit=None)
    after = fleet(model_record(args={"seed": 2}, weight=4))
    change = route(decide([JOBS[0], JOBS[2]], Memory(kept={"tiny": kept}), after))
    assert change is not None
    assert {one.job_id: one.weight for one in change.targets} == {1: 9, 3: 4}


# --- what is given up


def given_up(*jobs: Job, revision: str = NEW) -> Memory:
    aborted = Aborted(
        model="tiny", revision=revision, why="why", jobs=tuple(one.key for one in jobs)
    )
    return Memory(aborted={"tiny": aborted})


def test_canary_that_does_worse_leaves_and_is_not_submitted_again() -> None:
    """Its requests go to the others at once; it is told, and the fleet is as wanted without it."""
    decided = decide(trial=BAD)
    assert routed_ids(decided) == [1, 2]
    assert leaving(decided) == {3: Reason.ABORTED}
    [note] = notes(decided, NoteKind.ABORTED)
    assert NEW in note.text
    [shown] = decided.models
    assert (shown.wanted, shown.canary) == (2, None)
    after = remember(Memory(), decided)
    settled = decide(JOBS[:2], after)
    assert (settled.actions, settled.converged) == ((), True)
    assert notes(settled, NoteKind.ABORTED) == [note]


def test_plan_that_saw_nothing_forgets_nothing() -> None:
    """Neither while the queue can't be read, nor while the image can't."""
    memory = given_up(JOBS[2])
    blind = plan(WANTED, observation(gateways=[view(WANTED)], jobs=None), memory)
    assert remember(memory, blind).aborted == memory.aborted
    tried = fleet(
        model_record(canary={**TRIED, "image": "other"}),
        images={
            "engine": {"runtime": "none", "path": "/opt/engine"},
            "other": {"runtime": "none", "path": "/opt/other"},
        },
    )
    unread = decide(JOBS[:2], memory, tried, image_errors={"other": "gone"})
    assert remember(memory, unread).aborted == memory.aborted
    assert submits(unread) == []


@pytest.mark.parametrize(
    "wanted", [MODEL, fleet(model_record(canary={**TRIED, "env": {"A": "b"}}))]
)
def test_word_is_forgotten_with_the_canary_it_was_about(wanted: Fleet) -> None:
    """Once it is changed or removed, the next one begins anew."""
    memory = given_up(JOBS[2])
    decided = decide(JOBS[:2], memory, wanted)
    assert notes(decided, NoteKind.ABORTED) == []
    assert remember(memory, decided).aborted == {}
    assert len(submits(decided)) == sum(one.replicas for one in wanted.models[0].variants[1:])


def test_canary_without_a_share_is_given_up_by_nobody() -> None:
    """Nothing of it is counted apart; what is left of an earlier trial is not held against it."""
    wanted = fleet(model_record(canary={"args": {"seed": 2}}))
    assert decide(wanted=wanted, trial=BAD).actions == ()


def test_canary_that_was_given_up_serves_while_nobody_else_does() -> None:
    """It may fail some requests; without it all would."""
    healths = {1: Health.STARTING, 2: Health.STARTING}
    jobs = [job(OLD, id=1, ready_at=None), job(OLD, id=2, ordinal=1, ready_at=None), JOBS[2]]
    seen = observation(*jobs, gateways=[view(WANTED, JOBS[2])], healths=healths)
    decided = plan(WANTED, seen, given_up(JOBS[2]))
    assert (routed_ids(decided), leaving(decided)) == (None, {})


def test_canary_that_was_given_up_does_not_stand_in_for_a_model_at_zero() -> None:
    """Nobody else is wanted to serve, so there is nobody to wait for."""
    wanted = fleet(model_record(replicas=0, canary=TRIED))
    decided = decide([JOBS[2]], given_up(JOBS[2]), wanted)
    assert leaving(decided) == {3: Reason.ABORTED}
    assert routed_ids(decided) == []


def test_canary_that_was_given_up_waits_for_no_place_of_the_model() -> None:
    """It serves nobody, so it goes at once, also while the model lacks replicas."""
    decided = decide([JOBS[0], JOBS[2]], given_up(JOBS[2]))
    assert leaving(decided) == {3: Reason.ABORTED}
    assert [(one.name.revision, one.reason) for one in submits(decided)] == [(OLD, Reason.MISSING)]


def test_replicas_of_a_revision_that_was_given_up_are_not_all_the_canary() -> None:
    """Those that serve the model for its own sake leave one by one, when others have come."""
    old = [job(NEW, id=at, ordinal=at) for at in (3, 4, 5, 6)]
    wanted = fleet(model_record(replicas=4, canary=TRIED))
    decided = decide([job(OLD, id=1), *old], given_up(old[0]), wanted)
    assert leaving(decided) == {3: Reason.ABORTED}
    assert routed_ids(decided) == [1, 4, 5, 6]


def test_model_that_is_paused_loses_the_canarys_route_only() -> None:
    """Nothing of it is ended; whoever does worse gets no requests all the same."""
    wanted = fleet(model_record(canary=TRIED, suspend=True))
    decided = decide(wanted=wanted, trial=BAD)
    assert (routed_ids(decided), leaving(decided)) == ([1, 2], {})
