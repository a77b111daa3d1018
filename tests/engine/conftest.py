"""Engines on the lab's hosts, real and stand-in, started as a job script starts them."""

import json
import os
import signal
import ssl
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from images.build import image
from reconciler.adapters import certificates, secrets
from tests.lab.lab import Lab
from tests.lab.wait import wait_for

# The real engine takes 10 to 30 s on idle cores, and the cores may not be idle.
START_TIMEOUT_S = 180.0
# The real one waits for its watchdog, and then for the disk: 6 s when idle, 25 s seen when not.
STOP_TIMEOUT_S = 120.0

NAMES = ("tiny", "tiny@4711")
SLOTS = 2
IN_FLIGHT_LIMIT = 4
FLAGS = [
    *("--served-model-name", *NAMES, "--host", "0.0.0.0"),  # noqa: S104  (inside the lab)
    *("--max-model-len", "16384", "--max-num-seqs", str(SLOTS)),
    *("--max-num-queued-reqs", str(IN_FLIGHT_LIMIT), "--shutdown-timeout", "60"),
    *("--enforce-eager", "--dtype", "bfloat16", "--kv-cache-memory-bytes", "64M"),
]
# The two run on different nodes, so that they don't see each other's processes.
HOSTS = {"standin": "gpu1", "vllm": "gpu2"}
# What a replica's job gives its engine: a certificate, and two keys in the file of --config.
KEYS = ("the-current-key", "the-next-key")
AUTHORITY = certificates.new_authority("test")
SECRETS = "/tmp/engine-secrets"  # on the host, and in the container
PROTECTION = [
    *("--config", f"{SECRETS}/engine.yaml"),
    *("--ssl-certfile", f"{SECRETS}/replica.pem", "--ssl-keyfile", f"{SECRETS}/replica.pem"),
]
# As batch.py sets it, on the host and in a container: a client here may be kept waiting too.
_KEEP_ALIVE = {f"{prefix}VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "120" for prefix in ("", "APPTAINERENV_")}
STANDIN = "/opt/modelfleet/src/tests/lab/standin.py"


@dataclass(frozen=True)
class Process:
    pid: int
    parent: int
    group: int
    command: str


@dataclass(frozen=True)
class Engine:
    """A started engine: what runs on the host, and how to reach it from here."""

    kind: str
    lab: Lab
    port: int
    started: "subprocess.Popen[str]"
    log: Path
    protected: bool = True

    @property
    def host(self) -> str:
        return HOSTS[self.kind]

    @property
    def url(self) -> str:
        scheme = "https" if self.protected else "http"
        return f"{scheme}://{self.lab.address(self.host)}:{self.port}"

    def client(self, key: str | None = KEYS[0]) -> httpx.Client:
        # Whom the certificate is for is asked in tests/contract: here it is only who signed it.
        trusted = ssl.create_default_context(cadata=secrets.certificates_in(AUTHORITY)[0])
        trusted.check_hostname = False
        headers = {"Authorization": f"Bearer {key}"} if key and self.protected else {}
        return httpx.Client(
            base_url=self.url, headers=headers, verify=trusted, trust_env=False, timeout=60
        )

    @property
    def session(self) -> int:
        """The started process, and so its session and its process group, as the host counts."""
        return int(wait_for("a process id", lambda: self.log.read_text().partition("\n")[0]))

    def processes(self) -> list[Process]:
        """All processes of this engine that are alive, the started one first."""
        session = self.session
        columns = "pid=,ppid=,pgid=,sess=,stat=,args="
        table = self.lab.run(self.host, ["ps", "-u", "fleet", "--sort=pid", "-o", columns])
        rows = [line.split(maxsplit=5) for line in table.stdout.splitlines()]
        return [
            Process(int(pid), int(parent), int(group), command)
            for pid, parent, group, member_of, state, command in rows
            if int(member_of) == session and not state.startswith("Z")
        ]

    def api(self) -> Process:
        """The process that answers HTTP: the first one that is the engine's own."""
        return next(p for p in self.processes() if " serve /models/" in p.command)

    def core(self) -> Process:
        """The engine's process, which computes: the API process's child that is no helper."""
        api = self.api().pid
        children = [p for p in self.processes() if p.parent == api]
        return next(p for p in children if "resource_tracker" not in p.command)

    def signal(self, number: signal.Signals, pid: int) -> None:
        """Send a signal on the host, as the user there; a negative pid is a process group."""
        self.lab.run(self.host, ["kill", f"-{number.value}", "--", str(pid)])

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-2000:]


