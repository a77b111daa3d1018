"""plan() on anything that a spec, a cluster and a memory can hold."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from hypothesis import given, settings
from hypothesis import strategies as st

from reconciler.memory import learn, remember
from reconciler.plan import (
    Action,
    Cancel,
    Drain,
    NoteKind,
    Plan,
    Reason,
    Route,
    Status,
    Submit,
    from_json,
    to_json,
)
from reconciler.render import plan_text, status_text
from reconciler.state import PHASES, Health, Phase
from tests.property.worlds import GONE, UNKNOWN_STATES, World, is_known, unseen, worlds

SETTINGS = settings.get_profile("property")
K = TypeVar("K")
V = TypeVar("V")


def ends(decided: Plan) -> list[Drain | Cancel]:
    return [action for action in decided.actions if isinstance(action, Drain | Cancel)]


def submits(decided: Plan) -> list[Submit]:
    return [action for action in decided.actions if isinstance(action, Submit)]


def changes(decided: Plan) -> list[Route]:
    return [action for action in decided.actions if isinstance(action, Route)]


def backwards(mapping: Mapping[K, V]) -> dict[K, V]:
    """The same mapping, made in the other order."""
    return dict(reversed(list(mapping.items())))


@SETTINGS
@given(worlds(), st.randoms(use_true_random=False))
def test_same_input_gives_the_same_plan_in_any_order(world: World, random: Any) -> None:
    """Neither the order of Slurm's lines nor that of any mapping changes a byte."""
    text = to_json(world.plan())
    assert to_json(world.plan()) == text
    seen, memory = world.observation, world.memory
    jobs = list(seen.jobs or ())
    random.shuffle(jobs)
    shuffled = replace(seen, jobs=tuple(jobs), probes=backwards(seen.probes))
    other = replace(
        memory,
        misses=backwards(memory.misses),
        drains=backwards(memory.drains),
        failures=backwards(memory.failures),
    )
    assert to_json(replace(world, observation=shuffled, memory=other).plan()) == text


@SETTINGS
@given(worlds())
def test_plan_never_goes_over_the_budget(world: World) -> None:
    """What is held and what is submitted fit, or what is held alone is already too much."""
    decided = world.plan()
    total = decided.gpus_held + sum(action.gpus for action in submits(decided))
    assert total <= max(decided.gpus_held, decided.gpus_budget)
    for action in submits(decided):
        model = world.fleet.model(action.name.model)
        assert model is not None
        assert action.gpus == model.resources.gpus_total


@SETTINGS
@given(worlds())
def test_plan_ends_only_jobs_that_it_understands(world: World) -> None:
    """Each job that is drained or cancelled is listed, live, of a known state, named once."""
    decided = world.plan()
    named = ends(decided)
    assert len({action.job.key for action in named}) == len(named)
    for action in named:
        job = world.jobs[action.job.key]
        assert job.name == action.job.name
        assert is_known(job)
        assert job.comment is not None or job.phase is Phase.PENDING
        if isinstance(action, Drain):
            assert job.phase is Phase.RUNNING
        else:
            assert action.pending == (job.phase is Phase.PENDING)


@SETTINGS
@given(worlds(), st.sampled_from(("demo2", "dem", "other")))
def test_R27_foreign_job_is_nothing_to_a_plan(world: World, fleet: str) -> None:
    """Should a job of another fleet ever get this far, the plan is as if it were not there."""
    jobs = world.observation.jobs or ()
    foreign = tuple(
        replace(job, id=job.id + 50, name=replace(job.name, fleet=fleet)) for job in jobs
    )
    seen = replace(world.observation, jobs=jobs + foreign)
    assert replace(world, observation=seen).plan() == world.plan()


@SETTINGS
@given(worlds())
def test_drain_is_never_planned_while_a_gateway_may_route(world: World) -> None:
    """USR1 goes to a job only if every gateway has said that it does not route to it."""
    views = world.observation.gateways
    for action in world.plan().actions:
        if isinstance(action, Drain):
            assert not any(view.error for view in views)
            assert not any(t.key == action.job.key for view in views for t in view.targets)
            run = world.jobs[action.job.key].run
            assert run is not None
            assert (run.trap_ready, run.draining) == (True, False)


