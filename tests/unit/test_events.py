"""`fleet events` and `fleet explain`: what was done, and all that is known of one replica."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from reconciler.adapters.ports import ImagePin, Listing, LogPart
from reconciler.adapters.ports import Result as Ended
from reconciler.adapters.store import FILE, SqliteStore
from reconciler.cli import main
from reconciler.errors import SlurmUnavailable
from reconciler.memory import remember
from reconciler.plan import Action, Cancel, Drain, JobRef, Reason, Route, Submit, to_json
from reconciler.planner import plan
from reconciler.render import events_text, explain_text, explanation
from reconciler.state import Job, Memory, Scaling
from tests.simulation.secrets import MemorySecrets
from tests.unit.build import (
    AT,
    DIGEST,
    KEYS,
    fleet,
    job,
    model_record,
    observation,
    revision,
    spec_record,
    view,
)

MODELS = model_record(), model_record(name="big", replicas=1)
FLEET = fleet(*MODELS)
REV = revision(FLEET)
# The command's clock is the real one: walltimes end far from now.
LATER = 4_000_000_000
ONE = job(REV, id=1, ends_at=LATER)
NAME = str(ONE.name)


def ref(of: Job) -> JobRef:
    return JobRef(id=of.id, submitted_at=of.submitted_at, name=of.name)


def route(*added: str) -> Route:
    return Route(gateways=("gateway",), generation="0" * 8, targets=(), added=added, removed=())


def history(folder: Path) -> None:
    """A journal of one replica's life, and of another model's, as it was on 1970-01-12."""
    big = job(revision(FLEET, "big"), id=9, model="big")
    events: list[tuple[Action, Ended, str]] = [
        (Submit(name=ONE.name, gpus=1, reason=Reason.MISSING), Ended.DONE, "job 1"),
        (route("1"), Ended.DONE, "generation 00000000"),
        (route("9"), Ended.FAILED, "gateway: broken"),
        (Drain(job=ref(big), reason=Reason.SURPLUS), Ended.UNKNOWN, "timed out"),
    ]
    store = SqliteStore(folder)
    with store.locked():
        for at, (action, result, detail) in enumerate(events):
            store.conclude(store.intend(AT + at, action), result, detail)
        store.intend(AT + 4, Cancel(job=ref(ONE), pending=False, reason=Reason.STALE))


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    folder = tmp_path / "spec"
    folder.mkdir()
    (folder / "fleet.yaml").write_text(json.dumps(spec_record(*MODELS)))
    return folder


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "state"
    monkeypatch.setenv("FLEET_STATE_DIR", str(folder))
    return folder


def fake_world(monkeypatch: pytest.MonkeyPatch, *jobs: Job, error: str = "") -> None:
    """Replace the adapters that the command builds, all but the store."""

    def listing(fleet: str) -> Listing:
        if error:
            raise SlurmUnavailable(f"{fleet}: {error}")
        return Listing(jobs=jobs, odd_lines=0)

    slurm = SimpleNamespace(jobs=listing, nodes=dict[str, str])
    pins: Mapping[str, ImagePin] = {"engine": ImagePin(program="/opt/engine", digest=DIGEST)}
    images = SimpleNamespace(pins=lambda _: (pins, {}))
    gateways = SimpleNamespace(
        look=lambda: (view(FLEET),),
        log=lambda _, position: LogPart(lines=b"", position=position, ended=True),
    )
    engines = SimpleNamespace(probe=lambda *_: observation(*jobs).probes)
    monkeypatch.setattr("reconciler.adapters.slurm_cli.SlurmCli", lambda *_: slurm)
    monkeypatch.setattr("reconciler.adapters.images.ImageFolder", lambda *_: images)
    secrets = MemorySecrets([*KEYS])
    monkeypatch.setattr("reconciler.adapters.secrets.FileSecrets", lambda *_: secrets)
    monkeypatch.setattr("reconciler.adapters.nginx.NginxGateways", lambda *_: gateways)
    monkeypatch.setattr("reconciler.adapters.engine.HttpEngines", lambda *_: engines)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


# -- events


def test_events_are_a_table_with_the_latest_last(spec: Path, state: Path) -> None:
    """When, what, to whom, why, how it ended; an action cut off is shown as unknown."""
    history(state)
    result = invoke("events", spec)
    assert result.exit_code == 0
    big = f"demo.big.{revision(FLEET, 'big')}.0"
    rows = [
        ("TIME (UTC)", "ACTION", "SUBJECT", "REASON", "OUTCOME"),
        ("1970-01-12 13:46:40", "submit", NAME, "missing (1 GPU)", "done: job 1"),
        ("1970-01-12 13:46:41", "route", "gateway", "jobs +1", "done: generation 00000000"),
        ("1970-01-12 13:46:42", "route", "gateway", "jobs +9", "failed: gateway: broken"),
        ("1970-01-12 13:46:43", "drain", big, "surplus (job 9)", "unknown: timed out"),
        ("1970-01-12 13:46:44", "cancel", NAME, "stale (job 1)", "unknown: no outcome was written"),
    ]
    widths = [19, 6, len(NAME), 15, 0]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    assert result.output.splitlines() == lines


def test_events_as_json_are_what_the_table_is_made_of(spec: Path, state: Path) -> None:
    """The same rows, with the action that was performed; --last takes the latest."""
    history(state)
    record = json.loads(invoke("events", spec, "--json", "--last", 2).output)
    assert [event["id"] for event in record["events"]] == [4, 5]
    assert record["events"][0]["action"]["job"]["id"] == 9
    assert events_text(record) == invoke("events", spec, "--last", "2").output.rstrip("\n")


def test_events_work_while_the_lock_is_held(spec: Path, state: Path) -> None:
    """Who looks needs no lock and waits for nobody."""
    history(state)
    with SqliteStore(state).locked():
        assert len(invoke("events", spec).output.splitlines()) == 6


def test_events_before_the_first_run_are_a_friendly_line(spec: Path, state: Path) -> None:
    """No database is no error, and none is made."""
    result = invoke("events", spec)
    assert result.exit_code == 0
    assert result.output == "No events yet: nothing was done for this fleet from this host.\n"
    assert json.loads(invoke("events", spec, "--json").output) == {"events": []}
    assert not state.exists()


def test_R32_events_of_a_damaged_file_are_one_line(spec: Path, state: Path) -> None:
    """Exit code 1, and no traceback."""
    state.mkdir()
    (state / FILE).write_text("garbage" * 100)
    result = invoke("events", spec)
    assert result.exit_code == 1
    assert result.output == f"fleet: {state}/{FILE} can't be read: file is not a database\n"


@pytest.mark.parametrize("action", [None, {}, {"kind": "drain"}, {"kind": "route"}])
def test_event_of_another_version_is_shown_by_its_columns(action: Any) -> None:
    """Its action may have other fields; the row's own columns say enough."""
    event = {"at": 0.5, "kind": "later", "subject": "x\n", "reason": "why", "action": action}
    record = {"events": [{**event, "result": "done", "detail": ""}]}
    row = events_text(record).splitlines()[1]
    assert row.split() == ["1970-01-01", "00:00:00", "later", "x?", "why", "done"]
    seen = json.loads(to_json(plan(FLEET, observation(), Memory())))
    told = explanation(seen, record["events"], "tiny")
    assert told is not None
    assert told["events"] == []


