"""plan(): what is wanted, seen and remembered, to what is done now and what is held back."""

import random
from dataclasses import replace
from typing import Any

import pytest

from reconciler.memory import CONFIRM_S, learn, remember
from reconciler.naming import ReplicaName
from reconciler.plan import (
    Cancel,
    Drain,
    JobRef,
    NoteKind,
    Plan,
    Reason,
    Submit,
    from_json,
    summary,
    to_json,
)
from reconciler.planner import plan
from reconciler.planner.drain import IDLE_HOLD_S
from reconciler.spec import Fleet
from reconciler.state import (
    PHASES,
    DrainClock,
    Failures,
    Health,
    Job,
    Memory,
    Observation,
    Phase,
    Probe,
)
from tests.unit.build import (
    AT,
    OLD,
    ended,
    fleet,
    job,
    keys,
    leaving,
    misses,
    model_record,
    notes,
    observation,
    revision,
    route,
    routed_ids,
    submits,
    target,
    view,
)

FLEET = fleet()
ONE = fleet(model_record(replicas=1))
REV = revision(FLEET)
NOTHING = Memory()


def pair(**changes: Any) -> tuple[Job, Job]:
    """The two replicas that the fleet wants, ready."""
    return job(REV, id=1, ordinal=0, **changes), job(REV, id=2, ordinal=1, **changes)


def settled(*more: Job, **changes: Any) -> Observation:
    """A look at the two wanted replicas, ready and routed, and at more jobs that aren't routed."""
    both = pair()
    return observation(*both, *more, gateways=[view(FLEET, *both)], **changes)


def names(actions: list[Submit]) -> list[str]:
    return [str(action.name) for action in actions]


# --- missing ---------------------------------------------------------------------------------


def test_missing_replicas_are_submitted_with_the_lowest_ordinals() -> None:
    """An empty cluster gets one job for each wanted replica."""
    decided = plan(FLEET, observation(), NOTHING)
    assert names(submits(decided)) == [f"demo.tiny.{REV}.0", f"demo.tiny.{REV}.1"]
    assert {action.reason for action in submits(decided)} == {Reason.MISSING}
    assert summary(decided) == {"submit": 2}


def test_missing_replica_takes_the_lowest_free_ordinal() -> None:
    """The ordinal is the lowest that no live job of the model holds, of any revision."""
    wanted = fleet(model_record(replicas=4))
    jobs = job(REV, id=1, ordinal=0), job(OLD, id=2, ordinal=2), job(REV, id=3, ordinal=3)
    decided = plan(wanted, observation(*jobs), NOTHING)
    assert [action.name.ordinal for action in submits(decided)] == [1, 4]


def test_missing_replica_does_not_take_the_ordinal_of_a_completing_job() -> None:
    """A replacement never waits for a job whose node is dead: it has another name."""
    jobs = job(REV, id=1, ordinal=0, state="COMPLETING"), job(REV, id=2, ordinal=1)
    decided = plan(FLEET, observation(*jobs), NOTHING)
    assert names(submits(decided)) == [f"demo.tiny.{REV}.2"]


