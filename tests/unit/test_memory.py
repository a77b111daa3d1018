"""Memory follows from what was seen; losing it restarts timers and nothing else."""

from dataclasses import replace
from typing import Any

import pytest

from reconciler.failures import learn_refusals
from reconciler.memory import CONFIRM_S, learn, remember, unconfirmed
from reconciler.plan import Submit
from reconciler.planner import plan
from reconciler.state import DrainClock, Failures, Health, Job, Memory, Observation
from tests.unit.build import AT, fleet, job, model_record, observation, revision, view

FLEET = fleet()
REV = revision(FLEET)
NOTHING = Memory()
ONE = job(REV)


def test_R10_misses_count_in_a_row_and_end_with_an_answer() -> None:
    """Failed looks add up; one good answer forgets them."""
    memory = NOTHING
    for health, count in (
        *((Health.SILENT, 1), (Health.SICK, 2), (Health.STARTING, 3), (Health.READY, 0)),
        (Health.IMPOSTOR, 1),
    ):
        memory = learn(memory, observation(ONE, healths={1: health}))
        assert memory.misses == {ONE.key: count}


def test_R10_refused_connections_of_a_loading_engine_are_no_misses() -> None:
    """However long it loads, the first odd answer afterwards is its first miss."""
    loading = job(REV, ready_at=None)
    memory = NOTHING
    for _ in range(50):
        memory = learn(memory, observation(loading, healths={1: Health.STARTING}))
    memory = learn(memory, observation(loading, healths={1: Health.SICK}))
    assert memory.misses == {loading.key: 1}


def test_refused_connections_of_a_routed_engine_are_misses() -> None:
    """A replica that answered before its job said so can die like any other."""
    loading = job(REV, ready_at=None)
    seen = observation(loading, healths={1: Health.STARTING}, gateways=[view(FLEET, loading)])
    assert learn(NOTHING, seen).misses == {loading.key: 1}


def test_misses_of_jobs_that_are_gone_are_forgotten() -> None:
    """Memory holds nothing of a job that no longer has an address."""
    memory = learn(Memory(misses={ONE.key: 3, (7, 7): 3}), observation(ONE))
    assert memory.misses == {ONE.key: 0}


def test_idle_time_begins_with_the_first_idle_look_and_ends_with_a_request() -> None:
    """Only an unbroken time without requests counts; not knowing is not idle."""
    memory = Memory(drains={ONE.key: DrainClock(since=AT)})
    for second, ongoing, idle_since in (
        *((1, 0, AT + 1), (2, 0, AT + 1), (3, 1, None), (4, 0, AT + 4), (5, None, None)),
    ):
        memory = learn(memory, observation(ONE, ongoing=ongoing, at=AT + second))
        assert memory.drains == {ONE.key: DrainClock(since=AT, idle_since=idle_since)}


def test_drain_clock_is_void_once_a_gateway_routes_to_the_replica_again() -> None:
    """Another process changed its mind and could not save it, or a gateway is back as it was."""
    memory = Memory(drains={ONE.key: DrainClock(since=AT - 500)})
    assert learn(memory, observation(ONE, gateways=[view(FLEET, ONE)])).drains == {}


def test_drain_clock_is_forgotten_when_the_replica_stays() -> None:
    """A change of mind ends the drain; the next one starts anew."""
    memory = Memory(drains={ONE.key: DrainClock(since=AT)})
    wanted = fleet(model_record(replicas=1))
    decided = plan(wanted, observation(ONE, gateways=[view(wanted, ONE)]), memory)
    assert remember(memory, decided).drains == {}


def empty(at: float, *routed: Job) -> Observation:
    return observation(at=at, gateways=[view(FLEET, *routed)])


def test_R02_suspicion_needs_a_job_that_was_known() -> None:
    """Routed, probed or draining: a job known a moment ago makes an empty queue suspicious."""
    known: list[tuple[Memory, tuple[Job, ...]]] = [
        (NOTHING, (ONE,)),
        (Memory(misses={ONE.key: 0}), ()),
        (Memory(drains={ONE.key: DrainClock(since=AT)}), ()),
    ]
    for memory, routed in known:
        assert learn(memory, empty(AT, *routed)).emptied_at == AT
    assert learn(NOTHING, empty(AT)).emptied_at is None


def test_R02_jobs_that_were_never_listed_are_known_by_their_names() -> None:
    """What is submitted is remembered before it is done, so also if the process ends in it."""
    decided = plan(FLEET, empty(AT), NOTHING)
    names = {action.name for action in decided.actions if isinstance(action, Submit)}
    memory = remember(NOTHING, decided)
    assert memory.submitted == names != set()
    gone = learn(memory, empty(AT + 1))
    assert gone.emptied_at == AT + 1
    blind = plan(FLEET, empty(AT + 1), gone)
    assert not blind.actions
    assert remember(gone, blind).submitted == names
    assert learn(memory, observation(ONE, at=AT + 1)).emptied_at is None


