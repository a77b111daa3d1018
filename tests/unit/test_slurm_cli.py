"""Slurm's commands as they really answer: captured listings, and small programs that record.

The programs stand on PATH in place of Slurm's and write down their arguments, environment and
standard input.
"""

import getpass
import json
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reconciler.adapters.ports import Listing
from reconciler.adapters.slurm_cli import SlurmCli, parse_listing, parse_reservations
from reconciler.errors import SlurmUnavailable, SubmitRejected, SubmitUnknown
from reconciler.naming import ReplicaName
from reconciler.plan import JobRef
from reconciler.state import UNREADABLE, Phase
from tests.unit.build import comment_text

MARK = "|0123456789abcdef|"
NAME = ReplicaName(fleet="demo", model="tiny", revision="0123abcd", ordinal=0)
REF = JobRef(id=42, submitted_at=1_700_000_000, name=NAME)

# In the order in which squeue is asked for them; as 24.11 prints them.
FIELDS: dict[str, str] = {
    "id": "42",
    "user": "fleet",
    "state": "RUNNING",
    "submitted": "1700000000",
    "started": "1700000010",
    "ends": "1700014410",
    "nodes": "node1",
    "reason": "None",
    "restarts": "0",
    "name": str(NAME),
    "status": "0:0",
    "limit": "4:00:00",
    "node_count": "1",
    "per_node": "gres/gpu:1",
    "excluded": "",
    "comment": comment_text(node="node1"),
}


def line(mark: str = MARK, **changes: str) -> str:
    """One record of squeue's output: each field with the mark behind it."""
    record = {**FIELDS, **changes}
    assert set(record) == set(FIELDS)
    return "".join(f"{field}{mark}" for field in record.values()) + "\n"


def listing(*lines: str) -> Listing:
    return parse_listing("".join(lines), mark=MARK, fleet="demo", user="fleet")


def test_listing_of_a_running_job_is_read() -> None:
    """One query gives identity, state, times and address."""
    [job] = listing(line()).jobs
    assert (job.id, job.submitted_at, job.name) == (42, 1_700_000_000, NAME)
    assert (job.state, job.reason, job.nodes) == ("RUNNING", "None", "node1")
    assert (job.started_at, job.ends_at, job.restarts) == (1_700_000_010, 1_700_014_410, 0)
    assert job.run is not None
    assert job.run.address == "10.0.0.1:20000"


@pytest.mark.parametrize("word", ["N/A", "Unknown", "NONE", ""])
def test_R07_time_that_slurm_does_not_know_is_none(word: str) -> None:
    """A pending job has no start and no end yet."""
    changes = {"state": "PENDING", "started": word, "ends": word, "nodes": ""}
    [job] = listing(line(**changes)).jobs
    assert (job.phase, job.started_at, job.ends_at) == (Phase.PENDING, None, None)


@pytest.mark.parametrize(
    ("text", "limit_s"),
    [("4:00:00", 14_400), ("1-00:00:00", 86_400), ("UNLIMITED", None), ("Partition_Limit", None)],
)
def test_R07_walltime_of_a_job_is_read(text: str, limit_s: int | None) -> None:
    """A job without a limit has none."""
    [job] = listing(line(limit=text)).jobs
    assert job.limit_s == limit_s


@pytest.mark.parametrize(
    ("count", "per_node", "gpus"),
    [
        ("1", "gres/gpu:2", 2),  # 24.11
        ("2", "gres:gpu:4", 8),  # 22.05
        ("1", "gres/gpu:a100:3", 3),
        ("1", "gres/shard:8,gres/gpu:1", 1),
        ("1", "N/A", None),
        ("", "gres/gpu:2", None),
    ],
)
def test_gpus_that_a_job_was_submitted_with_are_read(
    count: str, per_node: str, gpus: int | None
) -> None:
    """They count where the comment can't be read: a comment is the job's own, and a vandal's."""
    [job] = listing(line(node_count=count, per_node=per_node, comment="?")).jobs
    assert job.gpus == gpus


