"""Text for people is made of the plan's JSON only, and says what would be asked next."""

import json
from dataclasses import replace
from typing import Any

import pytest

from reconciler.plan import Plan, to_json
from reconciler.planner import plan
from reconciler.render import changes, columns, plan_text, status_text, waiting_text
from reconciler.state import Failures, Health, Memory, Probe
from tests.unit.build import AT, fleet, job, model_record, observation, revision, view

FLEET = fleet(model_record(), model_record(name="big", replicas=1))
REV = revision(FLEET)
BIG = revision(FLEET, "big")


def record(decided: Plan) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(to_json(decided))
    return loaded


def mixed(**keys: Any) -> dict[str, Any]:
    """A plan with one action of each kind, and notes."""
    jobs = (
        *(job(REV, id=1), job(REV, id=2, ordinal=1, state="PENDING", reason="Resources")),
        *(job(REV, id=3, model="gone"), job(REV, id=4, model="gone", ordinal=1, state="PENDING")),
    )
    failed = Failures(count=2, last_at=AT, counted=frozenset())
    seen = observation(*jobs, gateways=[view(FLEET)], **keys)
    wanted = fleet(model_record(), model_record(name="big"), model_record(name="sad", replicas=1))
    memory = Memory(failures={f"sad.{revision(wanted, 'sad')}": failed})
    return record(plan(wanted, seen, memory, frozenset({"gone"})))


def test_plan_text_is_as_reviewed() -> None:
    """What is done and why, then what is not done, why, and until when."""
    assert plan_text(mixed()) == (
        "fleet demo: 2 to submit, 1 to route, 1 to drain, 1 to cancel; 4 of 8 GPUs held\n"
        "\n"
        f"  +  submit  demo.big.{REV}.0   missing (1 GPU)\n"
        f"  +  submit  demo.big.{REV}.1   missing (1 GPU)\n"
        "  ~  route   gateway               1 replica, jobs +1\n"
        f"  -  drain   demo.gone.{REV}.0  not in spec (job 3)\n"
        f"  x  cancel  demo.gone.{REV}.1  not in spec (job 4)\n"
        "\n"
        "Not done now:\n"
        "  sad                   backoff:  held: 2 failures on revision "
        f"{REV}, until 13:47:00 UTC\n"
        f"  demo.tiny.{REV}.1  pending:  Slurm: Resources"
    )


def test_plan_text_of_a_converged_fleet_says_so() -> None:
    """Nothing to do is one line."""
    jobs = job(REV, id=1), job(REV, id=2, ordinal=1), job(BIG, id=3, model="big")
    decided = plan(FLEET, observation(*jobs, gateways=[view(FLEET, *jobs)]), Memory())
    assert plan_text(record(decided)) == "fleet demo: nothing to do; 3 of 8 GPUs held"


def test_status_text_is_as_reviewed() -> None:
    """Each model, each replica, and what else is held back."""
    jobs = job(REV, id=1), job("0" * 8, id=2, ordinal=1, published=False)
    seen = observation(*jobs, gateways=[view(FLEET, jobs[0])], odd_lines=1)
    assert status_text(record(plan(FLEET, seen, Memory()))) == (
        "fleet demo: 2 to submit; 2 of 8 GPUs held\n"
        "\n"
        "MODEL  REVISION  WANTED  READY\n"
        f"tiny   {REV}  2       1\n"
        f"big    {BIG}  1       0\n"
        "\n"
        "REPLICA               JOB  STATUS   ROUTED  NODE   ADDRESS         DETAIL\n"
        "demo.tiny.00000000.1  2    leaving  no      node1  -               stale\n"
        f"demo.tiny.{REV}.0  1    ready    yes     node1  10.0.0.1:20000\n"
        "\n"
        "slurm: odd lines: 1 of squeue's lines could not be read; those jobs are left alone"
    )


def test_status_text_without_replicas_says_so() -> None:
    """An empty table is a sentence."""
    assert "No replica is live." in status_text(record(plan(FLEET, observation(), Memory())))


def test_R37_text_from_outside_moves_no_cursor() -> None:
    """A server's or a job's words can't write escape sequences to a terminal."""
    evil = "\x1b[2J\r\nfleet: all fine\x9b31m\u202e"
    one = job(REV, id=1)
    seen = observation(one, healths={1: Health.IMPOSTOR}, gateways=[view(FLEET)])
    seen = replace(seen, probes={one.key: Probe(health=Health.IMPOSTOR, detail=evil)})
    before, after = (record(plan(FLEET, look, Memory())) for look in (observation(), seen))
    for text in (
        plan_text(after),
        status_text(after),
        waiting_text(after),
        *changes(before, after),
    ):
        assert not set(text) & set("\x1b\r\x9b\u202e")
        assert "\nfleet: all fine" not in text


def test_changes_are_told_once_each() -> None:
    """One line for each replica that does something else, none for one that does not."""
    first, second = job(REV, id=1), job(REV, id=2, ordinal=1)
    looks = [
        observation(first, replace(second, state="PENDING"), gateways=[view(FLEET)]),
        observation(first, second, gateways=[view(FLEET, first)]),
        observation(second, gateways=[view(FLEET, second)]),
    ]
    plans = [record(plan(FLEET, look, Memory())) for look in looks]
    assert changes(None, plans[0]) == [
        f"demo.tiny.{REV}.0 job 1: ready",
        f"demo.tiny.{REV}.1 job 2: pending (Slurm: None)",
    ]
    assert changes(plans[0], plans[1]) == [
        f"demo.tiny.{REV}.0 job 1: ready -> ready, routed",
        f"demo.tiny.{REV}.1 job 2: pending -> ready",
    ]
    assert changes(plans[1], plans[2]) == [
        f"demo.tiny.{REV}.1 job 2: ready -> ready, routed",
        f"demo.tiny.{REV}.0 job 1: ready, routed -> gone",
    ]
    assert changes(plans[2], plans[2]) == []


def test_R01_look_without_a_listing_makes_nothing_gone() -> None:
    """Unknown is never absent, in words too: a queue that can't be read ends no replica."""
    one = job(REV, id=1)
    seen = observation(one, gateways=[view(FLEET, one)])
    before = record(plan(FLEET, seen, Memory()))
    for blind, memory in (
        (replace(seen, jobs=None), Memory()),
        (replace(seen, jobs=()), Memory(emptied_at=AT)),
    ):
        after = record(plan(FLEET, blind, memory))
        assert after["replicas"] == []
        assert changes(before, after) == []


def test_waiting_text_says_what_is_missing() -> None:
    """One line: how many are ready of each model, and every note."""
    one = job(REV, id=1, state="PENDING", reason="Priority")
    text = waiting_text(record(plan(FLEET, observation(one), Memory())))
    assert text == f"tiny 0/2 ready; big 0/1 ready; demo.tiny.{REV}.0: Slurm: Priority"


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([("a", "b")], "a  b"),
        ([("a", "bb"), ("ccc", "")], "a    bb\nccc"),
        ([("", "x")], "  x"),
    ],
)
def test_columns_are_aligned_without_trailing_spaces(rows: Any, text: str) -> None:
    """Two spaces apart, and nothing at the ends of lines."""
    assert columns(rows) == text
