"""What can go wrong, named for what the caller can do about it.

::

    FleetError                 one line for the user, exit code 1
    ├── SpecError              the spec is wrong: edit it (it holds every problem with its position)
    ├── SlurmUnavailable       Slurm did not answer: nothing is known; do nothing, look again
    ├── SubmitRejected         Slurm said no: nothing was submitted
    ├── SubmitUnknown          Slurm may have accepted: look again before submitting that name
    ├── GatewayFailed          a gateway kept its last configuration: it still serves
    ├── SecretsFailed          keys or certificates can't be read or made: mend their folder
    ├── LockHeld               another reconciler is at work on this fleet
    ├── PlanDiffers              the plan is not the reviewed one: review again, exit code 3
    ├── LogMissing               a job's log can't be shown: look where it is, or later
    └── StateFailed            the memory's file can't be read or written
"""

from collections.abc import Sequence
from dataclasses import dataclass


class FleetError(Exception):
    """Base of all errors that a user may see; its text is one line: what, where, what to do."""


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One mistake in a spec, at `file:line:column` (both counted from 1)."""

    file: str
    line: int
    column: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}: {self.message}"


class SpecError(FleetError):
    """The spec can't be used. `problems` holds all of them, in the order of the files."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(sorted(set(problems)))
        super().__init__("\n".join(map(str, self.problems)))


class SlurmUnavailable(FleetError):
    """Slurm did not answer, or not in a way that can be trusted."""


class SubmitRejected(FleetError):
    """Slurm refused a job; no job exists."""


class SubmitUnknown(FleetError):
    """A submission's outcome is unknown; never repeat it in the same cycle."""


class GatewayFailed(FleetError):
    """A gateway could not be read or changed; its last configuration keeps serving."""


class SecretsFailed(FleetError):
    """The fleet's keys or certificates can't be read, or not be made."""


class LockHeld(FleetError):
    """Another reconciler holds this fleet's lock."""


class StateFailed(FleetError):
    """The memory's file can't be read or written."""


class PlanDiffers(FleetError):
    """The plan is not the one that was reviewed; nothing was done."""


class LogMissing(FleetError):
    """A job's log is not there yet, or can't be read on this host."""