def test_R02_confirmed_emptiness_says_nothing_of_what_is_submitted_then() -> None:
    """It is believed once; the jobs that are submitted on that belief are missed anew."""
    known = Memory(submitted=frozenset({ONE.name}))
    believed = learn(learn(known, empty(AT)), empty(AT + CONFIRM_S))
    decided = plan(FLEET, empty(AT + CONFIRM_S), believed)
    assert any(isinstance(action, Submit) for action in decided.actions)
    later = AT + CONFIRM_S + 1
    memory = learn(remember(believed, decided), empty(later))
    assert memory.emptied_at == later
    assert not plan(FLEET, empty(later), memory).actions


def test_R02_what_slurm_refused_is_missed_by_nobody() -> None:
    """The next cycle may submit again at once, as far as its back-off lets it."""
    memory = Memory(submitted=frozenset({ONE.name}))
    assert learn(learn_refusals(memory, [ONE.name], AT), empty(AT + 1)).emptied_at is None


def test_R02_suspicious_listing_teaches_nothing_until_it_is_confirmed() -> None:
    """What is known of the jobs is kept, so that the suspicion lasts; then it is believed."""
    start = Memory(misses={ONE.key: 3}, drains={ONE.key: DrainClock(since=AT)})
    memory = learn(start, empty(AT))
    assert memory == replace(start, emptied_at=AT)
    assert learn(memory, empty(AT + CONFIRM_S - 0.1)) == memory
    believed = learn(memory, empty(AT + CONFIRM_S))
    assert believed.misses == {}
    assert not unconfirmed(believed, AT + CONFIRM_S)


def test_R02_ended_jobs_in_the_list_are_no_reason_for_suspicion() -> None:
    """A queue that names the jobs, ended, has not forgotten them."""
    seen = observation(replace(ONE, state="COMPLETED"), gateways=[view(FLEET, ONE)])
    assert learn(NOTHING, seen).emptied_at is None


def test_R31_clock_that_is_set_back_stops_no_timer() -> None:
    """A time in the future is now: each timer starts again, none waits for the old time."""
    memory = Memory(
        misses={ONE.key: 0},
        drains={ONE.key: DrainClock(since=AT, idle_since=AT)},
        failures={"m.r": Failures(count=1, last_at=AT, counted=frozenset())},
        emptied_at=AT,
    )
    back = AT - 100_000
    learnt = learn(memory, empty(back))
    assert learnt.emptied_at == back
    assert learnt.drains == {ONE.key: DrainClock(since=back, idle_since=back)}
    assert learnt.failures["m.r"].last_at == back


@pytest.mark.parametrize("jump_s", [-100_000, -90, 90, 100_000])
def test_R31_clock_that_jumps_moves_every_timer_along(jump_s: int) -> None:
    """Ten seconds later every timer is ten seconds older, whatever the clock says by then."""
    booted_at = AT - 1_000_000
    before = replace(observation(ONE, healths={1: Health.STARTING}), at=AT, booted_at=booted_at)
    memory = replace(
        learn(NOTHING, before),
        drains={ONE.key: DrainClock(since=AT - 30, idle_since=AT - 20)},
        failures={"m.r": Failures(count=1, last_at=AT - 40, counted=frozenset())},
    )
    now = AT + jump_s + 10
    after = replace(before, at=now, booted_at=booted_at + jump_s)
    learnt = learn(memory, after)
    assert learnt.drains[ONE.key].since == now - 40
    assert learnt.failures["m.r"].last_at == now - 50
    assert learn(learnt, replace(after, at=now + 5)).drains[ONE.key].since == now - 40


def test_R31_clock_that_is_kept_right_by_small_steps_costs_no_write() -> None:
    """Less than a second is no jump; what adds up to one is."""
    booted_at = AT - 1_000
    memory = learn(NOTHING, replace(observation(ONE), at=AT, booted_at=booted_at))
    assert memory.booted_at == booted_at
    steps = (0.4, 0.8, 1.2)
    looks = [replace(observation(ONE), at=AT, booted_at=booted_at + step) for step in steps]
    assert [learn(memory, look).booted_at for look in looks] == [booted_at] * 2 + [booted_at + 1.2]


@pytest.mark.parametrize("changes", [{"jobs": None}, {"jobs": None, "gateways": ()}])
def test_R01_without_a_listing_nothing_is_learnt(changes: dict[str, Any]) -> None:
    """A look that failed leaves the memory as it was."""
    memory = Memory(misses={ONE.key: 3}, emptied_at=1.0)
    assert learn(memory, replace(observation(), **changes)) is memory
