"""Why jobs end, how long their revision is held back, and which nodes are avoided."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from reconciler.failures import (
    BACKOFF_FIRST_S,
    BACKOFF_MOST_S,
    FORGOTTEN_S,
    HALT_AFTER,
    HALT_S,
    QUARANTINE_S,
    backoff_until,
    cause,
    halted,
    learn_refusals,
    quarantined,
)
from reconciler.memory import learn
from reconciler.naming import ReplicaName
from reconciler.plan import NoteKind, Reason, Submit
from reconciler.planner import plan
from reconciler.state import PHASES, Cause, DrainClock, Failure, Failures, Job, Memory, Phase
from tests.unit.build import (
    AT,
    ended,
    fleet,
    job,
    model_record,
    observation,
    revision,
    submits,
    view,
)

FLEET = fleet()
REV = revision(FLEET)
NAME = f"tiny.{REV}"
NOTHING = Memory()


def failed(id: int, status: int = 1, *, node: str = "node1", state: str = "FAILED") -> Job:
    """A job that ended by itself with a status."""
    return replace(job(REV, id=id, state=state, node=node), exit_status=status)


def after(*jobs: Job, at: float = AT, memory: Memory = NOTHING) -> Memory:
    return learn(memory, observation(*jobs, at=at))


def count(memory: Memory) -> int:
    return memory.failures[NAME].count if NAME in memory.failures else 0


@pytest.mark.parametrize(
    ("state", "status", "why"),
    [
        ("FAILED", 1, Cause.ENGINE),
        ("FAILED", 2, Cause.ARGUMENTS),
        ("FAILED", 66, Cause.WEIGHTS),
        ("FAILED", 69, Cause.IMAGE),
        ("FAILED", 71, Cause.NODE),
        ("COMPLETED", 0, Cause.ENGINE),
        ("OUT_OF_MEMORY", 0, Cause.MEMORY),
        ("NODE_FAIL", 0, Cause.NODE),
        ("BOOT_FAIL", 0, Cause.NODE),
        ("PREEMPTED", 0, Cause.PREEMPTED),
        ("TIMEOUT", 0, Cause.WALLTIME),
        ("DEADLINE", 0, Cause.WALLTIME),
        ("CANCELLED", 0, None),
        ("REVOKED", 0, None),
        ("RUNNING", 0, None),
        ("NOT_INVENTED_YET", 0, None),
    ],
)
def test_cause_of_an_end_is_told_apart(state: str, status: int, why: Cause | None) -> None:
    """Slurm's state and the script's status say whose fault an end was."""
    assert cause(failed(1, status, state=state)) is why


def test_cause_of_every_end_is_known() -> None:
    """No ended state is without a meaning; a live one has none."""
    for state, phase in PHASES.items():
        told = state in ("CANCELLED", "REVOKED")
        assert (cause(failed(1, state=state)) is not None) is (phase is Phase.ENDED and not told)


@pytest.mark.parametrize("state", ["FAILED", "COMPLETED", "OUT_OF_MEMORY"])
def test_failure_of_the_revision_is_counted_once(state: str) -> None:
    """Each ended job counts when it is first seen, and not again."""
    memory = after(failed(1, state=state))
    assert count(memory) == 1
    assert count(after(failed(1, state=state), at=AT + 1, memory=memory)) == 1


@pytest.mark.parametrize("state", ["NODE_FAIL", "PREEMPTED", "TIMEOUT"])
def test_end_that_is_not_the_revisions_holds_nothing_back(state: str) -> None:
    """A node, preemption or walltime: the next job follows at once, but it is remembered where."""
    memory = after(failed(1, state=state))
    assert count(memory) == 0
    assert [failure.node for failure in memory.failures[NAME].recent] == ["node1"]
    assert backoff_until(memory.failures[NAME]) == 0.0


def test_R25_failures_of_a_revision_add_up_until_one_is_ready() -> None:
    """Each failed job counts; a replica that becomes ready clears its revision."""
    memory = NOTHING
    for number in range(1, 4):
        memory = after(failed(number), at=AT + number, memory=memory)
        assert count(memory) == number
    assert memory.failures[NAME].last_at == AT + 3
    healthy = job(REV, id=4, ready_at=round(AT) + 10)
    memory = after(failed(3), healthy, at=AT + 11, memory=memory)
    assert (count(memory), memory.failures[NAME].was_ready) == (0, True)


@pytest.mark.parametrize("listed", [1, -1], ids=["failed-first", "ready-first"])
def test_R25_failing_replica_backs_off_beside_one_that_has_long_been_ready(listed: int) -> None:
    """A neighbour that serves since before is no reason to try the failing one without pause."""
    memory = NOTHING
    for number in range(1, 4):
        jobs = (failed(number), job(REV, id=9, ordinal=1))[::listed]
        memory = after(*jobs, at=AT + number, memory=memory)
        assert count(memory) == number
    assert memory.failures[NAME].was_ready
    assert backoff_until(memory.failures[NAME]) == AT + 3 + 4 * BACKOFF_FIRST_S


@pytest.mark.parametrize("known_by", ["memory", "comment"])
def test_end_of_a_drained_job_is_no_failure_now_or_later(known_by: str) -> None:
    """An engine that was told to end may report its TERM as an error."""
    ended = job(REV, state="FAILED", draining=known_by == "comment")
    clocks = {ended.key: DrainClock(since=AT)} if known_by == "memory" else {}
    memory = after(ended, memory=Memory(drains=clocks))
    assert count(memory) == 0
    assert count(after(ended, at=AT + 1, memory=replace(memory, drains={}))) == 0


def test_backoff_doubles_up_to_its_limit() -> None:
    """The first failure costs seconds, the tenth minutes, and no count overflows."""
    waits = [
        backoff_until(Failures(count=n, last_at=AT, counted=frozenset(), was_ready=True)) - AT
        for n in (1, 2, 3, 100, 10**9)
    ]
    first = BACKOFF_FIRST_S
    assert waits == [first, 2 * first, 4 * first, BACKOFF_MOST_S, BACKOFF_MOST_S]
    assert backoff_until(None) == 0.0


def _failures(*failures: Failure, was_ready: bool = False) -> Failures:
    return Failures(
        count=len(failures),
        last_at=AT,
        counted=frozenset(),
        recent=failures,
        was_ready=was_ready,
    )


def _failure(why: Cause, node: str = "node1", at: float = AT) -> Failure:
    return Failure(node=node, cause=why, at=at)


@pytest.mark.parametrize("why", [Cause.ARGUMENTS, Cause.IMAGE, Cause.WEIGHTS])
def test_release_is_bad_when_two_nodes_say_the_same(why: Cause) -> None:
    """What no node can mend is not tried on the third; one node alone may be the node's fault."""
    assert halted(_failures(_failure(why), _failure(why))) is None
    bad = halted(_failures(_failure(why), _failure(why, "node2")))
    assert bad == f"{why} on node1 and node2"


