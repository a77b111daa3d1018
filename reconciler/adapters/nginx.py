"""NGINX on this host or behind ssh: the same steps by the same script in both cases.

The gateway's folder holds `base.conf` (Ansible's), one folder per generation and the link
`current`. A change is staged beside them, tested there, and only then becomes `current`.
"""

import hashlib
import io
import shlex
import subprocess
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files

from reconciler.adapters.ports import LogPart
from reconciler.errors import GatewayFailed
from reconciler.routes import (
    STATUS_ADDRESS,
    GatewayFiles,
    parse_exhausted,
    parse_owner,
    parse_targets,
)
from reconciler.spec import Gateway, GatewayHost
from reconciler.state import GatewayView

_SCRIPT = files("reconciler.adapters").joinpath("gateway.sh").read_text(encoding="utf-8")
_TIMEOUT_S = 30.0
# BatchMode: never a prompt. The connection must fail long before the cycle's patience ends.
# Where a log was read to: how many bytes of its file's beginning have which hash, the offset, and
# when that file was written last.
_NOWHERE = ("0", "-", "0", "0")
# A line is longer, and has its time to the millisecond: no two files begin alike.
_MARK_BYTES = 128
_LOG_MOST = 4 * 1024 * 1024
_SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", "-o", "ServerAliveInterval=5")


class NginxGateways:
    """The adapter for all gateways of one fleet, whose name keeps it from another one's routes."""

    def __init__(self, gateway: Gateway, fleet: str) -> None:
        self._gateway = gateway
        self._fleet = fleet

    def look(self) -> tuple[GatewayView, ...]:
        with ThreadPoolExecutor(max_workers=8) as pool:
            return tuple(pool.map(self._look, self._gateway.hosts))

    def change(self, name: str, files: GatewayFiles) -> None:
        argv = ["change", files.generation]
        answer = self._run(self._host(name), argv, stdin=_tar(files))
        said = answer.decode(errors="replace").strip()
        if said != files.generation:
            raise GatewayFailed(f"gateway {name}: it runs {said or 'nothing'} after the reload")

    def log(self, name: str, position: str) -> LogPart:
        words = position.split(":") if position else _NOWHERE
        said = self._run(self._host(name), ["log", *words, str(_LOG_MOST)])
        head, _, data = said.partition(b"\n")
        try:
            state, begin, size, since, left = head.decode().split()
            return _log_part(position, data, state, int(begin), int(size), since, left)
        except ValueError:
            raise GatewayFailed(f"gateway {name}: its log can't be read") from None

    def _host(self, name: str) -> GatewayHost:
        return next(host for host in self._gateway.hosts if host.name == name)

    def _look(self, host: GatewayHost) -> GatewayView:
        try:
            said = self._run(host, ["look"]).decode(errors="replace")
            head, _, listing = said.partition("\n")
            generation, linked, old_workers = head.split()
            if generation == "none":
                return GatewayView(name=host.name, old_workers=int(old_workers))
            _, targets = parse_targets(listing)
            owner = parse_owner(listing)
            if targets and owner not in (None, self._fleet):
                raise GatewayFailed(
                    f"gateway {host.name}: {self._gateway.directory} serves the fleet {owner}: "
                    f"end that first, or give this one its own gateway.directory"
                )
            return GatewayView(
                name=host.name,
                # A start of nginx would read something else: as good as behind, so swapped again.
                generation=generation if linked == generation else None,
                targets=targets,
                old_workers=int(old_workers),
                exhausted=parse_exhausted(listing),
            )
        except GatewayFailed as error:
            return GatewayView(name=host.name, error=str(error))
        except ValueError:
            return GatewayView(
                name=host.name, error=f"gateway {host.name}: its files can't be read"
            )

    def _run(self, host: GatewayHost, words: Sequence[str], stdin: bytes = b"") -> bytes:
        local = ["sh", "-c", _SCRIPT, "gateway", self._gateway.directory, STATUS_ADDRESS, *words]
        argv = local if host.ssh is None else [*_SSH, "--", host.ssh, shlex.join(local)]
        try:
            done = subprocess.run(
                argv,
                input=stdin,
                capture_output=True,
                timeout=_TIMEOUT_S,
                check=False,
                process_group=0,  # Ctrl-C is for us: what has begun is finished
            )
        except subprocess.TimeoutExpired:
            raise GatewayFailed(f"gateway {host.name}: no answer in {_TIMEOUT_S:g} s") from None
        except FileNotFoundError:
            raise GatewayFailed(f"gateway {host.name}: {argv[0]} is not on PATH") from None
        if done.returncode != 0:
            said = " ".join(done.stderr.decode(errors="replace").split())[:300]
            raise GatewayFailed(f"gateway {host.name}: {said or f'status {done.returncode}'}")
        return done.stdout


def _log_part(
    position: str, data: bytes, state: str, begin: int, size: int, since: str, left: str
) -> LogPart:
    """Return the whole lines of what was read, and where they end.

    Of a file that nobody writes any more also its last line, if that has no end; and of a line
    that is longer than what is read at once what there is of it, so that it can't stop the reading.
    """
    whole = data[: data.rfind(b"\n") + 1]
    if (left == "settled" and begin + len(data) >= size) or (not whole and len(data) >= _LOG_MOST):
        whole = data
    ended = left == "end" and begin + len(data) >= size
    if not whole:
        return LogPart(lines=b"", position=position, ended=ended)
    mark_bytes, mark, *_ = position.split(":") if position else _NOWHERE
    if begin == 0:
        first = whole[:_MARK_BYTES]
        mark_bytes, mark = str(len(first)), hashlib.sha256(first).hexdigest()[:16]
    return LogPart(
        lines=whole,
        position=f"{mark_bytes}:{mark}:{begin + len(whole)}:{since}",
        ended=ended,
        lost=state == "gone",
    )


def _tar(files: GatewayFiles) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for part, mode in ((files.files, 0o640), (files.secrets, 0o600)):
            for name, text in sorted(part.items()):
                data = text.encode()
                entry = tarfile.TarInfo(name)
                entry.size, entry.mode = len(data), mode
                tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()