def test_nodes_that_a_job_avoids_are_read() -> None:
    """Slurm writes them as it writes all lists of nodes."""
    [job] = listing(line(excluded="gpu[1-2]")).jobs
    assert job.excluded == "gpu[1-2]"


# As `scontrol show reservation --oneliner` printed it on 24.11, with SLURM_TIME_FORMAT=%s.
RESERVATION = (
    "ReservationName={name} StartTime={begin} EndTime=1795318496 Duration=00:30:00 Nodes=gpu[1-2]"
    " NodeCnt=2 CoreCnt=32 Features=(null) PartitionName=(null) Flags={flags} TRES=cpu=32"
    " Users=root Groups=(null) Accounts=(null) Licenses=(null) State=INACTIVE BurstBuffer=(null)"
    " MaxStartDelay=(null)\n"
)


def test_begins_of_maintenances_are_read() -> None:
    """Other reservations are somebody's work, and what can't be read is none."""
    text = "".join(
        RESERVATION.format(name=name, begin=begin, flags=flags)
        for name, begin, flags in (
            ("later", "1795316696", "MAINT,IGNORE_JOBS,SPEC_NODES"),
            ("sooner", "1795310000", "MAINT"),
            ("course", "1795300000", "SPEC_NODES"),
            ("odd", "soon", "MAINT"),
        )
    )
    assert parse_reservations(text) == [1_795_310_000.0, 1_795_316_696.0]
    assert parse_reservations("No reservations in the system\n") == []


def test_listing_that_is_empty_is_a_fact() -> None:
    """No line is no job; what to think of that is the planner's business."""
    assert listing() == Listing(jobs=(), odd_lines=0)


@pytest.mark.parametrize(
    "comment",
    [
        *("", "(null)", "a\nb", "\n", "\n\n42|x", "é\u2028\x1b[31m", "|", "|0123456789abcdeX|"),
        "\n".join(FIELDS.values()),
    ],
)
def test_R08_vandalised_comment_spoils_one_job_only(comment: str) -> None:
    """A comment may hold anything, line ends included: the jobs around it are read as ever."""
    found = listing(line(id="1"), line(id="2", comment=comment), line(id="3"))
    assert [job.id for job in found.jobs] == [1, 2, 3]
    assert [job.comment is None for job in found.jobs] == [False, True, False]
    assert found.odd_lines == 0


@pytest.mark.parametrize(
    "changes",
    [
        *({"id": ""}, {"id": "42_7"}, {"id": "42+1"}, {"id": "x"}, {"id": "4 2"}),
        *({"submitted": "N/A"}, {"submitted": "2026-01-01T00:00:00"}, {"submitted": "-1"}),
        *({"restarts": "N/A"}, {"restarts": ""}, {"restarts": "\u0661"}, {"state": ""}),
    ],
    ids=str,
)
def test_R08_unreadable_line_is_a_job_of_which_nothing_is_known(changes: dict[str, str]) -> None:
    """Unknown is never absent: the job keeps its name's place and is never touched."""
    found = listing(line(id="1"), line(**changes), line(id="3"))
    assert found.odd_lines == 1
    odd = found.jobs[1]
    assert (odd.state, odd.phase, odd.comment, odd.name) == (UNREADABLE, Phase.UNKNOWN, None, NAME)
    assert [job.id for job in (found.jobs[0], found.jobs[2])] == [1, 3]


@pytest.mark.parametrize(
    "changes",
    [
        *({"user": "alice"}, {"user": ""}, {"user": "Fleet"}, {"name": "bash"}, {"name": ""}),
        *({"name": "other.tiny.0123abcd.0"}, {"name": "demo.tiny.0123abcd"}),
        *({"name": f"{NAME}\n"}, {"name": f"\n{NAME}"}, {"name": f"{NAME}\nx"}),
    ],
    ids=str,
)
def test_R27_foreign_job_is_left_out(changes: dict[str, str]) -> None:
    """Another user, another fleet or another form of name: not ours, and not odd."""
    found = listing(line(**changes), line(id="3"))
    assert [job.id for job in found.jobs] == [3]
    assert found.odd_lines == 0


