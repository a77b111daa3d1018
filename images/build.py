"""Build an engine's image: one file, named by its contents, that every node runs.

    python images/build.py vllm-cpu

The result lies in the cache, `images/NAME-DIGEST.sif`, beside a manifest `images/NAME.json` that
says which file is current, from which recipe and by which Apptainer.  An image with the same recipe
is not built again; a cache that is gone or broken costs minutes, never a result.

Wheels are fetched out here, where pip is configured, and installed in the image without a network.
Apptainer runs in the lab's base, so the machine needs none.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

IMAGES = Path(__file__).resolve().parent
# Run as a script, Python finds this folder and not the checkout, where the lab is.
sys.path.insert(0, str(IMAGES.parent))

from tests.lab.base import Say, base, cache, enter, locked  # noqa: E402
from tests.lab.wait import LabError, run_aloud  # noqa: E402

SUITE = "bookworm"
# Debian 12's, and so the one that the lock's wheels are for.
PYTHON = "3.11"
DEBIAN_PACKAGES = "python3,libnuma1"
# As root proper Apptainer takes every capability for %post, and a machine that is itself confined
# lacks one (CAP_SYS_RESOURCE); in a user namespace of its own root has them all.  The base's root
# has no range of its own, and user ids must stay what they are: one to one, and root is mapped
# anyway.
SUBORDINATE_IDS = "for file in subuid subgid; do echo root:1:65536 > /etc/$file; done"
# Squashfs on one core of a busy machine: level 1 costs half the time of level 3 and 4 % more bytes.
SQUASHFS = "-comp zstd -Xcompression-level 1 -no-progress"
# Hex digits of the file's SHA-256 in its name: enough to tell a cluster's images apart at a glance.
DIGEST_DIGITS = 12

Manifest = dict[str, str | int]


def recipe_digest(name: str) -> str:
    """What decides an image's contents: its definition, its lock and the constants above."""
    digest = hashlib.sha256(repr((SUITE, PYTHON, DEBIAN_PACKAGES, SQUASHFS)).encode())
    for suffix in (".def", ".lock"):
        digest.update((IMAGES / f"{name}{suffix}").read_bytes())
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def current(folder: Path, name: str) -> Manifest | None:
    """The manifest of the image of today's recipe; None if it or its file is missing or damaged."""
    try:
        manifest: Manifest = json.loads((folder / f"{name}.json").read_text())
        sif = folder / str(manifest["sif"])
        if manifest["definition_sha256"] != recipe_digest(name):
            return None
        # The size first: reading a gigabyte to see that it is half of one would be a waste.
        if sif.stat().st_size != manifest["size"] or file_digest(sif) != manifest["sha256"]:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return manifest


def fetch_wheels(lock: Path, wheels: Path, log: Path, say: Say) -> None:
    """Have every wheel of the lock in the folder; whatever it holds already is not fetched."""
    wheels.mkdir(exist_ok=True)
    pip = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-cache-dir", "--no-deps"),
        *("--python-version", PYTHON, "--only-binary", ":all:", "--require-hashes"),
        *("--dest", str(wheels), "--requirement", str(lock)),
    ]
    # The index is asked about 150 packages, half a minute, only if the folder has not got them.
    offline = [*pip, "--no-index", "--find-links", str(wheels)]
    if subprocess.run(offline, check=False, capture_output=True).returncode != 0:
        run_aloud("fetching wheels", pip, log, say)


def bootstrap(root: Path, log: Path, say: Say) -> None:
    """Lay a small Debian at `root`."""
    debs = cache() / f"debs-{SUITE}"
    debs.mkdir(exist_ok=True)
    argv = ["debootstrap", "--variant=minbase", f"--include={DEBIAN_PACKAGES}"]
    # In namespaces of its own, so that nothing of it stays mounted or alive, however it ends.
    namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
    run_aloud(
        f"debootstrap {SUITE}",
        [*namespaces, *argv, f"--cache-dir={debs}", SUITE, str(root)],
        log,
        say,
    )


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def apptainer(
    argv: Sequence[str], binds: Mapping[Path, str], work: Path
) -> tuple[list[str], Callable[[], None]]:
    """A command line that runs Apptainer in the lab's base, and what to call after it."""
    upper = Path(tempfile.mkdtemp(prefix="upper-", dir=work))
    env = {"APPTAINER_TMPDIR": "/mnt/work", "APPTAINER_CACHEDIR": "/mnt/work/cache"}
    script = ["sh", "-c", f'{SUBORDINATE_IDS}; exec apptainer "$@"', "sh", *argv]
    line = enter(base(), script, upper=upper, binds={work: "/mnt/work", **binds}, env=env)
    return line, lambda: shutil.rmtree(upper, ignore_errors=True)


