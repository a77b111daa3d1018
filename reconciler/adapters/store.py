"""Memory in a file of this host, replaced atomically, and the lock that makes one writer.

Losing or breaking the file restarts timers and nothing else: Slurm holds every fact that matters.
"""

import fcntl
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from reconciler.errors import LockHeld, StateFailed
from reconciler.state import DrainClock, Failures, JobKey, Memory

# Pairs instead of mappings: JSON's keys are texts, ours are (job id, submit time).
_Filed = tuple[
    list[tuple[JobKey, int]], list[tuple[JobKey, DrainClock]], dict[str, Failures], float | None
]
_ADAPTER: TypeAdapter[_Filed] = TypeAdapter(_Filed)


class FileStore:
    """The adapter for one fleet's state folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = folder / "memory.json"
        self._lock = folder / "lock"

    def load(self) -> Memory:
        try:
            misses, drains, failures, emptied_at = _ADAPTER.validate_json(self._file.read_bytes())
        except (OSError, ValidationError):
            return Memory()
        return Memory(
            misses=dict(misses), drains=dict(drains), failures=failures, emptied_at=emptied_at
        )

    def save(self, memory: Memory) -> None:
        filed = (
            sorted(memory.misses.items()),
            sorted(memory.drains.items(), key=lambda item: item[0]),
            dict(memory.failures),
            memory.emptied_at,
        )
        try:
            with tempfile.NamedTemporaryFile(dir=self._folder, delete=False) as part:
                part.write(_ADAPTER.dump_json(filed))
                part.flush()
                os.fsync(part.fileno())
            os.replace(part.name, self._file)
        except OSError as error:
            raise StateFailed(f"{self._file} can't be written: {error.strerror}") from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the fleet's lock. Raises LockHeld, which names who has it, or StateFailed."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle = self._lock.open("a+")
        except OSError as error:
            raise StateFailed(f"{self._folder} can't be used: {error.strerror}") from error
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                handle.seek(0)
                raise LockHeld(f"{self._lock} is held by {handle.read().strip()}") from None
            handle.truncate(0)
            handle.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            handle.flush()
            yield