def test_R01_listing_cut_short_within_a_line_is_no_listing() -> None:
    """Half an answer is no answer: the missing jobs must not look as if they had ended."""
    one, two = line(id="1"), line(id="1") + line(id="2")
    for length in range(1, len(two)):
        if length != len(one):
            with pytest.raises(SlurmUnavailable, match="cut short"):
                listing(two[:length])


@pytest.mark.parametrize("text", ["slurm_load_jobs error\n", "\n", "x", line() + "banner\n"])
def test_R01_text_that_is_no_listing_is_refused(text: str) -> None:
    """A site's banner, or an error with rc 0, is never an empty queue."""
    with pytest.raises(SlurmUnavailable):
        listing(text)


# --- commands ----------------------------------------------------------------------------------

FAKE = """\
#!/bin/sh
{
  for word in "$@"; do printf '%s\\0' "$word"; done
} >"@FOLDER@/@NAME@.argv"
env -0 >"@FOLDER@/@NAME@.env"
cat >"@FOLDER@/@NAME@.stdin"
"""

Install = Callable[..., None]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder before all others on PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


@pytest.fixture
def install(folder: Path) -> Install:
    """Makes a program on PATH that records how it was started and then runs `body`."""

    def make(name: str, body: str) -> None:
        program = folder / name
        head = FAKE.replace("@FOLDER@", str(folder)).replace("@NAME@", name)
        program.write_text(head + body)
        program.chmod(program.stat().st_mode | stat.S_IXUSR)

    return make


def arguments(folder: Path, name: str) -> list[str]:
    return (folder / f"{name}.argv").read_text().split("\0")[:-1]


def environment(folder: Path, name: str) -> dict[str, str]:
    pairs = (folder / f"{name}.env").read_text().split("\0")[:-1]
    return {pair.partition("=")[0]: pair.partition("=")[2] for pair in pairs}


@pytest.mark.parametrize(
    "stdout",
    ["42\n", "42", "42;cluster\n", "Welcome to the cluster!\n42\n", "42;east\nhave a nice day\n"],
)
def test_R03_submit_with_banner_lines_returns_the_id(
    stdout: str, install: Install, folder: Path
) -> None:
    """A banner, a plugin's warning or the cluster's name does not lose a job."""
    (folder / "said").write_text(stdout)
    install("sbatch", f"cat {folder}/said; echo 'sbatch: warning: 7 things' >&2")
    assert SlurmCli().submit("#!/bin/bash\ntrue\n") == 42
    assert arguments(folder, "sbatch") == ["--parsable"]
    assert (folder / "sbatch.stdin").read_text() == "#!/bin/bash\ntrue\n"


@pytest.mark.parametrize("stdout", ["", "hello\n", "42\n43\n", "Submitted batch job 42\n", "-1\n"])
def test_R03_submit_that_names_no_single_id_is_unknown(
    stdout: str, install: Install, folder: Path
) -> None:
    """rc 0 without one id: the job may exist, so nothing is repeated in this cycle."""
    (folder / "said").write_text(stdout)
    install("sbatch", f"cat {folder}/said")
    with pytest.raises(SubmitUnknown, match="neither yes nor no"):
        SlurmCli().submit("x")


@pytest.mark.parametrize(
    "stderr",
    [
        "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation",
        "sbatch: error: Unable to contact slurm controller (connect failure)",
        "sbatch: error: Batch job submission failed: Zero Bytes were transmitted or received",
        "sbatch: error: slurm_receive_msg: Connection reset by peer",
        "sbatch: error: Batch job submission failed: Unexpected message received",
        "sbatch: error: Batch job submission failed: Transport endpoint is not connected",
        "sbatch: error: Communication connection failure",
    ],
)
def test_R04_submit_that_lost_its_answer_is_unknown(stderr: str, install: Install) -> None:
    """A broken connection says nothing about the job: it may have been accepted."""
    install("sbatch", f'echo "{stderr}" >&2; exit 1')
    with pytest.raises(SubmitUnknown) as caught:
        SlurmCli().submit("x")
    assert str(caught.value) == f"sbatch: {stderr}"