def build(name: str, folder: Path, work: Path, say: Say) -> Manifest:
    """Build the image and publish it in the folder; `work` is scratch space."""
    definition, lock = IMAGES / f"{name}.def", IMAGES / f"{name}.lock"
    recipe, log, wheels = recipe_digest(name), folder / f"{name}.log", cache() / "wheels"
    log.unlink(missing_ok=True)
    # One waits for the network, the other for the disk and a core.
    with ThreadPoolExecutor() as pool:
        jobs: list[Future[Any]] = [
            pool.submit(fetch_wheels, lock, wheels, log, say),
            pool.submit(bootstrap, work / "rootfs", log, say),
            pool.submit(base, say=say),
        ]
    for job in jobs:
        job.result()
    # Device nodes can't be made in a user namespace, and Apptainer mounts its own.
    for device in (work / "rootfs/dev").iterdir():
        remove(device)
    # Apptainer makes no mount points in an image that it is building.
    (work / "rootfs/mnt/wheels").mkdir()
    (work / "rootfs/mnt/image.lock").touch()
    part = folder / f"{name}.sif.part"
    binds = {
        work / "rootfs": "/mnt/rootfs",
        wheels: "/mnt/wheels",
        lock: "/mnt/image.lock",
        definition: "/mnt/image.def",
        folder: "/mnt/images",
    }
    line, clean = apptainer(
        [
            *(
                "build",
                "--force",
                "--fakeroot",
                "--bind",
                "/mnt/wheels",
                "--bind",
                "/mnt/image.lock",
            ),
            *("--mksquashfs-args", SQUASHFS, f"/mnt/images/{part.name}", "/mnt/image.def"),
        ],
        binds,
        work,
    )
    run_aloud(f"apptainer build {name}", line, log, say)
    clean()
    line, clean = apptainer(["--version"], {}, work)
    version = subprocess.run(line, check=True, capture_output=True, text=True).stdout.split()[-1]
    clean()
    digest = file_digest(part)
    sif = folder / f"{name}-{digest[:DIGEST_DIGITS]}.sif"
    part.chmod(0o444)
    part.rename(sif)
    manifest: Manifest = {
        "name": name,
        "sif": sif.name,
        "sha256": digest,
        "size": sif.stat().st_size,
        "definition_sha256": recipe,
        "apptainer": version,
        "built_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    fresh = folder / f"{name}.json.part"
    fresh.write_text(json.dumps(manifest, indent=2) + "\n")
    fresh.rename(folder / f"{name}.json")
    return manifest


def image(name: str, say: Say = print) -> Path:
    """The file of the image of this name, built if it is not there; builders take turns."""
    folder = cache() / "images"
    folder.mkdir(exist_ok=True)
    with locked(folder / f"{name}.lock", say):
        manifest = current(folder, name)
        if manifest is None:
            with tempfile.TemporaryDirectory(prefix=f"build-{name}-", dir=folder) as work:
                manifest = build(name, folder, Path(work), say)
    return folder / str(manifest["sif"])


def main(arguments: Sequence[str]) -> int:
    """Build the image named on the command line and print where it is."""
    names = sorted(path.stem for path in IMAGES.glob("*.lock"))
    if len(arguments) != 1 or arguments[0] not in names:
        print(f"usage: build.py {'|'.join(names)}", file=sys.stderr)
        return 2
    if os.geteuid() != 0:
        print("build.py: debootstrap needs root", file=sys.stderr)
        return 1
    start = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - start:4.0f} s] {line}", file=sys.stderr, flush=True)

    try:
        print(image(arguments[0], say))
    except (LabError, subprocess.CalledProcessError) as error:
        print(f"build.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
