"""What the reconciler needs from the world: one narrow Protocol each."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from reconciler.plan import Action, JobRef
from reconciler.routes import GatewayFiles
from reconciler.spec import Fleet
from reconciler.state import (
    Credentials,
    GatewayView,
    Job,
    JobKey,
    Keyring,
    Memory,
    Probe,
    Traffic,
    Trial,
    Trust,
    Usage,
)
from reconciler.usage import Tallies


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """All jobs of one fleet and user. `odd_lines` counts records that could not be read."""

    jobs: tuple[Job, ...]
    odd_lines: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagePin:
    """What an image of the spec stands for: the program to start, and the digest of its content."""

    program: str
    digest: str


class Slurm(Protocol):
    """The cluster. Every call raises SlurmUnavailable when nothing can be known."""

    def jobs(self, fleet: str) -> Listing:
        """Return all jobs that bear the fleet's name and belong to this user."""

    def nodes(self) -> Mapping[str, str]:
        """Return each node's state word, lower case; a `*` at its end means it does not respond."""

    def maintenances(self) -> Sequence[float]:
        """Return when each reservation for maintenance begins (epoch seconds), past ones too."""

    def script(self, job_id: int) -> str:
        """Return the batch script of a live job."""

    def submit(self, script: str) -> int:
        """Submit and return the job's id. Raises SubmitRejected or SubmitUnknown."""

    def drain(self, job: JobRef) -> None:
        """Send USR1 to the batch shell, and to nothing else, of a job if it is running."""

    def cancel(self, job: JobRef, *, pending: bool) -> None:
        """Cancel the job; with `pending` only if it still waits. One that is over is no error."""


class Engines(Protocol):
    """The replicas' addresses."""

    def probe(self, jobs: Sequence[Job], proven: Iterable[JobKey]) -> Mapping[JobKey, Probe]:
        """Ask every job that published an address, all at once, each bounded in time.

        Jobs in `proven` get no completion: they have answered one before.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class LogPart:
    """Whole lines of a log, and the position after them, which is the adapter's own text."""

    lines: bytes
    position: str
    ended: bool = False  # there is nothing more for now
    lost: bool = False  # the file that was read last is gone, and what was unread of it


class Gateways(Protocol):
    """The fleet's NGINX hosts."""

    def look(self) -> tuple[GatewayView, ...]:
        """Return what each gateway runs; an unreachable one has its error."""

    def change(self, name: str, files: GatewayFiles) -> None:
        """Test, swap, reload and verify. Raises GatewayFailed; the last configuration serves on."""

    def log(self, name: str, position: str) -> LogPart:
        """Return the next lines of a gateway's access log, from where `position` says; "": all.

        Rotated files that are not compressed are read to their end first. Raises GatewayFailed.
        """


class Images(Protocol):
    """The provisioned images."""

    def pins(self, fleet: Fleet) -> tuple[Mapping[str, ImagePin], Mapping[str, str]]:
        """Return the pin of each image of the spec, and one line for each that has none."""


class Secrets(Protocol):
    """The fleet's keys and certificates. Every call may raise SecretsFailed."""

    def keyring(self) -> Keyring:
        """Return what there is of them; nothing in it is secret."""

    def issue(self, model: str, walltime_s: float) -> Credentials:
        """Return what a job of the model needs, valid for its walltime; make what is missing."""

    def external_keys(self, files: Iterable[str]) -> tuple[Mapping[str, str], Mapping[str, str]]:
        """Return the id of the key in each of these files, and one line for each that has none.

        Raises nothing: without one of them there is one model that has no fallback.
        """

    def gateway_files(self, trust: Trust | None, external: Mapping[str, str]) -> Mapping[str, str]:
        """Return the secret files, by name, of a gateway that is to have this key and authority.

        `external` names the file with the key of each model's fallback.
        """


class Result(StrEnum):
    """How an action ended, for the journal."""

    DONE = "done"
    FAILED = "failed"
    UNKNOWN = "unknown"  # it may have happened; the next look shows it


class Store(Protocol):
    """Where memory and journal live between cycles. Only the holder of the lock writes."""

    def load(self) -> Memory:
        """Return the memory; what is not there or can't be read has its default.

        Raises StateFailed if a newer program wrote it.
        """

    def save(self, memory: Memory) -> None:
        """Replace the memory atomically. Raises StateFailed."""

    def intend(self, at: float, action: Action) -> int:
        """Commit, before it is done, that an action is about to be; return the intent's number.

        `at` is the cycle's time (epoch seconds). Raises StateFailed.
        """

    def conclude(self, intent: int, result: Result, detail: str) -> None:
        """Write how an intended action ended, in at most one line. Raises StateFailed."""

    def log_positions(self) -> Mapping[str, str]:
        """Return up to where each gateway's log is counted. Raises StateFailed."""

    def count(self, gateway: str, part: LogPart, tallies: Tallies) -> None:
        """Add what a part of a log adds up to, and its position, at once. Raises StateFailed."""

    def usage(
        self, at: float, gateways: frozenset[str]
    ) -> tuple[Usage, Mapping[str, Traffic] | None, Mapping[str, Trial]]:
        """Return what of these gateways' logs is counted, as of the time `at`.

        Without any log read there is no traffic to tell of: None. Raises StateFailed.
        """

    def locked(self) -> AbstractContextManager[None]:
        """Hold the fleet's one lock. Raises LockHeld, which says who has it, or StateFailed."""
