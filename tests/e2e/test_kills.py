"""Killed where it hurts: right before and right after each call that changes the world.

Shims in front of sbatch, scancel and ssh kill the reconciler (9) around the call. Each boundary is
hit once here and five times in `make soak`; the same requests run throughout.
"""

import asyncio
import os

import pytest

from tests.lab import Lab
from tests.lab.fleet import Fleet
from tests.lab.load import Load, in_flight

KILLS = 5 if os.environ.get("SOAK") else 1
# What is called with which words, so that a mere look is not taken for a change.
CALLS = {"sbatch": "*", "scancel": "*", "ssh": "*change*"}
WHENS = ("before", "after")

# Counts in a file, as each call is a process of its own; the parent is the reconciler.
_SHIM = """#!/bin/bash
real={real}
strike() {{
  local file=/shared/shims/$1 n
  n=$(cat "$file")
  if ((n > 0)); then echo $((n - 1)) > "$file"; kill -9 "$PPID"; exit 137; fi
}}
case "$*" in {words}) strike {tool}.before ;; esac
"$real" "$@"
status=$?
case "$*" in {words}) strike {tool}.after ;; esac
exit "$status"
"""


def _lay_shims(lab: Lab) -> None:
    folder = lab.shared / "shims"
    folder.mkdir()
    for tool, words in CALLS.items():
        shim = folder / tool
        shim.write_text(_SHIM.format(real=f"/usr/bin/{tool}", tool=tool, words=words))
        shim.chmod(0o755)
        for when in WHENS:
            count = folder / f"{tool}.{when}"
            count.write_text(str(KILLS))
            count.chmod(0o666)


def _left(lab: Lab) -> int:
    return sum(int((lab.shared / "shims" / f"{t}.{w}").read_text()) for t in CALLS for w in WHENS)


def _apply_until_done(fleet: Fleet) -> None:
    """Run `fleet apply --wait` again and again, each time killed somewhere, until it converges."""
    path = {"PATH": "/shared/shims:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"}
    command = fleet.command("apply", "--wait", "--timeout", "90s", "--interval", "1")
    for _ in range(2 * KILLS * len(CALLS) * len(WHENS) + 3):
        done = fleet.lab.run("login", command, env=path, check=False, timeout=120)
        if done.returncode == 0:
            return
        assert "Traceback" not in done.stderr
    pytest.fail(f"not converged: {fleet.run('status')}")


def _live(fleet: Fleet) -> list[str]:
    live = ("PENDING", "RUNNING", "COMPLETING")
    return sorted(job[1] for job in fleet.jobs() if job[2] in live)


def test_R05_killed_around_every_effect_of_a_rolling_update(fleet: Fleet) -> None:
    """No orphan, no duplicate, converged, and no request lost, whatever call was the last."""
    fleet.run("apply", "--wait", "--timeout", "60s")
    _lay_shims(fleet.lab)
    slots = 16
    while _left(fleet.lab):
        # Each update has only so many calls; another one follows until every boundary was hit.
        assert slots < 16 + 4 * KILLS, f"{_left(fleet.lab)} boundaries were never reached"
        fleet.edit(f"max-num-seqs: {slots}", f"max-num-seqs: {slots + 1}")
        slots += 1
        _update_under_load(fleet)


def _update_under_load(fleet: Fleet) -> None:
    async def go() -> list[Load]:
        loads = []
        work = asyncio.create_task(asyncio.to_thread(_apply_until_done, fleet))
        while not work.done():
            async with in_flight(fleet.url, "tiny", plain=3, streams=3, tokens=100) as load:
                loads.append(load)
        await work
        return loads

    loads = asyncio.run(go())
    names = _live(fleet)
    assert len(names) == len(set(names)) == 2
    assert {name.split(".")[2] for name in names} == {fleet.status()["models"][0]["revision"]}
    lost = [r for load in loads for r in load.requests if not r.succeeded]
    assert [(r.id, r.status, r.finish, r.error) for r in lost] == []