@pytest.mark.parametrize(
    "stderr",
    [
        "sbatch: error: Batch job submission failed: Invalid account or account/partition",
        "sbatch: error: invalid partition specified: nowhere",
        "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy",
    ],
)
def test_R03_submit_that_slurm_refused_is_rejected(stderr: str, install: Install) -> None:
    """Slurm's own no: there is no job, and the reason is one line."""
    install("sbatch", f'printf "%s\\n\\n" "{stderr}" >&2; exit 1')
    with pytest.raises(SubmitRejected) as caught:
        SlurmCli().submit("x")
    assert str(caught.value) == f"sbatch: {stderr}"


def test_R04_submit_without_an_answer_in_time_is_unknown(install: Install) -> None:
    """A sbatch that hangs may have been heard."""
    install("sbatch", "exec tail -f /dev/null")
    with pytest.raises(SubmitUnknown, match=r"no answer in 0\.3 s"):
        SlurmCli(timeout_s=0.3).submit("x")


def test_R04_submit_that_was_killed_is_unknown(install: Install) -> None:
    """A sbatch that died of a signal may have been heard."""
    install("sbatch", "kill -9 $$")
    with pytest.raises(SubmitUnknown):
        SlurmCli().submit("x")


def test_R36_commands_see_nothing_of_our_environment(
    install: Install, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job inherits sbatch's environment: no token in it, and nothing that changes output."""
    for name in ("SECRET_TOKEN", "HF_TOKEN", "SBATCH_PARTITION", "SBATCH_EXPORT"):
        monkeypatch.setenv(name, "leaked")
    for name in ("SLURM_JOB_ID", "SLURM_CLUSTERS", "SQUEUE_FORMAT", "SQUEUE_STATES", "LC_TIME"):
        monkeypatch.setenv(name, "leaked")
    monkeypatch.setenv("SLURM_CONF", "/etc/site/slurm.conf")
    for name in ("sbatch", "squeue", "sinfo", "scancel"):
        install(name, "echo 42" if name == "sbatch" else "true")
    slurm = SlurmCli()
    slurm.submit("x")
    slurm.jobs("demo")
    slurm.nodes()
    slurm.cancel(REF, pending=False)
    for name in ("sbatch", "squeue", "sinfo", "scancel"):
        seen = environment(folder, name)
        assert "leaked" not in seen.values()
        assert seen["SLURM_CONF"] == "/etc/site/slurm.conf"
        assert (seen["LC_ALL"], seen["SLURM_TIME_FORMAT"]) == ("C", "%s")
        shell = {"PWD", "OLDPWD", "SHLVL", "_"}
        ours = {"PATH", "HOME", "USER", "LOGNAME", "SLURM_CONF", "LC_ALL", "SLURM_TIME_FORMAT"}
        assert set(seen) - shell <= ours


def test_jobs_are_asked_for_in_one_query(install: Install, folder: Path) -> None:
    """squeue is told whose jobs, which states and which fields; and its answer is read back."""
    user = getpass.getuser()
    # The program finds the mark, which differs in every call, in its own arguments.
    body = f"""
mark=$(printf '%s' "$4" | sed 's/.*JobID:\\(|[0-9a-f]*|\\),.*/\\1/')
sed "s/|MARK|/$mark/g; s/|USER|/{user}/" "{folder}/answer"
"""
    install("squeue", body)
    (folder / "answer").write_text(line(mark="|MARK|", user="|USER|"))
    [job] = SlurmCli().jobs("demo").jobs
    assert job.key == (42, 1_700_000_000)
    *options, fields = arguments(folder, "squeue")
    assert options == ["--me", "--states=all", "--noheader"]
    assert fields.startswith("--Format=JobID:|")
    assert SlurmCli().jobs("other").jobs == ()


def test_R37_mark_of_a_listing_is_new_each_time(install: Install, folder: Path) -> None:
    """No comment can hold a mark that it could not know."""
    install("squeue", "true")
    seen = set()
    for _ in range(3):
        SlurmCli().jobs("demo")
        seen.add(arguments(folder, "squeue")[3])
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1",
            "squeue: slurm_load_jobs error: Unable to contact slurm controller",
        ),
        ("exit 1", "squeue: no reason given"),
        ("kill -9 $$", "squeue: no reason given"),
        ("exec tail -f /dev/null", "squeue gave no answer in 0.3 s"),
    ],
    ids=["unreachable", "silent", "killed", "hangs"],
)
def test_R01_queue_that_can_not_be_read_is_an_error(
    body: str, message: str, install: Install
) -> None:
    """An error is never an empty list."""
    install("squeue", body)
    with pytest.raises(SlurmUnavailable) as caught:
        SlurmCli(timeout_s=0.3).jobs("demo")
    assert str(caught.value) == message


