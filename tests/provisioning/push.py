"""Runs on the host: push an image of one layer (BusyBox and some files) and print its digest.

push.py REGISTRY/NAME USER PASSWORD < {path: text, ...}
"""

import base64
import gzip
import hashlib
import io
import json
import sys
import tarfile
import urllib.request
from pathlib import Path

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
BUSYBOX = Path("/bin/busybox")


def layer(files: dict[str, str]) -> bytes:
    """Return the layer as a tar file."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for path, data, mode in [
            ("bin/busybox", BUSYBOX.read_bytes(), 0o755),
            *((path, text.encode(), 0o755) for path, text in files.items()),
        ]:
            info = tarfile.TarInfo(path)
            info.size, info.mode = len(data), mode
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("bin/sh")
        link.type, link.linkname = tarfile.SYMTYPE, "busybox"
        tar.addfile(link)
    return out.getvalue()


class Registry:
    """The push half of the distribution specification's HTTP."""

    def __init__(self, name: str, user: str, password: str) -> None:
        host, _, repository = name.partition("/")
        self.base = f"https://{host}/v2/{repository}"
        self.token = base64.b64encode(f"{user}:{password}".encode()).decode()

    def ask(self, method: str, url: str, data: bytes | None = None, kind: str = "") -> str:
        headers = {"Authorization": f"Basic {self.token}"}
        if data is not None:
            headers["Content-Type"] = kind
        request = urllib.request.Request(url, data, headers, method=method)  # noqa: S310
        with urllib.request.urlopen(request) as answer:  # noqa: S310
            return str(answer.headers.get("Location", ""))

    def blob(self, data: bytes, kind: str) -> dict[str, str | int]:
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        place = self.ask("POST", f"{self.base}/blobs/uploads/", b"")
        self.ask("PUT", f"{place}&digest={digest}", data, "application/octet-stream")
        return {"mediaType": kind, "digest": digest, "size": len(data)}


def main() -> None:
    """Push what stdin holds."""
    registry = Registry(*sys.argv[1:4])
    tar = layer(json.load(sys.stdin))
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(tar).hexdigest()}"]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": registry.blob(
            json.dumps(config).encode(), "application/vnd.oci.image.config.v1+json"
        ),
        "layers": [
            registry.blob(gzip.compress(tar, 1), "application/vnd.oci.image.layer.v1.tar+gzip")
        ],
    }
    data = json.dumps(manifest).encode()
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    registry.ask("PUT", f"{registry.base}/manifests/{digest}", data, MANIFEST)
    print(digest)


if __name__ == "__main__":
    main()
