"""What people say outside of git: kept in a file, obeyed by the planner, shown to everybody."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from reconciler.adapters.orders import FILE, change_orders, read_orders
from reconciler.cli import main
from reconciler.errors import StateFailed
from reconciler.plan import NoteKind, Plan, Reason
from reconciler.planner import plan
from reconciler.state import Memory, Orders, Pause
from tests.unit.build import (
    AT,
    OLD,
    fleet,
    job,
    leaving,
    model_record,
    notes,
    observation,
    revision,
    routed_ids,
    submits,
    view,
)

FLEET = fleet(model_record(), model_record(name="other"))
REV = revision(FLEET)
PAUSE = Pause(model="tiny", reason="moving the weights", by="admin", until=AT + 60)


# --- a pause -----------------------------------------------------------------------------------


def look(*pauses: Pause, at: float = AT) -> Plan:
    """The plan while `tiny` has a stale replica and lacks one, and its dead one is still routed."""
    stale, dead = job(OLD, id=1), job(REV, id=2, ordinal=1)
    seen = observation(stale, gateways=[view(FLEET, stale, dead)], at=at)
    return plan(FLEET, seen, Memory(), pauses=pauses)


def models(decided: Plan) -> set[str]:
    return {action.name.model for action in submits(decided)}


def test_paused_model_is_left_alone_and_dead_routes_go() -> None:
    """Nothing is submitted or ended, what serves stays routed; the other model goes on."""
    decided = look(PAUSE)
    assert models(decided) == {"other"}
    assert leaving(decided) == {}
    assert routed_ids(decided) == [1]
    [note] = notes(decided, NoteKind.PAUSED)
    assert (note.subject, note.text, note.until) == (
        "tiny",
        "paused by admin: moving the weights",
        AT + 60,
    )


def test_pause_of_everything_holds_what_is_not_in_the_spec_too() -> None:
    """Whoever pauses the fleet does not want a single job ended."""
    gone = job(REV, id=1, model="gone", state="PENDING")
    decided = plan(FLEET, observation(gone), Memory(), pauses=[replace(PAUSE, model=None)])
    assert decided.actions == ()
    subjects = {note.subject for note in notes(decided, NoteKind.PAUSED)}
    assert subjects == {"tiny", "other", "gone"}


def test_pause_ends_by_itself() -> None:
    """Nobody has to think of it on Monday morning."""
    assert models(look(PAUSE, at=AT + 60)) == {"tiny", "other"}


# --- the blast radius ---------------------------------------------------------------------------


def cut(replicas: int, *, share: float = 0.5, allow: frozenset[str] = frozenset()) -> Plan:
    """The plan when a model of ten ready replicas is edited to have fewer."""
    wanted = fleet(model_record(replicas=replicas), blast_radius=share, budget={"gpus": 20})
    jobs = [job(revision(wanted), id=n, ordinal=n) for n in range(1, 11)]
    return plan(wanted, observation(*jobs, gateways=[view(wanted, *jobs)]), Memory(), allow)


@pytest.mark.parametrize(("replicas", "share"), [(5, 0.5), (9, 0.1), (0, 0.5), (1, 1.0)])
def test_edit_within_the_blast_radius_is_done(replicas: int, share: float) -> None:
    """As many leave as are too many; that nothing is wanted at all is nobody's mistake."""
    decided = cut(replicas, share=share)
    assert len(leaving(decided)) == 10 - replicas
    assert set(leaving(decided).values()) == {Reason.SURPLUS}


@pytest.mark.parametrize(("replicas", "share"), [(4, 0.5), (8, 0.1), (1, 0.8)])
def test_R33_edit_beyond_the_blast_radius_waits_for_a_word(replicas: int, share: float) -> None:
    """None of the ready replicas leaves; the note says what to say, and that is obeyed."""
    decided = cut(replicas, share=share)
    assert leaving(decided) == {}
    [note] = notes(decided, NoteKind.GUARD)
    assert note.text.endswith("apply --allow-destroy tiny")
    allowed = cut(replicas, share=share, allow=frozenset({"tiny"}))
    assert len(leaving(allowed)) == 10 - replicas


