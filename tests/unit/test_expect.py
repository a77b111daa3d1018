"""`fleet apply --expect`: what was reviewed is done, or nothing."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from reconciler.adapters.orders import read_orders
from reconciler.adapters.store import FILE, read_events
from reconciler.cli import main
from reconciler.plan import Action, Cancel, Drain, JobRef, Plan, Reason, Submit, differences
from reconciler.planner import plan
from reconciler.state import Memory, Orders
from tests.simulation.secrets import MemorySecrets
from tests.unit.build import (
    DIGEST,
    KEYS,
    fleet,
    job,
    model_record,
    observation,
    revision,
    spec_record,
)
from tests.unit.test_execute import FakeWorld, to

FLEET = fleet(model_record(replicas=2), gateway={"hosts": [{"name": "a"}, {"name": "b"}]})
REV = revision(FLEET)
ONE, TWO = job(REV, id=1), job(REV, id=2, ordinal=1)
REF = JobRef(id=ONE.id, submitted_at=ONE.submitted_at, name=ONE.name)
DRAIN = Drain(job=REF, reason=Reason.SURPLUS)
SUBMIT = Submit(name=replace(ONE.name, ordinal=7), gpus=1, reason=Reason.MISSING)
ROUTE = to(ONE)
DIFFER = {
    "new": ((DRAIN,), (DRAIN, SUBMIT), f"new: submit {SUBMIT.name}"),
    "gone": ((DRAIN, SUBMIT), (SUBMIT,), f"gone: drain {ONE.name}"),
    "twice": ((SUBMIT,), (SUBMIT, SUBMIT), f"new: submit {SUBMIT.name}"),
    "instead": (
        (DRAIN,),
        (Cancel(job=REF, pending=True, reason=Reason.SURPLUS),),
        f"new: cancel {ONE.name}; gone: drain {ONE.name}",
    ),
    "another-job-of-the-name": (
        (DRAIN,),
        (replace(DRAIN, job=replace(REF, submitted_at=REF.submitted_at + 1)),),
        f"changed: drain {ONE.name}",
    ),
    "reason": ((DRAIN,), (replace(DRAIN, reason=Reason.STALE),), f"changed: drain {ONE.name}"),
    "gpus": ((SUBMIT,), (replace(SUBMIT, gpus=2),), f"changed: submit {SUBMIT.name}"),
    "successor": ((SUBMIT,), (replace(SUBMIT, succeeds=(1, 2)),), f"changed: submit {SUBMIT.name}"),
    "targets": ((ROUTE,), (to(ONE, TWO),), "changed: route to a, b"),
    "generation": ((ROUTE,), (replace(ROUTE, generation="0" * 12),), "changed: route to a, b"),
    "gateways": (
        (ROUTE,),
        (replace(ROUTE, gateways=("a",)),),
        "new: route to a; gone: route to a, b",
    ),
    "many": (
        (),
        tuple(replace(SUBMIT, name=replace(SUBMIT.name, ordinal=at)) for at in range(5)),
        "new: " + ", ".join(f"submit demo.tiny.{REV}.{at}" for at in range(3)) + " and 2 more",
    ),
}


def made(*actions: Action, at: float = 1.0) -> Plan:
    return replace(plan(FLEET, observation(), Memory()), actions=actions, at=at)


@pytest.mark.parametrize(("reviewed", "now", "line"), DIFFER.values(), ids=DIFFER.keys())
def test_plans_that_differ_say_how(
    reviewed: tuple[Action, ...], now: tuple[Action, ...], line: str
) -> None:
    """One line with the action's name; what is not the same action any more is changed."""
    assert differences(made(*reviewed), made(*now)) == line


def test_plans_that_differ_only_by_the_clock_are_the_same() -> None:
    """Time, notes, order, and what follows from the time for a submission."""
    later = replace(SUBMIT, walltime_s=3600, exclude=("gpu1",))
    assert differences(made(SUBMIT, DRAIN), made(DRAIN, later, at=2.0)) is None
    assert differences(made(), made()) is None


