"""Memory on disk: it comes back equal, a broken file is an empty memory, one writer at a time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from reconciler.adapters.store import FileStore
from reconciler.errors import LockHeld, StateFailed
from reconciler.state import DrainClock, Failures, Memory

FULL = Memory(
    misses={(1, 2): 3, (4, 5): 0},
    drains={(1, 2): DrainClock(since=1.5), (4, 5): DrainClock(since=1.0, idle_since=2.25)},
    failures={"m.0123abcd": Failures(count=2, last_at=7.5, counted=frozenset({(1, 2), (3, 4)}))},
    emptied_at=9.0,
)

# Holds the lock of the folder given, says so, and ends with its standard input.
HOLDER = """
import sys
from pathlib import Path
from reconciler.adapters.store import FileStore
with FileStore(Path(sys.argv[1])).locked():
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("memory", [FULL, Memory()])
def test_memory_comes_back_equal(memory: Memory, tmp_path: Path) -> None:
    """What was saved is what is loaded, keys, times and all."""
    store = FileStore(tmp_path)
    store.save(FULL)
    store.save(memory)
    assert FileStore(tmp_path).load() == memory
    assert [path.name for path in tmp_path.iterdir()] == ["memory.json"]


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"{", b"null", b"[]", b"[1,2,3,4]", b"\0" * 100, b"\xff", b"[" * 100_000),
        *(b'[[[[1,2],"x"]],[],{},null]', b"[[[[1,2,3],1]],[],{},null]", b'[[],[],{},"now"]'),
    ],
)
def test_R32_memory_that_is_corrupt_is_empty(data: bytes, tmp_path: Path) -> None:
    """A broken file costs timers; it stops nothing, and the next save mends it."""
    (tmp_path / "memory.json").write_bytes(data)
    store = FileStore(tmp_path)
    assert store.load() == Memory()
    store.save(FULL)
    assert store.load() == FULL


def test_memory_that_is_not_there_is_empty(tmp_path: Path) -> None:
    """The first cycle of a fleet knows nothing; a folder in the file's place is no crash."""
    assert FileStore(tmp_path / "none").load() == Memory()
    (tmp_path / "memory.json").mkdir()
    assert FileStore(tmp_path).load() == Memory()


def test_R32_full_disk_says_so_and_keeps_the_last_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line with the reason; the file that was there stays whole, and nothing piles up."""
    store = FileStore(tmp_path)
    store.save(FULL)

    def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", no_space)
        for _ in range(3):
            with pytest.raises(StateFailed) as caught:
                store.save(Memory())
    expected = f"{tmp_path}/memory.json can't be written: No space left on device"
    assert str(caught.value) == expected
    assert store.load() == FULL
    assert len(list(tmp_path.iterdir())) <= 2


def test_R32_folder_that_can_not_be_written_says_so(tmp_path: Path) -> None:
    """A folder that is missing, or a file in its place, is one line."""
    with pytest.raises(StateFailed, match="can't be written: No such file or directory"):
        FileStore(tmp_path / "none").save(FULL)
    (tmp_path / "file").touch()
    with (
        pytest.raises(StateFailed, match=r"can't be used: (File exists|Not a directory)"),
        FileStore(tmp_path / "file").locked(),
    ):
        pass
    (tmp_path / "lock").mkdir()
    with (
        pytest.raises(StateFailed, match="can't be used: Is a directory"),
        FileStore(tmp_path).locked(),
    ):
        pass


def test_R32_full_disk_at_the_lock_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That the holder's name can't be written is one line too; and the lock is let go."""

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.pwrite", no_space)
        with (
            pytest.raises(StateFailed, match="lock can't be locked: No space left on device"),
            FileStore(tmp_path).locked(),
        ):
            pass
    with FileStore(tmp_path).locked():
        pass


def test_R34_lock_of_another_process_is_refused_by_name(tmp_path: Path) -> None:
    """Two reconcilers at once: one works, the other says who does."""
    argv = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(LockHeld) as caught, FileStore(tmp_path).locked():
            pass
        holder = f"process {other.pid} on {os.uname().nodename}"
        assert str(caught.value) == f"{tmp_path}/lock is held by {holder}"
        other.communicate()
    assert other.returncode == 0
    with FileStore(tmp_path).locked():
        pass


def test_R06_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    """kill -9 leaves no lock behind, only a name in a file."""
    argv = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        other.kill()
    with FileStore(tmp_path).locked():
        text = (tmp_path / "lock").read_text()
    assert text == f"process {os.getpid()} on {os.uname().nodename}\n"


def test_lock_is_let_go_when_the_work_fails(tmp_path: Path) -> None:
    """An error inside does not keep the lock."""
    with pytest.raises(ZeroDivisionError), FileStore(tmp_path).locked():
        raise ZeroDivisionError
    with FileStore(tmp_path).locked():
        pass


def test_lock_whose_holder_is_not_named_is_still_refused(tmp_path: Path) -> None:
    """Between taking the lock and writing its name a holder is just another process."""
    with FileStore(tmp_path).locked():
        (tmp_path / "lock").write_bytes(b"\xff")
        with pytest.raises(LockHeld, match="is held by \ufffd"), FileStore(tmp_path).locked():
            pass
        (tmp_path / "lock").write_bytes(b"")
        with (
            pytest.raises(LockHeld, match="is held by another process"),
            FileStore(tmp_path).locked(),
        ):
            pass


def test_state_folder_is_made_for_its_owner_only(tmp_path: Path) -> None:
    """Nobody else may read or plant anything in a new state folder."""
    with FileStore(tmp_path / "a" / "b").locked():
        assert (tmp_path / "a" / "b").stat().st_mode & 0o077 == 0
