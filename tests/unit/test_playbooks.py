"""The roles' variables are declared and described; both families of systems are thought of.

Red Hat's family can't be run here: what can be read of the roles without it is what is checked.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
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


FAMILIES = {"Debian", "RedHat"}
# Which family each module that installs packages is of; `package` asks the host.
INSTALLS = {"ansible.builtin.apt": "Debian", "ansible.builtin.dnf": "RedHat"}


def tasks(found: Any) -> Iterator[dict[str, Any]]:
    """Yield each task of a file, those within blocks with the block's conditions too."""
    for task in found or []:
        conditions = task.get("when", [])
        here = conditions if isinstance(conditions, list) else [conditions]
        for inner in tasks(task.get("block")):
            yield {**inner, "when": here + inner["when"]}
        if "block" not in task:
            yield {**task, "when": here}


ALL_TASKS = [
    (f"{path.parts[-3]}: {task['name']}", task)
    for path in sorted(ROLES.glob("*/tasks/*.yml"))
    for task in tasks(yaml.safe_load(path.read_text()))
]


@pytest.mark.parametrize("role", DOCUMENTED)
def test_what_differs_by_family_has_both(role: str) -> None:
    """Package names, programs and paths: none is missing on the other family."""
    for name, value in (read(role, "vars/main.yml") | read(role, "defaults/main.yml")).items():
        if isinstance(value, dict) and FAMILIES & set(value):
            assert set(value) == FAMILIES, name


def test_packages_are_installed_by_the_family_that_has_them() -> None:
    """Neither apt nor dnf is ever asked on the other's hosts."""
    seen = set()
    for name, task in ALL_TASKS:
        for module in INSTALLS.keys() & task.keys():
            seen.add(module)
            family = f"ansible_facts['os_family'] == '{INSTALLS[module]}'"
            assert any(family in str(condition) for condition in task["when"]), name
    assert seen == set(INSTALLS)


LUA = """- hosts: gateway
  connection: local
  gather_facts: false
  tasks:
    - ansible.builtin.import_role: {name: validate, tasks_from: nginx.yml}
"""


@pytest.mark.parametrize("has", ["", "nginx nginx-module-lua lua-cjson"])
def test_gateway_of_red_hats_family_without_lua_is_refused_in_a_line(
    tmp_path: Path, has: str
) -> None:
    """Its own repositories have none; what the site's have is asked of rpm and dnf."""
    rpm = "nginx 'package nginx-module-lua is not installed' logrotate"
    for program, said in {"rpm": rpm, "dnf": has}.items():
        (tmp_path / program).write_text(f"#!/bin/sh\nprintf '%s\\n' {said}\n")
        (tmp_path / program).chmod(0o755)
    (tmp_path / "play.yml").write_text(LUA)
    (tmp_path / "hosts").write_text("[gateway]\ngateway1\n")
    ansible = [sys.executable, "-m", "ansible", "playbook", "-i", str(tmp_path / "hosts")]
    variables = f"ansible_python_interpreter={sys.executable} fleet_user=fleet"
    done = subprocess.run(
        [*ansible, str(tmp_path / "play.yml"), "-e", variables],
        env={
            **os.environ,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "ANSIBLE_ROLES_PATH": str(ROLES),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode == 0) == bool(has), done.stdout
    refused = "No repository of gateway1 has nginx-module-lua, lua-cjson" in " ".join(
        done.stdout.split()
    )
    assert refused == (not has)


def test_facts_are_asked_for_as_facts() -> None:
    """A variable of that name is not there (ansible.cfg: inject_facts_as_vars)."""
    for path in ROLES.glob("*/*/*"):
        if path.suffix in (".yml", ".j2"):
            assert not re.search(r"\bansible_(os_family|distribution|hostname)\b", path.read_text())
