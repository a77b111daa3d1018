"""What planner and executor rely on: asked of a real Slurm, and of the simulator in its place.

Each case is one text that runs on both, so the simulator can't merely agree with its author. What
only a real Slurm can answer is in test_slurm_real.py.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from reconciler.adapters.ports import Slurm
from reconciler.errors import SlurmUnavailable, SubmitRejected, SubmitUnknown
from reconciler.hostlist import expand
from reconciler.plan import JobRef
from reconciler.state import UNREADABLE, Job, Phase
from tests.contract.clusters import (
    COMMENT,
    DEAF,
    ENDS,
    FLEET,
    GPUS_PER_NODE,
    REFUSES,
    REPLICA,
    STUBBORN,
    Body,
    Cluster,
    RealCluster,
    SimulatedCluster,
    name,
    script,
)

LEAST_CASES = 30
SINGLETON = "dependency=singleton"
HOLD = "hold"
NO_REQUEUE = "no-requeue"
# In this order a job goes through them; a look may miss some.
ORDER = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")


@pytest.fixture(params=["real", "simulated"])
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Both clusters in turn; the real one is shared, and left as it was found."""
    if request.param == "simulated":
        yield SimulatedCluster()
        return
    real = RealCluster(request.getfixturevalue("lab"))
    yield real
    real.tidy()
    real.close()


def test_every_case_runs_on_both() -> None:
    """The fixture has both kinds, and enough cases ask for it."""
    functions = inspect.getmembers(sys.modules[__name__], inspect.isfunction)
    cases = [
        test
        for title, test in functions
        if title.startswith("test_") and "cluster" in inspect.signature(test).parameters
    ]
    assert len(cases) >= LEAST_CASES


# -- what a case says in one line


def _job(cluster: Cluster, job_id: int) -> Job | None:
    return next((job for job in cluster.slurm.jobs(FLEET).jobs if job.id == job_id), None)


def _known(cluster: Cluster, job_id: int) -> Job:
    job = _job(cluster, job_id)
    assert job is not None
    return job


def _live(cluster: Cluster) -> dict[int, Job]:
    """The jobs that have not ended; those of earlier cases are listed for MinJobAge."""
    return {job.id: job for job in cluster.slurm.jobs(FLEET).jobs if job.phase is not Phase.ENDED}


def _ref(job: Job) -> JobRef:
    return JobRef(id=job.id, submitted_at=job.submitted_at, name=job.name)


def _when(cluster: Cluster, job_id: int, what: str, holds: Callable[[Job], bool]) -> Job:
    def ask() -> Job | None:
        job = _job(cluster, job_id)
        return job if job is not None and holds(job) else None

    return cluster.until(f"job {job_id}: {what}", ask)


def _in_phase(cluster: Cluster, job_id: int, phase: Phase) -> Job:
    return _when(cluster, job_id, str(phase), lambda job: job.phase is phase)


def _running(cluster: Cluster, job_id: int) -> Job:
    """Wait until a job's script runs, which CONFIGURING is not."""
    return _when(cluster, job_id, "RUNNING", lambda job: job.state == "RUNNING")


def _published(cluster: Cluster, job_id: int) -> Job:
    return _when(cluster, job_id, "its comment", lambda job: job.run is not None)


def _reason(cluster: Cluster, job_id: int, reason: str) -> Job:
    return _when(cluster, job_id, reason, lambda job: job.reason.startswith(reason))


def _started(cluster: Cluster, body: Body = REPLICA, *options: str, ordinal: int = 0) -> Job:
    """Submit a job and wait until it runs; a replica, until it has its trap."""
    job_id = cluster.slurm.submit(script(name(ordinal), body, *options))
    return (_published if body is REPLICA else _running)(cluster, job_id)


