"""Each known failure's test sees the mistake that would bring it back, so none passes by chance."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutations.mutations import MUTATIONS, OWED, Mutation
from tests.unit.test_regressions_index import rows

_CHECKOUT = Path(__file__).parents[2]
# images/build.py follows links to find its checkout, and puts that first on the import path.
_COPIED = frozenset({"images", "reconciler"})


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The checkout by links, but for a copy of reconciler/ that a test may break."""
    for entry in _CHECKOUT.iterdir():
        if entry.name in _COPIED:
            shutil.copytree(entry, tmp_path / entry.name)
        else:
            (tmp_path / entry.name).symlink_to(entry)
    return tmp_path


def run(tree: Path, *tests: str) -> subprocess.CompletedProcess[str]:
    """Run tests against a tree's reconciler in a process of their own."""
    paths = [f"tests/{test}" for test in tests]
    # What it compiled would lie in the checkout and name this tree.
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *paths],
        cwd=tree,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )


def test_each_failure_that_is_not_owed_has_its_mutation() -> None:
    """One for each number, seen by a test of that number."""
    assert [one.number for one in MUTATIONS] == [number for number in rows() if number not in OWED]
    assert {number for number, proof in rows().items() if "`test_" not in proof} == OWED
    for one in MUTATIONS:
        assert f"::test_{one.number}_" in one.test


@pytest.mark.soak
def test_without_a_mutation_every_test_passes(tree: Path) -> None:
    """What a mutation's test sees is the mutation, not the tree."""
    done = run(tree, *(one.test for one in MUTATIONS))
    assert done.returncode == pytest.ExitCode.OK, done.stdout


@pytest.mark.soak
def test_reconciler_under_test_is_the_trees(tree: Path) -> None:
    """Were the checkout's imported, its tests would pass beside a copy that is none."""
    (tree / "reconciler" / "__init__.py").write_text("raise ImportError('the copy')\n")
    done = run(tree, MUTATIONS[0].test)
    assert "ImportError: the copy" in done.stdout


@pytest.mark.soak
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.number)
def test_mutation_is_seen_by_the_test_of_its_number(tree: Path, mutation: Mutation) -> None:
    """Seen is a test that failed; one that could not be collected or run has seen nothing."""
    file = tree / "reconciler" / mutation.file
    file.write_text(mutation.applied(file.read_text(encoding="utf-8")), encoding="utf-8")
    done = run(tree, mutation.test)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout
