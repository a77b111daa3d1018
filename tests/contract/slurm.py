"""The Slurm adapter, run on a lab's login host as the service user and called from here."""

import base64
import pickle
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from reconciler.adapters.ports import Listing
from reconciler.plan import JobRef
from tests.lab import Lab

_PYTHON = "/opt/modelfleet/venv/bin/python"
_CALLS = """
import base64, pickle, sys
from reconciler.adapters.slurm_cli import SlurmCli
from reconciler.errors import FleetError
for line in sys.stdin:
    verb, words, options, timeout_s = pickle.loads(base64.b64decode(line))
    try:
        answer = getattr(SlurmCli(timeout_s=timeout_s), verb)(*words, **options)
    except FleetError as error:
        answer = error
    print(base64.b64encode(pickle.dumps(answer)).decode(), flush=True)
"""


class LabSlurm:
    """SlurmCli as the reconciler would use it on the login host; raises what it raises there.

    Its processes there are kept for the next call, one for each that is made at the same time.
    """

    def __init__(
        self, lab: Lab, env: Mapping[str, str] | None = None, *, timeout_s: float = 20
    ) -> None:
        self._lab = lab
        self._env = env
        self._timeout_s = timeout_s
        self._idle: list[subprocess.Popen[str]] = []

    def jobs(self, fleet: str) -> Listing:
        listing: Listing = self._call("jobs", fleet)
        return listing

    def nodes(self) -> Mapping[str, str]:
        nodes: Mapping[str, str] = self._call("nodes")
        return nodes

    def maintenances(self) -> Sequence[float]:
        begins: Sequence[float] = self._call("maintenances")
        return begins

    def script(self, job_id: int) -> str:
        return str(self._call("script", job_id))

    def submit(self, script: str) -> int:
        return int(self._call("submit", script))

    def drain(self, job: JobRef) -> None:
        self._call("drain", job)

    def cancel(self, job: JobRef, *, pending: bool) -> None:
        self._call("cancel", job, pending=pending)

    def close(self) -> None:
        """End its processes; a later call starts another."""
        while self._idle:
            with self._idle.pop() as process:
                process.kill()

    def _call(self, verb: str, *words: object, **options: object) -> Any:
        call = base64.b64encode(pickle.dumps((verb, words, options, self._timeout_s))).decode()
        process = self._idle.pop() if self._idle else self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{call}\n")
        process.stdin.flush()
        said = process.stdout.readline()
        self._idle.append(process)
        answer = pickle.loads(base64.b64decode(said))  # noqa: S301 - our own process wrote it
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _start(self) -> "subprocess.Popen[str]":
        argv = [_PYTHON, "-c", _CALLS]
        pipe = subprocess.PIPE
        return self._lab.popen("login", argv, env=self._env, stdin=pipe, stdout=pipe)
