"""Which images must stay: whatever may still start one is asked, and silence is no answer."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from reconciler.adapters.ports import ImagePin
from reconciler.batch import batch_script
from reconciler.cli import main
from reconciler.errors import FleetError, SlurmUnavailable
from reconciler.in_use import images_in_use
from reconciler.observe import World
from reconciler.plan import Reason, Submit
from reconciler.state import Job, Memory, Recipe
from tests.unit.build import DIGEST, fleet, job, model_record, revision, spec_record
from tests.unit.test_execute import FakeWorld

FLEET = fleet()


def recipe(program: str, **keys: Any) -> Recipe:
    """What is made of an image that has this file."""
    of = fleet(model_record(**keys))
    return Recipe.of(of, of.models[0], digest=DIGEST, program=program, commit=None)


def script(of: Recipe, for_job: Job) -> str:
    return batch_script(of, Submit(name=for_job.name, gpus=1, reason=Reason.MISSING))


def world(
    fake: FakeWorld, *, kept: dict[str, Recipe] | None = None, errors: dict[str, str] | None = None
) -> World:
    """The fake's world with one image, and what memory holds."""
    pins = {"engine": ImagePin(program="/images/new.sif", digest=DIGEST)}
    images: Any = SimpleNamespace(pins=lambda _: ({}, errors) if errors else (pins, {}))
    store: Any = SimpleNamespace(load=lambda: Memory(kept=kept or {}))
    return replace(fake.world(), images=images, store=store)


def test_image_stays_that_the_spec_a_job_or_memory_names() -> None:
    """Jobs by what their scripts start, also those that wait or end; not one that is over."""
    old, older = recipe("/images/old.sif", args={"seed": 1}), recipe("/images/older.sif")
    live = [
        job(old.revision, id=1),
        job(old.revision, id=2, ordinal=1, state="PENDING"),
        job(old.revision, id=3, ordinal=2, state="COMPLETING"),
        job("01234567", id=4, state="COMPLETED"),
    ]
    fake = FakeWorld(live=live, scripts={1: script(old, live[0])})
    assert images_in_use(FLEET, world(fake, kept={"tiny": older})) == {
        "/images/new.sif": ("the spec as engine",),
        "/images/old.sif": ("job 1", "job 2", "job 3"),
        "/images/older.sif": ("what served tiny last",),
    }


@pytest.mark.parametrize(
    ("slurm", "errors", "said"),
    [
        ({"fail": {"list demo": SlurmUnavailable("squeue: no answer")}}, {}, "squeue: no answer"),
        ({}, {"engine": "x.json can't be used"}, "not known what is in use: x.json can't be used"),
        (
            {"live": [job(revision(FLEET), id=7)], "scripts": {7: "#!/bin/sh\n"}},
            {},
            "not known what is in use: job 7 has no script of ours",
        ),
    ],
)
def test_what_is_not_known_of_one_is_known_of_none(
    slurm: dict[str, Any], errors: dict[str, str], said: str
) -> None:
    """Whoever removes what is not named must not take silence for an answer."""
    with pytest.raises(FleetError, match=said):
        images_in_use(FLEET, world(FakeWorld(**slurm), errors=errors))


def test_memory_that_can_not_be_read_names_nothing_and_so_everything_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other commands go on without it; this one must not."""
    (tmp_path / "spec").mkdir()
    (tmp_path / "spec/fleet.yaml").write_text(json.dumps(spec_record()))
    (tmp_path / "state").mkdir()
    (tmp_path / "state/state.sqlite").write_text(
        "no database, but long enough to look like one" * 9
    )
    monkeypatch.setattr(
        "reconciler.adapters.slurm_cli.SlurmCli.jobs", lambda *_: FakeWorld().jobs("demo")
    )
    asked = ["images", str(tmp_path / "spec"), "--state-dir", str(tmp_path / "state"), "--json"]
    done = CliRunner().invoke(main, asked)
    assert (done.exit_code, done.stdout) == (1, "")
    assert "state.sqlite can't be read" in done.stderr
    (tmp_path / "state/state.sqlite").unlink()
    assert CliRunner().invoke(main, asked).exit_code == 0
