"""Memory in a file of this host, replaced atomically, and the lock that makes one writer.

Losing or breaking the file restarts timers and nothing else: Slurm holds every fact that matters.
"""

import fcntl
import os
import socket
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
        # One name, as the lock makes one writer: a crash or a full disk leaves no litter.
        part = self._folder / "memory.json.part"
        try:
            with part.open("wb") as handle:
                handle.write(_ADAPTER.dump_json(filed))
                handle.flush()
                os.fsync(handle.fileno())
            part.replace(self._file)
        except OSError as error:
            raise StateFailed(f"{self._file} can't be written: {error.strerror}") from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the fleet's lock. Raises LockHeld, which names who has it, or StateFailed."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StateFailed(f"{self._folder} can't be used: {error.strerror}") from error
        try:
            _take(lock, self._lock)
            yield
        finally:
            os.close(lock)


def _take(lock: int, path: Path) -> None:
    """Take the lock and write who holds it, or raise who does."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    except BlockingIOError:
        holder = os.pread(lock, 200, 0).decode(errors="replace").strip()
        raise LockHeld(f"{path} is held by {holder or 'another process'}") from None
    except OSError as error:
        raise StateFailed(f"{path} can't be locked: {error.strerror}") from error
