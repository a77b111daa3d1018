"""The lab itself: start, stop, commands on its hosts, and the faults that tests need."""

import contextlib
import dataclasses
import http.client
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache as once
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.lab.base import CHECKOUT, FILES, Say, base, cache, clean_env, in_base, locked
from tests.lab.config import put, readable_checkout, write_files
from tests.lab.wait import LabError, tail, wait_for

RUN = Path("/run/modelfleet-lab")
# One /24 per lab. A private range; nothing routes to it but the lab's own link.
SUBNET = "10.86.{number}.{host}"
LINK = "modelfleet{number}"
MAX_LABS = 256
# Of the locally administered ones; the kernel chooses the hosts' own at random.
NOBODY = "02:00:00:00:00:00"
# nsenter's names for everything that a host has of its own.
HOST_NAMESPACES = ("--mount", "--uts", "--ipc", "--net", "--pid")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What another process must know to use a running lab (``<state>/lab.json``)."""

    pid: int
    started: int  # clock ticks after boot: tells this process from a later one of the same PID
    number: int
    gateways: tuple[str, ...]
    nodes: tuple[str, ...]
    root: str  # of the base: a newer base must not change under a running lab
    binds: tuple[str, ...]


class Lab:
    """A running lab. It ends with its owner, however that ends, unless it was detached."""

    def __init__(self, name: str, record: Record, outer: subprocess.Popen[str] | None) -> None:
        self.name = name
        self.number = record.number
        self.gateways = record.gateways
        self.nodes = record.nodes
        self.state = RUN / name
        self.shared = _shared(name)
        self._record = record
        # Holding its stdin open is what keeps an owned lab alive.
        self._outer = outer

    @classmethod
    def start(
        cls,
        name: str = "lab",
        *,
        nodes: int = 4,
        gateways: int = 1,
        release: str = "trixie",
        detached: bool = False,
        binds: Mapping[Path, str] | None = None,
        bare: bool = False,
        say: Say = print,
    ) -> "Lab":
        """Start a lab and return when its nodes are idle and its gateways answer.

        ``binds`` maps real folders or files to paths that every host sees read-only. A bare lab is
        a site before it is provisioned, with systemd on every host and nothing of ours. What a
        crashed lab left behind is removed; a running lab of this name is a LabError.
        """
        began = time.monotonic()
        root = base(release, say, bare=bare)
        if not bare:
            _compile(release)
        RUN.mkdir(mode=0o755, parents=True, exist_ok=True)
        with locked(RUN / ".lock", say):
            _sweep()
            if (RUN / name).exists():
                raise LabError(f"lab {name} is already running: stop it, or use another name")
            lab = cls._outermost(name, root, nodes, gateways, detached, binds or {}, bare)
        try:
            lab._boot(release, say, bare)
        except BaseException:
            lab.stop()
            raise
        say(f"lab {name}: up in {time.monotonic() - began:.1f} s, {lab.address('login')}")
        return lab

    @classmethod
    def attach(cls, name: str = "lab") -> "Lab":
        """The running lab of this name, whoever started it; LabError if there is none."""
        record = _read_record(RUN / name)
        if record is None or not _alive(record):
            raise LabError(f"no lab {name} is running")
        return cls(name, record, None)

    def stop(self) -> None:
        """End everything. Safe to repeat, also on a lab that has already died."""
        if _alive(self._record):
            # The kernel would remove the link when it collects the namespaces; this is sooner.
            _ip("link", "delete", self._link, check=False)
            end_process(self._record.pid)
        if self._outer is not None:
            _close(self._outer)
        with locked(RUN / ".lock", print):
            # A dead lab's name may have been taken since.
            if _read_record(self.state) == self._record:
                _remove(self.name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def hosts(self) -> tuple[str, ...]:
        return ("login", *self.gateways, *self.nodes)

    def address(self, host: str) -> str:
        """Where the real machine, and every host, reaches this host."""
        return _addresses(self.number, self.gateways, self.nodes)[host]

    def is_on(self, host: str) -> bool:
        """Whether the host has power (its link may be cut)."""
        return (self.state / "hosts" / host).exists()

    def run(
        self,
        host: str,
        argv: Sequence[str],
        *,
        user: str = "fleet",
        env: Mapping[str, str] | None = None,
        input: str | None = None,
        check: bool = True,
        timeout: float = 60,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host, in the user's home, with a clean environment and ``env``.

        At the timeout the command is killed there too.
        """
        done = subprocess.run(
            self.argv(host, argv, user=user, env=env),
            input=input if input is not None else "",
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check and done.returncode != 0:
            what = " ".join(argv)
            raise LabError(f"{host}: {what} ({done.returncode}): {done.stderr or done.stdout}")
        return done

    def popen(
        self,
        host: str,
        argv: Sequence[str],
        *,
        user: str = "fleet",
        env: Mapping[str, str] | None = None,
        **popen_kwargs: Any,
    ) -> "subprocess.Popen[str]":
        """As ``run``, in the background. Signalling the result kills (9) the command."""
        command = self.argv(host, argv, user=user, env=env)
        return subprocess.Popen(command, text=True, **popen_kwargs)

    def argv(
        self,
        host: str,
        argv: Sequence[str],
        *,
        user: str = "fleet",
        env: Mapping[str, str] | None = None,
    ) -> list[str]:
        """The real machine's command line for a command on a host."""
        home = "/root" if user == "root" else f"/home/{user}"
        return [
            *("nsenter", "--target", str(self._host_pid(host)), *HOST_NAMESPACES, "--"),
            # The death of nsenter, which is outside, must be the command's.
            *("setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups"),
            *("--pdeathsig", "KILL", "--"),
            *clean_env(user, home, home, env),
            *argv,
        ]

    def cut_link(self, host: str) -> None:
        """Pull the host's cable: nothing gets in or out, and nobody is told."""
        self._ip("link", "set", host, "down")

    def mend_link(self, host: str) -> None:
        self._ip("link", "set", host, "up")

    def cut_between(self, one: str, other: str) -> None:
        """Lose every packet between two hosts, both ways, and tell nobody; all others reach both.

        Each believes the other behind an address of the wire that nobody has.
        """
        for here, there in ((one, other), (other, one)):
            self._neighbour(here, "replace", there, "lladdr", NOBODY, "nud", "permanent")

    def mend_between(self, one: str, other: str) -> None:
        for here, there in ((one, other), (other, one)):
            self._neighbour(here, "delete", there)

    def power_cut(self, host: str) -> None:
        """Link first, then the host: dead processes close their connections, dead hosts do not."""
        pid = self._host_pid(host)
        self.cut_link(host)
        (self.state / "hosts" / host).unlink()
        end_process(pid)

    def power_on(self, host: str) -> None:
        """Boot a host; after a power cut it finds its disk as it was, but /run and /tmp empty."""
        if self.is_on(host):
            raise LabError(f"{host} is already on")
        script = str(FILES / "power-on.sh")
        where = (str(self.state), host, self.address(host), self._record.root, *self._record.binds)
        done = subprocess.run(
            [*self._outside("--mount", "--net", "--pid"), "sh", script, *where],
            stdout=subprocess.PIPE,
            text=True,
            timeout=60,
        )
        if not done.stdout.strip():
            log = self.state / "log" / host
            raise LabError(f"{host} did not boot: {tail(log, 5)}")
        put(self.state / "hosts" / host, done.stdout)

    def stop_daemon(self, host: str, daemon: str, *, kill: bool = False) -> None:
        """Stop slurmctld, slurmd, slurmrestd, munged, nginx or sshd; returns when it is gone."""
        self.run(host, ["lab-daemon", "kill" if kill else "stop", daemon], user="root")

    def start_daemon(self, host: str, daemon: str) -> None:
        self.run(host, ["lab-daemon", "start", daemon], user="root")

    @property
    def _link(self) -> str:
        """The real machine's end of the link into the lab."""
        return LINK.format(number=self.number)

    def _outside(self, *namespaces: str) -> list[str]:
        return ["nsenter", "--target", str(self._record.pid), *namespaces, "--"]

    def _ip(self, *words: str) -> None:
        subprocess.run([*self._outside("--net"), "ip", *words], check=True)

    def _neighbour(self, host: str, verb: str, other: str, *words: str) -> None:
        """Change what a host believes of where another one is on the wire (ip-neighbour(8))."""
        where = ("to", self.address(other), "dev", "eth0")
        self.run(host, ["ip", "neighbour", verb, *where, *words], user="root")

    def _host_pid(self, host: str) -> int:
        try:
            return int((self.state / "hosts" / host).read_text())
        except FileNotFoundError:
            on = _alive(self._record)
            raise LabError(f"{host} is off" if on else f"lab {self.name} is not running") from None

    @classmethod
    def _outermost(
        cls,
        name: str,
        root: Path,
        nodes: int,
        gateways: int,
        detached: bool,
        binds: Mapping[Path, str],
        bare: bool,
    ) -> "Lab":
        """The outer namespaces, their link to the real machine, and the record of both."""
        state, shared = RUN / name, _shared(name)
        _remove(name)
        for part in ("ram", "hosts", "log"):
            (state / part).mkdir(parents=True)
        state.chmod(0o755)
        for folder in (shared, shared / "images", shared / "models"):
            folder.mkdir(parents=True)
            os.chown(folder, 2000, 2000)
            folder.chmod(0o755)
        mounts = [
            f"{shared}:/shared:rw",
            *([] if bare else [f"{readable_checkout(state)}:/opt/modelfleet/src:ro"]),
            *(f"{source}:{target}:ro" for source, target in binds.items()),
        ]
        outer = _hold(state, detached)
        assert outer.stdout is not None
        pid = int(outer.stdout.readline() or 0)
        if not pid:
            raise LabError(f"lab {name} did not start: {tail(state / 'log/outer', 5)}")
        try:
            record = Record(
                pid=pid,
                started=_started(pid) or 0,
                number=_connect(pid),
                gateways=("gateway", *(f"gateway{n}" for n in range(2, gateways + 1))),
                nodes=tuple(f"gpu{n}" for n in range(1, nodes + 1)),
                root=str(root),
                binds=tuple(mounts),
            )
            put(state / "lab.json", json.dumps(asdict(record), indent=2))
        except BaseException:
            end_process(pid)
            raise
        return cls(name, record, outer)

    def _boot(self, release: str, say: Say, bare: bool) -> None:
        addresses = _addresses(self.number, self.gateways, self.nodes)
        write_files(self.state, addresses, self.gateways, self.nodes, release, bare=bare)
        with ThreadPoolExecutor(len(self.hosts)) as pool:
            list(pool.map(self.power_on, self.hosts))
        wait_for(f"nodes {','.join(self.nodes)} to be idle", self._all_idle, say=say)
        for gateway in self.gateways:
            answers = partial(self._accepts_ssh if bare else self._gateway_answers, gateway)
            wait_for(f"the answer of {gateway}", answers, say=say)

    def _all_idle(self) -> bool:
        sinfo = ["sinfo", "--noheader", "--Node", "--partition=gpu", "--format=%T"]
        states = self.run("login", sinfo, check=False).stdout.split()
        return states == ["idle"] * len(self.nodes)

    def _accepts_ssh(self, host: str) -> bool:
        try:
            socket.create_connection((self.address(host), 22), timeout=2).close()
        except OSError:
            return False
        return True

    def _gateway_answers(self, host: str) -> bool:
        # Not urllib, which would ask a proxy that the caller's environment names.
        gateway = http.client.HTTPConnection(self.address(host), 8080, timeout=2)
        try:
            gateway.request("GET", "/")
            return bool(gateway.getresponse().status)
        except (OSError, http.client.HTTPException):
            return False
        finally:
            gateway.close()


@once
def _compile(release: str) -> None:
    """Leave the bytecode of the hosts' Python beside the sources, which hosts can't write.

    Without it each `fleet` would compile all that it imports, which is half of its time.
    """
    source = "/opt/modelfleet/src/reconciler"
    argv = ["/opt/modelfleet/venv/bin/python", "-m", "compileall", "-q", source]
    in_base(argv, release=release, binds={CHECKOUT / "reconciler": source})


def running() -> list[str]:
    """The names of the labs that are running on this machine."""
    # Of a lab of another version of this code these two are enough.
    found = {path.parent.name: _read_json(path.parent) for path in RUN.glob("*/lab.json")}
    return sorted(
        name
        for name, fields in found.items()
        if fields is not None and _started(fields["pid"]) == fields["started"]
    )


def end_process(pid: int, timeout_s: float = 20.0) -> None:
    """Kill a process and return when it, and the namespaces it was first in, have ended."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        wait_for(f"process {pid} to end", lambda: _ended(handle), timeout_s=timeout_s)
    finally:
        os.close(handle)


def _ended(handle: int) -> bool:
    return bool(select.select([handle], [], [], 1.0)[0])


def _hold(state: Path, detached: bool) -> "subprocess.Popen[str]":
    """Start the outer process: it lives as long as its stdin is open, or until it is stopped."""
    argv = [
        # A session of its own, so that Ctrl-C lets the owner stop the lab in order.
        *("setsid", *(["--fork"] if detached else [])),
        *("unshare", "--mount", "--net", "--pid", "--fork", "--kill-child"),
        *("sh", str(FILES / "outer.sh"), str(state)),
        *(["sleep", "infinity"] if detached else ["cat"]),
    ]
    stdin = subprocess.DEVNULL if detached else subprocess.PIPE
    with (state / "log/outer").open("w") as log:
        return subprocess.Popen(argv, stdin=stdin, stdout=subprocess.PIPE, stderr=log, text=True)


def _close(outer: "subprocess.Popen[str]") -> None:
    for stream in (outer.stdin, outer.stdout):
        if stream is not None:
            stream.close()
    outer.wait(20)


def _connect(pid: int) -> int:
    """Link the real machine to the lab's bridge; the first free link name is the lab's number."""
    for number in range(MAX_LABS):
        link = LINK.format(number=number)
        if not Path("/sys/class/net", link).exists():
            break
    else:
        raise LabError(f"{MAX_LABS} labs are running: stop one")
    _ip("link", "add", link, "type", "veth", "peer", "name", "uplink", "netns", str(pid))
    inside = ["nsenter", "--target", str(pid), "--net", "--", "ip", "link", "set"]
    subprocess.run([*inside, "uplink", "master", "bridge", "up"], check=True)
    _ip("address", "add", SUBNET.format(number=number, host=1) + "/24", "dev", link)
    _ip("link", "set", link, "up")
    return number


def _ip(*words: str, check: bool = True) -> bool:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if check and done.returncode != 0:
        raise LabError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.returncode == 0


def _addresses(number: int, gateways: Sequence[str], nodes: Sequence[str]) -> dict[str, str]:
    places = {"outside": 1, "login": 2}
    places |= {gateway: n for n, gateway in enumerate(gateways, start=3)}
    places |= {node: 10 + n for n, node in enumerate(nodes, start=1)}
    return {host: SUBNET.format(number=number, host=place) for host, place in places.items()}


def _shared(name: str) -> Path:
    """On the cache's file system: gigabytes fit, and an image can be a hard link."""
    return cache() / "labs" / name


def _read_json(state: Path) -> dict[str, Any] | None:
    try:
        fields: dict[str, Any] = json.loads((state / "lab.json").read_text())
    except (FileNotFoundError, ValueError):
        return None
    return fields


def _read_record(state: Path) -> Record | None:
    fields = _read_json(state)
    if fields is None:
        return None
    fields |= {key: tuple(value) for key, value in fields.items() if isinstance(value, list)}
    if set(fields) != {field.name for field in dataclasses.fields(Record)}:
        how = f"kill {fields['pid']}, then remove {state}"
        raise LabError(f"lab {state.name} was started by another version of this code: {how}")
    return Record(**fields)


def _alive(record: Record) -> bool:
    return _started(record.pid) == record.started


def _started(pid: int) -> int | None:
    """When this process started, in clock ticks after boot (proc(5), stat, field 22)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def _sweep() -> None:
    """Remove what dead labs left on the disk. Only under the lock, as a newborn looks dead."""
    alive = running()
    found = {path.name for folder in (RUN, _shared("")) for path in folder.glob("[!.]*")}
    for name in found.difference(alive):
        _remove(name)


def _control_groups(name: str) -> list[Path]:
    """What systemd on the hosts of a bare lab has made (power-on.sh)."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    roots = [Path(mount[1]) for mount in mounts if mount[2] == "cgroup2"]
    return [root / f"modelfleet-lab-{name}" for root in roots]


def _remove(name: str) -> None:
    for groups in _control_groups(name):
        # Deepest first, as none that holds another can go.
        for folder, _, _ in os.walk(groups, topdown=False):
            with contextlib.suppress(OSError):
                Path(folder).rmdir()
    shutil.rmtree(RUN / name, ignore_errors=True)
    shutil.rmtree(_shared(name), ignore_errors=True)