def _states(cluster: Cluster, job_id: int) -> list[str]:
    """The states that a job goes through until it has ended, each once."""
    seen: list[str] = []

    def ask() -> bool:
        job = _known(cluster, job_id)
        if job.state not in seen:
            seen.append(job.state)
        return job.phase is Phase.ENDED

    cluster.until(f"the end of job {job_id}", ask)
    return seen


def _in_order(states: list[str], final: str) -> bool:
    return states == [state for state in (*ORDER, final) if state in states] and final in states


def _scheduled(cluster: Cluster) -> None:
    """Return when Slurm has looked at every job that was there before: a later one was started."""
    _in_phase(cluster, cluster.slurm.submit(script(name(99), ENDS, gpus=0)), Phase.ENDED)


def _fill(cluster: Cluster, nodes: int) -> None:
    """Take all GPUs of so many nodes."""
    for at in range(nodes):
        text = script(name(50 + at), DEAF, gpus=GPUS_PER_NODE)
        _running(cluster, cluster.slurm.submit(text))


def _all_but(cluster: Cluster, node: str) -> str:
    return "exclude=" + ",".join(other for other in cluster.nodes if other != node)


# -- a job's life


def test_a_job_goes_through_its_states_in_order(cluster: Cluster) -> None:
    """PENDING, RUNNING, COMPLETING, COMPLETED: never back; then its node and times stay known."""
    job_id = cluster.slurm.submit(script(name(), ENDS))
    assert _in_order(_states(cluster, job_id), "COMPLETED")
    job = _known(cluster, job_id)
    assert (job.exit_status, job.restarts) == (0, 0)
    assert job.nodes in cluster.nodes
    assert job.started_at is not None
    assert job.ends_at is not None
    assert job.submitted_at <= job.started_at <= job.ends_at


def test_a_script_that_fails_has_its_exit_status(cluster: Cluster) -> None:
    """FAILED, with the script's own status and the node: what failures.py judges by."""
    job_id = cluster.slurm.submit(script(name(), REFUSES))
    assert _in_order(_states(cluster, job_id), "FAILED")
    job = _known(cluster, job_id)
    assert (job.exit_status, job.reason) == (2, "NonZeroExitCode")
    assert job.nodes in cluster.nodes


def test_a_running_job_says_when_its_walltime_ends(cluster: Cluster) -> None:
    """Start and end are its walltime apart."""
    job = _started(cluster)
    assert job.started_at is not None
    assert job.ends_at == job.started_at + 600


def test_a_waiting_job_has_no_node_and_no_start_in_the_past(cluster: Cluster) -> None:
    """The start of a job that waits is a guess of Slurm's, in the future, or not there."""
    _fill(cluster, 4)
    job_id = cluster.slurm.submit(script(name(), gpus=GPUS_PER_NODE))
    job = _when(cluster, job_id, "an expected start", lambda job: job.started_at is not None)
    assert (job.phase, job.nodes, job.run) == (Phase.PENDING, "", None)
    assert job.started_at is not None
    assert job.started_at > job.submitted_at
    assert job.ends_at == job.started_at + 600


def test_listing_says_what_a_job_was_submitted_with(cluster: Cluster) -> None:
    """GPUs and the nodes that it avoids, by sbatch's own words, whatever its comment says."""
    avoided = ",".join(cluster.nodes[:2])
    job_id = cluster.slurm.submit(script(name(), REPLICA, HOLD, f"exclude={avoided}", gpus=2))
    job = _known(cluster, job_id)
    assert job.gpus == 2
    assert expand(job.excluded) == tuple(cluster.nodes[:2])
    other = cluster.slurm.submit(script(name(1), REPLICA, HOLD))
    assert (_known(cluster, other).gpus, _known(cluster, other).excluded) == (1, "")


def test_of_the_waiting_only_the_first_waits_for_resources(cluster: Cluster) -> None:
    """The others wait for their turn; both go away by waiting."""
    _fill(cluster, 4)
    ids = [cluster.slurm.submit(script(name(n), ENDS, gpus=GPUS_PER_NODE)) for n in range(3)]
    _reason(cluster, ids[0], "Resources")
    for job_id in ids[1:]:
        _reason(cluster, job_id, "Priority")


def test_an_ended_job_is_listed_for_a_while_and_then_gone(cluster: Cluster) -> None:
    """MinJobAge: what ended must be read before that, and its absence then proves nothing."""
    job_id = cluster.slurm.submit(script(name(), ENDS))
    _in_phase(cluster, job_id, Phase.ENDED)
    assert _job(cluster, job_id) is not None
    cluster.until("MinJobAge", lambda: _job(cluster, job_id) is None)


def test_a_job_out_of_walltime_has_timed_out(cluster: Cluster) -> None:
    """TIMEOUT is its own state: no failure of the revision."""
    job = _started(cluster)
    cluster.end_walltime(job.id)
    assert _in_order(_states(cluster, job.id), "TIMEOUT")
    assert _known(cluster, job.id).reason == "TimeLimit"


def test_two_jobs_never_have_one_key(cluster: Cluster) -> None:
    """Ids go up, and every job has a submit time."""
    ids = [cluster.slurm.submit(script(name(n), ENDS)) for n in range(2)]
    keys = {_known(cluster, job_id).key for job_id in ids}
    assert len(keys) == 2
    assert ids == sorted(ids)
    assert all(submitted_at > 0 for _, submitted_at in keys)


# -- singleton


def test_two_submissions_of_one_name_are_never_both_running(cluster: Cluster) -> None:
    """Singleton holds a second job of one name until the first has left RUNNING."""
    text = script(name(), DEAF, SINGLETON)
    first, second = cluster.slurm.submit(text), cluster.slurm.submit(text)
    _running(cluster, first)
    assert _reason(cluster, second, "Dependency").phase is Phase.PENDING
    cluster.scancel(first)
    _in_phase(cluster, second, Phase.RUNNING)
    ended = _job(cluster, first)
    assert ended is None or ended.phase in (Phase.ENDING, Phase.ENDED)


def test_singleton_lets_go_while_the_first_is_completing(cluster: Cluster) -> None:
    """So two processes of one name can overlap: routes and ports go by the job, not its name."""
    text = script(name(), STUBBORN, SINGLETON)
    first, second = cluster.slurm.submit(text), cluster.slurm.submit(text)
    _running(cluster, first)
    _reason(cluster, second, "Dependency")
    cluster.scancel(first)

    def both() -> bool:
        phases = {job.id: job.phase for job in cluster.slurm.jobs(FLEET).jobs}
        return (phases[first], phases[second]) == (Phase.ENDING, Phase.RUNNING)

    cluster.until("both at once", both)


def test_singleton_waits_for_an_earlier_job_that_waits_itself(cluster: Cluster) -> None:
    """The first submitted goes first, however long it is held."""
    first = cluster.slurm.submit(script(name(), DEAF, SINGLETON, HOLD))
    second = cluster.slurm.submit(script(name(), DEAF, SINGLETON))
    _scheduled(cluster)
    assert _known(cluster, second).reason == "Dependency"
    cluster.release(first)
    _running(cluster, first)
    assert _known(cluster, second).reason == "Dependency"


def test_without_singleton_two_of_one_name_run(cluster: Cluster) -> None:
    """It is singleton alone that holds the second one."""
    ids = [cluster.slurm.submit(script(name(), DEAF)) for _ in range(2)]
    for job_id in ids:
        _running(cluster, job_id)
    assert {job.phase for job in _live(cluster).values()} == {Phase.RUNNING}


def test_another_users_job_of_the_name_holds_nothing(cluster: Cluster) -> None:
    """Singleton goes by name and user."""
    cluster.submit_as_other(script(name(), DEAF, SINGLETON))
    _running(cluster, cluster.slurm.submit(script(name(), DEAF, SINGLETON)))


# -- a requeue


