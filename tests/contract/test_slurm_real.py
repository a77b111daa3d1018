"""What only a real Slurm can answer, through the real adapter."""

from collections.abc import Iterator

import pytest

from tests.contract.clusters import REPLICA, Body, RealCluster, name, script
from tests.contract.slurm import LabSlurm
from tests.lab import Lab
from tests.lab.wait import wait_for


@pytest.fixture
def tidy(lab: Lab) -> Iterator[None]:
    """Whatever a test submitted is cancelled and gone after it."""
    yield
    real = RealCluster(lab)
    real.tidy()
    real.close()


@pytest.mark.usefixtures("tidy")
def test_a_token_of_the_reconciler_is_in_no_job(lab: Lab) -> None:
    """R36: what lies in the reconciler's environment does not travel with its jobs."""
    secret = {"HF_TOKEN": "hf_do_not_leak", "SBATCH_EXPORT": "ALL", "SLURM_EXPORT_ENV": "ALL"}
    leaking = LabSlurm(lab, env=secret)
    out = "/shared/environment.txt"
    dump = f"tr '\\0' '\\n' < /proc/$$/environ > {out}.part; mv {out}.part {out}; sleep 60"
    job_id = leaking.submit(script(name(), Body(REPLICA.behaviour, dump)))
    leaking.close()
    seen = wait_for("the job's environment", lambda: _text(lab, "environment.txt"))
    assert "SLURM_JOB_ID" in seen
    assert "hf_do_not_leak" not in seen
    shown = lab.run("login", ["scontrol", "show", "job", str(job_id)]).stdout
    text = lab.run("login", ["scontrol", "write", "batch_script", str(job_id), "-"]).stdout
    assert "hf_do_not_leak" not in shown + text


def _text(lab: Lab, file_name: str) -> str:
    file = lab.shared / file_name
    return file.read_text() if file.exists() else ""
