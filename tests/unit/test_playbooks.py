"""The roles' variables are declared and described, and have a default each."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROLES = Path(__file__).parents[2] / "playbooks/roles"
DOCUMENTED = sorted(path.parents[1].name for path in ROLES.glob("*/meta/argument_specs.yml"))


def read(role: str, file: str) -> dict[str, Any]:
    path = ROLES / role / file
    return (yaml.safe_load(path.read_text()) or {}) if path.exists() else {}


def options(role: str) -> dict[str, Any]:
    points = read(role, "meta/argument_specs.yml")["argument_specs"].values()
    return {name: option for point in points for name, option in point.get("options", {}).items()}


def test_every_role_declares_its_variables() -> None:
    """So that a mistake in one is an error before the role has done anything."""
    assert sorted(path.name for path in ROLES.iterdir()) == DOCUMENTED


@pytest.mark.parametrize("role", DOCUMENTED)
def test_every_variable_of_a_role_is_documented(role: str) -> None:
    """Declared, with a default unless it must be given, and in the README."""
    declared = options(role)
    needed = {name for name, option in declared.items() if option.get("required")}
    assert set(read(role, "defaults/main.yml")) == set(declared) - needed
    assert all(option.get("description") for option in declared.values())
    # A table of them is whole.
    readme = (ROLES / role / "README.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", readme, re.MULTILINE)) in (set(), set(declared))