def test_a_requeued_job_has_its_id_and_another_key(cluster: Cluster) -> None:
    """New submit time, one more restart, no node; the old comment stays, its address is void."""
    before = _started(cluster)
    # Slurm's times are whole seconds.
    cluster.until("the next second", lambda: cluster.now() >= before.submitted_at + 1)
    assert cluster.requeue(before.id)
    after = _when(cluster, before.id, "waiting", lambda job: job.state == "PENDING")
    assert after.submitted_at > before.submitted_at
    assert (after.restarts, after.nodes, after.run) == (1, "", None)
    assert after.comment == before.comment
    _reason(cluster, before.id, "BeginTime")


def test_a_job_that_forbids_it_is_not_requeued(cluster: Cluster) -> None:
    """--no-requeue: nobody can requeue a replica by hand; it runs on under its key."""
    before = _started(cluster, REPLICA, NO_REQUEUE)
    assert not cluster.requeue(before.id)
    assert _known(cluster, before.id) == before


def test_singleton_still_waits_for_a_requeued_predecessor(cluster: Cluster) -> None:
    """It came first, so it goes first again."""
    text = script(name(), DEAF, SINGLETON)
    first, second = cluster.slurm.submit(text), cluster.slurm.submit(text)
    _running(cluster, first)
    assert cluster.requeue(first)
    _reason(cluster, first, "BeginTime")
    _scheduled(cluster)
    assert _known(cluster, second).reason == "Dependency"


# -- cancel and drain


def test_a_cancelled_waiting_job_is_over_at_once(cluster: Cluster) -> None:
    """CANCELLED, and it never had a node."""
    job_id = cluster.slurm.submit(script(name(), DEAF, HOLD))
    cluster.slurm.cancel(_ref(_known(cluster, job_id)), pending=True)
    job = _known(cluster, job_id)
    assert (job.state, job.nodes) == ("CANCELLED", "")


def test_a_cancelled_running_job_is_completing_first(cluster: Cluster) -> None:
    """RUNNING, COMPLETING, CANCELLED; it keeps the name of its node."""
    before = _started(cluster)
    cluster.slurm.cancel(_ref(before), pending=False)
    states = ["RUNNING", *_states(cluster, before.id)]
    assert _in_order(list(dict.fromkeys(states)), "CANCELLED")
    assert _known(cluster, before.id).nodes == before.nodes


def test_a_job_that_ignores_term_holds_its_gpus_until_kill_wait(cluster: Cluster) -> None:
    """ENDING still counts against the budget: who needs the GPUs waits for them."""
    _fill(cluster, 3)
    last = cluster.slurm.submit(script(name(), STUBBORN, gpus=GPUS_PER_NODE))
    _running(cluster, last)
    waiting = cluster.slurm.submit(script(name(1), DEAF, gpus=GPUS_PER_NODE))
    _reason(cluster, waiting, "Resources")
    cluster.scancel(last)
    job = _in_phase(cluster, last, Phase.ENDING)
    assert job.nodes in cluster.nodes
    assert _known(cluster, waiting).phase is Phase.PENDING
    _running(cluster, waiting)
    assert _known(cluster, last).state == "CANCELLED"


def test_a_cancel_of_another_name_touches_nothing(cluster: Cluster) -> None:
    """Slurm itself checks the name: an id that means another job by now is left alone."""
    job = _started(cluster)
    cluster.slurm.cancel(replace(_ref(job), name=name(5)), pending=False)
    assert _known(cluster, job.id) == job


def test_a_cancel_of_a_waiting_job_spares_one_that_runs(cluster: Cluster) -> None:
    """It started between the look and the cancel: it may have requests by now."""
    job = _started(cluster)
    cluster.slurm.cancel(_ref(job), pending=True)
    assert _known(cluster, job.id) == job


def test_to_end_what_is_over_or_unknown_is_silent(cluster: Cluster) -> None:
    """It was to be over, and it is: no error, whether Slurm still lists it or not."""
    job = _started(cluster, STUBBORN)
    cluster.scancel(job.id)
    _in_phase(cluster, job.id, Phase.ENDING)
    refs = [_ref(job), replace(_ref(job), id=999_999)]
    for _ in range(2):
        for ref in refs:
            cluster.slurm.cancel(ref, pending=False)
            cluster.slurm.cancel(ref, pending=True)
            cluster.slurm.drain(ref)
        _in_phase(cluster, job.id, Phase.ENDED)


def test_a_cancel_never_reaches_another_user(cluster: Cluster) -> None:
    """Not even by the right id and name."""
    job_id = cluster.submit_as_other(script(name(), DEAF, gpus=4))
    _fill(cluster, 3)
    ref = JobRef(id=job_id, submitted_at=1, name=name())
    cluster.slurm.cancel(ref, pending=False)
    waiting = cluster.slurm.submit(script(name(1), DEAF, gpus=4))
    _reason(cluster, waiting, "Resources")  # its GPUs are still taken


def test_a_drain_lets_a_replica_publish_and_end(cluster: Cluster) -> None:
    """USR1: the script says that it drains, and ends by itself."""
    job = _started(cluster)
    cluster.slurm.drain(_ref(job))
    ended = _in_phase(cluster, job.id, Phase.ENDED)
    assert ended.comment is not None
    assert ended.comment.run is not None
    assert ended.comment.run.draining
    assert ended.state != "CANCELLED"


def test_a_drain_before_the_trap_ends_the_job(cluster: Cluster) -> None:
    """So USR1 must wait for `trap_ready`. Before the script runs, it may be lost as well."""
    job = _started(cluster, DEAF)

    def drained() -> bool:
        cluster.slurm.drain(_ref(job))
        return _known(cluster, job.id).phase is Phase.ENDED

    cluster.until("the end of the drained job", drained)
    ended = _known(cluster, job.id)
    assert ended.state == "FAILED"
    assert ended.reason.startswith("RaisedSignal")


def test_a_drain_touches_no_waiting_job_and_no_other_name(cluster: Cluster) -> None:
    """It is for RUNNING alone, by id, name and user."""
    running = _started(cluster, DEAF)
    waiting = cluster.slurm.submit(script(name(1), DEAF, HOLD))
    held = _reason(cluster, waiting, "JobHeldUser")
    cluster.slurm.drain(_ref(held))
    cluster.slurm.drain(replace(_ref(running), name=name(5)))
    _scheduled(cluster)
    assert _known(cluster, waiting) == held
    assert _known(cluster, running.id) == running


# -- comments


def test_a_job_publishes_its_address_in_its_own_comment(cluster: Cluster) -> None:
    """One listing gives identity, state and address."""
    job = _started(cluster)
    assert job.run is not None
    assert (job.run.node, job.run.trap_ready, job.run.draining) == (job.nodes, True, False)


def test_a_vandalised_comment_spoils_one_job_only(cluster: Cluster) -> None:
    """Its owner may write anything, newlines and our own format included."""
    jobs = [_started(cluster, DEAF, ordinal=n) for n in range(2)]
    vandal = 'x|y\n7|fleet|RUNNING|1|1|1|gpu1|None|0|contract.tiny.0123abcd.9|{"v":1}\n'
    assert cluster.comment(jobs[0].id, vandal)
    assert _live(cluster) == {jobs[0].id: replace(jobs[0], comment=None), jobs[1].id: jobs[1]}


def test_a_comment_over_1024_bytes_is_refused(cluster: Cluster) -> None:
    """At submission and later; the old one stays."""
    with pytest.raises(SubmitRejected, match="too long"):
        cluster.slurm.submit(script(name(), comment=COMMENT.ljust(1025)))
    job_id = cluster.slurm.submit(script(name(), DEAF, comment=COMMENT.ljust(1024)))
    assert set(_live(cluster)) == {job_id}
    job = _running(cluster, job_id)
    assert not cluster.comment(job_id, "x" * 1025)
    assert _known(cluster, job_id) == job