# -- the command


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "spec"
    folder.mkdir()
    record = spec_record(model_record(replicas=2), gateway={"hosts": [{"name": "a"}]})
    (folder / "fleet.yaml").write_text(json.dumps(record))
    monkeypatch.setenv("FLEET_STATE_DIR", str(tmp_path / "state"))
    return folder


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeWorld:
    """The command's adapters replaced, all but the store."""
    fake = FakeWorld()
    gateways = fake.world().gateways
    images: Any = SimpleNamespace(
        pins=lambda _: ({"engine": SimpleNamespace(program="/opt/e", digest=DIGEST)}, {})
    )
    engines: Any = SimpleNamespace(probe=lambda *_: {})
    monkeypatch.setattr("reconciler.adapters.slurm_cli.SlurmCli", lambda *_: fake)
    monkeypatch.setattr("reconciler.adapters.images.ImageFolder", lambda *_: images)
    secrets = MemorySecrets([*KEYS])
    monkeypatch.setattr("reconciler.adapters.secrets.FileSecrets", lambda *_: secrets)
    monkeypatch.setattr("reconciler.adapters.nginx.NginxGateways", lambda *_: gateways)
    monkeypatch.setattr("reconciler.adapters.engine.HttpEngines", lambda *_: engines)
    return fake


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


def reviewed(spec: Path) -> Path:
    file = spec.parent / "plan.json"
    file.write_text(invoke("plan", spec, "--json").stdout)
    return file


def test_reviewed_plan_that_still_holds_is_done(spec: Path, fake: FakeWorld) -> None:
    """The clock has gone on since, and that is all."""
    result = invoke("apply", spec, "--expect", reviewed(spec), "--allow-destroy", "tiny")
    assert (result.exit_code, result.stderr) == (0, "")
    assert set(read_orders(spec.parent / "state").allowed) == {"tiny"}
    assert sorted(fake.done)[-2:] == [f"submit demo.tiny.{REV}.0", f"submit demo.tiny.{REV}.1"]


def test_plan_that_is_not_the_reviewed_one_does_nothing_and_exits_with_3(
    spec: Path, fake: FakeWorld
) -> None:
    """One line says what differs; no job, no route, no memory, no journal, no allowance."""
    file = reviewed(spec)
    fake.live, fake.done = (replace(ONE, state="PENDING", started_at=None, ends_at=None),), []
    result = invoke("apply", spec, "--expect", file, "--allow-destroy", "tiny")
    assert result.exit_code == 3
    assert result.stderr == (
        "fleet: the plan is not the reviewed one, nothing was done: "
        f"gone: submit demo.tiny.{REV}.0\n"
    )
    assert fake.done == ["list demo"]
    state = spec.parent / "state"
    assert read_orders(state) == Orders()
    assert read_events(state) == []
    assert b"emptied_at" not in (state / FILE).read_bytes()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "is not what `fleet plan --json` of this version writes"),
        ("no JSON", "is not what `fleet plan --json` of this version writes"),
        (None, "can't be read: No such file or directory"),
    ],
)
def test_file_that_is_no_plan_is_one_line(
    text: str | None, message: str, spec: Path, fake: FakeWorld
) -> None:
    """An error, not a difference; nothing is looked at."""
    file = spec.parent / "plan.json"
    if text is not None:
        file.write_text(text)
    result = invoke("apply", spec, "--expect", file)
    assert (result.exit_code, result.stderr) == (1, f"fleet: {file} {message}\n")
    assert fake.done == []


def test_plan_of_another_fleet_is_refused(spec: Path, fake: FakeWorld) -> None:
    """The wrong file is not a change of the world."""
    file = reviewed(spec)
    file.write_text(file.read_text().replace('"fleet": "demo"', '"fleet": "prod"'))
    fake.done = []
    result = invoke("apply", spec, "--expect", file)
    assert result.exit_code == 1
    assert result.stderr == f"fleet: {file} is a plan of the fleet prod, not demo\n"
    assert fake.done == []
