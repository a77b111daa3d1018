"""Successors are submitted early enough, once, and by name; walltimes do not end together."""

from dataclasses import replace

from reconciler.naming import parse_comment, submit_comment
from reconciler.plan import NoteKind, Reason, Submit
from reconciler.planner import plan
from reconciler.planner.seen import HUNG_S
from reconciler.rollover import (
    LEAD_DEFAULT_S,
    LEAD_LEAST_S,
    LEAD_SPARE,
    due,
    last_moment,
    lead_s,
    staggered,
)
from reconciler.spec import MARGIN_S
from reconciler.state import Job, Memory, Progress
from tests.unit.build import AT, fleet, job, model_record, observation, revision, view

FLEET = fleet(model_record(replicas=1))
REV = revision(FLEET)
DRAIN_S = 60
LEADS = (50.0,)
# Submitted when just this much of its walltime is left, by the formula in rollover.py.
AHEAD_S = DRAIN_S + MARGIN_S + LEAD_SPARE * LEADS[0]


def ending(in_s: float, *, id: int = 1) -> Job:
    """A ready replica that runs since long ago and whose walltime ends in so many seconds."""
    return job(REV, id=id, started_at=1, ends_at=round(AT + in_s))


def keys(*jobs: Job, slots: int = 8, at: float = AT) -> set[int]:
    found = due(
        jobs, at=at, leads=LEADS, drain_timeout_s=DRAIN_S, slots=slots, nodes={"node7": "draining"}
    )
    return {job_id for job_id, _ in found}


def memory() -> Memory:
    return Memory(leads={"tiny": LEADS})


def submits(*jobs: Job, remembered: Memory | None = None) -> list[Submit]:
    seen = observation(*jobs, gateways=[view(FLEET, jobs[0])])
    actions = plan(FLEET, seen, remembered or memory()).actions
    return [action for action in actions if isinstance(action, Submit)]


def test_lead_is_a_high_percentile_of_what_was_measured() -> None:
    """Nine of ten starts were quicker, and a bad day has its spare; without any a default holds."""
    assert lead_s([10.0 * n for n in range(1, 11)]) == LEAD_SPARE * 90.0
    assert lead_s([1.0]) == LEAD_LEAST_S
    assert lead_s(()) == LEAD_DEFAULT_S


def test_successor_is_due_one_lead_before_the_last_moment() -> None:
    """Not a second earlier."""
    assert keys(ending(AHEAD_S)) == {1}
    assert keys(ending(AHEAD_S + 1)) == set()
    assert last_moment(AT, DRAIN_S) == AT - DRAIN_S - MARGIN_S


def test_successors_that_must_queue_are_due_earlier() -> None:
    """With room for one at a time the second in line needs two lead times."""
    first, second = ending(AHEAD_S + 50), ending(AHEAD_S + 60, id=2)
    assert keys(first, second, slots=2) == set()
    assert keys(first, second, slots=1) == {2}


def test_walltime_shorter_than_the_lead_is_used_for_half_at_least() -> None:
    """A replica is never replaced as soon as it starts."""
    # 140 s of use before its last moment.
    short = job(REV, started_at=round(AT) - 60, ends_at=round(AT) + 200)
    assert keys(short) == set()
    assert keys(short, at=AT + 10) == {1}


def test_replica_on_a_draining_node_is_due_now() -> None:
    """The administrator has asked for the node."""
    assert keys(job(REV, node="node7", ends_at=None)) == {1}


def test_replica_of_several_nodes_is_due_when_one_of_them_is_draining() -> None:
    """It can't stay without that node."""
    wide = replace(ending(10_000), nodes="node[6-8]")
    assert keys(wide) == {1}
    assert keys(replace(wide, nodes="node[1,8]")) == set()


def test_expiring_replica_gets_one_successor_that_names_it() -> None:
    """The next cycle, and one that has lost its memory, sees the successor and submits no more."""
    old = ending(AHEAD_S)
    (submit,) = submits(old)
    assert (submit.reason, submit.succeeds, submit.name.ordinal) == (Reason.EXPIRING, old.key, 1)
    heir = job(REV, id=2, ordinal=1, state="PENDING")
    assert heir.comment is not None
    heir = replace(heir, comment=replace(heir.comment, succeeds=old.key))
    assert submits(old, heir) == []
    decided = plan(FLEET, observation(old, heir, gateways=[view(FLEET, old)]), Memory())
    assert decided.actions == ()
    assert NoteKind.EXPIRING in {note.kind for note in decided.notes}


def test_expiring_replica_leaves_when_its_successor_is_ready() -> None:
    """And not before: nobody is without a replica."""
    old = ending(AHEAD_S)
    heir = job(REV, id=2, ordinal=1)
    seen = observation(old, heir, gateways=[view(FLEET, old, heir)])
    decided = plan(FLEET, seen, memory())
    (left,) = [view for view in decided.replicas if view.status == "leaving"]
    assert (left.job_id, left.detail) == (1, Reason.EXPIRING)


def test_R40_without_a_ready_successor_it_serves_until_its_last_moment() -> None:
    """Then it drains within its walltime, so that what it has begun ends whole."""
    for in_s, leaves in ((DRAIN_S + MARGIN_S + 1, False), (DRAIN_S + MARGIN_S, True)):
        old = ending(in_s)
        decided = plan(FLEET, observation(old, gateways=[view(FLEET, old)]), memory())
        assert any(view.status == "leaving" for view in decided.replicas) is leaves


def test_replicas_that_start_together_do_not_end_together() -> None:
    """Each ordinal gets a little less walltime, and never less than start and drain need."""
    walltimes = [staggered(86_400, ordinal, floor_s=1000) for ordinal in range(8)]
    assert len(set(walltimes)) == 8
    assert max(walltimes) == 86_400
    assert min(walltimes) > 0.8 * 86_400
    assert staggered(1000, 7, floor_s=990) == 990


def test_comment_carries_predecessor_and_protection_both_ways() -> None:
    """What a later cycle must know about a job is on the job."""
    name = job(REV).name
    text = submit_comment(name, gpus=1, commit=None, succeeds=(7, 8), protect=True)
    comment = parse_comment(text)
    assert comment is not None
    assert (comment.succeeds, comment.protect) == ((7, 8), True)
    assert parse_comment(text.replace("[7,8]", "[7]")) is None


def test_hung_engine_is_replaced_though_it_says_it_is_well() -> None:
    """Requests, a good /health, and no token for long: a standing counter is the only sign."""
    stuck = job(REV)
    progress = {stuck.key: Progress(tokens=5.0, since=AT - HUNG_S)}
    seen = observation(stuck, gateways=[view(FLEET, stuck)], ongoing=3)
    decided = plan(FLEET, seen, Memory(progress=progress))
    assert [view.detail for view in decided.replicas] == [Reason.UNHEALTHY]
    fresh = {stuck.key: Progress(tokens=5.0, since=AT - HUNG_S + 1)}
    assert plan(FLEET, seen, Memory(progress=fresh)).actions == ()
