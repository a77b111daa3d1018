"""The one lock of a fleet's state folder, on a disk of this host.

The kernel lets go of a flock when its holder ends, however it ends, so a lock is never left behind.
The name in the file is for people; nothing is decided by it. A lock on a local disk can't be seen
from another host, and one on a network filesystem can't be trusted (nor can SQLite's WAL there), so
such a folder is refused, and there is no such thing as taking over another host's lock. Reconcilers
on two hosts are kept apart by Slurm: a job's name is its replica's, and one name runs once.
"""

import errno
import fcntl
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from reconciler.errors import LockHeld, StateFailed

# Types of mounts as /proc/self/mounts has them.
NETWORK_FILESYSTEMS = frozenset(
    {
        *("nfs", "nfs4", "lustre", "gpfs", "beegfs", "cifs", "smb3", "ceph", "afs", "panfs"),
        *("wekafs", "fuse.sshfs", "fuse.ceph", "fuse.ceph-fuse", "fuse.glusterfs"),
    }
)
_MOUNTS = Path("/proc/self/mounts")


@contextmanager
def locked(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the folder's lock. Raises LockHeld, which names who has it, or StateFailed.

    That the holder's name can't be written (a full disk) is said; the lock is held all the same.
    """
    _refuse_network(folder)
    path = folder / "lock"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = _open(path)
    except OSError as error:
        raise StateFailed(f"{folder} can't be used: {error.strerror}") from error
    try:
        _take(lock, path, say)
        yield
    finally:
        os.close(lock)


def filesystem(path: Path, mounts: str) -> str:
    """Return the type of the filesystem that holds the absolute `path`, "" if no mount does.

    `mounts` is the text of /proc/self/mounts. Of two mounts at one place the later hides the other.
    """
    found, depth = "", 0
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        place = Path(_unescaped(fields[1]))
        if path.is_relative_to(place) and len(place.parts) >= depth:
            found, depth = fields[2], len(place.parts)
    return found


def _unescaped(text: str) -> str:
    """Return a mount's place with its blanks, which /proc writes as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _refuse_network(folder: Path) -> None:
    try:
        kind = filesystem(folder.resolve(), _MOUNTS.read_text(errors="surrogateescape"))
    except OSError:
        return  # without /proc nothing is known of mounts
    if kind in NETWORK_FILESYSTEMS:
        raise StateFailed(
            f"{folder} is on a network filesystem ({kind}), where locks can't be trusted: "
            "choose a folder on a disk of this host with --state-dir or FLEET_STATE_DIR"
        )


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        # The disk became read-only (an I/O error does that): the lock that is there still locks.
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _take(lock: int, path: Path, say: Callable[[str], None]) -> None:
    """Take the lock and write who holds it, or raise who does."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 200, 0).decode(errors="replace").strip()
        raise LockHeld(f"{path} is held by {holder or 'another process'}") from None
    except OSError as error:
        raise StateFailed(f"{path} can't be locked: {error.strerror}") from error
    try:
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    except OSError as error:
        say(f"{path} is locked, but does not say by whom: {error.strerror}")
