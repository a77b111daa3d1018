"""Slurm through its own commands, in an environment that holds nothing of ours but what they need.

Formats: squeue(1) and sinfo(1). Every record starts with a marker that no comment can guess, so a
vandalised comment (any character, newlines included) spoils one job only.
"""

import os
import pwd
import re
import secrets
import subprocess
from collections.abc import Mapping, Sequence

from reconciler.adapters.ports import Listing
from reconciler.errors import SlurmUnavailable, SubmitRejected, SubmitUnknown
from reconciler.naming import ReplicaName, parse_comment, parse_name
from reconciler.plan import JobRef
from reconciler.spec import parse_duration
from reconciler.state import UNREADABLE, Job

# What Slurm's commands need of our environment. A token that lies in the rest must not reach a
# job, and SQUEUE_* or SLURM_* variables must not change what a command prints.
_PASSED = ("PATH", "HOME", "USER", "LOGNAME", "SLURM_CONF")
_TIMEOUT_S = 20.0

# squeue's names of the fields, in the order that `_job` takes them.
_FIELDS = (
    *("JobID", "UserName", "State", "SubmitTime", "StartTime", "EndTime", "NodeList"),
    *("Reason", "RestartCnt", "Name", "exit_code", "TimeLimit", "NumNodes", "tres-per-node"),
    *("ExcNodes", "Comment"),
)

# sbatch's words for "it may have been accepted" (slurm_errno.h; seen on 22.05 and 24.11).
_UNSURE = re.compile(
    r"timed out|unable to contact|connection (?:refused|reset)|zero bytes|communication|"
    r"unexpected message|transport endpoint",
    re.IGNORECASE,
)
# scancel's words for a job that is COMPLETING or over, when it is to check a name (seen on 24.11).
_OVER = re.compile(r"invalid job id|already completing or completed", re.IGNORECASE)
# What sbatch was asked for of each node: `gres/gpu:2` on 24.11, `gres:gpu:2` before.
_GPUS = re.compile(r"(?:^|,)(?:gres[/:])?gpu(?::[^:,]+)?:(\d{1,6})(?:,|$)")
_SUBMITTED = re.compile(r"^(\d+)(?:;\S*)?$", re.MULTILINE)


class SlurmCli:
    """The adapter for squeue, sinfo, scontrol, sbatch and scancel."""

    def __init__(self, *, timeout_s: float = _TIMEOUT_S) -> None:
        try:
            self._user = pwd.getpwuid(os.getuid()).pw_name
        except KeyError:
            raise SlurmUnavailable(f"user id {os.getuid()} has no name on this host") from None
        self._timeout_s = timeout_s

    def jobs(self, fleet: str) -> Listing:
        mark = f"|{secrets.token_hex(8)}|"
        fields = ",".join(f"{field}:{mark}" for field in _FIELDS)
        output = self._query(["squeue", "--me", "--states=all", "--noheader", f"--Format={fields}"])
        return parse_listing(output, mark=mark, fleet=fleet, user=self._user)

    def nodes(self) -> Mapping[str, str]:
        output = self._query(["sinfo", "--noheader", "--Node", "--format=%N %T"])
        pairs = (line.split(None, 1) for line in output.splitlines())
        return {pair[0]: pair[1].strip().lower() for pair in pairs if len(pair) == 2}

    def maintenances(self) -> Sequence[float]:
        output = self._query(["scontrol", "show", "reservation", "--oneliner"])
        return parse_reservations(output)

    def script(self, job_id: int) -> str:
        return self._query(["scontrol", "write", "batch_script", str(job_id), "-"])

    def submit(self, script: str) -> int:
        try:
            done = self._run(["sbatch", "--parsable"], stdin=script)
        except subprocess.TimeoutExpired:
            raise SubmitUnknown(f"sbatch gave no answer in {self._timeout_s:g} s") from None
        said = _one_line(done.stderr)
        if done.returncode != 0:
            if done.returncode < 0 or _UNSURE.search(done.stderr):
                raise SubmitUnknown(f"sbatch: {said}")
            raise SubmitRejected(f"sbatch: {said}")
        ids = _SUBMITTED.findall(done.stdout)
        if len(ids) != 1:
            raise SubmitUnknown(f"sbatch said neither yes nor no: {_one_line(done.stdout)}")
        return int(ids[0])

    def drain(self, job: JobRef) -> None:
        # --state: on a pending job the signal would hang for a minute and a half.
        self._scancel(["--batch", "--signal=USR1", "--state=RUNNING"], job)

    def cancel(self, job: JobRef, *, pending: bool) -> None:
        self._scancel(["--state=PENDING"] if pending else [], job)

    def _scancel(self, options: Sequence[str], job: JobRef) -> None:
        # Name and user are checked by Slurm itself: an id alone may mean another job by now.
        verified = [f"--user={self._user}", f"--name={job.name}"]
        self._query(["scancel", *options, *verified, str(job.id)], unless=_OVER)

    def _query(self, argv: Sequence[str], *, unless: re.Pattern[str] | None = None) -> str:
        try:
            done = self._run(argv)
        except subprocess.TimeoutExpired:
            raise SlurmUnavailable(f"{argv[0]} gave no answer in {self._timeout_s:g} s") from None
        if done.returncode != 0 and not (unless and unless.search(done.stderr)):
            raise SlurmUnavailable(f"{argv[0]}: {_one_line(done.stderr)}")
        return done.stdout

    def _run(self, argv: Sequence[str], stdin: str = "") -> subprocess.CompletedProcess[str]:
        environment = {key: os.environ[key] for key in _PASSED if key in os.environ}
        # SLURM_TIME_FORMAT makes every time an epoch.
        environment |= {"LC_ALL": "C", "SLURM_TIME_FORMAT": "%s"}
        try:
            return subprocess.run(
                argv,
                input=stdin,
                env=environment,
                capture_output=True,
                timeout=self._timeout_s,
                encoding="utf-8",
                errors="replace",
                check=False,
                process_group=0,  # Ctrl-C is for us: what has begun is finished
            )
        except FileNotFoundError:
            raise SlurmUnavailable(f"{argv[0]} is not on PATH: run fleet on a login node") from None
        except OSError as error:
            raise SlurmUnavailable(f"{argv[0]} can't be started: {error.strerror}") from None


