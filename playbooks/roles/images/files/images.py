#!/usr/bin/env python3
"""Provide an image as a content-addressed file, and remove those that nothing names.

    images.py provide|clean [--check] < REQUEST

The request is JSON on stdin, as it may hold secrets. `provide` has the image in the folder, and
prints {"provided": true} if it was not there; `clean` prints {"removed": [...]}. With --check both
only say what they would do. A mistake is one line on stderr and exit code 1; what was there before
it stays as it was.

    NAME-DIGEST.sif        read-only; DIGEST is the beginning of its sha256
    NAME-DIGEST.sif.json   its manifest: also of an earlier image, so that going back takes seconds
    NAME.json              the manifest of the current one, which `fleet` reads

Needs nothing but Python 3.9 and, where an image is built, Apptainer.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

# Hex digits of the file's sha256 in its name: enough to tell a cluster's images apart at a glance.
DIGEST_DIGITS = 12
NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
DIGEST = re.compile(r"[0-9a-f]{64}")
SOURCE = re.compile(r"docker://[^@\s]+@sha256:[0-9a-f]{64}")
# What a base image may come from by a tag, which is no pin.
REGISTRIES = ("docker", "oras", "library", "shub")
# A large engine's image takes half an hour to unpack and squash; what takes longer hangs.
TIMEOUT_S = 3 * 3600.0
CHUNK = 1 << 20
# A disk with less is full.
SPACE = 1 << 20

Image = dict[str, str]
Manifest = dict[str, Any]


class Failed(Exception):
    """One line: what went wrong, where, and what to do."""


def main() -> int:
    """Do what the command line and the request ask for."""
    words = [word for word in sys.argv[1:] if word != "--check"]
    verbs = {"provide": provide, "clean": clean}
    if len(words) != 1 or words[0] not in verbs:
        print("usage: images.py provide|clean [--check] < REQUEST", file=sys.stderr)
        return 2
    request = json.load(sys.stdin)
    os.umask(0o022)
    try:
        answer = verbs[words[0]](request, "--check" in sys.argv)
    except (Failed, OSError) as error:
        # An error while writing does not say where.
        text = f"{request['folder']}: {error}" if isinstance(error, OSError) else str(error)
        print(f"images: {one_line(text, request)}", file=sys.stderr)
        return 1
    print(json.dumps(answer))
    return 0


def one_line(text: str, request: dict[str, Any]) -> str:
    """Return an error as one line in which the registry's password can't be."""
    password = request.get("password")
    text = text.replace(password, "...") if password else text
    return " ".join(text.split())


# --- provide ---


def provide(request: dict[str, Any], check: bool) -> Any:
    """Have the image in the folder, verified and current."""
    folder, image = Path(request["folder"]), request["image"]
    if not folder.is_absolute():
        raise Failed("images_dir is not set: name the folder that login hosts and nodes share")
    name, pin, verified_with = image["name"], pin_of(image), key_of(request)
    # The size alone is compared: reading it all takes minutes.
    current = read_manifest(folder / f"{name}.json")
    if current is not None and answers(folder, current, pin, verified_with):
        return {"provided": False}
    if not check:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            earlier = find(folder, name, pin, verified_with)
            publish(folder, earlier or make(folder, image, pin, request))
    return {"provided": True}


def pin_of(image: Image) -> str:
    """Return what decides an image's content, as its manifest holds it."""
    name = image["name"]
    if not NAME.fullmatch(name):
        raise Failed(f'the image name "{name}" is no DNS label')
    kinds = [kind for kind in ("source", "definition", "file") if image.get(kind)]
    if len(kinds) != 1:
        raise Failed(f"{name}: give one of source, definition and file")
    if kinds == ["source"]:
        if not SOURCE.fullmatch(image["source"]):
            raise Failed(
                f"{name}: {image['source']} is no pin: write docker://REPOSITORY@sha256:DIGEST"
            )
        return image["source"]
    if kinds == ["definition"]:
        check_definition(name, image["definition"])
        return f"definition sha256:{digest_of(image['definition'])}"
    if not DIGEST.fullmatch(image.get("sha256", "")):
        raise Failed(f"{name}: a file needs its sha256 (64 hex digits)")
    return f"file sha256:{image['sha256']}"


def key_of(request: dict[str, Any]) -> str | None:
    """Return what tells the key from others with which images are verified, if they are."""
    key = request.get("verify_key")
    return digest_of(key) if key else None


def check_definition(name: str, text: str) -> None:
    """Refuse a definition whose base is a tag: it would be another image next month."""
    stage = ""
    for line in text.splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key.lower() == "bootstrap":
            stage = value.lower()
        elif key.lower() == "from" and stage in REGISTRIES and "@sha256:" not in value:
            raise Failed(f"{name}: its definition is From: {value}; pin it by @sha256:DIGEST")