def test_release_of_several_nodes_is_bad_when_no_node_had_a_part_in_all() -> None:
    """As long as one node was there each time, it may be that node's fault."""
    alike = [_failure(Cause.WEIGHTS, nodes) for nodes in ("node[1-2]", "node[2-3]")]
    assert halted(_failures(*alike)) is None
    bad = halted(_failures(*alike, _failure(Cause.WEIGHTS, "node[1,3]")))
    assert bad == "its weights are missing on node[1,3] and node[1-2] and node[2-3]"


def test_release_is_bad_when_it_never_was_ready() -> None:
    """Enough failures in a row halt a revision, unless it has served before."""
    many = [_failure(Cause.ENGINE)] * HALT_AFTER
    assert halted(_failures(*many[1:])) is None
    assert halted(_failures(*many)) is not None
    assert halted(_failures(*many, was_ready=True)) is None


def test_halted_release_leaves_the_old_one_serving_and_says_why() -> None:
    """Invariant 8: nothing is submitted or drained, and the note names the cause and the time."""
    old = [job("0" * 8, id=1), job("0" * 8, id=2, ordinal=1)]
    bad = _failures(_failure(Cause.WEIGHTS), _failure(Cause.WEIGHTS, "node2"))
    decided = plan(
        FLEET,
        observation(*old, gateways=[view(FLEET, *old)]),
        Memory(failures={NAME: bad}),
    )
    assert decided.actions == ()
    (note,) = [note for note in decided.notes if note.kind is NoteKind.HALTED]
    assert "its weights are missing on node1 and node2" in note.text
    assert note.until == AT + HALT_S