def test_the_comment_of_a_job_that_ends_is_final(cluster: Cluster) -> None:
    """Once COMPLETING it can't be changed: what it last said stands."""
    job = _started(cluster, STUBBORN)
    cluster.scancel(job.id)
    _in_phase(cluster, job.id, Phase.ENDING)
    assert not cluster.comment(job.id, "late")
    assert _known(cluster, job.id).comment == job.comment


# -- submissions that are refused, or wait for ever


@pytest.mark.parametrize("option", ["partition=nowhere", "exclude=nowhere"])
def test_what_slurm_does_not_know_is_refused(cluster: Cluster, option: str) -> None:
    """No job exists after it, and one line says why."""
    with pytest.raises(SubmitRejected, match=r"[Ii]nvalid"):
        cluster.slurm.submit(script(name(), DEAF, option))
    assert _live(cluster) == {}


def test_more_gpus_than_any_node_has_are_refused_and_leave_a_failed_job(cluster: Cluster) -> None:
    """sbatch says no, and yet a job is listed: FAILED, on no node, for BadConstraints."""
    replica = name(model="greedy")
    with pytest.raises(SubmitRejected, match="not available"):
        cluster.slurm.submit(script(replica, gpus=GPUS_PER_NODE + 1))
    (job,) = [job for job in cluster.slurm.jobs(FLEET).jobs if job.name == replica]
    assert (job.state, job.reason, job.nodes, job.exit_status) == (
        *("FAILED", "BadConstraints", ""),
        0,
    )


def test_to_exclude_every_node_is_refused(cluster: Cluster) -> None:
    """A quarantine of all nodes would not wait: it would be refused again and again."""
    with pytest.raises(SubmitRejected, match="not available"):
        cluster.slurm.submit(script(name(), DEAF, f"exclude={','.join(cluster.nodes)}"))
    assert _live(cluster) == {}


def test_a_walltime_over_the_partitions_limit_waits_for_ever(cluster: Cluster) -> None:
    """It is accepted, and only its reason tells."""
    job_id = cluster.slurm.submit(script(name(), DEAF, "partition=debug", walltime="1:00:00"))
    _reason(cluster, job_id, "PartitionTimeLimit")
    _scheduled(cluster)
    assert _known(cluster, job_id).phase is Phase.PENDING


def test_a_held_job_waits_until_it_is_released(cluster: Cluster) -> None:
    """JobHeldUser is the owner's own doing."""
    job_id = cluster.slurm.submit(script(name(), DEAF, HOLD))
    _reason(cluster, job_id, "JobHeldUser")
    _scheduled(cluster)
    assert _known(cluster, job_id).phase is Phase.PENDING
    cluster.release(job_id)
    _running(cluster, job_id)


# -- nodes


def test_a_nodes_word_says_whether_it_has_jobs(cluster: Cluster) -> None:
    """idle, mixed, and idle again: none of them begins as a drained or a dead one's does."""
    assert dict(cluster.slurm.nodes()) == dict.fromkeys(cluster.nodes, "idle")
    job = _started(cluster)
    cluster.until("mixed", lambda: cluster.slurm.nodes()[job.nodes] == "mixed")
    cluster.scancel(job.id)
    cluster.until("idle", lambda: cluster.slurm.nodes()[job.nodes] == "idle")


def test_an_excluded_node_gets_no_job(cluster: Cluster) -> None:
    """All but one are excluded: every job is there."""
    node = cluster.nodes[2]
    jobs = [_started(cluster, DEAF, _all_but(cluster, node), ordinal=n) for n in range(3)]
    assert {job.nodes for job in jobs} == {node}