@SETTINGS
@given(worlds())
def test_cancel_never_hits_a_replica_that_answers_and_may_be_routed(world: World) -> None:
    """Past its drain timeout or not: while requests can come it is not ended."""
    decided = world.plan()
    views = world.observation.gateways
    for action in ends(decided):
        probe = world.observation.probes.get(action.job.key)
        routed = any(t.key == action.job.key for view in views for t in view.targets)
        blind = any(view.error for view in views)
        if probe is not None and probe.health is Health.READY and (routed or blind):
            progress = world.memory.progress.get(action.job.key)
            draining = (run := world.jobs[action.job.key].run) is not None and run.draining
            assert progress is not None or draining or world.jobs[action.job.key].comment is None


@SETTINGS
@given(worlds())
def test_R01_plan_without_a_listing_is_empty(world: World) -> None:
    """Unknown is never absent, whatever else was seen or is remembered."""
    blind = unseen(world)
    decided = blind.plan()
    assert (decided.actions, decided.leaving, decided.observed) == ((), (), False)
    assert learn(world.memory, blind.observation) == world.memory
    assert remember(world.memory, decided) == world.memory


@SETTINGS
@given(worlds())
def test_plan_as_json_comes_back_equal(world: World) -> None:
    """What was reviewed can be compared with what is planned; and people can read it."""
    decided = world.plan()
    assert from_json(to_json(decided)) == decided
    record = decided_record(decided)
    for text in (plan_text(record), status_text(record)):
        assert text.isascii() or text.replace("\n", "").isprintable()
        assert all(line == line.rstrip() for line in text.splitlines())


def decided_record(decided: Plan) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(to_json(decided))
    return record


@SETTINGS
@given(worlds())
def test_plan_never_submits_more_than_wanted_and_surge(world: World) -> None:
    """With those that stay there are at most as many as wanted plus surge; rollover apart."""
    decided = world.plan()
    surge = world.fleet.defaults.rollout.max_surge
    gone = (Status.LEAVING, Status.DRAINING, Status.ENDING)
    stays = Counter(
        view.name.model for view in decided.replicas if view.status not in gone and view.current
    )
    more = Counter(
        action.name.model for action in submits(decided) if action.reason is not Reason.EXPIRING
    )
    for model in world.fleet.models:
        expiring = sum(
            1 for note in decided.notes if is_expiring(note.kind, note.subject, model.name)
        )
        assert more[model.name] <= model.replicas
        if more[model.name]:
            total = stays[model.name] - expiring + more[model.name]
            assert total <= model.replicas + surge


def is_expiring(kind: NoteKind, subject: str, model: str) -> bool:
    return kind is NoteKind.EXPIRING and subject.split(".")[1] == model


@SETTINGS
@given(worlds())
def test_names_of_submissions_are_held_by_no_live_job(world: World) -> None:
    """No name twice, none of a job that may still run, and no ordinal of one of its model."""
    decided = world.plan()
    names = [action.name for action in submits(decided)]
    assert len(set(names)) == len(names)
    live = [job for job in world.observation.jobs or () if job.phase is not Phase.ENDED]
    taken = {(job.name.model, job.name.ordinal) for job in live}
    assert not taken & {(name.model, name.ordinal) for name in names}


@SETTINGS
@given(worlds())
def test_replica_is_routed_only_after_it_answered(world: World) -> None:
    """A target answers now, or it is where a gateway already sends requests."""
    views = world.observation.gateways
    routed = {(t.key, t.address) for view in views for t in view.targets}
    ids = {t.job_id for view in views for t in view.targets}
    for change in changes(world.plan()):
        for target in change.targets:
            job = next(job for job in world.jobs.values() if job.id == target.job_id)
            probe = world.observation.probes.get(job.key)
            answers = probe is not None and probe.health is Health.READY
            known = (target.key, target.address) in routed or target.job_id in ids
            assert answers or known
            assert probe is None or probe.health is not Health.IMPOSTOR
            assert job.run is None or not job.run.draining


@SETTINGS
@given(worlds())
def test_R33_gone_model_that_serves_is_ended_only_by_name(world: World) -> None:
    """Ready or routed, without permission nothing of it leaves, unless its drain has begun."""
    guarded = replace(world, allow_destroy=frozenset())
    views = world.observation.gateways
    routed = {t.key for view in views for t in view.targets}
    for action in ends(guarded.plan()):
        job = world.jobs[action.job.key]
        begun = job.key in world.memory.drains or (job.run is not None and job.run.draining)
        if job.name.model == GONE and not begun:
            assert job.key not in routed
            assert job.comment is None or not job.comment.protect