# -- explain


def test_explain_of_a_model_shows_all_that_is_known(
    spec: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replicas, what is to be done, what is held back, and the events, of this model only."""
    history(state)
    waits = job(REV, id=2, ordinal=1, state="PENDING", reason="Priority", ends_at=None)
    fake_world(monkeypatch, ONE, waits)
    result = invoke("explain", spec, "tiny")
    assert result.exit_code == 0
    blocks = result.output.rstrip("\n").split("\n\n")
    assert blocks[0] == f"tiny: 1 of 2 replicas ready; revision {REV}"
    assert [line.split()[0] for line in blocks[1].splitlines()] == [
        *("REPLICA", NAME, f"demo.tiny.{REV}.1"),
    ]
    assert blocks[2].startswith("To be done now:\n  ~  route  gateway")
    assert blocks[3].splitlines()[0] == "Not done now:"
    assert "Slurm: Priority" in blocks[3]
    assert [line.split()[2] for line in blocks[4].splitlines()[2:]] == ["submit", "route", "cancel"]
    assert "big" not in result.output


def test_explain_of_a_replica_shows_it_alone(
    spec: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name as `status` and Slurm show it."""
    history(state)
    fake_world(
        monkeypatch,
        ONE,
        job(REV, id=2, ordinal=1, state="PENDING", reason="Priority", ends_at=None),
    )
    record = json.loads(invoke("explain", spec, NAME, "--json").output)
    assert [view["job_id"] for view in record["replicas"]] == [1]
    assert record["model"] is None
    assert [event["id"] for event in record["events"]] == [1, 2, 5]
    assert explain_text(record) == invoke("explain", spec, NAME).output.rstrip("\n")


def test_explain_of_a_replica_that_is_gone_shows_its_events(
    spec: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal knows it still."""
    history(state)
    fake_world(monkeypatch)
    result = invoke("explain", spec, NAME)
    assert result.exit_code == 0
    assert result.output.startswith(f"{NAME}\n\nNo replica is live.")
    assert "stale (job 1)" in result.output


def test_explain_of_a_name_that_nobody_knows_is_one_line(
    spec: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says which models there are; part of a name is not a name."""
    history(state)
    fake_world(monkeypatch, ONE)
    for name in ("tin", "demo", "demo.tiny", f"demo.tiny.{REV}"):
        result = invoke("explain", spec, name)
        assert result.exit_code == 1
        assert result.output == (
            f'fleet: no model or replica "{name}" is known; the models are tiny, big\n'
        )


def test_explain_without_a_listing_says_why_nothing_is_seen(
    spec: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 4, and the note that every model shares; a damaged journal hides nothing else."""
    state.mkdir()
    (state / FILE).write_text("garbage" * 100)
    fake_world(monkeypatch, error="no answer")
    result = invoke("explain", spec, "tiny")
    assert result.exit_code == 4
    assert "no listing" in result.output
    assert result.output.endswith("No events.\n")
    assert "file is not a database" in result.stderr
    assert "Traceback" not in result.output


def test_explain_says_since_when_so_many_are_wanted() -> None:
    """A change of their number begins a new time; a cycle that changes nothing does not."""
    memory = remember(Memory(), plan(FLEET, observation(ONE), Memory()))
    later = plan(FLEET, observation(ONE, at=AT + 60), memory)
    told = explanation(json.loads(to_json(later)), [], "tiny")
    assert told is not None
    assert "so many are wanted since 13:46:40 UTC" in explain_text(told)
    assert remember(memory, later).scaled == memory.scaled
    more = plan(fleet(model_record(replicas=3)), observation(ONE, at=AT + 90), memory)
    [view] = more.models
    assert view.wanted_since is None
    assert remember(memory, more).scaled["tiny"] == Scaling(replicas=3, since=AT + 90)


def test_explain_shows_the_last_ten_events_only() -> None:
    """The whole journal is `fleet events`."""
    record = json.loads(to_json(plan(FLEET, observation(ONE), Memory())))
    events = [{"id": at, "subject": NAME, "action": None} for at in range(20)]
    told = explanation(record, events, "tiny")
    assert told is not None
    assert [event["id"] for event in told["events"]] == [*range(10, 20)]