def test_command_that_is_not_there_says_what_to_do(folder: Path) -> None:
    """Not a login node: one line, no traceback; the same for a file that can't be started."""
    with pytest.raises(SlurmUnavailable, match="squeue is not on PATH: run fleet on a login node"):
        SlurmCli().jobs("demo")
    (folder / "squeue").write_bytes(b"\x7fELF broken")
    (folder / "squeue").chmod(0o755)
    with pytest.raises(SlurmUnavailable, match="squeue can't be started: Exec format error"):
        SlurmCli().jobs("demo")


def test_user_without_a_name_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's user id that no passwd file knows is an error that says so."""
    monkeypatch.setattr("os.getuid", lambda: 4_000_000_001)
    with pytest.raises(SlurmUnavailable, match="user id 4000000001 has no name on this host"):
        SlurmCli()


@pytest.mark.parametrize(
    ("act", "options"),
    [
        (lambda slurm: slurm.drain(REF), ["--batch", "--signal=USR1", "--state=RUNNING"]),
        (lambda slurm: slurm.cancel(REF, pending=True), ["--state=PENDING"]),
        (lambda slurm: slurm.cancel(REF, pending=False), []),
    ],
    ids=["drain", "cancel-pending", "cancel"],
)
def test_R22_scancel_names_user_and_name_beside_the_id(
    act: Any, options: list[str], install: Install, folder: Path
) -> None:
    """An id may mean another job by now: Slurm itself checks name and user."""
    install("scancel", "true")
    act(SlurmCli())
    verified = [f"--user={getpass.getuser()}", f"--name={NAME}", "42"]
    assert arguments(folder, "scancel") == [*options, *verified]


@pytest.mark.parametrize(
    "stderr",
    [
        "scancel: error: Kill job error on job id 42: Invalid job id specified",
        "scancel: error: Kill job error on job id 42: Job/step already completing or completed",
    ],
)
def test_to_end_a_job_that_is_over_is_no_error(stderr: str, install: Install) -> None:
    """It ended between the look and the command; any other refusal is an error."""
    install("scancel", f"echo '{stderr}' >&2; exit 1")
    SlurmCli().cancel(REF, pending=False)
    SlurmCli().drain(REF)
    install("scancel", "echo 'scancel: error: Access/permission denied' >&2; exit 1")
    with pytest.raises(SlurmUnavailable, match="denied"):
        SlurmCli().cancel(REF, pending=False)


def test_nodes_are_read_with_their_state(install: Install) -> None:
    """A node's word is lower case; a star says that it does not respond; odd lines are left out."""
    install("sinfo", "printf 'n1 idle\\nn2 down*\\nn3 MIXED \\nn4\\n\\n'")
    assert SlurmCli().nodes() == {"n1": "idle", "n2": "down*", "n3": "mixed"}


def test_output_that_is_not_utf_8_is_no_crash(install: Install) -> None:
    """Bytes of any encoding in an error are shown as well as they can be."""
    install("squeue", "printf '\\377 no' >&2; exit 1")
    with pytest.raises(SlurmUnavailable, match="squeue: \ufffd no"):
        SlurmCli().jobs("demo")


def test_recording_program_works(install: Install, folder: Path) -> None:
    """The tests' own tool: what it records is what was given."""
    install("tool", "true")
    subprocess.run(["tool", "a b", "", json.dumps({"x": "\n"})], input="hi", text=True, check=True)
    assert arguments(folder, "tool") == ["a b", "", '{"x": "\\n"}']
    assert (folder / "tool.stdin").read_text() == "hi"