def test_R33_edit_that_changes_the_revision_too_is_within_the_blast_radius_or_waits() -> None:
    """Nine of ten would go as stale ones; a rollout of as many as before takes its steps."""
    wanted = fleet(model_record(replicas=1), budget={"gpus": 20})
    jobs = [job(OLD, id=n, ordinal=n) for n in range(1, 11)]
    seen = observation(*jobs, gateways=[view(wanted, *jobs)])
    decided = plan(wanted, seen, Memory())
    assert len(leaving(decided)) <= 2
    assert notes(decided, NoteKind.GUARD)
    allowed = plan(wanted, seen, Memory(), frozenset({"tiny"}))
    assert len(leaving(allowed)) == 9
    same = fleet(model_record(replicas=10), budget={"gpus": 20})
    new = job(revision(same), id=11)
    rolling = plan(same, observation(new, *jobs, gateways=[view(same, new, *jobs)]), Memory())
    assert len(leaving(rolling)) == 1
    assert notes(rolling, NoteKind.GUARD) == []


# --- the file -----------------------------------------------------------------------------------


def test_orders_come_back_equal(tmp_path: Path) -> None:
    """What one process says another one reads."""
    orders = Orders(pauses=(PAUSE, replace(PAUSE, model=None, until=None)), allowed={"tiny": AT})
    change_orders(tmp_path, lambda _: orders)
    assert read_orders(tmp_path) == orders


def test_orders_without_a_file_are_none(tmp_path: Path) -> None:
    """The usual case."""
    assert read_orders(tmp_path / "not" / "there") == Orders()


@pytest.mark.parametrize("content", ["", "{", '{"pauses": 3}', '{"pauses": [{"model": 3}]}', "\0"])
def test_orders_that_can_not_be_read_pause_everything(tmp_path: Path, content: str) -> None:
    """Unknown is never taken for absent; and nobody writes over what may be mended."""
    (tmp_path / FILE).write_text(content)
    [pause] = read_orders(tmp_path).pauses
    assert pause.holds("tiny", AT)
    assert "mend it or remove it" in pause.reason
    with pytest.raises(StateFailed, match="mend it or remove it"):
        change_orders(tmp_path, lambda orders: orders)
    assert (tmp_path / FILE).read_text() == content


def test_allowance_ends_by_itself() -> None:
    """What was meant today must not end next month's replicas."""
    orders = Orders(allowed={"tiny": AT})
    assert orders.allow_destroy(AT - 1) == {"tiny"}
    assert orders.allow_destroy(AT) == frozenset()
    assert orders.current(AT) == Orders()


# --- the commands -------------------------------------------------------------------------------

SPEC = Path(__file__).parents[2] / "specs" / "demo"


def say(folder: Path, *words: str) -> Result:
    verb, *rest = words
    return CliRunner().invoke(main, [verb, str(SPEC), *rest, "--state-dir", str(folder)])


def test_pause_and_resume_by_command(tmp_path: Path) -> None:
    """Who, why and until when are kept; what is resumed is gone."""
    done = say(tmp_path, "pause", "tiny", "--until", "2h", "--reason", "new  disks")
    assert (done.exit_code, done.output) == (0, "paused tiny of demo until 2h\n")
    assert say(tmp_path, "pause", "--reason", "all").exit_code == 0
    first, second = json.loads((tmp_path / FILE).read_text())["pauses"]
    assert (first["model"], first["reason"], second["until"]) == ("tiny", "new disks", None)
    assert say(tmp_path, "resume", "tiny").output == (
        "resumed tiny of demo (every model is still paused)\n"
    )
    assert say(tmp_path, "resume").exit_code == 0
    assert read_orders(tmp_path) == Orders()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("pause", "tiny", "--until", "soon", "--reason", "x"), "write a number with its unit"),
        (("pause", "tiny", "--until", "2001-01-01", "--reason", "x"), "2001-01-01 is over"),
        (("pause", "tinny", "--reason", "x"), 'no model "tinny" in the spec; the models are tiny'),
        (("pause", "tiny"), "Missing option '--reason'"),
        (("resume", "tiny"), "nothing is paused of tiny"),
    ],
)
def test_mistake_in_a_pause_is_one_line(
    tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    """And nothing is written."""
    done = say(tmp_path, *words)
    assert done.exit_code in (1, 2)
    assert message in done.output
    assert "Traceback" not in done.output
    assert read_orders(tmp_path) == Orders()


def test_allowance_by_command_lasts_beyond_one_apply(tmp_path: Path) -> None:
    """A `fleet run` at work sees it in its next cycle; the drain may take many."""
    assert say(tmp_path, "allow-destroy", "gone").output == "allowed for an hour: gone\n"
    assert set(read_orders(tmp_path).allowed) == {"gone"}