def answers(folder: Path, manifest: Manifest, pin: str, verified_with: str | None) -> bool:
    """Whether a manifest is of this pin, and its file is there and whole by its size."""
    if (manifest.get("pin"), manifest.get("verified_with")) != (pin, verified_with):
        return False
    with contextlib.suppress(FileNotFoundError):
        return bool((folder / manifest["sif"]).stat().st_size == manifest["size"])
    return False


def find(folder: Path, name: str, pin: str, verified_with: str | None) -> Manifest | None:
    """Return an earlier image of this pin, if its bytes are still what they were."""
    for manifest in manifests(folder):
        same = manifest["name"] == name and answers(folder, manifest, pin, verified_with)
        if same and file_digest(folder / manifest["sif"]) == manifest["sha256"]:
            return manifest
    return None


def make(folder: Path, image: Image, pin: str, request: dict[str, Any]) -> Manifest:
    """Make the image's file; whatever goes wrong, nothing that was there has changed."""
    name = image["name"]
    part = folder / f".{name}.sif.part"
    part.unlink(missing_ok=True)
    try:
        with workplace(Path(request["scratch"]), folder, name) as work:
            if image.get("file"):
                copy(name, Path(image["file"]), part)
                if file_digest(part) != image["sha256"]:
                    raise Failed(f"{name}: {image['file']} has not the sha256 of its pin")
            else:
                build(image, part, work, request)
            seal(name, part, work, request)
        digest = file_digest(part)
        sif = f"{name}-{digest[:DIGEST_DIGITS]}.sif"
        flush(part)
        part.chmod(0o444)
        size = part.stat().st_size
        part.rename(folder / sif)
    finally:
        part.unlink(missing_ok=True)
    return {
        "name": name,
        "sif": sif,
        "sha256": digest,
        "size": size,
        "pin": pin,
        "verified_with": key_of(request),
        "apptainer": None if image.get("file") else apptainer_version(),
        "built_at": now(),
    }


@contextlib.contextmanager
def workplace(scratch: Path, folder: Path, name: str) -> Iterator[Path]:
    """Yield an empty folder of our own, at a place where the next run finds it after a kill."""
    work = scratch / f"images-{name}-{digest_of(str(folder))[:DIGEST_DIGITS]}"
    remove(work)
    # Who else may write to the scratch folder can't have made it: that would be an error.
    work.mkdir(mode=0o700)
    try:
        yield work
    finally:
        remove(work)


def remove(work: Path) -> None:
    """Remove a build's folder. What it unpacked has folders that not even their owner may write."""
    if work.exists():
        for path, names, _ in os.walk(work):
            for name in names:
                inner = Path(path, name)
                if not inner.is_symlink():
                    inner.chmod(0o700)
        shutil.rmtree(work)


def copy(name: str, source: Path, part: Path) -> None:
    """Copy a file, unless it can't fit."""
    try:
        size, free = source.stat().st_size, shutil.disk_usage(part.parent).free
    except FileNotFoundError:
        raise Failed(f"{name}: {source} is not there") from None
    if size > free:
        raise Failed(f"{name}: {part.parent} is full: it takes {mb(size)}, {mb(free)} are free")
    shutil.copyfile(source, part)


def build(image: Image, part: Path, work: Path, request: dict[str, Any]) -> None:
    """Build from a registry or a definition, with scratch space and a cache of its own."""
    spec = image.get("source") or str(work / "image.def")
    if image.get("definition"):
        Path(spec).write_text(image["definition"], encoding="utf-8")
    environment = {"APPTAINER_TMPDIR": str(work)}
    if request.get("username"):
        # Not arguments, which every user of this host could read.
        environment["APPTAINER_DOCKER_USERNAME"] = request["username"]
        environment["APPTAINER_DOCKER_PASSWORD"] = request["password"]
    apptainer(image["name"], ["build", str(part), spec], part.parent, work, environment)


def seal(name: str, part: Path, work: Path, request: dict[str, Any]) -> None:
    """Sign the file, if there is a key for that, and verify it, if there is one for that."""
    for verb, key in (("sign", request.get("sign_key")), ("verify", request.get("verify_key"))):
        if key:
            # On no disk: a run that is killed leaves no key behind.
            pem = os.memfd_create(verb, flags=0)
            os.write(pem, key.encode())
            words = [verb, "--key", f"/proc/self/fd/{pem}", str(part)]
            apptainer(name, words, part.parent, work, {})
            os.close(pem)


