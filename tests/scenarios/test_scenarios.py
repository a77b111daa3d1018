"""Each folder's plan is the text beside it, and together they show every Reason and every Note."""

from pathlib import Path

import pytest

from reconciler.plan import NoteKind, Reason, Submit
from tests.scenarios.loader import Scenario, folders, known, load, moment

ALL = [load(folder) for folder in folders()]


@pytest.mark.parametrize("scenario", ALL, ids=lambda scenario: scenario.folder.name)
def test_plan_is_as_its_text_says(scenario: Scenario) -> None:
    """After a change that is meant: python -m tests.scenarios --write, and read what changed."""
    assert scenario.text() == scenario.expected.read_text(encoding="utf-8")


def test_scenarios_are_at_least_forty_and_say_what_they_are_about() -> None:
    """A folder without its sentence would be read by nobody."""
    assert len(ALL) >= 40
    assert all(len(scenario.about) > 20 for scenario in ALL)
    assert len({scenario.about for scenario in ALL}) == len(ALL)


def test_no_two_plans_are_alike() -> None:
    """Each scenario shows something that no other shows."""
    seen: dict[str, Path] = {}
    for scenario in ALL:
        text = scenario.text()
        assert text not in seen, f"{scenario.folder.name} is {seen[text].name}"
        seen[text] = scenario.folder


def reasons(scenario: Scenario) -> set[Reason]:
    """The reasons of a plan's actions; of a replica that leaves, what its note says."""
    decided = scenario.plan()
    actions = {action.reason for action in decided.actions if action.kind != "route"}
    return actions | {Reason(v.detail) for v in decided.replicas if v.status == "leaving"}


@pytest.mark.parametrize("reason", Reason)
def test_reason_occurs_in_a_scenario(reason: Reason) -> None:
    """A new reason needs its folder."""
    assert any(reason in reasons(scenario) for scenario in ALL)


# What a cycle has left over is known when it is over: no plan of what was seen has it.
@pytest.mark.parametrize("kind", [kind for kind in NoteKind if kind is not NoteKind.LEFT_OVER])
def test_note_occurs_in_a_scenario(kind: NoteKind) -> None:
    """A new note needs its folder."""
    assert any(note.kind is kind for scenario in ALL for note in scenario.plan().notes)


@pytest.mark.parametrize("kind", ["submit", "route", "drain", "cancel"])
def test_action_occurs_in_a_scenario(kind: str) -> None:
    """Every kind of step is shown."""
    assert any(action.kind == kind for scenario in ALL for action in scenario.plan().actions)


def test_submission_options_occur_in_a_scenario() -> None:
    """A shorter walltime, nodes to avoid and a predecessor are shown too."""
    found = [
        action
        for scenario in ALL
        for action in scenario.plan().actions
        if isinstance(action, Submit)
    ]
    assert any(action.exclude for action in found)
    assert any(action.succeeds for action in found)


def test_misspelt_key_is_refused() -> None:
    """It would be a default in silence."""
    with pytest.raises(ValueError, match="unknown: stat"):
        known({"stat": "RUNNING"}, "state")
    with pytest.raises(KeyError):
        moment("5m")
