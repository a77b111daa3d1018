"""The wheel of this checkout, in an environment of its own on a host without the checkout."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.lab.base import CHECKOUT, LOCK, base, cache, download, enter, python_of
from tests.lab.wait import run_aloud

INSTALL = """
install -d -m 0700 /shared/secrets
python3 -m venv /opt/own
pip() { /opt/own/bin/pip install --quiet --no-index --no-deps --no-compile "$@"; }
pip --find-links /mnt/wheels --require-hashes --requirement /mnt/requirements.lock
pip /mnt/dist/*.whl
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=CHECKOUT, check=True, capture_output=True)
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """How a command runs where the wheel is installed; nothing there is of the checkout."""
    wheels, upper = cache() / "wheels", tmp_path_factory.mktemp("root")
    log = tmp_path_factory.mktemp("log") / "log"
    run_aloud("wheels", download(LOCK, python_of(base()), wheels), log, print)
    specs = CHECKOUT / "specs"
    binds = {
        wheels: "/mnt/wheels",
        wheel.parent: "/mnt/dist",
        LOCK: "/mnt/requirements.lock",
        specs: "/mnt/specs",
    }
    run_aloud(
        "the wheel", enter(base(), ["sh", "-ec", INSTALL], upper=upper, binds=binds), log, print
    )
    return enter(base(), [], upper=upper, binds={specs: "/mnt/specs"}, cwd="/")


def run(installed: list[str], *argv: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*installed, *argv], capture_output=True, text=True, check=False)


def fleet(installed: list[str], *words: str) -> "subprocess.CompletedProcess[str]":
    return run(installed, "/opt/own/bin/fleet", *words)


def test_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    """The data files too: configuration, scripts, schemas of arguments."""
    listed = subprocess.run(
        ["git", "ls-files", "reconciler"], cwd=CHECKOUT, check=True, capture_output=True, text=True
    )
    tracked = listed.stdout.split()
    assert {Path(name).suffix for name in tracked} >= {".py", ".conf", ".lua", ".sh", ".json"}
    assert set(tracked) <= set(zipfile.ZipFile(wheel).namelist())


def test_installed_command_works_without_the_checkout(installed: list[str]) -> None:
    """It reads a spec, the schema of its engine's arguments and the script of a job."""
    where = run(
        installed, "/opt/own/bin/python", "-c", "import reconciler; print(reconciler.__file__)"
    )
    assert where.stdout.startswith("/opt/own/lib/")
    assert "validate" in fleet(installed, "--help").stdout
    valid = fleet(installed, "validate", "/mnt/specs/demo-standin")
    assert (valid.returncode, valid.stdout) == (
        0,
        "/mnt/specs/demo-standin: fleet demo, 1 model, 2 replicas\n",
    )
    assert fleet(installed, "schema").stdout == (CHECKOUT / "specs/schema.json").read_text()
    edit = (
        "cp -r /mnt/specs/demo-standin /tmp/spec && sed -i s/max-num-seqs/max-num-seq/ /tmp/spec/*"
    )
    script = f"{edit} && exec /opt/own/bin/fleet validate /tmp/spec"
    mistaken = run(installed, "sh", "-c", script)
    assert mistaken.returncode == 1
    assert "max-num-seq" in mistaken.stderr
    assert "Traceback" not in mistaken.stderr


def test_installed_command_makes_what_jobs_and_gateways_run(installed: list[str]) -> None:
    """Of its own data files; no Slurm and no gateway is asked."""
    job = fleet(installed, "render", "/mnt/specs/demo-standin", "tiny")
    assert job.returncode == 0, job.stderr
    assert "#SBATCH --job-name=demo.tiny." in job.stdout
    assert "trap_ready" in job.stdout
    code = (
        "from pathlib import Path; from reconciler.routes import render_gateway;"
        "from reconciler.spec import load_fleet;"
        "print(*render_gateway(load_fleet(Path('/mnt/specs/demo-standin')), []).files)"
    )
    made = run(installed, "/opt/own/bin/python", "-c", code)
    assert "fleet.conf" in made.stdout.split(), made.stderr
