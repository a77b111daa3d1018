"""One reconciler at a time: the lock says who holds it, dies with its holder, and is local."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from reconciler.adapters import lock
from reconciler.adapters.lock import NETWORK_FILESYSTEMS, filesystem, locked
from reconciler.errors import LockHeld, StateFailed

# Holds the lock of the folder given, says so, and ends with its standard input.
HOLDER = """
import sys
from pathlib import Path
from reconciler.adapters.lock import locked
with locked(Path(sys.argv[1]), print):
    print("held", flush=True)
    sys.stdin.read()
"""


def take(folder: Path) -> list[str]:
    """Take and let go of a folder's lock; return what was said."""
    said: list[str] = []
    with locked(folder, said.append):
        return said


def test_R34_lock_of_another_process_is_refused_by_name(tmp_path: Path) -> None:
    """Two reconcilers at once: one works, the other says who does."""
    argv = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(LockHeld) as caught:
            take(tmp_path)
        holder = f"process {other.pid} on {os.uname().nodename}"
        assert str(caught.value) == f"{tmp_path}/lock is held by {holder}"
        other.communicate()
    assert other.returncode == 0
    assert take(tmp_path) == []


def test_R06_lock_of_a_dead_process_is_free_at_once(tmp_path: Path) -> None:
    """kill -9 leaves no lock behind, only a name in a file."""
    argv = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        other.kill()
    assert (tmp_path / "lock").read_text().startswith(f"process {other.pid} on ")
    assert take(tmp_path) == []
    assert (tmp_path / "lock").read_text() == f"process {os.getpid()} on {os.uname().nodename}\n"


def test_lock_is_let_go_when_the_work_fails(tmp_path: Path) -> None:
    """An error inside does not keep the lock."""
    with pytest.raises(ZeroDivisionError), locked(tmp_path, print):
        raise ZeroDivisionError
    take(tmp_path)


def test_lock_whose_holder_is_not_named_is_still_refused(tmp_path: Path) -> None:
    """Between taking the lock and writing its name a holder is just another process."""
    with locked(tmp_path, print):
        (tmp_path / "lock").write_bytes(b"\xff")
        with pytest.raises(LockHeld, match="is held by \ufffd"):
            take(tmp_path)
        (tmp_path / "lock").write_bytes(b"")
        with pytest.raises(LockHeld, match="is held by another process"):
            take(tmp_path)


def test_state_folder_is_made_for_its_owner_only(tmp_path: Path) -> None:
    """Nobody else may read or plant anything in a new state folder."""
    take(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").stat().st_mode & 0o077 == 0


def test_folder_that_can_not_be_used_says_so(tmp_path: Path) -> None:
    """A file in the folder's place, or a folder in the lock's, is one line."""
    (tmp_path / "file").touch()
    with pytest.raises(StateFailed, match=r"can't be used: (File exists|Not a directory)"):
        take(tmp_path / "file")
    (tmp_path / "lock").mkdir()
    with pytest.raises(StateFailed, match="can't be used: Is a directory"):
        take(tmp_path)


def test_R32_full_disk_hides_the_holder_and_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name is for people: without it the lock is held all the same, and that is said."""

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.pwrite", no_space)
        said: list[str] = []
        with locked(tmp_path, said.append), pytest.raises(LockHeld, match="another process"):
            take(tmp_path)
    assert said == [f"{tmp_path}/lock is locked, but does not say by whom: No space left on device"]
    assert take(tmp_path) == []


MOUNTS = r"""
/dev/vda / ext4 rw 0 0
server:/home /home nfs4 rw,vers=4.2 0 0
tmpfs /home/fleet/local tmpfs rw 0 0
me@host: /mnt/a\040b fuse.sshfs rw 0 0
auto.data /data autofs rw 0 0
server:/data /data nfs rw 0 0
garbled
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        *(("/", "ext4"), ("/var/lib/fleet", "ext4"), ("/homes/fleet", "ext4")),
        *(("/home", "nfs4"), ("/home/fleet", "nfs4"), ("/home/fleet/local/x", "tmpfs")),
        *(("/mnt/a b/c", "fuse.sshfs"), ("/data/x", "nfs")),
    ],
)
def test_filesystem_is_that_of_the_nearest_mount(path: str, kind: str) -> None:
    """The deepest mount counts, and of two at one place the later."""
    assert filesystem(Path(path), MOUNTS) == kind


def test_filesystem_without_mounts_is_not_known() -> None:
    """Nothing is claimed of a path that no mount holds."""
    assert filesystem(Path("/x"), "") == ""


@pytest.mark.parametrize("kind", sorted(NETWORK_FILESYSTEMS))
def test_state_on_a_network_filesystem_is_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line says why and what to do, and nothing is made there; links are followed."""
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/vda / ext4 rw 0 0\nserver:/x {tmp_path}/home {kind} rw 0 0\n")
    (tmp_path / "home").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "home")
    monkeypatch.setattr(lock, "_MOUNTS", mounts)
    with pytest.raises(StateFailed) as caught:
        take(tmp_path / "link" / "state")
    assert str(caught.value) == (
        f"{tmp_path}/link/state is on a network filesystem ({kind}), where locks can't be "
        "trusted: choose a folder on a disk of this host with --state-dir or FLEET_STATE_DIR"
    )
    assert not any((tmp_path / "home").iterdir())
    assert take(tmp_path / "local") == []