def test_node_where_alone_jobs_fail_is_avoided_for_a_while() -> None:
    """Two failures there and none elsewhere: new jobs exclude it until the memory has faded."""
    bad = _failures(_failure(Cause.ENGINE), _failure(Cause.ENGINE))
    memory = Memory(failures={NAME: replace(bad, count=0)})
    assert quarantined(memory, AT + 1) == {"node1": AT + QUARANTINE_S}
    assert quarantined(memory, AT + QUARANTINE_S) == {}
    decided = plan(FLEET, observation(gateways=[view(FLEET)]), memory)
    excluded = [action.exclude for action in decided.actions if isinstance(action, Submit)]
    assert excluded == [("node1",), ("node1",)]
    assert NoteKind.QUARANTINE in {note.kind for note in decided.notes}


@pytest.mark.parametrize(
    ("avoids", "reason", "word", "replaced"),
    [
        ("node1", "Resources", "idle", True),
        ("node[1-2]", "ReqNodeNotAvail, UnavailableNodes:node3", "mixed", True),
        ("node1", "Priority", "idle", False),  # not its turn: its place in the queue is worth more
        ("node1", "Resources", "allocated", False),  # nothing is gained
        ("node1", "Resources", "drained", False),
        ("node2", "Resources", "idle", False),  # still in quarantine
        ("", "Resources", "idle", False),
    ],
)
def test_job_that_waits_for_nodes_avoids_none_in_vain(
    avoids: str, reason: str, word: str, replaced: bool
) -> None:
    """A quarantine ends, and the nodes that a job avoids are those of its submission."""
    one = fleet(model_record(replicas=1))
    waiting = job(revision(one), state="PENDING", reason=reason, avoids=avoids)
    node2 = _failures(_failure(Cause.ENGINE, "node2"), _failure(Cause.ENGINE, "node2"))
    seen = observation(
        waiting,
        gateways=[view(one)],
        nodes={"node1": word, "node2": "idle", "node3": "drained"},
    )
    decided = plan(one, seen, Memory(failures={f"other.{REV}": node2}))
    assert ended(decided) == ({1: f"cancel: {Reason.QUARANTINE_OVER}"} if replaced else {})
    assert [submit.exclude for submit in submits(decided)] == ([("node2",)] if replaced else [])


@pytest.mark.parametrize(
    ("avoids", "excluded"),
    [("", "node1"), ("node3", "node1"), ("node1", "")],
    ids=["not by us", "others by us", "taken back"],
)
def test_node_that_the_site_excludes_replaces_no_job(avoids: str, excluded: str) -> None:
    """A plugin of the site, or a person, would do it to the next job too: again and again."""
    one = fleet(model_record(replicas=1))
    waiting = job(revision(one), state="PENDING", reason="Resources", avoids=avoids)
    seen = observation(
        replace(waiting, excluded=excluded),
        gateways=[view(one)],
        nodes={"node1": "idle", "node3": "idle"},
    )
    assert plan(one, seen, Memory()).actions == ()


def test_R25_node_after_node_that_fails_backs_off_and_is_avoided() -> None:
    """A full /tmp on every node: the third moment at which one says so makes the next try wait."""
    memory, begun = NOTHING, 0
    for at in range(12):
        ended_now = failed(at + 1, 71, node=f"node{at % 3 + 1}")
        now = AT + 10 * at
        memory = after(ended_now, at=now, memory=memory)
        begun += backoff_until(memory.failures[NAME]) <= now
    assert begun <= 4
    assert halted(memory.failures[NAME]) is None  # it is not the release's fault
    assert sorted(quarantined(memory, AT + 111)) == ["node1", "node2", "node3"]


def test_node_that_takes_many_replicas_along_holds_nothing_back() -> None:
    """They are replaced at once: it is one failure, however many jobs it ended."""
    jobs = [failed(id, state="NODE_FAIL") for id in range(1, 9)]
    assert backoff_until(after(*jobs).failures[NAME]) <= AT


def test_node_that_says_so_itself_is_avoided_whatever_happens_elsewhere() -> None:
    """One chance crash elsewhere says nothing for a node whose own jobs blame it."""
    own = [_failure(Cause.NODE), _failure(Cause.ENGINE, "node2"), _failure(Cause.NODE)]
    assert list(quarantined(Memory(failures={NAME: _failures(*own)}), AT + 1)) == ["node1"]


def test_what_nodes_lack_halts_no_release_that_was_ready() -> None:
    """Two nodes without the weights, and others that have them: it backs off, and goes on."""
    lacking = _failures(_failure(Cause.WEIGHTS, "node8"), _failure(Cause.WEIGHTS, "node9"))
    assert halted(lacking) is not None
    assert halted(replace(lacking, was_ready=True)) is None
    wrong = _failures(_failure(Cause.ARGUMENTS, "node8"), _failure(Cause.ARGUMENTS, "node9"))
    assert halted(replace(wrong, was_ready=True)) is not None


