"""200 runs with everything going wrong, and the named cases: nothing that must not happen does."""

import os
from pathlib import Path

import pytest

from tests.simulation.run import simulate
from tests.simulation.script import read_script, script_of, shrink
from tests.simulation.soak import soak

CASES = sorted((Path(__file__).parent / "cases").glob("*.txt"))
# `make soak` asks for more.
SEEDS = int(os.environ.get("FLEET_SOAK_SEEDS", "200"))
CYCLES = 200


def test_R05_the_invariants_hold_whatever_goes_wrong_and_it_settles() -> None:
    """Each seed: 200 cycles of faults, crashes and edits; then calm, and the fleet as specified."""
    totals = soak(range(SEEDS), CYCLES)
    if totals.failed:
        first = totals.failed[0]
        assert first.violation is not None
        script = shrink(script_of(first), first.violation.number)
        pytest.fail(f"{len(totals.failed)} failed; seed {first.seed}: {first.violation}\n{script}")
    assert totals.missing() == []


@pytest.mark.parametrize("path", CASES, ids=[path.stem for path in CASES])
def test_a_run_that_once_failed_holds_now(path: Path) -> None:
    """Each named case is the script of a run that found a mistake."""
    script = read_script(path.read_text(encoding="utf-8"))
    result = simulate(script.seed, script.cycles, script.events)
    assert result.violation is None


def test_a_run_replays_exactly() -> None:
    """The same seed is the same run; its events as a script are the same run as well."""
    first = simulate(11, 120)
    again = simulate(11, 120)
    script = read_script(str(script_of(first)))
    scripted = simulate(script.seed, script.cycles, script.events)
    assert first.reasons == again.reasons == scripted.reasons
    assert first.struck == again.struck == scripted.struck
    assert first.settled_after_s == again.settled_after_s == scripted.settled_after_s