# As batch.py sets it, on the host and in a container: a client here may be kept waiting too.
_KEEP_ALIVE = {f"{prefix}VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "120" for prefix in ("", "APPTAINERENV_")}
Start = Callable[[str], AbstractContextManager[Engine]]


@pytest.fixture(scope="session")
def sif(lab: Lab) -> str:
    """The CPU engine's image, as the hosts see it."""
    built = image("vllm-cpu")
    published = lab.shared / "images" / built.name
    if not published.exists():
        os.link(built, published)
    return f"/shared/images/{built.name}"


def apptainer(*binds: str) -> list[str]:
    mounts = [word for bind in binds for word in ("--bind", bind)]
    return ["apptainer", "exec", "--cleanenv", "--containall", "--no-mount", "home", *mounts]


@pytest.fixture(scope="session")
def tiny(lab: Lab, sif: str) -> str:
    """The tiny model's folder, as the hosts see it; made by the image's own transformers."""
    script = ["python", "/opt/modelfleet/src/tests/lab/tiny_model.py", "/shared/models/tiny"]
    binds = ("/shared/models", "/opt/modelfleet/src:/opt/modelfleet/src:ro")
    lab.run("gpu2", [*apptainer(*binds), sif, *script], timeout=START_TIMEOUT_S)
    return "/shared/models/tiny"


@pytest.fixture(scope="session")
def command(request: pytest.FixtureRequest) -> Callable[[str], list[str]]:
    """How each kind of engine is started, up to its flags."""

    def command(kind: str) -> list[str]:
        if kind == "standin":
            return [STANDIN, "serve", "/models/tiny"]
        # Only here, so that tests of the stand-in alone need no image.
        sif, tiny = request.getfixturevalue("sif"), request.getfixturevalue("tiny")
        binds = (f"{tiny}:/models/tiny:ro", f"{SECRETS}:{SECRETS}:ro")
        return [*apptainer(*binds), sif, "vllm", "serve", "/models/tiny"]

    return command


@pytest.fixture(scope="session")
def start(
    lab: Lab, command: Callable[[str], list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Start:
    """Start an engine and wait until it is healthy; at the end nothing of it is left."""
    ports = iter(range(9000, 9100))

    @contextmanager
    def start(kind: str) -> Iterator[Engine]:
        port = next(ports)
        log = tmp_path_factory.mktemp(kind) / "log"
        # A session of its own, and the log's first line says which.
        session = ["setsid", "sh", "-c", 'echo $$; exec "$@"', "sh"]
        _write_secrets(lab, HOSTS[kind])
        argv = [*session, *command(kind), "--port", str(port), *FLAGS, *PROTECTION]
        with log.open("w") as out:
            started = lab.popen(HOSTS[kind], argv, env=_KEEP_ALIVE, stdout=out, stderr=out)
        engine = Engine(kind, lab, port, started, log)
        try:
            wait_for(f"{kind} to be healthy", lambda: healthy(engine), timeout_s=START_TIMEOUT_S)
            yield engine
        finally:
            # Apptainer's starter does not die with its parent, so the end of `started`, which is
            # on the real machine, is not enough.
            lab.run(HOSTS[kind], ["pkill", "-KILL", "-s", str(engine.session)], check=False)
            started.wait(STOP_TIMEOUT_S)

    return start


def _write_secrets(lab: Lab, host: str) -> None:
    server = certificates.new_certificate(AUTHORITY, "tiny.test.modelfleet.internal", 86_400)
    files = {"replica.pem": server, "engine.yaml": f"api-key: {json.dumps(KEYS)}\n"}
    for name, text in files.items():
        script = f"umask 077; mkdir -p {SECRETS}; cat >{SECRETS}/{name}"
        lab.run(host, ["sh", "-c", script], input=text)


def healthy(engine: Engine) -> bool:
    if engine.started.poll() is not None:
        pytest.fail(f"{engine.kind} ended with {engine.started.returncode}: {engine.tail()}")
    try:
        with engine.client() as client:
            return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="session", params=["standin", "vllm"])
def kind(request: pytest.FixtureRequest) -> str:
    """Every test here holds for both: what the stand-in shows is what vLLM shows."""
    return str(request.param)


@pytest.fixture(scope="session")
def engine(kind: str, start: Start) -> Iterator[Engine]:
    """One engine for all tests that leave it as it was."""
    with start(kind) as engine:
        yield engine


@pytest.fixture
def victim(kind: str, start: Start) -> Iterator[Engine]:
    """An engine of the test's own, to be ended by it."""
    with start(kind) as engine:
        yield engine


@pytest.fixture
def client(engine: Engine) -> Iterator[httpx.Client]:
    with engine.client() as client:
        yield client