def test_node_that_had_a_part_in_each_failure_is_avoided() -> None:
    """Of several nodes the one that all failed jobs had is to blame, or all that they shared."""
    shared = _failures(_failure(Cause.NODE, "node[1-2]"), _failure(Cause.NODE, "node[2-3]"))
    assert list(quarantined(Memory(failures={NAME: shared}), AT + 1)) == ["node2"]
    same = _failures(_failure(Cause.NODE, "node[1-2]"), _failure(Cause.NODE, "node[1-2]"))
    assert list(quarantined(Memory(failures={NAME: same}), AT + 1)) == ["node1", "node2"]


def test_node_is_not_blamed_for_what_happens_elsewhere_too() -> None:
    """The same revision fails on another node: it is the revision's fault."""
    both = _failures(
        _failure(Cause.ENGINE), _failure(Cause.ENGINE), _failure(Cause.ENGINE, "node2")
    )
    assert quarantined(Memory(failures={NAME: both}), AT + 1) == {}
    preempted = _failures(_failure(Cause.PREEMPTED), _failure(Cause.PREEMPTED))
    assert quarantined(Memory(failures={NAME: preempted}), AT + 1) == {}


def test_jobs_that_slurm_refused_quarantine_no_node() -> None:
    """They are listed as FAILED on no node, and were counted when sbatch said so."""
    memory = after(failed(1, 0, node=""), failed(2, 0, node=""))
    assert count(memory) == 0
    assert quarantined(refused(3), AT + 1) == {}


def test_failures_of_a_revision_without_jobs_are_forgotten_in_a_week() -> None:
    """Memory must not grow with each release; one that still has a job is remembered."""
    memory = after(failed(1))
    later = AT + FORGOTTEN_S
    assert NAME in after(at=later - 1, memory=memory).failures
    assert NAME not in after(at=later, memory=memory).failures
    assert NAME in after(job(REV, id=2), at=later, memory=memory).failures


def refused(times: int, names: Sequence[ReplicaName] = (job(REV).name,)) -> Memory:
    """A memory of so many cycles in which Slurm refused these submissions."""
    memory = Memory()
    for at in range(times):
        memory = learn_refusals(memory, names, AT + at)
    return memory


def test_refused_submissions_back_off_once_a_cycle() -> None:
    """Eight replicas refused at once are one failure of their revision, not eight."""
    names = [job(REV, ordinal=ordinal).name for ordinal in range(8)]
    failures = refused(1, names).failures[NAME]
    assert failures.count == 1
    assert [failure.cause for failure in failures.recent] == [Cause.REFUSED]
    assert backoff_until(failures) == AT + BACKOFF_FIRST_S


def test_refused_submissions_halt_no_release() -> None:
    """A limit of the account passes; nobody should have to edit the spec for it."""
    failures = refused(3 * HALT_AFTER).failures[NAME]
    assert halted(failures) is None
    assert backoff_until(failures) == failures.last_at + BACKOFF_MOST_S


def test_refused_submission_is_tried_again_without_excluded_nodes() -> None:
    """They may be all that its partition has; and it is refused for a node that is gone."""
    lost = Failure(node="node1", cause=Cause.ENGINE, at=AT - 700)
    failures = Failures(count=2, last_at=AT - 700, counted=frozenset(), recent=(lost, lost))
    nodes = {"node1": "idle", "node2": "idle"}
    [submit, _] = submits(plan(FLEET, observation(nodes=nodes), Memory(failures={NAME: failures})))
    assert submit.exclude == ("node1",)
    again = learn_refusals(Memory(failures={NAME: failures}), [submit.name], AT - 100)
    [submit, _] = submits(plan(FLEET, observation(nodes=nodes), again))
    assert submit.exclude == ()


@pytest.mark.parametrize("nodes", [{"node1": "idle"}, {"node2": "idle"}])
def test_node_that_sbatch_would_refuse_to_exclude_is_not_excluded(nodes: dict[str, str]) -> None:
    """All nodes there are, or one that is there no more."""
    lost = Failure(node="node1", cause=Cause.ENGINE, at=AT - 700)
    failures = Failures(count=2, last_at=AT - 700, counted=frozenset(), recent=(lost, lost))
    decided = plan(FLEET, observation(nodes=nodes), Memory(failures={NAME: failures}))
    assert {submit.exclude for submit in submits(decided)} == {()}
