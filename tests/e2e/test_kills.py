"""Killed where it hurts: right before and right after each call that changes the world.

Shims stand before sbatch, scancel and ssh on the login host, nginx on the gateway and scontrol on
the nodes. Each kills (9) who calls: the reconciler; the script that changes the gateway, and the
reconciler with it; the job's own script. Requests run throughout. Each boundary is hit once here,
spread over changes and ways to run the reconciler; in `make soak` five times in each of them.
"""

import os
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import pytest

from tests.e2e.checks import assert_settled, live, lost, routed, under_load
from tests.lab import Lab
from tests.lab.fleet import Fleet, gateway_log
from tests.lab.wait import wait_for

SOAK = bool(os.environ.get("SOAK"))
CHANGES = 5 if SOAK else 1
# cron, CI and systemd; each is started again whenever it has ended.
WAYS = {
    "apply": ("apply",),
    "apply --wait": ("apply", "--wait", "--timeout", "90s", "--interval", "1"),
    "run": ("run", "--interval", "1"),
}

STANDIN = "/opt/modelfleet/src/tests/lab/standin.py"
# What is called with which words (bash patterns), so that a mere look is not taken for a change.
CALLS = {
    "sbatch": "sbatch *",
    "scancel": "scancel *",
    "ssh": "ssh * change ????????????",
    "nginx-test": "nginx -t *",
    "nginx-reload": "nginx -s reload *",
    "publish-address": '*"ready":null,"draining":false*',
    "publish-ready": '*"ready":[0-9]*"draining":false*',
    "publish-draining": '*"draining":true*',
}
_CALLERS = ("sbatch", "scancel", "ssh", "nginx-test", "nginx-reload")
# Where each tool is called.
HOSTS = {
    "sbatch": ("login",),
    "scancel": ("login",),
    "ssh": ("login",),
    "nginx": ("gateway",),
    "scontrol": ("gpu1", "gpu2", "gpu3", "gpu4"),
}

_SHIM = """#!/bin/bash
tool=${{0##*/}}
real=/usr/bin/$tool
[[ -x $real ]] || real=/usr/sbin/$tool
case "$tool $*" in
{cases}
  *) exec "$real" "$@" ;;
esac
strike() {{
  # Armed is a file; who takes it away kills, so it happens once.
  mv "/shared/kills/$call.$1" "/shared/kills/done/$call.$1.$RANDOM$$" 2>/dev/null || return
  case $tool in
    scontrol)
      grep -o '"address":"[^"]*' <<< "$*" | cut -d'"' -f4 >> /shared/kills/replicas
      # The job's first process, whatever subshell of it called.
      kill -9 "$(pgrep -o -f "job0*$SLURM_JOB_ID/slurm_script")" ;;
    nginx) touch /shared/kills/change-died; kill -9 "$PPID" ;;
    *) kill -9 "$PPID" ;;
  esac
  exit 137
}}
strike before
"$real" "$@"
status=$?
# The reconciler gets no answer of a change that died on the gateway: it dies with it.
if [[ $tool == ssh ]] && rm /shared/kills/change-died 2>/dev/null; then kill -9 "$PPID"; fi
strike after
exit "$status"
"""


class Kills:
    """The kills of one lab: armed by a test, struck once each by the shims."""

    def __init__(self, lab: Lab) -> None:
        self._folder = lab.shared / "kills"
        self._done = self._folder / "done"
        for folder in (self._folder, self._done):
            folder.mkdir()
            folder.chmod(0o777)
        cases = (f"  {_escaped(words)}) call={call} ;;" for call, words in CALLS.items())
        shim = _SHIM.format(cases="\n".join(cases))
        for tool, hosts in HOSTS.items():
            place = f"/usr/local/bin/{tool}"
            lay = ["sh", "-c", f"cat > {place} && chmod 755 {place}"]
            for host in hosts:
                lab.run(host, lay, user="root", input=shim)

    def arm(self, boundaries: Sequence[str]) -> None:
        for boundary in boundaries:
            (self._folder / boundary).touch()

    def armed(self) -> list[str]:
        return sorted(file.name for file in self._folder.glob("*.*"))

    def done(self) -> dict[str, int]:
        """Return how often each boundary was hit."""
        names = [file.name.rpartition(".")[0] for file in self._done.iterdir()]
        return {name: names.count(name) for name in sorted(set(names))}

    def replicas(self) -> set[str]:
        """Return the addresses of the replicas whose own script was killed."""
        file = self._folder / "replicas"
        return set(file.read_text().split()) if file.exists() else set()


def _escaped(pattern: str) -> str:
    return pattern.replace('"', '\\"').replace(" ", "\\ ")