def test_a_drained_node_lets_its_job_go_on_and_starts_none(cluster: Cluster) -> None:
    """draining, then drained: both words begin alike; who needs the node waits for it."""
    job = _started(cluster)
    cluster.drain_node(job.nodes)
    assert cluster.slurm.nodes()[job.nodes] == "draining"
    waiting = cluster.slurm.submit(script(name(1), DEAF, _all_but(cluster, job.nodes)))
    _reason(cluster, waiting, "ReqNodeNotAvail")
    assert _known(cluster, job.id) == job
    cluster.scancel(job.id)
    cluster.until("drained", lambda: cluster.slurm.nodes()[job.nodes] == "drained")
    cluster.resume_node(job.nodes)
    assert _running(cluster, waiting).nodes == job.nodes


def test_jobs_of_a_node_that_is_called_down_are_lost_at_once(cluster: Cluster) -> None:
    """NODE_FAIL with its node; one that may be requeued waits under its id."""
    node = cluster.nodes[0]
    lost = _started(cluster, DEAF, NO_REQUEUE, _all_but(cluster, node))
    back = _started(cluster, DEAF, _all_but(cluster, node), ordinal=1)
    cluster.until("the next second", lambda: cluster.now() >= back.submitted_at + 1)
    cluster.down_node(node)
    job = _in_phase(cluster, lost.id, Phase.ENDED)
    assert (job.state, job.nodes) == ("NODE_FAIL", node)
    again = _known(cluster, back.id)
    assert (again.phase, again.restarts, again.nodes) == (Phase.PENDING, 1, "")
    assert again.submitted_at > back.submitted_at


def test_a_node_without_power_keeps_its_jobs_until_slurm_notices(cluster: Cluster) -> None:
    """RUNNING as before; what is cancelled stays COMPLETING; then down*, and all of it is over.

    A job that was started there meanwhile is requeued, although it forbids that.
    """
    node = cluster.nodes[0]
    only_there = (NO_REQUEUE, _all_but(cluster, node))
    lost = _started(cluster, DEAF, *only_there)
    cancelled = _started(cluster, DEAF, *only_there, ordinal=1)
    cluster.cut_power(node)
    late = cluster.slurm.submit(script(name(2), DEAF, *only_there))
    _in_phase(cluster, late, Phase.RUNNING)
    cluster.scancel(cancelled.id)
    assert _known(cluster, lost.id) == lost
    assert _known(cluster, cancelled.id).phase is Phase.ENDING
    _when(cluster, late, "to come back", lambda job: job.restarts == 1)
    cluster.until("down", lambda: cluster.slurm.nodes()[node] == "down*")
    job = _in_phase(cluster, lost.id, Phase.ENDED)
    assert (job.state, job.nodes) == ("NODE_FAIL", node)
    assert _in_phase(cluster, cancelled.id, Phase.ENDED).state == "CANCELLED"
    again = _in_phase(cluster, late, Phase.PENDING)
    assert (again.restarts, again.nodes) == (1, "")
    cluster.restore_power(node)
    cluster.until("idle", lambda: cluster.slurm.nodes()[node] == "idle")


def test_a_job_that_just_began_outlives_its_nodes_power(cluster: Cluster) -> None:
    """The node is back before Slurm misses it: the job is called RUNNING, and nothing runs."""
    job = _started(cluster, DEAF)
    cluster.cut_power(job.nodes)
    cluster.restore_power(job.nodes)
    _scheduled(cluster)
    assert _known(cluster, job.id) == job
    cluster.slurm.drain(_ref(job))
    assert _known(cluster, job.id) == job
    cluster.slurm.cancel(_ref(job), pending=False)
    assert _in_phase(cluster, job.id, Phase.ENDED).state == "CANCELLED"


# -- the controller


