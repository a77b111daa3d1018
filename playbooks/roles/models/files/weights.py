#!/usr/bin/env python3
"""Provide a model's weights as a folder that is complete, verified and never changes.

    weights.py provide [--check] < REQUEST

The request is JSON on stdin, as it may hold a token. The weights lie in FOLDER/NAME-PIN, of which a
spec's `weights` is the path, beside a SHA256SUMS of them; PIN is the beginning of

    the commit           where they come from the Hugging Face hub (needs huggingface_hub),
    SHA256SUMS' sha256   where they come from a folder or an HTTP mirror, which has that file.

Prints {"provided": true, "weights": PATH} if they were not there. They are fetched into a `.part`
folder beside it, which is renamed once all is verified; a run that was interrupted is continued by
the next, and FOLDER/.NAME-PIN.progress says how far it is. A mistake is one line on stderr and exit
code 1.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import http.client
import json
import os
import re
import shutil
import socket
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol

PIN_DIGITS = 12
NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?")
COMMIT = re.compile(r"[0-9a-f]{40}")
DIGEST = re.compile(r"[0-9a-f]{64}")
SUM = re.compile(r"([0-9a-f]{64}) [ *](.+)")
SUMS = "SHA256SUMS"
CHUNK = 1 << 20
# A mirror that says nothing for so long has hung up; the file goes on where it was.
SILENCE_S = 60.0
TRIES = 5
PROGRESS_S = 2.0
FULL = (errno.ENOSPC, errno.EDQUOT)

Request = dict[str, Any]


class Failed(Exception):
    """One line: what went wrong, where, and what to do."""


class Interrupted(Failed):
    """The source broke off, or is not to be reached now; what came so far is good."""


@dataclass(frozen=True)
class File:
    """One file: its size in bytes, if that is known before, and how its bytes are told."""

    path: str
    size: int | None
    sha256: str | None = None
    blob: str | None = None  # git's own name of it, where there is no sha256


def main() -> int:
    """Do what the command line and the request ask for."""
    if sys.argv[1:] not in (["provide"], ["provide", "--check"]):
        print("usage: weights.py provide [--check] < REQUEST", file=sys.stderr)
        return 2
    request = json.load(sys.stdin)
    os.umask(0o022)
    try:
        answer = provide(request, "--check" in sys.argv)
    except (Failed, OSError) as error:
        # An error while writing does not say where.
        full = isinstance(error, OSError) and error.errno in FULL
        text = f"no space left in {request['folder']}" if full else str(error)
        print(f"weights: {' '.join(hide(text, request).split())}", file=sys.stderr)
        return 1
    print(json.dumps(answer))
    return 0


def hide(text: str, request: Request) -> str:
    """Return a text in which the token can't be."""
    token = request.get("token")
    return text.replace(token, "...") if token else text


def provide(request: Request, check: bool) -> Any:
    """Have the weights in the folder."""
    name, pin = name_and_pin(request)
    if not Path(request["folder"]).is_absolute():
        raise Failed("models_dir is not set: name the folder that login hosts and nodes share")
    final = Path(request["folder"]) / f"{name}-{pin[:PIN_DIGITS]}"
    missing = not final.exists()
    if missing and not check:
        final.parent.mkdir(parents=True, exist_ok=True)
        with locked(final):
            if not final.exists():
                fetch(request, pin, final)
    return {"provided": missing, "weights": str(final)}


def name_and_pin(request: Request) -> tuple[str, str]:
    """Return the name, and what decides each byte of the weights."""
    name = request["name"]
    if not NAME.fullmatch(name):
        raise Failed(f'the name "{name}" has more than small letters, digits, dots and dashes')
    kinds = [kind for kind in ("hub", "url", "path") if request.get(kind)]
    if len(kinds) != 1:
        raise Failed(f"{name}: give one of hub, url and path")
    if kinds == ["hub"]:
        if not COMMIT.fullmatch(request.get("commit") or ""):
            raise Failed(f"{name}: a hub's weights need their commit (40 hex digits), not a branch")
        return name, request["commit"]
    if not DIGEST.fullmatch(request.get("sha256") or ""):
        raise Failed(f"{name}: give the sha256 of {SUMS} (64 hex digits)")
    return name, request["sha256"]


def fetch(request: Request, pin: str, final: Path) -> None:
    """Fetch, verify and publish. What has come so far stays, whatever goes wrong."""
    part = final.with_name(f".{final.name}.part")
    part.mkdir(exist_ok=True)
    source = source_of(request, pin)
    files = source.files()
    room(part, files)
    with progress(part, files):
        source.fetch(part, files)
        sums = {file.path: verified(part, file) for file in files}
    text = "".join(f"{digest}  {path}\n" for path, digest in sorted(sums.items()))
    # Should the former run have been killed in its last step, it is read-only.
    (part / SUMS).unlink(missing_ok=True)
    (part / SUMS).write_text(text, encoding="utf-8")
    settle(part, {*sums, SUMS})
    part.rename(final)