@contextmanager
def _kept_at_work(fleet: Fleet, way: str) -> Iterator[list[int]]:
    """Run the reconciler again whenever it has ended or was killed; yield its exit statuses."""
    stop, said = threading.Event(), [""]
    current: list[subprocess.Popen[str]] = []
    ended: list[int] = []

    def repeat() -> None:
        while not stop.wait(0.3):
            process = fleet.lab.popen(
                "login", fleet.command(*WAYS[way]), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            current[:] = [process]
            said.append(process.communicate()[0])
            ended.append(process.returncode)

    repeating = threading.Thread(target=repeat)
    repeating.start()
    try:
        yield ended
    finally:
        stop.set()
        while repeating.is_alive():
            for process in current:
                process.kill()
            repeating.join(0.2)
    assert "Traceback" not in "".join(said)


def _boundaries(at: int) -> list[str]:
    """Return the boundaries of the change number `at`.

    Of a job's publications two in each change, of which one is a failure of its revision: more
    would only wait for its back-off. Over four changes every publication has its turn.
    """
    start = ("publish-address", "publish-ready")[at // 2 % 2]
    whens = ("before", "after") if at % 2 == 0 else ("after", "before")
    calls = [f"{call}.{when}" for call in _CALLERS for when in ("before", "after")]
    return [*calls, f"{start}.{whens[0]}", f"publish-draining.{whens[1]}"]


def _killed_during(fleet: Fleet, way: str, share: slice, change: Callable[[int], None]) -> None:
    """Make the change again and again with kills armed, and check what became of everything."""
    kills = Kills(fleet.lab)
    requests = []
    with _kept_at_work(fleet, way) as ended:
        for at in range(CHANGES):
            kills.arm(_boundaries(at)[share])
            requests += under_load(fleet, partial(change, at))
            assert_settled(fleet, replicas=2)
            assert kills.armed() == []
        deaths = sum(1 for status in ended if status in (-9, 137))
    assert 0 < deaths <= sum(kills.done().values())
    print(f"{way}: {len(requests)} requests, {deaths} deaths, {kills.done()}")
    tried = gateway_log(fleet.lab)
    gone = [request for request in requests if not request.succeeded]
    print(f"lost streams of killed replicas: {lost(gone)}")
    # Only a stream can be lost, once it has begun, and only with the job that was killed.
    assert lost([r for r in gone if not r.chunks]) == []
    assert {tried[request.id][-1] for request in gone} <= kills.replicas()


def _ways(change: str) -> list[tuple[str, slice]]:
    """Return the ways in which to make a change, each with its share of the boundaries."""
    if SOAK:
        return [(way, slice(None)) for way in WAYS]
    spread = [("update", "apply --wait"), ("update", "run"), ("rollover", "apply")]
    return [
        (way, slice(at, None, len(spread)))
        for at, (which, way) in enumerate(spread)
        if which == change
    ]


@pytest.mark.parametrize(("way", "share"), _ways("update"))
def test_R05_killed_around_every_effect_of_a_rolling_update(
    fleet: Fleet, way: str, share: slice
) -> None:
    """No orphan, no duplicate, converged, and no request lost, whatever call was the last."""
    fleet.run("apply", "--wait", "--timeout", "60s")

    def update(at: int) -> None:
        before = set(routed(fleet))
        fleet.edit(f"max-num-seqs: {16 + at}", f"max-num-seqs: {17 + at}")
        wait_for("the update", lambda: _replaced(fleet, before), timeout_s=180)

    _killed_during(fleet, way, share, update)


# How long a replica lives (Slurm counts minutes), and how long the first two take to be ready: just
# under half of what is left without drain and margin. A model that was once so slow has its
# successors submitted that early, so this long may all kills of one rollover take, and a back-off.
MINUTES, SLOW_S = (3, 50) if SOAK else (2, 22)
_SLOW_AT_FIRST = f"""#!/bin/bash
if ((SLURM_JOB_ID <= 2)); then sleep {SLOW_S}; fi
exec {STANDIN} "$@"
"""


@pytest.mark.parametrize(("way", "share"), _ways("rollover"))
def test_R05_killed_around_every_effect_of_a_rollover(fleet: Fleet, way: str, share: slice) -> None:
    """The same while walltimes end: who serves is replaced in time, kills or not."""
    engine = fleet.lab.shared / "engine.sh"
    engine.write_text(_SLOW_AT_FIRST)
    engine.chmod(0o755)
    fleet.edit(STANDIN, "/shared/engine.sh")
    fleet.edit('walltime: "4:00:00"', f'walltime: "{MINUTES}:00"')
    fleet.edit("startup_timeout_s: 600", f"startup_timeout_s: {SLOW_S + 14}")
    fleet.edit("drain_timeout_s: 60", "drain_timeout_s: 10")
    wait_for("two replicas", lambda: fleet.run("apply") and len(routed(fleet)) == 2, timeout_s=90)

    def roll_over(_: int) -> None:
        before = set(routed(fleet))
        wait_for("the rollover", lambda: _replaced(fleet, before), timeout_s=60 * MINUTES)

    _killed_during(fleet, way, share, roll_over)
    assert "TIMEOUT" not in {job[2] for job in fleet.jobs()}


def _replaced(fleet: Fleet, before: set[str]) -> bool:
    now = routed(fleet)
    return len(now) == 2 and before.isdisjoint(now) and before.isdisjoint(live(fleet))
