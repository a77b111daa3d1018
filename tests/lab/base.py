"""The base: one Debian root folder, built once, over which every lab host lays its own writes."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.lab.wait import run_aloud

FILES = Path(__file__).parent / "files"
CHECKOUT = Path(__file__).parents[2]
LOCK = CHECKOUT / "requirements.lock"

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

Say = Callable[[str], None]


def cache() -> Path:
    """The folder that may be deleted at any time: losing it costs minutes, never a result."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modelfleet"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def base(release: str = "trixie", say: Say = print, *, bare: bool = False) -> Path:
    """The root folder for this release and recipe; built if it is missing or was left half-built.

    `bare` is a site's host before it is provisioned: Slurm and sshd, and nothing of ours.
    Two builders of one release take turns; the second finds the first one's work.
    """
    kind = f"bare-{release}" if bare else release
    folder = cache() / f"base-{kind}-{_key(bare)}"
    with locked(cache() / f"base-{kind}.lock", say):
        if not (folder / "complete").exists():
            part = folder.with_suffix(".part")
            for stale in (part, folder):
                shutil.rmtree(stale, ignore_errors=True)
            log = cache() / f"base-{kind}.log"
            log.unlink(missing_ok=True)
            _build(release, part / "root", log, say, bare)
            (part / "complete").touch()
            part.rename(folder)
            say(f"base: ready in {folder}")
    return folder / "root"


def in_base(
    argv: Sequence[str],
    *,
    release: str = "trixie",
    binds: Mapping[Path, str] | None = None,
    cwd: str = "/root",
    env: Mapping[str, str] | None = None,
    capture: bool = False,
    check: bool = True,
    timeout: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command as root in a throw-away copy of the base, with the real machine's network.

    ``binds`` maps real paths to paths in the copy, writable; all other writes are lost. The
    environment is clean (HOME, PATH, USER, LANG and ``env``). Its processes die with the caller.
    """
    root = base(release)
    _sweep()
    with tempfile.TemporaryDirectory(dir=cache(), prefix=f"in-base-{os.getpid()}-") as upper:
        return subprocess.run(
            enter(root, argv, upper=Path(upper), binds=binds, cwd=cwd, env=env),
            check=check,
            capture_output=capture,
            text=True,
            timeout=timeout,
        )


def enter(
    root: Path,
    argv: Sequence[str],
    *,
    upper: Path | None = None,
    binds: Mapping[Path, str] | None = None,
    cwd: str = "/root",
    env: Mapping[str, str] | None = None,
) -> list[str]:
    """The command line that runs ``argv`` with ``root`` as its root (see files/enter.sh)."""
    pairs = [f"{source}:{target}" for source, target in (binds or {}).items()]
    return [
        *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private"),
        *("sh", str(FILES / "enter.sh"), str(root), str(upper or ""), *pairs, "--"),
        *clean_env("root", "/root", cwd, env),
        *argv,
    ]


def clean_env(user: str, home: str, cwd: str, env: Mapping[str, str] | None = None) -> list[str]:
    """A prefix for a command: none of the caller's variables, and a folder to start in."""
    settings = {"HOME": home, "USER": user, "LOGNAME": user, "PATH": PATH, "LANG": "C.UTF-8"}
    pairs = [f"{key}={value}" for key, value in {**settings, **(env or {})}.items()]
    return ["env", "--ignore-environment", f"--chdir={cwd}", *pairs]


@contextmanager
def locked(path: Path, say: Say) -> Iterator[None]:
    """Hold a lock that the kernel drops when its holder dies, however it dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that holds {path}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sweep() -> None:
    """Remove the copies whose makers were killed before they could."""
    for copy in cache().glob("in-base-*"):
        if not Path("/proc", copy.name.split("-")[2]).exists():
            shutil.rmtree(copy, ignore_errors=True)


def _key(bare: bool) -> str:
    """What defines a base: its recipe and the Python packages."""
    digest = hashlib.sha256()
    for path in (FILES / "bare.sh",) if bare else (FILES / "base.sh", FILES / "venv.sh", LOCK):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _build(release: str, root: Path, log: Path, say: Say, bare: bool) -> None:
    debs, wheels = cache() / f"debs-{release}", cache() / "wheels"
    for folder in (debs, wheels, root):
        folder.mkdir(parents=True, exist_ok=True)

    def inside(what: str, argv: Sequence[str], binds: Mapping[Path, str]) -> None:
        run_aloud(what, enter(root, argv, binds=binds, cwd="/"), log, say)

    bootstrap = ["debootstrap", "--variant=minbase", f"--cache-dir={debs}", release, str(root)]
    run_aloud(
        f"debootstrap {release}",
        ["unshare", "--mount", "--pid", "--fork", "--kill-child", *bootstrap],
        log,
        say,
    )
    packages = {debs: "/var/cache/apt/archives", FILES: "/mnt/files"}
    if bare:
        inside("Debian packages", ["sh", "/mnt/files/bare.sh"], packages)
        inside("cleaning up", ["sh", "-c", "rm -rf /mnt/*"], {})
        return
    inside("Debian packages", ["sh", "/mnt/files/base.sh"], packages)
    run_aloud("Python wheels", download(LOCK, python_of(root), wheels), log, say)
    python = {wheels: "/mnt/wheels", LOCK: "/mnt/requirements.lock", FILES: "/mnt/files"}
    inside("Python packages", ["sh", "/mnt/files/venv.sh"], python)
    inside("cleaning up", ["sh", "-c", "rm -rf /mnt/* /var/lib/apt/lists/*"], {})


def python_of(root: Path) -> str:
    """The base's Python, such as 3.13."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    argv = enter(root, ["python3", "-c", code])
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()


def download(lock: Path, python: str, wheels: Path) -> list[str]:
    """The command that fetches a lock's wheels out here: inside, nothing says from where."""
    pip = shutil.which("pip3")
    return [
        *([pip] if pip else [sys.executable, "-m", "pip"]),
        *("download", "--quiet", "--python-version", python, "--only-binary", ":all:"),
        *("--no-deps", "--require-hashes", "--dest", str(wheels), "--requirement", str(lock)),
    ]
