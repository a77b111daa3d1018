"""What the reconciler relies on, asked of the real Slurm through the real adapter."""

from collections.abc import Iterator

import pytest

from reconciler.errors import SlurmUnavailable, SubmitRejected
from reconciler.naming import ReplicaName
from reconciler.plan import JobRef
from reconciler.state import Job, Phase
from tests.contract.slurm import LabSlurm
from tests.lab import Lab
from tests.lab.wait import wait_for

FLEET = "contract"


@pytest.fixture
def slurm(lab: Lab) -> Iterator[LabSlurm]:
    """The adapter on the shared lab; whatever a test submitted is cancelled and gone after it."""
    yield LabSlurm(lab)
    for user in ("fleet", "mallory"):
        lab.run("login", ["scancel", f"--user={user}"], user=user)
    wait_for("the queue to be empty", lambda: not _squeue(lab))


def _squeue(lab: Lab) -> str:
    argv = ["squeue", "--noheader", "--states=PENDING,RUNNING,COMPLETING", "--format=%i %j %T %u"]
    return lab.run("login", argv).stdout


def _script(name: str, body: str, *options: str) -> str:
    lines = [f"#SBATCH --job-name={name}", "#SBATCH --output=/dev/null", "#SBATCH --mem=100M"]
    lines += [f"#SBATCH {option}" for option in options]
    return "\n".join(["#!/bin/bash", *lines, body, ""])


def _name(ordinal: int = 0, model: str = "tiny") -> ReplicaName:
    return ReplicaName(fleet=FLEET, model=model, revision="0123abcd", ordinal=ordinal)


def _ref(job: Job) -> JobRef:
    return JobRef(id=job.id, submitted_at=job.submitted_at, name=job.name)


def _job(slurm: LabSlurm, job_id: int) -> Job | None:
    return next((job for job in slurm.jobs(FLEET).jobs if job.id == job_id), None)


def _live(slurm: LabSlurm) -> dict[int, Job]:
    """The jobs that have not ended; those of earlier tests are listed for MinJobAge."""
    return {job.id: job for job in slurm.jobs(FLEET).jobs if job.phase is not Phase.ENDED}


def _in_phase(slurm: LabSlurm, job_id: int, phase: Phase) -> Job:
    def ask() -> Job | None:
        job = _job(slurm, job_id)
        return job if job is not None and job.phase is phase else None

    return wait_for(f"job {job_id} to be {phase}", ask)


def test_two_submissions_of_one_name_are_never_both_running(slurm: LabSlurm, lab: Lab) -> None:
    """Slurm's singleton holds a second job of one name until the first has left RUNNING."""
    script = _script(str(_name()), "sleep 60", "--dependency=singleton")
    first, second = slurm.submit(script), slurm.submit(script)
    _in_phase(slurm, first, Phase.RUNNING)
    waiting = _job(slurm, second)
    assert waiting is not None
    assert (waiting.phase, waiting.reason) == (Phase.PENDING, "Dependency")
    lab.run("login", ["scancel", str(first)])
    _in_phase(slurm, second, Phase.RUNNING)
    ended = _job(slurm, first)
    assert ended is None or ended.phase in (Phase.ENDING, Phase.ENDED)


def test_a_job_sets_its_own_comment_which_the_listing_then_shows(slurm: LabSlurm) -> None:
    """One listing gives identity, state and address: the job itself has written the last one."""
    comment = (
        '{"v":1,"gpus":1,"commit":null,"run":{"node":"\'$SLURMD_NODENAME\'","restarts":0,'
        '"address":"10.0.0.9:20000","trap_ready":true,"ready":7,"draining":false}}'
    )
    body = f"scontrol update jobid=$SLURM_JOB_ID comment='{comment}'; sleep 60"
    job_id = slurm.submit(_script(str(_name()), body, '--comment=\'{"v":1,"gpus":1}\''))

    def published() -> Job | None:
        job = _job(slurm, job_id)
        return job if job is not None and job.run is not None else None

    job = wait_for("the job's comment", published)
    assert job.run is not None
    assert (job.run.address, job.run.ready_at) == ("10.0.0.9:20000", 7)
    assert job.run.node == job.nodes


