"""`python -m bench.cycle`: what a cycle costs over 1,000 jobs on the lab's real Slurm.

Some fifty replicas run (stand-in engines behind real NGINX), the others wait for a GPU. Every
number has its reference in the same run: the imports alone, bare sbatch, a cycle in which every
engine answers. Processor time is the reconciler's own, without that of squeue, ssh and git.
"""

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from tests.lab import Lab
from tests.lab.fleet import Fleet
from tests.lab.wait import wait_for

JOBS = 1000
NODES = 13
RUNNING = 4 * NODES  # a GPU each
MODELS = 20
RUNS = 5
LIMITED = 60
# Of the issue that asked for it.
MOST_QUERIES = 3
MOST_IDLE_MS = 300.0
MOST_PROBE_MS = 3.0
PROBE_TIMEOUT_S = 3.0
MOST_BEYOND_TIMEOUT_S = 2.0

_PYTHON = "/opt/modelfleet/venv/bin/python"
# Runs its arguments as `fleet`, or only imports what that does; says what it took as its last line.
_MEASURED = """
import resource, sys, time
began = time.monotonic()
import reconciler.cli, reconciler.cycle, reconciler.render
import reconciler.adapters.engine, reconciler.adapters.images, reconciler.adapters.nginx
import reconciler.adapters.slurm_cli, reconciler.adapters.store
import anyio._backends._asyncio, httpcore  # which httpx imports at its first question
status = 0
if sys.argv[1:]:
    try:
        reconciler.cli.main()
    except SystemExit as end:
        status = end.code or 0
usage = resource.getrusage(resource.RUSAGE_SELF)
print(usage.ru_utime + usage.ru_stime, time.monotonic() - began, status)
"""
_QUERIES = ("squeue", "sinfo", "scontrol", "sacct")
_SHIM = '#!/bin/sh\necho {tool} >> /shared/shims/log\nexec /usr/bin/{tool} "$@"\n'
_SHIMMED = {"PATH": "/shared/shims:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"}
_MODEL = """\
name: model-{at}
image: standin
weights: /shared/models
args: {{max-model-len: 4096}}
resources: {{gpus: 1, cpus: 1, memory: 512M}}
replicas: {replicas}
"""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one run took, in seconds, and what it printed."""

    processor_s: float
    wall_s: float
    status: int
    output: str


def measured(fleet: Fleet, *arguments: str) -> Cost:
    """Run `fleet` on the login host, or only its imports when there is no argument."""
    argv = [_PYTHON, "-c", _MEASURED, *arguments]
    done = fleet.lab.run("login", argv, timeout=600)
    *output, last = done.stdout.splitlines()
    processor_s, wall_s, status = last.split()
    return Cost(float(processor_s), float(wall_s), int(status), "\n".join(output))


def cycle(fleet: Fleet) -> Cost:
    """Run one cycle."""
    return measured(fleet, "apply", fleet.spec)


def in_turns(fleet: Fleet) -> tuple[float, float]:
    """Return the median processor times of the imports and of a cycle, in seconds."""
    pairs = [(measured(fleet).processor_s, cycle(fleet).processor_s) for _ in range(RUNS + 1)][1:]
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)


def queries(fleet: Fleet) -> Sequence[str]:
    """Return the Slurm queries of one cycle, counted by shims on PATH."""
    folder = fleet.lab.shared / "shims"
    folder.mkdir(mode=0o777, exist_ok=True)
    folder.chmod(0o777)
    for tool in _QUERIES:
        (folder / tool).write_text(_SHIM.format(tool=tool))
        (folder / tool).chmod(0o755)
    fleet.lab.run("login", fleet.command("apply"), env=_SHIMMED, timeout=600)
    log = folder / "log"
    asked = log.read_text().split() if log.exists() else []
    log.unlink(missing_ok=True)
    return asked


def write_spec(fleet: Fleet, replicas: int) -> None:
    """Want so many replicas in all, of twenty models, and nothing of the demo's model."""
    text = fleet.spec_file.read_text()
    text = text[: text.index("models:")].replace("budget: {gpus: 4}", f"budget: {{gpus: {JOBS}}}")
    fleet.spec_file.write_text(text + "models: []\n")
    folder = fleet.spec_file.parent / "models"
    folder.mkdir(exist_ok=True)
    for at in range(MODELS):
        record = _MODEL.format(at=at, replicas=replicas // MODELS)
        (folder / f"model-{at}.yaml").write_text(record)


def partition(lab: Lab, state: str) -> None:
    """Let jobs start, or not."""
    lab.run("login", ["scontrol", "update", "partitionname=gpu", f"state={state}"], user="root")


def engines(lab: Lab, signal: str) -> None:
    """Stop (their sockets still accept) or continue every engine."""
    command = f"for pid in $(pgrep -f [s]tandin.py); do kill -{signal} $pid; done"
    for node in lab.nodes:
        lab.run(node, ["sh", "-c", command], user="root", check=False)


def ready(fleet: Fleet) -> int:
    """Run a cycle; return how many replicas are ready and routed after it."""
    cycle(fleet)
    return sum(view["routed"] and view["status"] == "ready" for view in fleet.replicas())


def line(title: str, value: str, goal: str = "") -> None:
    """Print a row of the table."""
    print(f"{title:46}  {value:>24}  {goal}".rstrip(), flush=True)


def fill(fleet: Fleet) -> None:
    """From an empty cluster to a thousand submitted replicas, against as many bare sbatch."""
    bare = (
        "import subprocess, time; from concurrent.futures import ThreadPoolExecutor as Pool\n"
        "argv = ['sbatch', '--parsable', '--hold', '--job-name=bare', '--wrap=true']\n"
        "began = time.monotonic()\n"
        "with Pool(8) as pool: list(pool.map(lambda _: subprocess.run(argv), range(100)))\n"
        "print((time.monotonic() - began) / 100)"
    )
    said = fleet.lab.run("login", [_PYTHON, "-c", bare], timeout=300).stdout
    bare_s = float(said.splitlines()[-1])
    fleet.lab.run("login", ["scancel", "--name=bare"])
    cost = cycle(fleet)
    count = len({job[1] for job in fleet.jobs() if job[1] != "bare"})
    line(f"one cycle submits {JOBS}", f"{count} in {cost.wall_s:.1f} s")
    each_s = cost.wall_s / count
    ratio = f"x {each_s / bare_s:.2f}"
    line("  each, against bare sbatch, 8 at once", f"{each_s * 1e3:.0f} ms, {ratio}")
    while len({job[1] for job in fleet.jobs() if job[1] != "bare"}) < JOBS:
        line("  left for the next cycle", cycle(fleet).output.splitlines()[-1])


def idle(fleet: Fleet) -> float:
    """A cycle that changes nothing, without and with probes. Returns the latter's wall time."""
    imports_s, quiet_s = in_turns(fleet)
    quiet_ms = (quiet_s - imports_s) * 1e3
    line("CPU of the imports", f"{imports_s * 1e3:.0f} ms")
    line(
        f"CPU of a cycle, {JOBS} jobs, no probe",
        f"{quiet_ms:.0f} ms more, x {quiet_s / imports_s:.2f}",
        f"at most {MOST_IDLE_MS:.0f} ms more",
    )
    partition(fleet.lab, "up")
    wait_for(f"{RUNNING} replicas", lambda: ready(fleet) == RUNNING, timeout_s=400, say=print)
    imports_s, probing_s = in_turns(fleet)
    probe_ms = ((probing_s - imports_s) * 1e3 - quiet_ms) / RUNNING
    line(
        f"CPU of a cycle, {JOBS} jobs, {RUNNING} probes",
        f"{probe_ms:.2f} ms a probe more",
        f"at most {MOST_PROBE_MS:.0f} ms",
    )
    asked = queries(fleet)
    said = f"{len(asked)} ({', '.join(asked)})"
    line("Slurm queries of a cycle", said, f"at most {MOST_QUERIES}")
    return statistics.median(cycle(fleet).wall_s for _ in range(RUNS))


def hung(fleet: Fleet, well_s: float) -> None:
    """Every engine's process is stopped: connections are taken and nothing is answered."""
    engines(fleet.lab, "STOP")
    try:
        hung_s = cycle(fleet).wall_s
    finally:
        engines(fleet.lab, "CONT")
    line("wall time of a cycle, all answer", f"{well_s:.1f} s")
    line(
        f"wall time of a cycle, {RUNNING} hung endpoints",
        f"{hung_s:.1f} s",
        f"at most {PROBE_TIMEOUT_S + MOST_BEYOND_TIMEOUT_S:.0f} s",
    )


def limited(lab: Lab) -> None:
    """Slurm's own rate limiter: what it holds up is left for the next cycles and none is lost."""
    limiter = "echo SlurmctldParameters=rl_enable >> /etc/slurm/slurm.conf"
    lab.run("login", ["sh", "-c", f"{limiter} && scontrol reconfigure"], user="root")
    fleet = Fleet(lab, name="limited")
    write_spec(fleet, LIMITED)
    cycles = 0
    while cycles < 10:
        cost = cycle(fleet)
        cycles += 1
        names = [job[1] for job in fleet.jobs() if job[1].startswith("limited.")]
        failed = sum("failed:" in text for text in cost.output.splitlines())
        line(
            f"rate limiter, cycle {cycles}: submitted of {LIMITED}",
            f"{len(set(names))} in {cost.wall_s:.1f} s",
            f"{failed} failed, {len(names) - len(set(names))} twice",
        )
        for text in (text for text in cost.output.splitlines() if "left over:" in text):
            line("  note", " ".join(text.split()))
        if len(set(names)) == LIMITED:
            return


def main() -> None:
    """Print the table."""
    with Lab.start(f"bench-{os.getpid()}", nodes=NODES) as lab:
        partition(lab, "down")
        fleet = Fleet(lab, name="bench")
        write_spec(fleet, JOBS)
        fill(fleet)
        well_s = idle(fleet)
        hung(fleet, well_s)
    with Lab.start(f"bench-{os.getpid()}") as lab:
        partition(lab, "down")
        limited(lab)


if __name__ == "__main__":
    main()
