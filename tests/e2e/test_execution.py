"""Actions side by side on real Slurm, and a reconciler that is told to end in the midst of them."""

import subprocess
from collections.abc import Sequence

import pytest

from tests.lab.fleet import Fleet
from tests.lab.wait import wait_for

REPLICAS = 12
AT_ONCE = 8  # reconciler/observe.py

# In front of sbatch: says that it has begun, and whose child it is; goes on when it is let go.
_SHIM = """#!/bin/bash
echo "$PPID" > /shared/shims/begun.$$
until [ -e /shared/shims/go ]; do read -rt 0.05 <> <(:); done
exec /usr/bin/sbatch "$@"
"""
_PATH = {"PATH": "/shared/shims:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"}


def _held_submissions(fleet: Fleet) -> None:
    """Want twelve replicas, and let no submission pass."""
    fleet.edit("replicas: 2", f"replicas: {REPLICAS}")
    fleet.edit("budget: {gpus: 4}", f"budget: {{gpus: {REPLICAS + 1}}}")
    folder = fleet.lab.shared / "shims"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    (folder / "sbatch").write_text(_SHIM)
    (folder / "sbatch").chmod(0o755)


def _begun(fleet: Fleet) -> list[str]:
    """Return the reconciler's process id once for each submission that has begun."""
    return [path.read_text().strip() for path in (fleet.lab.shared / "shims").glob("begun.*")]


@pytest.mark.parametrize(("verb", "status"), [(("run",), 0), (("apply", "--wait"), 1)])
def test_R05_told_to_end_amid_submissions_leaves_no_orphan_and_no_lock(
    fleet: Fleet, verb: Sequence[str], status: int
) -> None:
    """Eight are under way at once; they end and are written down, no more begin; then all go on."""
    _held_submissions(fleet)
    login = fleet.lab
    told = login.popen(
        "login", fleet.command(*verb), env=_PATH, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    with told:
        wait_for("as many submissions as may be", lambda: sum(map(bool, _begun(fleet))) == AT_ONCE)
        (pid,) = set(_begun(fleet))
        login.run("login", ["kill", "-TERM", pid])
        (login.shared / "shims/go").touch()
        output, _ = told.communicate(timeout=60)
    assert told.returncode == status, output
    # The route to nobody yet is left as well.
    left = REPLICAS + 1 - AT_ONCE
    assert f"{left} of {REPLICAS + 1} actions left for the next cycle: told to end" in output
    assert len(_begun(fleet)) == len(fleet.jobs()) == AT_ONCE
    events = fleet.run("events", "--json")
    assert events.count('"result": "done"') == AT_ONCE
    assert '"result": "unknown"' not in events
    # Nothing is locked, what was submitted is adopted, and the rest comes.
    fleet.run("apply")
    assert len({job[1] for job in fleet.jobs()}) == len(fleet.jobs()) == REPLICAS


def test_a_plan_that_was_reviewed_is_done_and_no_other(fleet: Fleet) -> None:
    """The world moves on between review and apply: exit code 3, one line, and nothing submitted."""
    reviewed = fleet.lab.shared / "plan.json"
    reviewed.write_text(fleet.run("plan", "--json"))
    apply = fleet.command("apply", "--expect", "/shared/plan.json")
    fleet.edit("replicas: 2", "replicas: 1")
    refused = fleet.lab.run("login", apply, check=False)
    assert refused.returncode == 3
    assert "nothing was done: gone: submit demo.tiny." in refused.stderr
    assert fleet.jobs() == []
    fleet.edit("replicas: 1", "replicas: 2")
    assert fleet.lab.run("login", apply, check=False).returncode == 0
    assert len(fleet.jobs()) == 2