@pytest.mark.parametrize("state", ["PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "NEW_WORD"])
def test_R04_job_that_lives_is_adopted_and_not_repeated(state: str) -> None:
    """Whatever submitted it, a live job of the name is the replica."""
    jobs = job(REV, id=1, state=state, published=False), job(REV, id=2, ordinal=1)
    assert submits(plan(FLEET, observation(*jobs), NOTHING)) == []


def test_R24_pending_for_hours_is_no_failure() -> None:
    """A queue is a queue: nothing is cancelled, nothing submitted, and the note says why."""
    waiting = job(REV, id=1, state="PENDING", reason="Resources", submitted_at=1)
    decided = plan(FLEET, observation(waiting, job(REV, id=2, ordinal=1)), NOTHING)
    assert (submits(decided), ended(decided)) == ([], {})
    [note] = notes(decided, NoteKind.PENDING)
    assert note.text == "Slurm: Resources"


def test_pending_for_a_reason_that_never_passes_says_so() -> None:
    """An impossible job is told apart from a long queue."""
    waiting = job(REV, id=1, state="PENDING", reason="PartitionTimeLimit")
    [note] = notes(plan(FLEET, observation(waiting), NOTHING), NoteKind.PENDING)
    assert note.text == "Slurm: PartitionTimeLimit; waiting will not help"


# --- budget ----------------------------------------------------------------------------------


def test_budget_holds_back_what_does_not_fit() -> None:
    """Never more GPUs than the budget: the spec's order decides, a note names the rest."""
    two = model_record(name="big", resources={"gpus": 3, "memory": "1G"}, replicas=1)
    wanted = fleet(model_record(replicas=1), two, budget={"gpus": 4})
    held = job(OLD, id=9, model="gone", gpus=1)
    decided = plan(wanted, observation(held), NOTHING)
    assert names(submits(decided)) == [f"demo.tiny.{revision(wanted)}.0"]
    [note] = notes(decided, NoteKind.BUDGET)
    assert note.text == "needs 3 GPUs; 2 of the budget's 4 are held"


@pytest.mark.parametrize(
    ("state", "nodes", "gpus"),
    [
        *[("PENDING", {}, 3), ("RUNNING", {}, 3), ("COMPLETING", {}, 3), ("NEW_WORD", {}, 3)],
        *[("COMPLETED", {}, 0), ("COMPLETING", {"node1": "idle"}, 3)],
        *[("COMPLETING", {"node1": "down"}, 0), ("COMPLETING", {"node1": "completing*"}, 0)],
        *[("RUNNING", {"node1": "down*"}, 3), ("COMPLETING", {"node2": "down"}, 3)],
    ],
)
def test_budget_counts_what_slurm_may_still_hold(
    state: str, nodes: dict[str, str], gpus: int
) -> None:
    """A job counts until it has ended; one that ends on a dead node no longer does."""
    seen = observation(job(REV, state=state, gpus=3), nodes=nodes)
    assert plan(FLEET, seen, NOTHING).gpus_held == gpus


def test_budget_counts_a_job_that_could_not_be_launched() -> None:
    """Slurm puts it back into the queue although it forbids that: it was never over."""
    back = job(REV, state="COMPLETING", gpus=3, restarts=1, published=False)
    seen = observation(back, nodes={"node1": "down"})
    assert back.phase is Phase.PENDING
    assert plan(FLEET, seen, NOTHING).gpus_held == 3
    told = job(REV, state="COMPLETING", restarts=1, run_restarts=1)
    assert told.phase is Phase.ENDING


@pytest.mark.parametrize(
    ("nodes", "words", "gpus"),
    [
        *(("node[1-2]", {"node2": "down*"}, 8), ("node[1-2]", {"node1": "idle"}, 8)),
        *(("node[1-2]", {"node1": "down", "node2": "idle*"}, 0), ("node2", {"node2": "down"}, 0)),
    ],
)
def test_budget_counts_a_job_of_several_nodes_until_all_it_holds_are_dead(
    nodes: str, words: dict[str, str], gpus: int
) -> None:
    """While it ends, Slurm lists the nodes that are not free yet: one that lives still works."""
    seen = observation(job(REV, state="COMPLETING", node=nodes, gpus=8), nodes=words)
    assert plan(FLEET, seen, NOTHING).gpus_held == gpus


def test_submission_of_several_nodes_needs_the_gpus_of_all() -> None:
    """Two nodes of three GPUs are six, in the action and for the budget."""
    record = model_record(resources={"nodes": 2, "gpus": 3, "memory": "1G"}, replicas=1)
    [submit] = submits(plan(fleet(record), observation(), NOTHING))
    assert submit.gpus == 6
    held = observation(job(OLD, id=9, model="gone", gpus=3))
    [note] = notes(plan(fleet(record), held, NOTHING), NoteKind.BUDGET)
    assert note.text == "needs 6 GPUs; 3 of the budget's 8 are held"


def test_replica_of_several_nodes_is_routed_at_its_first_ones_address() -> None:
    """Its job publishes the node that its script runs on, which is one of those Slurm lists."""
    wide = job(REV, node="node[1-2]", run_node="node1")
    assert routed_ids(plan(ONE, observation(wide, gateways=[view(ONE)]), NOTHING)) == [1]
    moved = job(REV, node="node[2-3]", run_node="node1")
    assert moved.run is None


def test_budget_counts_an_unreadable_job_as_slurm_says() -> None:
    """It was submitted with more than its model has by now: a vandal's comment frees nothing."""
    seen = observation(replace(job(REV, vandalised=True), gpus=3))
    assert plan(FLEET, seen, Memory()).gpus_held == 3


def test_budget_counts_an_unreadable_job_as_its_model_says() -> None:
    """Unknown is never absent: a vandalised comment frees no GPU."""
    wanted = fleet(model_record(resources={"gpus": 3, "memory": "1G"}, replicas=1))
    seen = observation(job(REV, vandalised=True), job(REV, id=2, model="gone", vandalised=True))
    assert plan(wanted, seen, NOTHING).gpus_held == 4


def test_budget_is_kept_by_surge() -> None:
    """A full budget holds the new revision back and leaves the old one serving."""
    wanted = fleet(budget={"gpus": 2})
    old = job(OLD, id=1), job(OLD, id=2, ordinal=1)
    decided = plan(wanted, observation(*old, gateways=[view(wanted, *old)]), NOTHING)
    assert decided.actions == ()
    assert len(notes(decided, NoteKind.BUDGET)) == 1


# --- duplicates ------------------------------------------------------------------------------


def test_duplicate_that_got_less_far_leaves() -> None:
    """Of two jobs of one name the one that got furthest stays."""
    both = pair()
    late = job(REV, id=3, ordinal=0, state="PENDING", submitted_at=999_999)
    decided = plan(FLEET, observation(late, *both, gateways=[view(FLEET, *both)]), NOTHING)
    assert ended(decided) == {3: "cancel: duplicate"}


def test_duplicate_that_is_younger_leaves() -> None:
    """Of two jobs that got equally far, the older one stays."""
    jobs = job(REV, id=7, submitted_at=10), job(REV, id=3, submitted_at=11)
    decided = plan(ONE, observation(*jobs, gateways=[view(ONE)]), NOTHING)
    assert leaving(decided) == {3: "duplicate"}
    assert routed_ids(decided) == [7]


def test_duplicate_of_an_unknown_job_is_left_alone() -> None:
    """What can't be judged is neither counted as extra nor the reason that another leaves."""
    jobs = job(REV, id=1, vandalised=True), job(REV, id=2, ordinal=0)
    decided = plan(fleet(model_record(replicas=1)), observation(*jobs), NOTHING)
    assert leaving(decided) == {}


# --- stale -----------------------------------------------------------------------------------


def stale_pair() -> tuple[Job, Job]:
    return job(OLD, id=1, ordinal=0), job(OLD, id=2, ordinal=1)


def test_stale_replicas_stay_until_one_new_is_ready() -> None:
    """A new revision comes first: one surge replica is submitted, no old one leaves."""
    old = stale_pair()
    decided = plan(FLEET, observation(*old, gateways=[view(FLEET, *old)]), NOTHING)
    assert names(submits(decided)) == [f"demo.tiny.{REV}.2"]
    assert submits(decided)[0].reason is Reason.STALE
    assert (leaving(decided), route(decided)) == ({}, None)
    [note] = notes(decided, NoteKind.ROLLING)
    assert note.text == f"1 more of revision {REV} follow when old replicas have left"


def test_R19_stale_replica_stays_while_its_successor_loads() -> None:
    """A predecessor leaves only after its successor is ready."""
    jobs = (*stale_pair(), job(REV, id=3, ordinal=2, ready_at=None))
    seen = observation(*jobs, healths={3: Health.STARTING}, gateways=[view(FLEET, *stale_pair())])
    decided = plan(FLEET, seen, NOTHING)
    assert (decided.actions, leaving(decided)) == ((), {})


def test_R19_stale_replica_leaves_when_its_successor_is_ready() -> None:
    """Each ready successor lets one predecessor go, the one that ends soonest."""
    first, second = stale_pair()
    jobs = (replace(first, ends_at=2_000_000), second, job(REV, id=3, ordinal=2))
    decided = plan(FLEET, observation(*jobs, gateways=[view(FLEET, *jobs[:2])]), NOTHING)
    assert leaving(decided) == {2: "stale"}
    assert routed_ids(decided) == [1, 3]
    assert submits(decided) == []


def test_stale_replicas_that_never_answered_leave_at_once() -> None:
    """Nobody misses an old replica that waits, loads or is sick."""
    jobs = (
        job(OLD, id=1, ordinal=0, state="PENDING"),
        job(OLD, id=2, ordinal=1, ready_at=None, published=False),
    )
    decided = plan(FLEET, observation(*jobs), NOTHING)
    assert leaving(decided) == {1: "stale", 2: "stale"}


def test_stale_replica_that_is_silent_stays_until_others_are_enough() -> None:
    """Silence alone ends nothing: an old replica may still serve."""
    wanted = fleet(model_record(replicas=1))
    rev = revision(wanted)
    old, new = job(OLD, id=1), job(rev, id=2, ordinal=1, ready_at=None)
    healths = {1: Health.SILENT, 2: Health.STARTING}
    seen = observation(old, new, healths=healths, gateways=[view(wanted, old)])
    assert leaving(plan(wanted, seen, misses(9, old))) == {}
    healths[2] = Health.READY
    seen = observation(old, new, healths=healths, gateways=[view(wanted, old)])
    assert leaving(plan(wanted, seen, misses(9, old))) == {1: "stale"}


def test_stale_without_surge_leaves_first_where_the_spec_allows() -> None:
    """max_unavailable lets an old replica go before the new one comes."""
    rollout = {"max_surge": 0, "max_unavailable": 1}
    wanted = fleet(defaults={"rollout": rollout})
    old = stale_pair()
    decided = plan(wanted, observation(*old, gateways=[view(wanted, *old)]), NOTHING)
    assert len(leaving(decided)) == 1
    assert submits(decided) == []


def test_bad_revision_keeps_the_old_one_serving() -> None:
    """A new revision that fails backs off, and no old replica leaves for it."""
    old = stale_pair()
    failed = Memory(failures={f"tiny.{REV}": Failures(count=3, last_at=AT, counted=frozenset())})
    decided = plan(FLEET, observation(*old, gateways=[view(FLEET, *old)]), failed)
    assert decided.actions == ()
    assert leaving(decided) == {}


# --- unhealthy -------------------------------------------------------------------------------


def look_at_one_bad(health: Health, count: int, **changes: Any) -> Plan:
    """The plan when the first of three routed replicas fails for the `count`th time."""
    wanted = fleet(model_record(replicas=3))
    jobs = (*pair(), job(REV, id=3, ordinal=2))
    jobs = (replace(jobs[0], **changes), *jobs[1:])
    seen = observation(*jobs, healths={1: health}, gateways=[view(wanted, *jobs)])
    return plan(wanted, seen, misses(count, jobs[0]))


@pytest.mark.parametrize("health", [Health.SICK, Health.STARTING, Health.SILENT])
def test_R10_one_failed_probe_changes_nothing(health: Health) -> None:
    """One failed look is not a death."""
    decided = look_at_one_bad(health, 1)
    assert (decided.actions, leaving(decided)) == ((), {})


@pytest.mark.parametrize("health", [Health.SICK, Health.STARTING, Health.SILENT])
def test_R10_two_failed_probes_only_end_the_route(health: Health) -> None:
    """After two misses a replica gets no requests, and is not replaced yet."""
    decided = look_at_one_bad(health, 2)
    assert routed_ids(decided) == [2, 3]
    assert leaving(decided) == {}


@pytest.mark.parametrize("health", [Health.SICK, Health.STARTING])
def test_unhealthy_replica_is_replaced_after_four_misses(health: Health) -> None:
    """Evidence that its engine is dead or sick, four times in a row, ends a replica."""
    decided = look_at_one_bad(health, 4)
    assert leaving(decided) == {1: "unhealthy"}
    assert names(submits(decided)) == [f"demo.tiny.{REV}.3"]


def test_R01_silent_replica_is_never_cancelled_for_it() -> None:
    """No answer is not evidence: a silent replica leaves the gateways and nothing else."""
    decided = look_at_one_bad(Health.SILENT, 1000)
    assert routed_ids(decided) == [2, 3]
    assert (leaving(decided), submits(decided)) == ({}, [])
    assert len(notes(decided, NoteKind.SILENT)) == 1


def test_R10_silence_does_not_take_the_last_replica_of_a_model() -> None:
    """One that is silent for long keeps its requests until another one can have them."""
    wanted = fleet(model_record(replicas=1))
    last, other = pair()
    alone = observation(last, healths={1: Health.SILENT}, gateways=[view(wanted, last)])
    decided = plan(wanted, alone, misses(1000, last))
    assert decided.actions == ()
    assert len(notes(decided, NoteKind.SILENT)) == 1
    both = observation(last, other, healths={1: Health.SILENT}, gateways=[view(wanted, last)])
    assert routed_ids(plan(wanted, both, misses(1000, last))) == [2]


def test_impostor_gets_no_request_at_once() -> None:
    """A replica that does not prove who it is gets no traffic, not even for one look."""
    decided = look_at_one_bad(Health.IMPOSTOR, 1)
    assert routed_ids(decided) == [2, 3]
    assert leaving(decided) == {}
    assert leaving(look_at_one_bad(Health.IMPOSTOR, 4)) == {1: "unhealthy"}


def test_R17_ended_job_leaves_the_upstream_in_one_cycle() -> None:
    """Slurm says that the job has ended: its route goes now and a new job comes."""
    decided = look_at_one_bad(Health.READY, 0, state="NODE_FAIL")
    assert routed_ids(decided) == [2, 3]
    assert names(submits(decided)) == [f"demo.tiny.{REV}.0"]


def test_observer_that_sees_most_replicas_silent_suspects_itself() -> None:
    """When most probes fail at once the routes stay, nothing is replaced, and it says so."""
    jobs = pair()
    healths = {1: Health.SILENT, 2: Health.SILENT}
    seen = observation(*jobs, healths=healths, gateways=[view(FLEET, *jobs)])
    decided = plan(FLEET, seen, misses(50, *jobs))
    assert (decided.actions, leaving(decided)) == ((), {})
    assert len(notes(decided, NoteKind.OBSERVER)) == 1


def test_R01_what_alone_answers_does_not_leave_while_the_observer_is_suspected() -> None:
    """Neither as one too many nor as a stale one: nobody knows whether the others serve."""
    for one, jobs in (
        (fleet(model_record(replicas=2)), [job(REV, id=n, ordinal=n) for n in range(1, 5)]),
        (FLEET, [job(OLD, id=1), *(job(REV, id=n, ordinal=n) for n in (2, 3, 4))]),
    ):
        healths = dict.fromkeys((2, 3, 4), Health.SILENT)
        seen = observation(*jobs, healths=healths, gateways=[view(one, *jobs)])
        assert leaving(plan(one, seen, misses(9, *jobs[1:]))) == {}


def test_of_replicas_too_many_a_silent_one_goes_first() -> None:
    """One look without an answer changes no route, and still tells who may be missed least."""
    jobs = [job(REV, id=n, ordinal=n) for n in (1, 2, 3)]
    seen = observation(*jobs, healths={1: Health.SILENT}, gateways=[view(FLEET, *jobs)])
    assert leaving(plan(FLEET, seen, misses(1, jobs[0]))) == {1: Reason.SURPLUS}


def test_starting_replica_is_late_only_after_its_timeout() -> None:
    """A job that runs longer than its startup timeout without being ready is replaced."""
    jobs = job(REV, id=1, ready_at=None, started_at=int(AT) - 600), job(REV, id=2, ordinal=1)
    healths = {1: Health.STARTING}
    in_time = plan(FLEET, observation(*jobs, healths=healths), NOTHING)
    late = plan(FLEET, observation(*jobs, healths=healths, at=AT + 1), NOTHING)
    assert leaving(in_time) == {}
    assert leaving(late) == {1: "startup timeout"}


def test_replica_gets_requests_only_after_it_answered() -> None:
    """Running, published and even ready by its own word is not enough: the probe must agree."""
    jobs = job(REV, id=1, published=False), job(REV, id=2, ordinal=1)
    seen = observation(*jobs, healths={2: Health.STARTING}, gateways=[view(FLEET, jobs[0])])
    assert routed_ids(plan(FLEET, seen, NOTHING)) == []


def test_R18_gateway_serves_with_whatever_is_ready() -> None:
    """One ready replica of two is routed; nothing waits for the other."""
    jobs = job(REV, id=1, ready_at=None), job(REV, id=2, ordinal=1)
    decided = plan(
        FLEET, observation(*jobs, healths={1: Health.STARTING}, gateways=[view(FLEET)]), NOTHING
    )
    assert routed_ids(decided) == [2]


# --- surplus, suspend, not in the spec ---------------------------------------------------------


def test_R09_surplus_leaves_in_the_order_of_what_it_costs() -> None:
    """Of too many, the pending one goes first, then a loading one, then the soonest to end."""
    jobs = (
        job(REV, id=1, ordinal=0, ends_at=3_000_000),
        job(REV, id=2, ordinal=1, ends_at=2_000_000),
        job(REV, id=3, ordinal=2, ready_at=None, published=False),
        job(REV, id=4, ordinal=3, state="PENDING"),
    )
    expected = [[4], [3, 4], [2, 3, 4], [1, 2, 3, 4]]
    for replicas, ids in zip((3, 2, 1, 0), expected, strict=True):
        wanted = fleet(model_record(replicas=replicas))
        seen = observation(*jobs, gateways=[view(wanted, *jobs[:2])])
        decided = plan(wanted, seen, NOTHING)
        assert sorted(leaving(decided)) == ids
        assert set(leaving(decided).values()) == {"surplus"}


def test_surplus_victim_stays_the_same_while_it_leaves() -> None:
    """The replica whose drain has begun is chosen again, whatever the load does meanwhile."""
    wanted = fleet(model_record(replicas=1))
    first, second = pair()
    seen = observation(first, second, gateways=[view(wanted, first)])
    memory = Memory(drains={second.key: DrainClock(since=AT - 1)})
    busy = {
        first.key: Probe(health=Health.READY, ongoing=0),
        second.key: Probe(health=Health.READY, ongoing=99),
    }
    decided = plan(wanted, replace(seen, probes=busy), memory)
    assert leaving(decided) == {2: "surplus"}


def test_suspended_model_is_left_alone_but_loses_dead_routes() -> None:
    """suspend stops submit, drain and cancel, never the removal of a dead address."""
    wanted = fleet(model_record(suspend=True, replicas=1))
    both = pair()
    dead = replace(both[0], state="FAILED")
    seen = observation(dead, both[1], job(OLD, id=3), gateways=[view(wanted, *both)])
    decided = plan(wanted, seen, NOTHING)
    assert routed_ids(decided) == [2, 3]
    assert (submits(decided), ended(decided), leaving(decided)) == ([], {}, {})
    assert len(notes(decided, NoteKind.SUSPENDED)) == 1


def test_suspended_model_does_not_keep_a_fleet_from_being_converged() -> None:
    """There is nothing to do and nothing to wait for in a model that is left alone."""
    wanted = fleet(model_record(suspend=True, replicas=5))
    assert plan(wanted, observation(gateways=[view(wanted)]), NOTHING).converged


def test_model_that_is_not_in_the_spec_leaves_when_told_by_name() -> None:
    """Jobs of a model whose block is gone drain; unknown and ending ones are not touched."""
    gone = (
        job(OLD, id=3, model="gone"),
        job(OLD, id=4, model="gone", ordinal=1, state="PENDING"),
        job(OLD, id=5, model="gone", ordinal=2, state="COMPLETING"),
        job(OLD, id=6, model="gone", ordinal=3, vandalised=True),
    )
    decided = plan(FLEET, settled(*gone), NOTHING, frozenset({"gone"}))
    assert leaving(decided) == {3: "not in spec", 4: "not in spec"}
    assert ended(decided) == {3: "drain: not in spec", 4: "cancel: not in spec"}


def test_R33_block_deleted_by_accident_ends_no_serving_replica() -> None:
    """Without its name in allow_destroy a model that serves stays routed, and a note says how."""
    gone = job(OLD, id=3, model="gone")
    decided = plan(FLEET, settled(gone), NOTHING)
    assert ended(decided) == {}
    (route,) = [action for action in decided.actions if action.kind == "route"]
    assert 3 in {target.job_id for target in route.targets}
    (note,) = [note for note in decided.notes if note.kind is NoteKind.GUARD]
    assert "--allow-destroy gone" in note.text


def test_R33_model_that_serves_nobody_needs_no_permission() -> None:
    """Jobs that wait or load are free to end: nobody would miss them."""
    waiting = job(OLD, id=3, model="gone", state="PENDING")
    loading = job(OLD, id=4, model="gone", ordinal=1, ready_at=None)
    seen = settled(waiting, loading, healths={4: Health.STARTING})
    assert ended(plan(FLEET, seen, NOTHING)) == {
        3: "cancel: not in spec",
        4: "drain: not in spec",
    }


def test_R33_protected_job_outlives_its_block_even_while_it_loads() -> None:
    """The protection is on the job itself: an edit of the spec can't take it away unseen."""
    bare = job(OLD, id=4, model="gone", ready_at=None)
    assert bare.comment is not None
    guarded = replace(bare, comment=replace(bare.comment, protect=True))
    seen = settled(guarded, healths={4: Health.STARTING})
    assert ended(plan(FLEET, seen, NOTHING)) == {}
    assert ended(plan(FLEET, seen, NOTHING, frozenset({"gone"}))) == {4: "drain: not in spec"}


def test_image_that_can_not_be_read_holds_its_model_and_no_other() -> None:
    """Without the image's digest the revision is unknown: nothing is stale or submitted."""
    other = model_record(name="other", image="second", replicas=1)
    images = {
        "engine": {"runtime": "none", "path": "/opt/engine"},
        "second": {"runtime": "none", "path": "/opt/second"},
    }
    wanted = fleet(model_record(), other, images=images)
    both = stale_pair()
    seen = observation(
        *both,
        gateways=[view(wanted, *both)],
        digests={"second": "d"},
        image_errors={"engine": "no manifest"},
    )
    decided = plan(wanted, seen, NOTHING)
    assert [action.name.model for action in submits(decided)] == ["other"]
    assert (leaving(decided), route(decided)) == ({}, None)
    assert not decided.observed


def test_canary_whose_image_can_not_be_read_does_not_hold_its_model() -> None:
    """What is surely the model's is replaced; any other job may be the canary's, and stays."""
    images = {name: {"runtime": "none", "path": f"/opt/{name}"} for name in ("engine", "second")}
    wanted = fleet(model_record(canary={"image": "second"}), images=images)
    jobs = [job(revision(wanted), id=1), job(OLD, id=2, ordinal=1)]
    seen = observation(
        *jobs, gateways=[view(wanted, *jobs)], image_errors={"second": "no manifest"}
    )
    decided = plan(wanted, seen, NOTHING)
    assert [submit.name.revision for submit in submits(decided)] == [revision(wanted)]
    assert leaving(decided) == {}
    assert [note.text for note in notes(decided, NoteKind.IMAGE_UNKNOWN)] == ["no manifest"]


def test_model_whose_image_can_not_be_read_drains_what_ends_soon() -> None:
    """Its walltime would cut its requests, whatever is wanted."""
    jobs = [job(REV, id=1, ends_at=int(AT) + 90), job(REV, id=2, ordinal=1)]
    seen = observation(*jobs, gateways=[view(FLEET, *jobs)], digests={})
    decided = plan(FLEET, seen, NOTHING)
    assert leaving(decided) == {1: Reason.EXPIRING}
    assert submits(decided) == []


# --- what can't be seen ------------------------------------------------------------------------


def test_R01_no_listing_plans_nothing() -> None:
    """The queue can't be read: nothing is submitted, cancelled or routed anew."""
    seen = replace(settled(), jobs=None, jobs_error="squeue: timed out", probes={})
    decided = plan(FLEET, seen, NOTHING)
    assert (decided.actions, decided.observed, decided.converged) == ((), False, False)
    [note] = decided.notes
    assert note.kind is NoteKind.NO_LISTING
    assert note.text == "squeue: timed out; nothing is submitted or cancelled"


def test_R01_no_listing_for_many_cycles_forgets_nothing() -> None:
    """However long Slurm is away, memory and plan stay as they were."""
    memory = Memory(drains={(1, 2): DrainClock(since=5.0)}, misses={(1, 2): 3})
    for cycle in range(100):
        seen = replace(settled(), jobs=None, at=AT + cycle)
        memory = learn(memory, seen)
        decided = plan(FLEET, seen, memory)
        memory = remember(memory, decided)
        assert decided.actions == ()
    assert memory == Memory(drains={(1, 2): DrainClock(since=5.0)}, misses={(1, 2): 3})


def empty_looks(memory: Memory, *times: float, routed: bool = True) -> list[Plan]:
    """The plans of looks, at these times, that find no job at all."""
    plans = []
    for at in times:
        gateways = [view(FLEET, *pair())] if routed else [view(FLEET, error="gone")]
        seen = observation(at=at, gateways=gateways)
        memory = learn(memory, seen)
        plans.append(plan(FLEET, seen, memory))
        memory = remember(memory, plans[-1])
    return plans


def test_R02_empty_listing_is_confirmed_before_it_is_believed() -> None:
    """All routed jobs gone at once: nothing is done until the queue has said so for a while."""
    first, second, third = empty_looks(NOTHING, AT, AT + CONFIRM_S - 0.1, AT + CONFIRM_S)
    for held in (first, second):
        assert (held.actions, held.observed) == ((), False)
        assert held.notes[0].kind is NoteKind.SUSPICIOUS_LISTING
        assert held.notes[0].until == AT + CONFIRM_S
    assert len(submits(third)) == 2
    assert routed_ids(third) == []


def test_R02_empty_listing_is_suspicious_when_no_gateway_answers() -> None:
    """What was seen before counts too: a network that is gone takes gateways and queue at once."""
    memory = learn(NOTHING, settled())
    first, second = empty_looks(memory, AT, AT + CONFIRM_S, routed=False)
    assert first.actions == ()
    assert len(submits(second)) == 2


def test_R02_empty_listing_once_changes_nothing() -> None:
    """The next good listing ends the suspicion, and the next bad one is suspected anew."""
    memory = learn(NOTHING, settled())
    assert memory.emptied_at is None
    empty = observation(at=AT + 1, gateways=[view(FLEET, *pair())])
    memory = learn(memory, empty)
    assert memory.emptied_at == AT + 1
    assert plan(FLEET, empty, memory).actions == ()
    memory = learn(memory, settled(at=AT + 2))
    assert memory.emptied_at is None


def test_empty_cluster_of_a_new_fleet_is_believed_at_once() -> None:
    """Nothing was ever known, so nothing can be missed."""
    [decided] = empty_looks(NOTHING, AT, routed=False)
    assert len(submits(decided)) == 2


def test_R08_unreadable_job_holds_its_place_and_its_route() -> None:
    """A line that can't be read is still a job: nothing replaces it, nothing ends it."""
    first, second = pair()
    odd = replace(first, state="UNREADABLE", submitted_at=0, comment=None)
    seen = observation(odd, second, gateways=[view(FLEET, first, second)], odd_lines=1)
    decided = plan(FLEET, seen, NOTHING)
    assert decided.actions == ()
    [note] = notes(decided, NoteKind.ODD_LINES)
    assert note.text == "1 of squeue's lines could not be read; those jobs are left alone"


def test_R37_job_with_a_vandalised_comment_is_left_alone() -> None:
    """Its address is unknown, so what routes exist stay, and nothing takes its place."""
    first, second = pair()
    seen = observation(replace(first, comment=None), second, gateways=[view(FLEET, first, second)])
    decided = plan(FLEET, seen, NOTHING)
    assert decided.actions == ()
    assert len(notes(decided, NoteKind.UNKNOWN_STATE)) == 1


# squeue(1) "JOB STATE CODES", and words that no release has had.
STATES = {
    **dict.fromkeys(
        ["PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"],
        Phase.PENDING,
    ),
    **dict.fromkeys(
        [
            "RUNNING",
            "CONFIGURING",
            "RESIZING",
            "SIGNALING",
            "STOPPED",
            "SUSPENDED",
            "POWER_UP_NODE",
        ],
        Phase.RUNNING,
    ),
    **dict.fromkeys(["COMPLETING", "STAGE_OUT"], Phase.ENDING),
    **dict.fromkeys(
        [
            "BOOT_FAIL",
            "CANCELLED",
            "COMPLETED",
            "DEADLINE",
            "FAILED",
            "LAUNCH_FAILED",
            "NODE_FAIL",
            "OUT_OF_MEMORY",
            "PREEMPTED",
            "RECONFIG_FAIL",
            "REVOKED",
            "TIMEOUT",
        ],
        Phase.ENDED,
    ),
    **dict.fromkeys(["HIBERNATED", "", "running", "UNREADABLE"], Phase.UNKNOWN),
}


@pytest.mark.parametrize(("state", "phase"), STATES.items())
def test_R20_state_of_slurm_has_a_defined_meaning(state: str, phase: Phase) -> None:
    """Every state has one phase; a word not invented yet is unknown, and so never touched."""
    assert job(REV, state=state).phase is phase
    extra = job(OLD, id=9, model="gone", state=state)
    touched = phase in (Phase.PENDING, Phase.RUNNING)
    assert (9 in ended(plan(FLEET, settled(extra), NOTHING, frozenset({"gone"})))) is touched


def test_R20_list_of_states_is_complete() -> None:
    """The table has no state that this test does not know."""
    assert set(PHASES) == {state for state, phase in STATES.items() if phase is not Phase.UNKNOWN}


# --- routes ------------------------------------------------------------------------------------


def test_R21_requeued_job_loses_its_address() -> None:
    """A requeued job keeps id and comment: its old address gets no request, its new one does."""
    first, second = pair()
    for changes in ({"node": "node9", "run_node": "node1"}, {"restarts": 1, "run_restarts": 0}):
        moved = job(REV, id=1, **changes)
        assert moved.run is None
        seen = observation(moved, second, gateways=[view(FLEET, first, second)])
        decided = plan(FLEET, seen, NOTHING)
        assert routed_ids(decided) == [2]
        assert (leaving(decided), submits(decided)) == ({}, [])


def test_R21_requeued_job_is_routed_at_its_new_address() -> None:
    """The same job at another address is a change of routes."""
    first, second = pair()
    old = replace(target(first), address="10.9.9.9:1")
    gateway = replace(view(FLEET), targets=(old, target(second)))
    change = route(plan(FLEET, observation(first, second, gateways=[gateway]), NOTHING))
    assert change is not None
    assert change.targets == (target(first), target(second))


def test_R22_reused_job_id_is_another_job() -> None:
    """A job is its id and its submit time: what is remembered of one says nothing of another."""
    old = pair()
    new = tuple(replace(one, submitted_at=999_999) for one in old)
    seen = observation(*new, gateways=[view(FLEET, *old)])
    memory = Memory(
        misses={one.key: 9 for one in old},
        drains={one.key: DrainClock(since=0.0) for one in old},
    )
    decided = plan(FLEET, seen, memory)
    assert (leaving(decided), ended(decided)) == ({}, {})
    change = route(decided)
    assert change is not None
    assert {t.submitted_at for t in change.targets} == {999_999}


def test_route_changes_only_the_gateways_that_run_something_else() -> None:
    """A gateway that is as it should be is not reloaded; an unreachable one gets a note."""
    both = pair()
    wanted = fleet(gateway={"hosts": [{"name": n} for n in ("a", "b", "c")]})
    gateways = [
        view(wanted, *both, name="a"),
        view(wanted, both[0], name="b"),
        view(wanted, name="c", error="no answer"),
    ]
    decided = plan(wanted, observation(*both, gateways=gateways), NOTHING)
    change = route(decided)
    assert change is not None
    assert (change.gateways, change.added, change.removed) == (("b",), ("2",), ())
    [note] = notes(decided, NoteKind.GATEWAY)
    assert (note.subject, decided.observed) == ("c", False)


# --- drain -------------------------------------------------------------------------------------


def step(
    memory: Memory = NOTHING,
    *,
    routed: bool = False,
    old_workers: int = 0,
    error: str | None = None,
    health: Health = Health.READY,
    ongoing: int | None = 0,
    at: float = AT,
    **victim: Any,
) -> tuple[Plan, Job]:
    """The plan for a fleet that wants one replica and has two; the second is the victim."""
    stays, goes = job(REV, id=1), job(REV, id=2, ordinal=1, ends_at=1_000_500, **victim)
    seen = observation(
        *(stays, goes),
        gateways=[
            view(ONE, stays, *([goes] if routed else []), old_workers=old_workers, error=error)
        ],
        healths={2: health},
        ongoing=ongoing,
        at=at,
    )
    return plan(ONE, seen, memory), goes


def waits(decided: Plan) -> str:
    [note] = notes(decided, NoteKind.DRAINING)
    return note.text.removeprefix("leaving (surplus): ")


def test_drain_first_takes_the_replica_off_the_gateways() -> None:
    """While a gateway routes to it, a leaving replica is told nothing, and no clock runs."""
    decided, goes = step(routed=True)
    assert routed_ids(decided) == [1]
    assert ended(decided) == {}
    assert waits(decided) == "it leaves the gateways first"
    assert decided.leaving == ()
    assert goes.key not in remember(NOTHING, decided).drains


def test_drain_waits_for_the_old_workers() -> None:
    """A half-uploaded request on an old worker can still arrive."""
    decided, goes = step(old_workers=1)
    assert ended(decided) == {}
    assert waits(decided) == "old workers of gateway gateway still finish requests"
    assert [leaving.key for leaving in decided.leaving] == [goes.key]


def test_drain_does_not_wait_for_old_workers_for_ever() -> None:
    """No request for as long as an upload can take: one long stream elsewhere blocks nothing."""
    key = job(REV, id=2).key
    just = Memory(drains={key: DrainClock(since=AT, idle_since=AT - IDLE_HOLD_S)})
    short = Memory(drains={key: DrainClock(since=AT, idle_since=AT - IDLE_HOLD_S + 1)})
    assert ended(step(just, old_workers=1)[0]) == {2: "drain: surplus"}
    assert ended(step(short, old_workers=1)[0]) == {}


def test_drain_signals_when_no_request_can_arrive() -> None:
    """Off the gateways, and no old worker left: now the job's shell is told to drain."""
    decided, goes = step()
    [action] = decided.actions
    ref = JobRef(id=goes.id, submitted_at=goes.submitted_at, name=goes.name)
    assert action == Drain(job=ref, reason=Reason.SURPLUS)


def test_drain_is_not_repeated_once_the_job_says_so() -> None:
    """A job that publishes `draining` only needs time; lost memory does not matter."""
    decided, goes = step(draining=True)
    assert decided.actions == ()
    assert waits(decided) == "its engine finishes its requests"
    assert [leaving.key for leaving in decided.leaving] == [goes.key]


def test_drain_waits_for_the_trap() -> None:
    """Before its shell has the trap, USR1 would kill the job."""
    assert waits(step(trap_ready=False)[0]) == "its job has not said yet that it can drain"
    decided, _ = step(published=False, health=Health.STARTING)
    assert waits(decided) == "its job has not said yet that it can drain"


def test_drain_of_a_replica_that_never_was_ready_waits_for_no_gateway() -> None:
    """No request can be on its way to a replica that never got one."""
    decided, _ = step(ready_at=None, health=Health.STARTING, old_workers=3)
    assert ended(decided) == {2: "drain: surplus"}


def test_drain_of_a_replica_that_answered_before_its_job_said_so_waits() -> None:
    """A comment may come late: who answers may have been routed."""
    decided, _ = step(ready_at=None, old_workers=3)
    assert ended(decided) == {}


def test_drain_is_blocked_by_a_gateway_that_can_not_be_asked() -> None:
    """It may still route: no signal, and no time limit either, until it has confirmed."""
    memory = Memory(drains={job(REV, id=2).key: DrainClock(since=0.0)})
    decided, _ = step(memory, error="no answer")
    assert ended(decided) == {}
    assert waits(decided) == "gateway gateway may still route to it: no answer"
    [note] = notes(decided, NoteKind.DRAINING)
    assert note.until is None


def test_drain_of_a_replica_that_stays_routed_never_ends_in_a_cancel() -> None:
    """A gateway that keeps its old configuration still serves through the replica."""
    memory = Memory(drains={job(REV, id=2).key: DrainClock(since=0.0)})
    assert ended(step(memory, routed=True)[0]) == {}


def test_drain_past_its_timeout_ends_in_a_cancel() -> None:
    """The drain timeout counts from when no gateway could send a request any more."""
    memory = Memory(drains={job(REV, id=2).key: DrainClock(since=AT)})
    early, _ = step(memory, draining=True, at=AT + 59)
    late, goes = step(memory, draining=True, at=AT + 60)
    assert ended(early) == {}
    ref = JobRef(id=goes.id, submitted_at=goes.submitted_at, name=goes.name)
    assert late.actions == (Cancel(job=ref, pending=False, reason=Reason.SURPLUS),)


def test_drain_of_a_dead_engine_is_not_blocked_by_a_gateway_for_ever() -> None:
    """What does not answer serves nobody: past its timeout it is cancelled."""
    wanted = fleet(model_record(replicas=1))
    dead = job(revision(wanted), id=1)
    seen = observation(dead, healths={1: Health.SICK}, gateways=[view(wanted, error="no answer")])
    memory = Memory(misses={dead.key: 4}, drains={dead.key: DrainClock(since=AT - 60)})
    assert ended(plan(wanted, seen, memory)) == {1: "cancel: unhealthy"}


def test_drain_of_a_pending_job_is_a_cancel_of_pending_jobs_only() -> None:
    """USR1 to a pending job would hang; should it start meanwhile, nothing is cancelled."""
    decided = plan(
        ONE, observation(job(REV, id=1), job(REV, id=2, ordinal=1, state="PENDING")), NOTHING
    )
    cancels = [action for action in decided.actions if isinstance(action, Cancel)]
    assert [(c.job.id, c.pending) for c in cancels] == [(2, True)]


def test_drain_of_a_draining_job_goes_on_when_it_is_wanted_again() -> None:
    """A job that drains can't come back: it counts as gone and another is submitted."""
    jobs = job(REV, id=1, draining=True), job(REV, id=2, ordinal=1)
    decided = plan(FLEET, observation(*jobs, gateways=[view(FLEET, jobs[1])]), NOTHING)
    assert names(submits(decided)) == [f"demo.tiny.{REV}.2"]
    assert leaving(decided) == {1: "surplus"}


def test_R19_whole_change_of_revision_never_leaves_too_few(  # the rule over many cycles
) -> None:
    """From the old revision to the new one, two ready replicas are routed at every step."""
    jobs: list[Job] = list(stale_pair())
    memory, routed, next_id = NOTHING, list(jobs), 3
    wanted = FLEET
    for cycle in range(40):
        at = AT + cycle
        seen = observation(*jobs, gateways=[view(wanted, *routed)], at=at)
        memory = learn(memory, seen)
        decided = plan(wanted, seen, memory)
        memory = remember(memory, decided)
        for action in submits(decided):
            jobs.append(job(REV, id=next_id, ordinal=action.name.ordinal))
            next_id += 1
        ids = routed_ids(decided)
        if ids is not None:
            routed = [one for one in jobs if one.id in ids]
        jobs = [one for one in jobs if one.id not in ended(decided)]
        assert len(routed) >= 2
        assert set(routed) <= set(jobs)
        if decided.converged:
            break
    assert decided.converged
    assert {one.name.revision for one in jobs} == {REV}


# --- failures ----------------------------------------------------------------------------------


def test_R25_failing_revision_backs_off_visibly() -> None:
    """After failures the next submission waits, and the note says until when."""
    failed = Failures(count=3, last_at=AT - 5, counted=frozenset())
    memory = Memory(failures={f"tiny.{REV}": failed})
    decided = plan(FLEET, observation(), memory)
    assert submits(decided) == []
    [note] = notes(decided, NoteKind.BACKOFF)
    assert (note.text, note.until) == (f"held: 3 failures on revision {REV}", AT + 35)
    assert len(submits(plan(FLEET, observation(at=AT + 35), memory))) == 2


def test_backoff_of_one_revision_holds_no_other() -> None:
    """A mended spec is a new revision and is tried at once."""
    failed = Failures(count=9, last_at=AT, counted=frozenset())
    assert len(submits(plan(FLEET, observation(), Memory(failures={f"tiny.{OLD}": failed})))) == 2


# --- the plan ----------------------------------------------------------------------------------


def test_converged_fleet_has_nothing_to_do() -> None:
    """As many ready, routed replicas as wanted: no action, no note, converged."""
    decided = plan(FLEET, settled(), NOTHING)
    assert (decided.actions, decided.notes, decided.converged) == ((), (), True)


@pytest.mark.parametrize(
    "extra",
    [
        job(OLD, id=9, model="gone", state="COMPLETING"),
        job(OLD, id=9, model="gone"),
        job(REV, id=9, ordinal=5, vandalised=True),
    ],
    ids=["ending", "not-in-spec", "unknown"],
)
def test_converged_waits_for_every_job(extra: Job) -> None:
    """A job that is still ending, or that nobody can judge, is something to wait for."""
    assert not plan(FLEET, settled(extra), NOTHING).converged


def test_converged_waits_for_every_gateway() -> None:
    """All is ready and routed by one gateway: the other one's change is still to be made."""
    both = pair()
    gateways = [view(FLEET, *both, name="a"), view(FLEET, both[0], name="b")]
    decided = plan(FLEET, observation(*both, gateways=gateways), NOTHING)
    assert len(decided.actions) == 1
    assert not decided.converged


def test_capacity_comes_before_it_goes() -> None:
    """Submit, then route, then drain and cancel."""
    gone = job(OLD, id=9, model="gone", state="PENDING")
    dead = replace(pair()[0], state="FAILED")
    seen = observation(dead, pair()[1], gone, gateways=[view(FLEET, *pair())])
    assert list(summary(plan(FLEET, seen, NOTHING))) == ["submit", "route", "cancel"]


def busy_world() -> tuple[Fleet, list[Job], Memory]:
    wanted = fleet(
        model_record(replicas=2), model_record(name="other", replicas=2), budget={"gpus": 20}
    )
    jobs = [
        *(job(OLD, id=1), job(OLD, id=2, ordinal=1), job(REV, id=3, ordinal=2)),
        *(job(REV, id=4, ordinal=2), job(REV, id=5, ordinal=3, state="PENDING")),
        job(OLD, id=8, model="gone", ordinal=1, state="PENDING"),
        *(job(OLD, id=6, model="gone"), job(OLD, id=7, model="other", vandalised=True)),
    ]
    memory = Memory(misses={jobs[2].key: 5}, drains={jobs[5].key: DrainClock(since=AT - 99)})
    return wanted, jobs, memory


def test_same_input_gives_the_same_plan_in_any_order_of_jobs() -> None:
    """The plan depends on what was seen, not on the order in which Slurm printed it."""
    wanted, jobs, memory = busy_world()
    gateways = [view(wanted, jobs[0], jobs[1], jobs[5])]
    texts = set()
    for seed in range(20):
        random.Random(seed).shuffle(jobs)
        texts.add(to_json(plan(wanted, observation(*jobs, gateways=gateways), memory)))
    assert len(texts) == 1


def test_plan_as_json_comes_back_equal() -> None:
    """What a review saw can be compared with what is planned now."""
    wanted, jobs, memory = busy_world()
    gateways = [view(wanted, jobs[0]), view(wanted, name="b", error="x")]
    seen = observation(*jobs, gateways=gateways, nodes={})
    decided = plan(wanted, seen, memory, frozenset({"gone"}))
    assert {type(action).__name__ for action in decided.actions} >= {"Submit", "Route", "Cancel"}
    assert from_json(to_json(decided)) == decided


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"fleet": 1}', "\0"])
def test_plan_from_anything_else_is_refused(text: str) -> None:
    """A file that is no plan is an error, not an empty plan."""
    with pytest.raises(ValueError, match="validation error"):
        from_json(text)


def test_names_of_submissions_parse_and_are_unique() -> None:
    """Every name that is submitted is one that will be recognised as ours."""
    wanted = fleet(model_record(replicas=50), budget={"gpus": 60})
    found = [action.name for action in submits(plan(wanted, observation(), NOTHING))]
    assert len(set(found)) == 50
    assert all(isinstance(name, ReplicaName) for name in found)


def test_leaving_keys_are_remembered_once() -> None:
    """A drain's clock starts when it can and is not set back by later plans."""
    decided, goes = step()
    memory = remember(NOTHING, decided)
    assert tuple(memory.drains) == keys(goes)
    later, _ = step(memory, at=AT + 30)
    assert remember(memory, later).drains[goes.key].since == AT