def test_without_its_controller_nothing_is_known_of_slurm(cluster: Cluster) -> None:
    """R01: each call raises, none answers `no jobs`; a submission may have happened."""
    job = _started(cluster)
    before = set(_live(cluster))
    cluster.stop_controller()
    slurm = cluster.slurm
    errors = cluster.at_once(
        lambda: _error(lambda: slurm.jobs(FLEET)),
        lambda: _error(slurm.nodes),
        lambda: _error(lambda: slurm.drain(_ref(job))),
        lambda: _error(lambda: slurm.cancel(_ref(job), pending=False)),
        lambda: _error(lambda: slurm.submit(script(name(1)))),
    )
    cluster.start_controller()
    assert errors == [SlurmUnavailable] * 4 + [SubmitUnknown]
    assert _known(cluster, job.id) == job
    assert set(_live(cluster)) == before


def _error(call: Callable[[], object]) -> type[Exception] | None:
    try:
        call()
    except (SlurmUnavailable, SubmitUnknown) as error:
        return type(error)
    return None


@pytest.mark.parametrize(
    ("fault", "arrives"),
    [("submit_lost_now", True), ("submit_lost_late", True), ("submit_lost_never", False)],
)
def test_R04_submission_without_an_answer_is_unknown(
    cluster: Cluster, fault: str, arrives: bool
) -> None:
    """The job may exist at once, a moment later, or never: the next look shows it."""
    with pytest.raises(SubmitUnknown):
        cluster.failing(fault).submit(script(name(), DEAF))
    if arrives:
        cluster.until("the job", lambda: len(_live(cluster)) == 1)
    else:
        _scheduled(cluster)
        assert _live(cluster) == {}


@pytest.mark.parametrize("fault", ["listing_fails", "listing_partial"])
def test_R01_listing_that_fails_or_is_cut_short_is_unavailable(
    cluster: Cluster, fault: str
) -> None:
    """Never a shorter list."""
    _started(cluster, DEAF)
    with pytest.raises(SlurmUnavailable):
        cluster.failing(fault).jobs(FLEET)


def test_a_record_that_can_not_be_read_is_a_job_all_the_same(cluster: Cluster) -> None:
    """It is there, so nothing may take its place; it is told apart, and never touched."""
    _started(cluster, DEAF)
    listing = cluster.failing("listing_garbled").jobs(FLEET)
    assert listing.odd_lines == 1
    (odd,) = [job for job in listing.jobs if job.phase is not Phase.ENDED]
    assert (odd.state, odd.comment, odd.name) == (UNREADABLE, None, name())


def test_a_cancel_whose_answer_is_lost_has_happened(cluster: Cluster) -> None:
    """It raises, and yet: so the next cycle looks again."""
    job = _started(cluster)
    slurm: Slurm = cluster.failing("cancel_lost")
    with pytest.raises(SlurmUnavailable):
        slurm.cancel(_ref(job), pending=False)
    assert _in_phase(cluster, job.id, Phase.ENDED).state == "CANCELLED"


def test_a_drain_without_an_answer_raises(cluster: Cluster) -> None:
    """One error, and the job runs on."""
    job = _started(cluster)
    slurm = cluster.failing("drain_fails")
    with pytest.raises(SlurmUnavailable):
        slurm.drain(_ref(job))
    assert _known(cluster, job.id) == job


def test_nodes_without_an_answer_are_unavailable(cluster: Cluster) -> None:
    """Never an empty cluster."""
    with pytest.raises(SlurmUnavailable):
        cluster.failing("nodes_fail").nodes()


# -- foreign jobs


def test_R27_foreign_jobs_are_not_listed_whatever_their_names(cluster: Cluster) -> None:
    """Another user's job of our name, another fleet's, and one whose name only looks like ours."""
    cluster.submit_as_other(script(name(), DEAF))
    cluster.slurm.submit(script("another.tiny.0123abcd.0", DEAF))
    cluster.slurm.submit(script("contract.tiny.run7", DEAF))
    ours = cluster.slurm.submit(script(name(), DEAF))
    _running(cluster, ours)
    assert set(_live(cluster)) == {ours}