def test_a_vandalised_comment_spoils_one_job_only(slurm: LabSlurm, lab: Lab) -> None:
    """A comment may hold any character, newlines and our own format included."""
    ids = [slurm.submit(_script(str(_name(n)), "sleep 60")) for n in range(2)]
    vandal = 'x|y\n7|fleet|RUNNING|1|1|1|gpu1|None|0|contract.tiny.0123abcd.9|{"v":1}\n'
    for job_id in ids:
        _in_phase(slurm, job_id, Phase.RUNNING)
    lab.run("login", ["scontrol", "update", f"jobid={ids[0]}", f"comment={vandal}"])
    jobs = _live(slurm)
    assert set(jobs) == set(ids)
    assert jobs[ids[0]].comment is None


def test_R27_foreign_jobs_are_not_listed_whatever_their_names(slurm: LabSlurm, lab: Lab) -> None:
    """Another user's job with our name, and our user's job with another fleet's, are foreign."""
    script = _script(str(_name()), "sleep 60")
    lab.run("login", ["sbatch"], user="mallory", input=script)
    other = _script("another.tiny.0123abcd.0", "sleep 60")
    lab.run("login", ["sbatch"], input=other)
    lab.run("login", ["sbatch"], input=_script("contract.tiny.run7", "sleep 60"))
    wait_for("three running jobs", lambda: _squeue(lab).count("RUNNING") == 3)
    assert _live(slurm) == {}


def test_a_cancel_of_another_name_touches_nothing(slurm: LabSlurm) -> None:
    """Slurm itself checks the name: an id that means another job by now is left alone."""
    job_id = slurm.submit(_script(str(_name()), "sleep 60"))
    job = _in_phase(slurm, job_id, Phase.RUNNING)
    slurm.cancel(
        JobRef(id=job_id, submitted_at=job.submitted_at, name=_name(ordinal=5)), pending=False
    )
    slurm.cancel(_ref(job), pending=True)
    still = _job(slurm, job_id)
    assert still is not None
    assert still.phase is Phase.RUNNING
    slurm.cancel(_ref(job), pending=False)
    _in_phase(slurm, job_id, Phase.ENDED)


@pytest.mark.usefixtures("slurm")
def test_a_token_of_the_reconciler_is_in_no_job(lab: Lab) -> None:
    """R36: what lies in the reconciler's environment does not travel with its jobs."""
    secret = {"HF_TOKEN": "hf_do_not_leak", "SBATCH_EXPORT": "ALL", "SLURM_EXPORT_ENV": "ALL"}
    leaking = LabSlurm(lab, env=secret)
    out = "/shared/environment.txt"
    body = f"tr '\\0' '\\n' < /proc/$$/environ > {out}.part; mv {out}.part {out}; sleep 60"
    job_id = leaking.submit(_script(str(_name()), body))
    seen = wait_for("the job's environment", lambda: _text(lab, "environment.txt"))
    assert "SLURM_JOB_ID" in seen
    assert "hf_do_not_leak" not in seen
    shown = lab.run("login", ["scontrol", "show", "job", str(job_id)]).stdout
    script = lab.run("login", ["scontrol", "write", "batch_script", str(job_id), "-"]).stdout
    assert "hf_do_not_leak" not in shown + script


def _text(lab: Lab, name: str) -> str:
    file = lab.shared / name
    return file.read_text() if file.exists() else ""


def test_a_submission_that_slurm_refuses_is_rejected_with_its_words(slurm: LabSlurm) -> None:
    """No job exists after SubmitRejected, and the one line says why."""
    with pytest.raises(SubmitRejected, match="partition"):
        slurm.submit(_script(str(_name()), "true", "--partition=nowhere"))
    assert _live(slurm) == {}


def test_every_node_is_reported_with_its_state(slurm: LabSlurm, lab: Lab) -> None:
    """sinfo's words arrive per node, lower case."""
    assert dict(slurm.nodes()) == dict.fromkeys(lab.nodes, "idle")


def test_no_controller_is_unavailable_and_never_an_empty_list(own_lab: Lab) -> None:
    """R01: a controller that is down raises; it does not answer `no jobs`."""
    slurm = LabSlurm(own_lab)
    own_lab.stop_daemon("login", "slurmctld", kill=True)
    with pytest.raises(SlurmUnavailable, match="squeue"):
        slurm.jobs(FLEET)
    own_lab.start_daemon("login", "slurmctld")
    wait_for("slurmctld to answer", lambda: _answers(slurm))


def _answers(slurm: LabSlurm) -> bool:
    try:
        return slurm.jobs(FLEET).jobs == ()
    except SlurmUnavailable:
        return False
