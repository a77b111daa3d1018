"""Runs on the host: what huggingface_hub asks of the hub, for the folders below one.

hub.py PORT FOLDER TOKEN

FOLDER/OWNER/NAME/COMMIT is a repository. Files of 1 kB and more are in its large file storage. Who
comes without the token is refused.
"""

import hashlib
import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = 1000
MODEL = re.compile(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)")
FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


def sibling(path: Path, name: str) -> dict[str, Any]:
    data = path.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    about: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": blob}
    if len(data) >= LARGE:
        digest = hashlib.sha256(data).hexdigest()
        about["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 134}
    return about


def entry(about: dict[str, Any]) -> dict[str, Any]:
    """Return the same as it is told of a tree."""
    told = {
        "type": "file",
        "path": about["rfilename"],
        "size": about["size"],
        "oid": about["blobId"],
    }
    if "lfs" in about:
        told["lfs"] = {**about["lfs"], "oid": about["lfs"]["sha256"]}
    return told


class Hub(BaseHTTPRequestHandler):
    """One request."""

    folder: Path
    token: str

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if self.headers.get("Authorization") != f"Bearer {self.token}":
            self.answer(401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "who are you?"})
        elif asked := MODEL.fullmatch(path):
            self.model(*asked.groups())
        elif asked := FILE.fullmatch(path):
            self.file(*asked.groups())
        else:
            self.answer(404, b"", {})

    def model(self, repository: str, what: str, commit: str) -> None:
        root = self.folder / repository / commit
        if not root.is_dir():
            self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return
        found = sorted(path for path in root.rglob("*") if path.is_file())
        siblings = [sibling(path, path.relative_to(root).as_posix()) for path in found]
        about = {"id": repository, "sha": commit, "siblings": siblings}
        answer = about if what == "revision" else [entry(one) for one in siblings]
        self.answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def file(self, repository: str, commit: str, name: str) -> None:
        path = self.folder / repository / commit / name
        if not path.is_file():
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        about = sibling(path, name)
        etag = about["lfs"]["sha256"] if "lfs" in about else about["blobId"]
        # What was asked for is served, which is not always what was announced.
        spoilt = path.with_name(f"{path.name}.spoilt")
        data = (spoilt if spoilt.exists() else path).read_bytes()
        begin = re.fullmatch(r"bytes=([0-9]+)-", self.headers.get("Range", ""))
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if begin is not None:
            at = int(begin[1])
            span = f"bytes {at}-{len(data) - 1}/{len(data)}"
            self.answer(206, data[at:], {**headers, "Content-Range": span})
        else:
            self.answer(200, data, headers)

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the log is the client's."""


def main() -> None:
    """Listen until killed; the first line says that it does."""
    port, Hub.folder, Hub.token = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    hub = ThreadingHTTPServer(("127.0.0.1", port), Hub)
    print("listening", flush=True)
    hub.serve_forever()


if __name__ == "__main__":
    main()
