"""`python -m bench.cli`: how long `fleet --help` and `fleet validate` on 100 models take.

The references are a bare Python that imports pydantic (which alone loads little: its parts come on
demand), one that imports its BaseModel, and one that imports click and yaml and makes one model of
one field: less than that no command with a spec can take. All are measured in turns, with bytecode
cached as an installed package has it; the medians are of processor time, as this machine may be
shared.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

RUNS = 9
MODELS = 100
MOST_RATIO = 3.0

_FLEET = """\
version: 1
fleet: bench
slurm: {partition: gpu, log_dir: /shared/logs}
budget: {gpus: 1000}
images: {engine: {runtime: none, path: /opt/vllm, version: 0.32.0}}
gateway: {hosts: [{name: gateway}]}
secret_dir: /shared/secrets
"""
_MODEL = """\
name: model-{at}
image: engine
weights: /models/model-{at}
args: {{max-model-len: 8192, gpu-memory-utilization: 0.9, dtype: bfloat16}}
env: {{OMP_NUM_THREADS: "4"}}
resources: {{gpus: 1, cpus: 8, memory: 64G}}
replicas: 5
"""


_LEAST = """
import click, yaml
from pydantic import BaseModel
class Model(BaseModel):
    field: int
"""


def write_spec(folder: Path, models: int = MODELS) -> None:
    """Write a spec folder of so many models, a file each."""
    (folder / "models").mkdir()
    (folder / "fleet.yaml").write_text(_FLEET, encoding="utf-8")
    for at in range(models):
        path = folder / "models" / f"model-{at}.yaml"
        path.write_text(_MODEL.format(at=at), encoding="utf-8")


def processor_s(arguments: Sequence[str], bytecode: str) -> float:
    """Return the processor time of one run of Python with these arguments, in seconds."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPYCACHEPREFIX": bytecode, "PYTHONDONTWRITEBYTECODE": ""},
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(arguments)} ended with {process.returncode}")
    return usage.ru_utime + usage.ru_stime


def measure(commands: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Return each command's median, all measured in turns after one run that warms the caches."""
    with tempfile.TemporaryDirectory() as bytecode:
        rounds = [
            {title: processor_s(arguments, bytecode) for title, arguments in commands.items()}
            for _ in range(RUNS + 1)
        ][1:]
    return {title: statistics.median(one[title] for one in rounds) for title in commands}


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        write_spec(Path(folder))
        references = {
            "import pydantic": ["-c", "import pydantic"],
            "import BaseModel": ["-c", "from pydantic import BaseModel"],
            "one model, yaml, click": ["-c", _LEAST],
        }
        fleet = {
            "fleet --help": ["-m", "reconciler", "--help"],
            f"fleet validate, {MODELS} models": ["-m", "reconciler", "validate", folder],
        }
        medians = measure({"pass": ["-c", "pass"], **references, **fleet})
    print(f"{'':28}  {'CPU':>6}  " + "  ".join(f"x {name}" for name in references))
    for title, median in medians.items():
        ratios = (f"x {median / medians[name]:.2f}".ljust(len(name) + 2) for name in references)
        print(f"{title:28}  {median * 1e3:3.0f} ms  {'  '.join(ratios)}".rstrip())
    print(f"\nAt most x {MOST_RATIO:.0f} of Python with pydantic's import.")


if __name__ == "__main__":
    main()
