"""docs/regressions.md and the tests name each other, so that neither promises what is not there."""

import re
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_ROW = re.compile(r"^\| (R[0-9]{2}) \| (.+) \| (.+) \|$", re.MULTILINE)
_OWED = re.compile(
    r"owed by: (gateway|provisioning|autoscaling|a later session)"
    r"(, (gateway|provisioning|autoscaling|a later session))*$"
)
_TEST = re.compile(r"^(?:async )?def (test_\w+)", re.MULTILINE)


def rows() -> dict[str, str]:
    """What proves each failure of the table, by its number."""
    text = (_ROOT / "docs" / "regressions.md").read_text(encoding="utf-8")
    return {number: proof for number, _, proof in _ROW.findall(text)}


def named() -> set[str]:
    """The tests that the table names."""
    return set(re.findall(r"`(test_\w+)`", " ".join(rows().values())))


def existing() -> set[str]:
    """The tests that there are."""
    paths = (_ROOT / "tests").glob("**/*.py")
    return {name for path in paths for name in _TEST.findall(path.read_text(encoding="utf-8"))}


def test_table_has_each_failure_and_its_proof_or_who_owes_it() -> None:
    """R01 to R40, in order."""
    assert list(rows()) == [f"R{number:02}" for number in range(1, 41)]
    for number, proof in rows().items():
        assert "`test_" in proof or _OWED.search(proof), number
        assert "owed by" not in proof or _OWED.search(proof), number


def test_each_test_of_the_table_exists() -> None:
    """A renamed test takes its row with it."""
    assert named() - existing() == set()


def test_each_test_with_a_number_is_in_its_row() -> None:
    """Add the name of a new test_R.. to docs/regressions.md."""
    numbered = {name for name in existing() if re.match(r"test_R[0-9]{2}_", name)}
    assert numbered - named() == set()
    for name in numbered:
        assert f"`{name}`" in rows()[name[5:8]], name