@SETTINGS
@given(worlds())
def test_suspended_model_gets_no_action_but_routes(world: World) -> None:
    """Nothing is submitted, drained or cancelled for it."""
    alone = {model.name for model in world.fleet.models if model.suspend}
    decided = world.plan()
    assert not alone & {action.name.model for action in submits(decided)}
    assert not alone & {action.job.name.model for action in ends(decided)}


@SETTINGS
@given(worlds())
def test_every_leaving_replica_has_a_step_or_a_note(world: World) -> None:
    """Nothing waits in silence."""
    decided = world.plan()
    stepped = {action.job.key for action in ends(decided)}
    waiting = {note.subject for note in decided.notes if note.kind is NoteKind.DRAINING}
    for view in decided.replicas:
        if view.status in (Status.LEAVING, Status.DRAINING) and not is_alone(
            view.name.model, world
        ):
            assert (view.job_id, view.since) in stepped or str(view.name) in waiting


@SETTINGS
@given(worlds())
def test_every_replica_that_is_not_ready_is_spoken_of(world: World) -> None:
    """Whoever reads the plan learns why a replica does not serve, or that its job ends."""
    decided = world.plan()
    subjects = {note.subject for note in decided.notes}
    subjects |= {str(action.job.name) for action in ends(decided)}
    for view in decided.replicas:
        fine = view.status in (Status.READY, Status.ENDING)
        assert fine or str(view.name) in subjects or is_alone(view.name.model, world)


@SETTINGS
@given(worlds(), st.randoms(use_true_random=False))
def test_what_is_learnt_does_not_depend_on_the_order_of_jobs(world: World, random: Any) -> None:
    """A failed job counts whether Slurm lists it before or after one that is ready."""
    jobs = list(world.observation.jobs or ())
    random.shuffle(jobs)
    shuffled = replace(world.observation, jobs=tuple(jobs))
    learnt, again = learn(world.memory, world.observation), learn(world.memory, shuffled)
    assert replace(again, leads={}) == replace(learnt, leads={})
    assert {model: sorted(of) for model, of in again.leads.items()} == {
        model: sorted(of) for model, of in learnt.leads.items()
    }


def is_alone(model: str, world: World) -> bool:
    """Whether nothing is decided for a model: it is suspended, or its image can't be read."""
    found = world.fleet.model(model)
    return found is not None and (
        found.suspend or found.image not in world.observation.image_digests
    )


@SETTINGS
@given(worlds())
def test_actions_stand_in_the_order_that_loses_no_capacity(world: World) -> None:
    """Submit, then route, then drain and cancel."""
    ranks = [rank(action) for action in world.plan().actions]
    assert ranks == sorted(ranks)


def rank(action: Action) -> int:
    return {"submit": 0, "route": 1, "drain": 2, "cancel": 2}[action.kind]


@SETTINGS
@given(worlds(), st.sampled_from(UNKNOWN_STATES) | st.text(max_size=12))
def test_R20_job_of_an_unknown_state_is_never_touched(world: World, state: str) -> None:
    """Every state of Slurm has one meaning; a word that has none is alive, and left alone."""
    seen = world.observation
    odd = replace(seen, jobs=tuple(replace(job, state=state) for job in seen.jobs or ()))
    decided = replace(world, observation=odd).plan()
    if state in PHASES:
        assert {job.phase for job in odd.jobs or ()} <= {PHASES[state]}
        return
    assert {job.phase for job in odd.jobs or ()} <= {Phase.UNKNOWN}
    assert ends(decided) == []


@SETTINGS
@given(worlds(), st.integers(-10_000_000, 10_000_000))
def test_R31_learning_at_any_time_keeps_no_time_after_now(world: World, shift: int) -> None:
    """However far the clock jumps, the next plan is one, and no timer lies in the future."""
    seen = replace(world.observation, at=max(0.0, world.observation.at + shift))
    memory = learn(world.memory, seen)
    assert all(clock.since <= seen.at for clock in memory.drains.values())
    assert all(one.last_at <= seen.at for one in memory.failures.values())
    assert all(one.since <= seen.at for one in memory.progress.values())
    assert memory.emptied_at is None or memory.emptied_at <= seen.at
    replace(world, observation=seen, memory=memory).plan()
