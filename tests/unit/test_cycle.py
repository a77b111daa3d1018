"""A cycle ends well whatever the disk of its state does."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from reconciler.adapters.ports import ImagePin
from reconciler.batch import batch_script
from reconciler.cycle import cycle
from reconciler.observe import World
from reconciler.plan import NoteKind, Reason, Submit
from reconciler.state import Failures, Health, Memory, Probe, Recipe
from tests.unit.build import AT, DIGEST, fleet, job, model_record, revision
from tests.unit.test_execute import FakeJournal, FakeWorld


def world(fake: FakeWorld) -> World:
    """The fake's world with one image and no replica that could be asked."""
    pins = {"engine": ImagePin(program="/opt/engine", digest=DIGEST)}
    engines: Any = SimpleNamespace(probe=lambda *_: {})
    images: Any = SimpleNamespace(pins=lambda _: (pins, {}))
    return replace(fake.world(), engines=engines, images=images)


def test_R32_full_disk_is_reported_and_the_fleet_is_healed() -> None:
    """Memory and journal are one line each; the missing replicas are submitted."""
    fake = FakeWorld(journal=FakeJournal(full=0))
    outcome = cycle(fleet(), world(fake), at=1_000_000.0, commit=None, say=lambda _: None)
    assert [what.split()[0] for what in fake.done] == ["list", "submit", "submit"]
    assert outcome.errors == (
        "memory: state.sqlite can't be written: disk is full",
        "journal: state.sqlite can't be written: disk is full",
    )


def test_what_a_cycle_leaves_over_is_a_note_of_its_plan() -> None:
    """`apply` shows it, in text and in JSON, beside what is held back."""
    fake = FakeWorld()
    outcome = cycle(
        fleet(), world(fake), at=AT, commit=None, say=lambda _: None, told_to_end=lambda: True
    )
    [note] = [note for note in outcome.plan.notes if note.kind is NoteKind.LEFT_OVER]
    assert note.text == "2 of 2 actions left for the next cycle: told to end"
    assert outcome.errors == (note.text,)


def test_memory_is_saved_before_anything_is_done() -> None:
    """A crash in the first effect must not lose what the cycle has learnt."""
    fake = FakeWorld()
    cycle(fleet(), world(fake), at=1_000_000.0, commit=None, say=lambda _: None)
    assert fake.journal.rows[:2] == [
        "memory saved, 1 done",
        "submit intended at 1000000, 1 done",
    ]


def test_recipe_that_memory_lost_is_found_in_the_script_of_a_serving_replica() -> None:
    """The spec has moved on; what serves is known to Slurm, and asked for once."""
    before = fleet(model_record(replicas=1, args={"seed": 1}))
    after = fleet(model_record(replicas=1, args={"seed": 2}), budget={"gpus": 1})
    recipe = Recipe.of(before, before.models[0], digest=DIGEST, program="/opt/engine", commit=None)
    old = job(recipe.revision, id=7)
    submit = Submit(name=old.name, gpus=1, reason=Reason.MISSING)
    fake = FakeWorld(live=[old], scripts={7: batch_script(recipe, submit)})
    saved: list[Memory] = []
    store: Any = SimpleNamespace(
        load=Memory, save=saved.append, log_positions=dict, usage=lambda *_: (None, None, {})
    )
    probes = {old.key: Probe(health=Health.READY, ongoing=1)}
    engines: Any = SimpleNamespace(probe=lambda *_: probes)
    cycle(
        after,
        replace(world(fake), store=store, engines=engines),
        at=AT,
        commit=None,
        say=lambda _: None,
    )
    assert [memory.kept for memory in saved] == [{"tiny": recipe}]


def test_what_was_kept_is_submitted_where_the_spec_says_now() -> None:
    """A partition that was wrong then would be so for ever."""
    before = fleet(model_record(replicas=1, args={"seed": 1}, slurm={"partition": "wrong"}))
    after = fleet(model_record(replicas=1, args={"seed": 2}))
    kept = Recipe.of(before, before.models[0], digest=DIGEST, program="/opt/engine", commit=None)
    bad = Failures(count=5, last_at=AT, counted=frozenset())
    memory = Memory(kept={"tiny": kept}, failures={f"tiny.{revision(after)}": bad})
    fake = FakeWorld(journal=FakeJournal(memory=memory))
    cycle(after, world(fake), at=AT, commit=None, say=lambda _: None)
    [script] = fake.submitted
    assert f"--job-name=demo.tiny.{kept.revision}.0" in script
    assert "#SBATCH --partition=gpu\n" in script


@pytest.mark.parametrize("hours", [1, 24 * 365])
def test_R31_clock_further_than_a_walltime_ends_no_job_and_submits_none(hours: int) -> None:
    """What Slurm says runs has not ended: by such a clock nothing is judged, and a note says so."""
    wanted = fleet()
    live = [job(revision(wanted), id=n, ordinal=n, ends_at=1_000_600) for n in (1, 2)]
    fake = FakeWorld(live=live)
    ahead = 1_000_000.0 + 3600 * hours
    outcome = cycle(wanted, world(fake), at=ahead, commit=None, say=lambda _: None)
    assert (outcome.plan.actions, outcome.plan.observed) == ((), False)
    assert "this host's clock is ahead of Slurm's" in outcome.plan.notes[0].text
    assert "nothing is submitted or cancelled" in outcome.plan.notes[0].text


def test_job_that_slurm_is_about_to_end_spoils_no_look() -> None:
    """Slurm takes a while to notice a walltime; an ended, pending or endless job says nothing."""
    wanted = fleet()
    states = {"RUNNING": 999_800, "COMPLETING": 990_000, "COMPLETED": 1, "SUSPENDED": 990_000}
    live = [
        job(revision(wanted), id=n, ordinal=n, state=state, ends_at=ends_at)
        for n, (state, ends_at) in enumerate([*states.items(), ("RUNNING", None)], start=1)
    ]
    fake = FakeWorld(live=live)
    outcome = cycle(wanted, world(fake), at=1_000_000.0, commit=None, say=lambda _: None)
    assert outcome.plan.observed


def test_job_that_may_run_over_its_walltime_spoils_no_look() -> None:
    """A site may have an OverTimeLimit: one such job among others says nothing of the clock."""
    wanted = fleet()
    over = job(revision(wanted), id=1, ordinal=0, ends_at=990_000)
    fake = FakeWorld(live=[over, job(revision(wanted), id=2, ordinal=1)])
    outcome = cycle(wanted, world(fake), at=1_000_000.0, commit=None, say=lambda _: None)
    assert outcome.plan.observed
