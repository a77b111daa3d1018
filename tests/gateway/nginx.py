"""The generated files on a real NGINX of a Debian release, on this machine's loopback."""

import itertools
import os
import re
import socket
import subprocess
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType

from reconciler.adapters.nginx import _tar
from reconciler.routes import KEY_FILE, STATUS_ADDRESS, key_file, render_gateway
from reconciler.spec import Fleet
from reconciler.state import Target
from tests.lab.base import base, cache, enter
from tests.lab.config import GATEWAY_CONF
from tests.lab.wait import wait_for

FOLDER = "/var/lib/modelfleet/gateway"
CHANGE = files("reconciler.adapters").joinpath("gateway.sh").read_text(encoding="utf-8")
# In NGINX's log: it, and not a request, went wrong.
FAULT = re.compile(
    r"\[(?:alert|crit|emerg)\]|lua entry thread aborted|failed to run \w+_by_lua|exited on signal"
)


# Below what Linux gives to outgoing connections, and of each process that tests beside others
# its own: a port that is free now must not be another's in the next moment.
_FIRST = 20_000 + 2_000 * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 6)
_PORTS = itertools.cycle(range(_FIRST, _FIRST + 2_000))


def free_port() -> int:
    """Return a port of this machine that nobody listens on, another one each time."""
    for port in itertools.islice(_PORTS, 2_000):
        with socket.socket() as sock, suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is left")


class Nginx:
    """One running NGINX; `change` gives it a fleet's files by the product's own script."""

    def __init__(self, folder: Path, process: "subprocess.Popen[bytes]") -> None:
        self.folder = folder
        self._process = process
        self._status = f"127.0.0.1:{free_port()}"
        self._workers: list[int] = []

    def read(self, name: str) -> str:
        """Return a file of its folder."""
        return (self.folder / name).read_text(errors="replace")

    @property
    def log(self) -> str:
        return self.read("error.log")

    @property
    def faults(self) -> list[str]:
        """What its log says of its own failures."""
        return [line for line in self.log.splitlines() if FAULT.search(line)]

    @property
    def master(self) -> int:
        """The process id of its master, as this machine counts."""
        return _children(self._process.pid)[0]

    @property
    def unharmed(self) -> bool:
        """Whether the workers that the last change started still run, and nothing failed."""
        return self._workers == _children(self.master) and not self.faults

    def change(
        self,
        fleet: Fleet,
        targets: Sequence[Target],
        exhausted: Collection[str] = (),
        external: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Test, swap and reload as `fleet` does; return when the new configuration answers.

        `external` has the key of each model's fallback.
        """
        ids = dict.fromkeys(external, "0" * 8)
        made = render_gateway(fleet, targets, exhausted=exhausted, external=ids)
        conf = made.files["fleet.conf"].replace(STATUS_ADDRESS, self._status)
        secrets = {KEY_FILE: key_file(None, external)} if external else {}
        made = replace(made, files={**made.files, "fleet.conf": conf}, secrets=secrets)
        old = set(_children(self.master))
        argv = ["sh", "-c", CHANGE, "gateway", FOLDER, self._status, "change", made.generation]
        said = self.inside(argv, stdin=_tar(made)).stdout.decode()
        assert said.strip() == made.generation, self.log
        wait_for("the old workers to end", lambda: not old & set(_children(self.master)))
        self._workers = _children(self.master)

    def check(self) -> str:
        """Return what `nginx -t` says of the files that it runs."""
        argv = ["nginx", "-t", "-q", "-c", f"{FOLDER}/current/nginx.conf"]
        return self.inside(argv).stderr.decode()

    def inside(
        self, argv: Sequence[str], stdin: bytes = b""
    ) -> "subprocess.CompletedProcess[bytes]":
        """Run a command beside it, with its files and processes."""
        enter_it = ["nsenter", "-t", str(self.master), "--mount", "--pid", "--"]
        done = subprocess.run(
            [*enter_it, *argv], input=stdin, capture_output=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr.decode()
        return done


@contextmanager
def running(release: str, folder: Path) -> Iterator[Nginx]:
    """Run NGINX with the base configuration that sites have; what it writes lies in `folder`."""
    folder.chmod(0o755)
    (folder / "base.conf").write_text(GATEWAY_CONF.read_text())
    (folder / "gen-empty").mkdir()
    (folder / "gen-empty/fleet.conf").touch()
    (folder / "gen-empty/nginx.conf").symlink_to("../base.conf")
    (folder / "current").symlink_to("gen-empty")
    (folder / "tmp").mkdir()
    prefix = f"in-base-{os.getpid()}-"
    with tempfile.TemporaryDirectory(dir=cache(), prefix=prefix) as upper:
        argv = ["nginx", "-g", "daemon off;", "-c", f"{FOLDER}/current/nginx.conf"]
        process = subprocess.Popen(
            enter(base(release), argv, upper=Path(upper), binds={folder: FOLDER}),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_for("NGINX to start", lambda: (folder / "nginx.pid").exists())
            yield Nginx(folder, process)
        finally:
            process.kill()
            process.wait()


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
