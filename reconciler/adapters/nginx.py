"""NGINX on this host or behind ssh: the same steps by the same script in both cases.

The gateway's folder holds `base.conf` (Ansible's), one folder per generation and the link
`current`. A change is staged beside them, tested there, and only then becomes `current`.
"""

import io
import shlex
import subprocess
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files

from reconciler.errors import GatewayFailed
from reconciler.routes import STATUS_ADDRESS, GatewayFiles, parse_targets
from reconciler.spec import Gateway, GatewayHost
from reconciler.state import GatewayView

_SCRIPT = files("reconciler.adapters").joinpath("gateway.sh").read_text(encoding="utf-8")
_TIMEOUT_S = 30.0
# BatchMode: never a prompt. The connection must fail long before the cycle's patience ends.
_SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", "-o", "ServerAliveInterval=5")


class NginxGateways:
    """The adapter for all gateways of one fleet."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def look(self) -> tuple[GatewayView, ...]:
        with ThreadPoolExecutor(max_workers=8) as pool:
            return tuple(pool.map(self._look, self._gateway.hosts))

    def change(self, name: str, files: GatewayFiles) -> None:
        host = next(host for host in self._gateway.hosts if host.name == name)
        said = self._run(host, ["change", files.generation], stdin=_tar(files)).strip()
        if said != files.generation:
            raise GatewayFailed(f"gateway {name}: it runs {said or 'nothing'} after the reload")

    def _look(self, host: GatewayHost) -> GatewayView:
        try:
            said = self._run(host, ["look"])
            head, _, listing = said.partition("\n")
            generation, linked, old_workers = head.split()
            if generation == "none":
                return GatewayView(name=host.name, old_workers=int(old_workers))
            _, targets = parse_targets(listing)
            return GatewayView(
                name=host.name,
                # A start of nginx would read something else: as good as behind, so swapped again.
                generation=generation if linked == generation else None,
                targets=targets,
                old_workers=int(old_workers),
            )
        except GatewayFailed as error:
            return GatewayView(name=host.name, error=str(error))
        except ValueError:
            return GatewayView(
                name=host.name, error=f"gateway {host.name}: its files can't be read"
            )

    def _run(self, host: GatewayHost, words: Sequence[str], stdin: bytes = b"") -> str:
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
        return done.stdout.decode(errors="replace")


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