def room(part: Path, files: list[File]) -> None:
    """Say at once, and not after hours, that the weights can't fit."""
    wanted = sum(file.size or 0 for file in files)
    missing, free = wanted - size_of(part), shutil.disk_usage(part).free
    if missing > free:
        raise Failed(f"no space left in {part.parent}: {gb(missing)} to come, {gb(free)} free")


def verified(part: Path, file: File) -> str:
    """Return a file's sha256, if its bytes are the right ones; if not, it is fetched again."""
    path = part / file.path
    digest, blob = hashlib.sha256(), hashlib.sha1(usedforsecurity=False)
    blob.update(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as content:
        while chunk := content.read(CHUNK):
            digest.update(chunk)
            blob.update(chunk)
    if file.sha256 not in (None, digest.hexdigest()) or file.blob not in (None, blob.hexdigest()):
        path.unlink()
        raise Failed(f"{path.name} has not the checksum that it should have: it was removed")
    return digest.hexdigest()


def settle(part: Path, wanted: set[str]) -> None:
    """Leave the wanted files alone in the folder, read-only and on the disk."""
    for path in sorted(part.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError):
                path.rmdir()  # if nothing is in it
                continue
            path.chmod(0o755)
        elif path.relative_to(part).as_posix() not in wanted:
            path.unlink()
        else:
            path.chmod(0o444)
            with path.open("rb") as file:
                os.fsync(file.fileno())
    part.chmod(0o755)


def source_of(request: Request, pin: str) -> Source:
    if request.get("hub"):
        return Hub(request)
    return Mirror(request["url"], pin) if request.get("url") else Folder(request["path"], pin)


class Source(Protocol):
    """Where weights come from."""

    def files(self) -> list[File]:
        """Return what there is to fetch."""

    def fetch(self, part: Path, files: list[File]) -> None:
        """Have the files in the folder, whole by their sizes; go on with what is there already."""


# --- the Hugging Face hub ---


class Hub:
    """One commit of a repository, by the hub's own library."""

    def __init__(self, request: Request) -> None:
        self.repository, self.commit = request["hub"], request["commit"]
        self.ignored = list(request.get("leave_out") or [])
        # Without a token of ours, none that happens to lie in a home folder.
        self.login = {"token": request.get("token") or False, "endpoint": request.get("hub_url")}

    def files(self) -> list[File]:
        with self.errors():
            from huggingface_hub import HfApi
            from huggingface_hub.utils import filter_repo_objects

            info = HfApi(**self.login).model_info(
                self.repository, revision=self.commit, files_metadata=True
            )
            names = [sibling.rfilename for sibling in info.siblings or []]
            wanted = set(filter_repo_objects(names, ignore_patterns=self.ignored))
            return [hub_file(one) for one in info.siblings or [] if one.rfilename in wanted]

    def fetch(self, part: Path, files: list[File]) -> None:
        for file in files:
            check_inside(file.path)
        with self.errors():
            from huggingface_hub import snapshot_download

            snapshot_download(
                self.repository,
                revision=self.commit,
                local_dir=part,
                ignore_patterns=self.ignored,
                **self.login,
            )

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Make one line of what the library raises, which is of many kinds."""
        try:
            yield
        except ImportError:
            raise Failed(f"{sys.executable} has no huggingface_hub") from None
        except Exception as error:
            full = isinstance(error, OSError) and error.errno in FULL
            if full or isinstance(error, Failed):
                raise
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise Failed(
                f"{self.repository} at {self.commit}: {said[0]}; run again to go on"
            ) from None


def hub_file(sibling: Any) -> File:
    if sibling.lfs is not None:
        return File(sibling.rfilename, sibling.lfs.size, sha256=sibling.lfs.sha256)
    return File(sibling.rfilename, sibling.size, blob=sibling.blob_id)


# --- a folder or a mirror that has a SHA256SUMS ---


class Sums(ABC):
    """Weights that lie beside a SHA256SUMS."""

    def __init__(self, base: str, pin: str) -> None:
        self.base, self.pin = base.rstrip("/"), pin

    @abstractmethod
    def size(self, path: str) -> int | None:
        """Return a file's size, if the source can tell."""

    @abstractmethod
    def open(self, path: str, offset: int) -> tuple[IO[bytes], bool]:
        """Open a file; whether it begins at the offset, and not at its first byte."""

    def files(self) -> list[File]:
        with self.open(SUMS, 0)[0] as answer:
            text = answer.read()
        if hashlib.sha256(text).hexdigest() != self.pin:
            raise Failed(f"{self.base}: its {SUMS} is not the pinned one")
        lines = [SUM.fullmatch(line) for line in text.decode().splitlines()]
        # `sha256sum ./*` writes ./name.
        found = [(PurePosixPath(line[2]).as_posix(), line[1]) for line in lines if line]
        if not found or len(found) != len(lines):
            raise Failed(f"{self.base}: its {SUMS} is not what sha256sum writes")
        for path, _ in found:
            check_inside(path)
        return [File(path, self.size(path), sha256=digest) for path, digest in found]

    def fetch(self, part: Path, files: list[File]) -> None:
        for file in files:
            target = part / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            for tried in range(1, TRIES + 1):
                try:
                    self.go_on(file, target)
                    break
                except Interrupted as error:
                    if tried == TRIES:
                        raise Failed(f"{error}; run again to go on") from None
                    time.sleep(tried)

    def go_on(self, file: File, target: Path) -> None:
        """Fetch what is missing of a file."""
        have = target.stat().st_size if target.exists() else 0
        if have == file.size:
            return
        if file.size is None or have > file.size:
            have = 0
        content, resumed = self.open(file.path, have)
        with content, target.open("ab" if resumed else "wb") as out:
            try:
                shutil.copyfileobj(content, out, CHUNK)
            except (OSError, http.client.HTTPException) as error:
                if isinstance(error, OSError) and error.errno in FULL:
                    raise
                raise Interrupted(f"{self.base}/{file.path}: {error}") from None
        if file.size is not None and target.stat().st_size < file.size:
            raise Interrupted(f"{self.base}/{file.path} ended too early")


class Folder(Sums):
    """A folder that this host sees."""

    def size(self, path: str) -> int:
        try:
            return Path(self.base, path).stat().st_size
        except FileNotFoundError:
            raise Failed(f"{self.base}/{path} is not there") from None

    def open(self, path: str, offset: int) -> tuple[IO[bytes], bool]:
        try:
            file = Path(self.base, path).open("rb")  # noqa: SIM115  (its caller closes it)
        except FileNotFoundError:
            raise Failed(f"{self.base}/{path} is not there") from None
        file.seek(offset)
        return file, offset > 0


class Mirror(Sums):
    """A folder that a web server has; it goes on where it was if the server takes ranges."""

    def size(self, path: str) -> int | None:
        with self.ask("HEAD", path, {}) as answer:
            length = answer.headers.get("Content-Length")
        return int(length) if length else None

    def open(self, path: str, offset: int) -> tuple[IO[bytes], bool]:
        answer = self.ask("GET", path, {"Range": f"bytes={offset}-"} if offset else {})
        return answer, answer.status == 206

    def ask(self, method: str, path: str, headers: dict[str, str]) -> Any:
        url = f"{self.base}/{urllib.parse.quote(path)}"
        if not url.startswith(("https://", "http://")):
            raise Failed(f"{self.base} is no http:// or https:// address")
        request = urllib.request.Request(url, headers=headers, method=method)  # noqa: S310
        try:
            return urllib.request.urlopen(request, timeout=SILENCE_S)  # noqa: S310
        except urllib.error.HTTPError as error:
            raise (Interrupted if error.code >= 500 else Failed)(f"{url}: {error}") from None
        except (OSError, http.client.HTTPException) as error:
            raise Interrupted(f"{url}: {getattr(error, 'reason', error)}") from None


# --- files ---


def check_inside(path: str) -> None:
    """Refuse a name by which a source would write elsewhere."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or path == SUMS or not path.isprintable():
        raise Failed(f"{path!r} is no name that a file of weights may have")


def size_of(folder: Path) -> int:
    """Return how many bytes the files of a folder have, which others may be moving."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.lstat().st_size
    return total


@contextlib.contextmanager
def progress(part: Path, files: list[File]) -> Iterator[None]:
    """Write how far it is into a file beside the folder, every two seconds."""
    wanted, ended = gb(sum(file.size or 0 for file in files)), threading.Event()
    said = part.with_suffix(".progress")

    def tell() -> None:
        while not ended.wait(PROGRESS_S):
            with contextlib.suppress(OSError):
                said.write_text(f"{gb(size_of(part))} of {wanted}\n", encoding="utf-8")

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()
        said.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(final: Path) -> Iterator[None]:
    """Hold the weights' lock, which ends with its holder however that ends, or say who does."""
    with final.with_name(f".{final.name}.lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise Failed(f"{final} is being fetched by {file.read()}: run again later") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


if __name__ == "__main__":
    raise SystemExit(main())