def parse_listing(output: str, *, mark: str, fleet: str, user: str) -> Listing:
    """Return the jobs in squeue's output that are ours; foreign ones are left out.

    `mark` stands behind each field. A record of ours that can't be read is counted and becomes a
    job of an unknown state: it is there, so nothing may take its place. It spoils no other.
    Raises SlurmUnavailable if the output is cut short or is not such a listing at all.
    """
    *fields, rest = output.split(mark)
    whole = rest.endswith("\n") if fields else not rest
    if rest.strip() or not whole or len(fields) % len(_FIELDS):
        raise SlurmUnavailable("squeue: its answer is cut short")
    jobs, odd_lines = [], 0
    for start in range(0, len(fields), len(_FIELDS)):
        record = fields[start : start + len(_FIELDS)]
        name = parse_name(record[9])
        if name is None or name.fleet != fleet or record[1] != user:
            continue
        job = _job(record, name)
        odd_lines += job.state == UNREADABLE
        jobs.append(job)
    return Listing(jobs=tuple(jobs), odd_lines=odd_lines)


def parse_reservations(output: str) -> Sequence[float]:
    """Return the begin of each reservation with the flag MAINT, from `scontrol --oneliner`."""
    begins = []
    for line in output.splitlines():
        fields = dict(word.partition("=")[::2] for word in line.split())
        begin = _number(fields.get("StartTime", ""))
        if begin is not None and "MAINT" in fields.get("Flags", "").split(","):
            begins.append(float(begin))
    return sorted(begins)


def _job(record: Sequence[str], name: ReplicaName) -> Job:
    job_id, _, state, submitted, started, ends, nodes, reason, restarts, *more = record
    _, status, limit, node_count, per_node, excluded, comment = more
    # The end of the record before stands in front of the first field.
    key, count = (_number(job_id.lstrip("\n")), _number(submitted)), _number(restarts)
    readable = bool(state) and None not in (*key, count)
    return Job(
        id=key[0] or 0,
        submitted_at=key[1] or 0,
        name=name,
        state=state if readable else UNREADABLE,
        reason=reason,
        nodes=nodes,
        started_at=_number(started),
        ends_at=_number(ends),
        restarts=count or 0,
        comment=parse_comment(comment) if readable else None,
        exit_status=_exit_status(status),
        limit_s=_seconds(limit),
        excluded=excluded,
        gpus=_gpus(_number(node_count), per_node),
    )


def _gpus(nodes: int | None, per_node: str) -> int | None:
    """Return how many GPUs sbatch was asked for; known also to a Slurm that accounts for none."""
    match = _GPUS.search(per_node)
    return None if match is None or nodes is None else nodes * int(match[1])


def _seconds(text: str) -> int | None:
    """Return a duration in seconds; UNLIMITED, INVALID, Partition_Limit and such are none."""
    try:
        return parse_duration(text)
    except ValueError:
        return None


def _exit_status(text: str) -> int | None:
    """Return the exit status in `7:0` (status:signal) or, before 23.02, the raw word `1792`."""
    status, colon, _ = text.partition(":")
    number = _number(status)
    return number if colon or number is None else number >> 8


def _number(text: str) -> int | None:
    """Return a count or an epoch time; Slurm writes N/A, Unknown or NONE where it has none."""
    return int(text) if re.fullmatch(r"[0-9]{1,15}", text) else None


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300] or "no reason given"
