"""`fleet backend-key`, and what the planner makes of keys: whom it replaces, what gateways show."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from reconciler.adapters.secrets import BackendKey, FileSecrets
from reconciler.backend_keys import listing, refusal
from reconciler.cli import main
from reconciler.plan import Note, NoteKind
from reconciler.planner import plan
from reconciler.state import Keyring, Memory
from tests.unit.build import (
    AT,
    DIGEST,
    KEYS,
    RING,
    ended,
    fleet,
    job,
    leaving,
    model_record,
    notes,
    observation,
    revision,
    route,
    routed_ids,
    spec_record,
    submits,
    view,
)

OLD, NEW = KEYS
REVOKED = "cccccccc"
FLEET = fleet(model_record(replicas=2))
REV = revision(FLEET)
ONE, TWO = job(REV, id=1), job(REV, id=2, ordinal=1)


# -- the planner


@pytest.mark.parametrize("keys", [(), (REVOKED,), (REVOKED, *KEYS)], ids=["none", "only", "too"])
def test_replica_whose_keys_differ_is_stale(keys: tuple[str, ...]) -> None:
    """Its revision is wanted; and yet another one is submitted, one at a time, before it leaves."""
    differ = [job(REV, id=1, keys=keys), job(REV, id=2, ordinal=1, keys=keys)]
    decided = plan(FLEET, observation(*differ, gateways=[view(FLEET, *differ)]), Memory())
    assert [(one.name.ordinal, one.reason) for one in submits(decided)] == [(2, "stale")]
    assert leaving(decided) == {}
    assert not decided.converged
    ready = [*differ, job(REV, id=3, ordinal=2)]
    decided = plan(FLEET, observation(*ready, gateways=[view(FLEET, *ready)]), Memory())
    assert len(leaving(decided)) == 1
    assert 3 not in leaving(decided)


def test_pending_job_with_a_revoked_key_goes_at_once() -> None:
    """It serves nobody."""
    waits = job(REV, id=3, ordinal=2, state="PENDING", keys=(REVOKED, *KEYS))
    seen = observation(ONE, TWO, waits, gateways=[view(FLEET, ONE, TWO)])
    assert ended(plan(FLEET, seen, Memory())) == {3: "cancel: stale"}


def test_canary_with_a_revoked_key_has_a_successor_that_stays() -> None:
    """The successor is no replica too many of the model itself."""
    wanted = fleet(model_record(replicas=1, canary={"args": {"seed": 1}}))
    (_, canary) = wanted.models[0].variants
    other = canary.revision("path:/opt/engine")
    own = job(revision(wanted), id=1)
    seen = [own, job(other, id=2, ordinal=1, keys=(REVOKED, *KEYS)), job(other, id=3, ordinal=2)]
    decided = plan(wanted, observation(*seen, gateways=[view(wanted, *seen)]), Memory())
    assert list(leaving(decided)) == [2]
    assert submits(decided) == []


@pytest.mark.parametrize(("gpus", "left"), [(2, [2]), (3, [])])
def test_canary_goes_first_only_where_its_successor_has_no_room(gpus: int, left: list[int]) -> None:
    """And only where max_unavailable lets one be missing: else it would stay for ever."""
    wanted = fleet(
        model_record(replicas=1, canary={"args": {"seed": 1}}),
        budget={"gpus": gpus},
        defaults={"rollout": {"max_unavailable": 1}},
    )
    (_, canary) = wanted.models[0].variants
    tried = job(canary.revision(DIGEST), id=2, ordinal=1, keys=(REVOKED, *KEYS))
    seen = [job(revision(wanted), id=1), tried]
    decided = plan(wanted, observation(*seen, gateways=[view(wanted, *seen)]), Memory())
    assert [*leaving(decided)] == left
    assert len(submits(decided)) == (gpus == 3)


def test_open_fleet_takes_replicas_without_keys() -> None:
    """And those that have some are of another revision."""
    wanted = fleet(model_record(replicas=1), replica_access="open")
    assert revision(wanted) != REV
    own = job(revision(wanted), id=1, keys=())
    decided = plan(wanted, observation(own, gateways=[view(wanted, own)]), Memory())
    assert decided.converged


def test_replica_that_does_not_take_the_key_gets_no_requests() -> None:
    """Somebody has meddled with the keys: it would answer 401 to every one of them."""
    lone = job(REV, id=3, ordinal=2, keys=(REVOKED,))
    decided = plan(FLEET, observation(ONE, TWO, lone, gateways=[view(FLEET, lone)]), Memory())
    assert routed_ids(decided) == [1, 2]


def test_gateway_goes_over_when_the_last_replica_takes_the_new_key() -> None:
    """The only change is the key: the plan names its id."""
    older = job(REV, id=1, keys=(OLD,))
    decided = plan(FLEET, observation(older, TWO, gateways=[view(FLEET)]), Memory())
    first = route(decided)
    assert first is not None
    assert first.trust is not None
    assert (first.trust.key, first.trust.authority) == (OLD, RING.authority)
    now = plan(FLEET, observation(ONE, TWO, gateways=[view(FLEET, older, TWO)]), Memory())
    second = route(now)
    assert second is not None
    assert second.trust is not None
    assert (second.trust.key, second.added, second.removed) == (NEW, (), ())


def test_unreadable_keys_decide_nothing() -> None:
    """Unknown is never absent: nothing is stale, submitted, ended or routed anew."""
    seen = observation(
        ONE, keyring=None, keyring_error="the folder is gone", gateways=[view(FLEET)]
    )
    decided = plan(FLEET, seen, Memory())
    [note] = decided.notes
    assert (decided.actions, note.kind, decided.observed) == ((), NoteKind.NO_KEYS, False)
    assert note.text.startswith("the folder is gone; nothing is submitted")


def test_no_keys_at_all_are_believed_only_before_the_first_job() -> None:
    """An empty folder may be a mount that is missing; at the beginning it is what there is."""
    gone = plan(FLEET, observation(ONE, keyring=Keyring(), gateways=[view(FLEET)]), Memory())
    assert (gone.actions, [note.kind for note in gone.notes]) == ((), [NoteKind.NO_KEYS])
    over = job(REV, id=1, state="COMPLETED")
    first = plan(FLEET, observation(over, keyring=Keyring(), gateways=[view(FLEET)]), Memory())
    assert len(submits(first)) == 2
    kept: list[Note] = notes(first, NoteKind.NO_KEYS)
    assert kept == []


# -- the command


def test_key_is_revoked_when_every_running_job_takes_another() -> None:
    """A job that waits or ends needs none; an open one takes no key at all."""
    three = (REVOKED, *KEYS)
    others = [
        job(REV, id=3, state="PENDING", keys=(REVOKED,)),
        job(REV, id=4, state="COMPLETING", keys=(REVOKED,)),
        job(REV, id=5, state="CANCELLED", keys=(REVOKED,)),
        job(REV, id=6, keys=()),
    ]
    assert refusal(REVOKED, three, [ONE, job(REV, id=2, keys=three), *others]) is None


REFUSED = {
    "unknown": ("dddddddd", (REVOKED, *KEYS), [], 'there is no key "dddddddd"; the keys are cccc'),
    "last-two": (OLD, KEYS, [], "there are only 2 keys: rotate first"),
    "only-one-of-a-job": (
        *(REVOKED, (REVOKED, *KEYS), [job(REV, id=7, keys=(REVOKED,))]),
        "job 7 takes no other key that is left",
    ),
    "comment-unreadable": (
        *(REVOKED, (REVOKED, *KEYS), [job(REV, id=8, vandalised=True)]),
        "which keys job 8 takes can't be read",
    ),
}


@pytest.mark.parametrize(("key", "ids", "jobs", "line"), REFUSED.values(), ids=REFUSED.keys())
def test_key_that_a_job_needs_is_not_revoked(
    key: str, ids: tuple[str, ...], jobs: list[object], line: str
) -> None:
    """One line says who needs it, or what is missing."""
    why = refusal(key, ids, jobs)  # type: ignore[arg-type]
    assert why is not None
    assert why.startswith(line)


def test_listing_says_who_takes_and_who_shows_each_key() -> None:
    """Of live jobs; a gateway that can't be asked shows nothing that is known."""
    keys = [BackendKey(made_at=int(AT) - at, id=id, text="x") for at, id in ((60, OLD), (0, NEW))]
    older = job(REV, id=1, keys=(OLD,))
    over = job(REV, id=3, state="FAILED")
    views = [view(FLEET, older, TWO), view(FLEET, name="other", error="no answer")]
    record = listing(keys, [older, TWO, over], views, AT)
    made = {"made": "1970-01-12 13:45:40", "age_s": 60}
    assert record["keys"] == [
        {"id": OLD, **made, "jobs": 2, "gateways": ["gateway"]},
        {"id": NEW, "made": "1970-01-12 13:46:40", "age_s": 0, "jobs": 1, "gateways": []},
    ]


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    folder = tmp_path / "spec"
    folder.mkdir()
    secrets = tmp_path / "secrets"
    secrets.mkdir(mode=0o700)
    (folder / "fleet.yaml").write_text(json.dumps(spec_record(secret_dir=str(secrets))))
    return folder


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["backend-key", *map(str, arguments)])


def test_rotate_adds_a_key_and_says_only_its_id(spec: Path) -> None:
    """Nothing but files holds the key itself."""
    files = FileSecrets(str(spec.parent / "secrets"), "demo")
    before = files.issue("tiny", 60.0).keys
    result = invoke("rotate", spec)
    assert result.exit_code == 0
    *same, added = files.backend_keys()
    assert tuple(key.id for key in same) == before
    assert f"added backend key {added.id}:" in result.output
    assert added.text not in result.output


def test_rotate_before_the_first_need_is_one_line(spec: Path) -> None:
    """There is nothing to rotate, and nobody who would take it."""
    result = invoke("rotate", spec)
    assert result.exit_code == 1
    assert result.stderr.startswith("fleet: no keys are made yet")