def apptainer(
    name: str, words: list[str], folder: Path, work: Path, environment: dict[str, str]
) -> None:
    """Run Apptainer; all that it says is in NAME.log, its last error in ours."""
    log = folder / f"{name}.log"
    with log.open("w", encoding="utf-8") as said:
        try:
            done = subprocess.run(
                ["apptainer", "--nocolor", *words],
                # Nothing of a person's home: no cache, no login to another registry.
                env={**os.environ, "HOME": str(work), **environment},
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                timeout=TIMEOUT_S,
                # It has the folder's lock too: should we be killed, it still writes for a while.
                close_fds=False,
                check=False,
            )
        except FileNotFoundError:
            raise Failed("Apptainer is not installed: run playbooks/apptainer.yml") from None
        except subprocess.TimeoutExpired:
            raise Failed(f"{name}: apptainer {words[0]} took over {TIMEOUT_S:.0f} s") from None
    if done.returncode != 0:
        text = log.read_text(encoding="utf-8", errors="replace")
        raise Failed(f"{name}: apptainer {words[0]}: {reason(text, folder, work)} (see {log})")


def reason(text: str, folder: Path, work: Path) -> str:
    """Return why Apptainer failed, in its own last words, or that a disk is full."""
    free = {at: shutil.disk_usage(at).free for at in (folder, work.parent)}
    # What it says may itself have found no space.
    said = re.search("no space left on device|disk quota exceeded", text, re.IGNORECASE)
    if said or min(free.values()) < SPACE:
        return "no space left: " + ", ".join(
            f"{at} has {mb(size)} free" for at, size in free.items()
        )
    errors = [line for line in text.splitlines() if line.startswith(("FATAL", "ERROR"))]
    return (errors or text.splitlines() or ["it said nothing"])[-1]


def apptainer_version() -> str:
    argv = ["apptainer", "--version"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    return (done.stdout.split() or ["unknown"])[-1]


def publish(folder: Path, manifest: Manifest) -> None:
    """Make an image the current one; the reconciler reads the last file of the two."""
    manifest = {**manifest, "published_at": now()}
    write_manifest(folder / f"{manifest['sif']}.json", manifest)
    write_manifest(folder / f"{manifest['name']}.json", manifest)


# --- clean ---


def clean(request: dict[str, Any], check: bool) -> Any:
    """Remove what is neither current, nor in use, nor one of the `keep` latest of its name.

    Only files with a manifest of ours are looked at. `in_use` holds paths of which the last part
    counts: a folder has several names where links lead to it.
    """
    folder = Path(request["folder"])
    stay = {Path(path).name for path in request["in_use"]}
    removed: list[str] = []
    with contextlib.nullcontext() if check else locked(folder):
        earlier: dict[str, list[str]] = {}
        for manifest in sorted(manifests(folder), key=published, reverse=True):
            current = read_manifest(folder / f"{manifest['name']}.json")
            # Which one is current can't be told without it.
            if current is not None and current["sif"] != manifest["sif"]:
                earlier.setdefault(manifest["name"], []).append(manifest["sif"])
        for sifs in earlier.values():
            removed += [sif for sif in sifs[request["keep"] :] if sif not in stay]
        for sif in [] if check else removed:
            (folder / sif).unlink(missing_ok=True)
            (folder / f"{sif}.json").unlink()
    return {"removed": removed}


def published(manifest: Manifest) -> str:
    return str(manifest.get("published_at", ""))


# --- files ---


def manifests(folder: Path) -> Iterator[Manifest]:
    """Yield the manifests of all images in the folder, current or not."""
    for path in sorted(folder.glob("*.sif.json")):
        manifest = read_manifest(path)
        if manifest is not None and path.name == f"{manifest['sif']}.json":
            yield manifest


def read_manifest(path: Path) -> Manifest | None:
    """Return a manifest, None if there is none or it has not what every one has."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        known = {key: manifest[key] for key in ("name", "sif", "sha256", "size")}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    whole = "/" not in str(known["sif"]) and NAME.fullmatch(str(known["name"]))
    return manifest if whole else None


def write_manifest(path: Path, manifest: Manifest) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    part.chmod(0o644)
    flush(part)
    part.rename(path)


def flush(path: Path) -> None:
    """Have a file on the disk before its name is: a power cut must not leave half of one."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def mb(size: int) -> str:
    return f"{size / 1e6:.0f} MB"


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which ends with its holder however that ends, or say who does."""
    with (folder / ".lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise Failed(f"{folder} is in use by {file.read()}: run this again later") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {now()}")
        file.flush()
        os.set_inheritable(file.fileno(), True)
        yield


if __name__ == "__main__":
    raise SystemExit(main())
