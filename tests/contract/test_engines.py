"""What a probe makes of a replica's address: asked of real sockets, hosts and engines."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Thread

import pytest

from reconciler.adapters import certificates, engine
from reconciler.adapters.engine import HttpEngines, parse_metrics
from reconciler.adapters.secrets import FileSecrets
from reconciler.naming import Comment, ReplicaName, Run, tls_name
from reconciler.state import Health, Job, Probe
from tests.lab import Lab
from tests.lab.base import CHECKOUT
from tests.lab.wait import wait_for

STANDIN = "/opt/modelfleet/src/tests/lab/standin.py"
PORT = 20500
NO_SECRETS = FileSecrets(None, "probe")


def _job(address: str, job_id: int = 7, keys: tuple[str, ...] = ()) -> Job:
    run = Run(node="gpu1", restarts=0, address=address, trap_ready=True, ready_at=5, draining=False)
    return Job(
        id=job_id,
        submitted_at=1,
        name=ReplicaName(fleet="probe", model="tiny", revision="0123abcd", ordinal=0),
        state="RUNNING",
        reason="None",
        nodes="gpu1",
        started_at=2,
        ends_at=None,
        restarts=0,
        comment=Comment(gpus=1, commit=None, run=run, keys=keys),
    )


def _probe(job: Job) -> Probe:
    return HttpEngines(NO_SECRETS).probe([job], ())[job.key]


@pytest.fixture(scope="module")
def replica(lab: Lab) -> Iterator[Job]:
    """A stand-in on gpu1 that is job 7 of the model tiny."""
    address = f"{lab.address('gpu1')}:{PORT}"
    names = ["--served-model-name", "tiny", "tiny@7"]
    argv = [STANDIN, "serve", "/models/tiny", "--host", "0.0.0.0", "--port", str(PORT), *names]  # noqa: S104 - inside the lab
    with lab.popen("gpu1", argv) as engine:
        job = _job(address)
        wait_for("the stand-in", lambda: _probe(job).health is not Health.STARTING)
        yield job
        engine.kill()


def test_probe_of_the_right_engine_is_ready_and_counts_its_requests(replica: Job) -> None:
    """Identity, health and one completed token make a replica ready; its metrics tell its load."""
    probe = _probe(replica)
    assert (probe.health, probe.ongoing) == (Health.READY, 0)
    assert probe.tokens is not None
    assert probe.tokens >= 1


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> FileSecrets:
    """The secrets of the fleet `probe`, with a certificate for its model tiny."""
    folder = tmp_path_factory.mktemp("secrets")
    folder.chmod(0o700)
    made = FileSecrets(str(folder), "probe")
    made.issue("tiny", 86_400)
    return made


@pytest.fixture(scope="module")
def protected(lab: Lab, secrets: FileSecrets) -> Iterator[Job]:
    """A stand-in on gpu2 that is job 7 of the model tiny, with TLS and all keys there are."""
    keys = {key.id: key.text for key in secrets.backend_keys()}
    folder = secrets._folder / "models"
    files = {"replica.pem": (folder / "tiny.pem").read_text()}
    files["engine.yaml"] = f"api-key: {list(keys.values())}"
    for name, text in files.items():
        script = f"umask 077; mkdir -p /tmp/probed; cat >/tmp/probed/{name}"
        lab.run("gpu2", ["sh", "-c", script], input=text)
    argv = [STANDIN, "serve", "/models/tiny", "--host", "0.0.0.0", "--port", str(PORT)]  # noqa: S104
    argv += ["--served-model-name", "tiny", "tiny@7", "--config", "/tmp/probed/engine.yaml"]
    argv += [f"--ssl-{part}file=/tmp/probed/replica.pem" for part in ("cert", "key")]
    with lab.popen("gpu2", argv) as engine:
        job = _job(f"{lab.address('gpu2')}:{PORT}", keys=tuple(keys))
        wait_for("the stand-in", lambda: _asked(secrets, job).health is not Health.STARTING)
        yield job
        engine.kill()


def _asked(secrets: FileSecrets, job: Job) -> Probe:
    return HttpEngines(secrets).probe([job], ())[job.key]


def _taking(job: Job, *keys: str) -> Job:
    assert job.comment is not None
    return replace(job, comment=replace(job.comment, keys=keys))


def test_probe_of_a_protected_engine_proves_it_and_shows_a_key(
    protected: Job, secrets: FileSecrets
) -> None:
    """Over TLS all is as without; any key does that the job was given and that there still is."""
    said = _asked(secrets, protected)
    assert (said.health, said.ongoing) == (Health.READY, 0)
    assert said.tokens is not None
    [old, new] = secrets.keyring().ids
    assert _asked(secrets, _taking(protected, old)).health is Health.READY
    assert _asked(secrets, _taking(protected, new, "cccccccc")).health is Health.READY


def test_probe_without_a_key_that_there_is_says_so(protected: Job, secrets: FileSecrets) -> None:
    """All its keys are revoked: nobody can use it."""
    said = _asked(secrets, _taking(protected, "cccccccc"))
    assert said == Probe(health=Health.SICK, detail="it takes none of the keys that it was given")


def test_probe_of_another_models_certificate_is_an_impostor(
    protected: Job, secrets: FileSecrets
) -> None:
    """The same authority has signed it, for a model that is not the one asked for."""
    other = replace(protected, name=replace(protected.name, model="big"))
    assert _asked(secrets, other).health is Health.IMPOSTOR


def test_probe_of_another_authoritys_certificate_is_an_impostor(
    protected: Job, tmp_path: Path
) -> None:
    """Anybody can make a certificate of any name."""
    tmp_path.chmod(0o700)
    others = FileSecrets(str(tmp_path), "probe")
    keys = others.issue("tiny", 86_400).keys
    assert _asked(others, _taking(protected, *keys)).health is Health.IMPOSTOR


def test_R31_certificate_that_is_out_of_date_says_nothing_of_who_shows_it(
    secrets: FileSecrets, tmp_path: Path
) -> None:
    """By a clock that has jumped all of them are, and all replicas would be replaced."""
    authority = (secrets._folder / "ca.pem").read_text()
    file = tmp_path / "replica.pem"
    file.write_text(certificates.new_certificate(authority, tls_name("probe", "tiny"), -3600))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    with _answering(b"", context) as address:
        said = _asked(secrets, _job(address, keys=secrets.keyring().ids))
    assert said == Probe(health=Health.SILENT, detail="its certificate is out of date here")


def test_probe_of_an_engine_without_tls_is_an_impostor(replica: Job, secrets: FileSecrets) -> None:
    """It answers in the clear, and is not asked again in the clear."""
    ids = secrets.keyring().ids
    assert _asked(secrets, _taking(replica, *ids)).health is Health.IMPOSTOR


def test_probe_without_an_authority_to_believe_is_silent(protected: Job, tmp_path: Path) -> None:
    """Nothing is known then, of any replica; least of all that it is an impostor."""
    gone = FileSecrets(str(tmp_path / "gone"), "probe")
    assert _asked(gone, protected).health is Health.SILENT
    assert _asked(FileSecrets(None, "probe"), protected).health is Health.SILENT


@pytest.mark.parametrize("answer", [b"", b"\x16\x03\x01"], ids=["nothing", "half a record"])
def test_probe_of_what_closes_during_the_handshake_is_no_impostor(
    secrets: FileSecrets, answer: bytes
) -> None:
    """So does an engine that dies: it says nothing of who was there."""
    with _answering(answer) as address:
        said = _asked(secrets, _job(address, keys=secrets.keyring().ids))
    assert said.health in (Health.SILENT, Health.SICK)


def test_probe_of_another_jobs_engine_is_an_impostor(replica: Job) -> None:
    """The same address proves nothing for another job: its id is not among the served names."""
    assert _probe(replace(replica, id=8)).health is Health.IMPOSTOR


def test_probe_of_a_closed_port_is_starting(lab: Lab) -> None:
    """A refused connection is evidence: nothing listens there."""
    assert _probe(_job(f"{lab.address('gpu1')}:{PORT + 1}")).health is Health.STARTING


def test_probe_over_a_cut_link_is_silent(replica: Job, lab: Lab) -> None:
    """No way there says nothing about the engine, however the kernel words it."""
    lab.cut_link("gpu1")
    try:
        assert _probe(replica).health is Health.SILENT
        # By now the kernel knows that nobody answers for the address: "no route to host".
        assert _probe(replica).health is Health.SILENT
    finally:
        lab.mend_link("gpu1")
    wait_for("the way back", lambda: _probe(replica).health is Health.READY)


def test_R11_fifty_hung_endpoints_are_all_silent() -> None:
    """Sockets that accept and never answer: each is silent, none blocks another."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as hung:
        address = f"127.0.0.1:{hung.getsockname()[1]}"
        jobs = [_job(address, job_id) for job_id in range(50)]
        probes = HttpEngines(NO_SECRETS).probe(jobs, ())
    assert {probe.health for probe in probes.values()} == {Health.SILENT}
    assert len(probes) == 50


def test_R11_five_hundred_replicas_that_answer_are_all_ready(replica: Job) -> None:
    """Nobody's clock runs while others are asked: a large fleet is not taken for a silent one."""
    jobs = [replace(replica, submitted_at=at) for at in range(500)]
    probes = HttpEngines(NO_SECRETS).probe(jobs, [job.key for job in jobs])
    assert {(probe.health, probe.detail) for probe in probes.values()} == {(Health.READY, "")}
    assert len(probes) == 500


def test_R11_no_more_replicas_are_asked_at_once_than_can_be_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A probe has its time from its own turn on: what others take of the thread is not counted."""
    under_way, most = 0, 0

    async def probe(*_: object) -> Probe:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0)
        under_way -= 1
        return Probe(health=Health.READY)

    monkeypatch.setattr(engine, "_probe", probe)
    jobs = [_job("127.0.0.1:1", job_id) for job_id in range(1000)]
    assert len(HttpEngines(NO_SECRETS).probe(jobs, ())) == 1000
    assert most == engine._AT_ONCE


@contextmanager
def _answering(answer: bytes, context: ssl.SSLContext | None = None) -> Iterator[str]:
    """Something at an address that reads a request, sends these bytes and closes."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with contextlib.suppress(OSError):  # it has had enough
                if context is not None:
                    connection = context.wrap_socket(connection, server_side=True)
                with connection:
                    connection.recv(65536)
                    connection.sendall(answer)

        thread = Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        thread.join()


_OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    ("answer", "detail"),
    [
        (b"", "not an answer of an engine: RemoteProtocolError"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "not an answer of an engine: RemoteProtocolError"),
        (b"HTTP/1.1 500 Oh\r\n\r\n", "not an answer of an engine: ValueError"),
        (_OK + b"Content-Length: 20\r\n\r\n{}", "not an answer of an engine: RemoteProtocolError"),
        (_OK + b"\r\n[1]", "not an answer of an engine: TypeError"),
        (_OK + b"\r\n" + b"[" * 100_000, "not an answer of an engine: RecursionError"),
        (_OK + b"\r\n" + b" " * (5 << 20), "not an answer of an engine: ValueError"),
    ],
    ids=["nothing", "another protocol", "an error", "cut short", "a list", "nested", "endless"],
)
def test_probe_of_what_is_no_engine_is_sick_and_says_why(answer: bytes, detail: str) -> None:
    """Whatever answers there, the probe ends and no other is disturbed."""
    with _answering(answer) as address:
        assert _probe(_job(address)) == Probe(health=Health.SICK, detail=detail)


def test_probe_reads_an_answer_in_chunks() -> None:
    """Starlette sends some answers so; what it is then said to serve was read."""
    body = b'{"data":[{"id":"else"}]}'
    chunks = b"8\r\n%s\r\n%x\r\n%s\r\n0\r\n\r\n" % (body[:8], len(body) - 8, body[8:])
    with _answering(_OK + b"Transfer-Encoding: chunked\r\n\r\n" + chunks) as address:
        assert _probe(_job(address)) == Probe(health=Health.IMPOSTOR, detail="it serves else")


def test_R30_ongoing_is_read_from_a_recorded_scrape_of_real_vllm() -> None:
    """Running plus waiting, over all engines; a text without them is unknown, not zero."""
    scrape = (CHECKOUT / "tests" / "fixtures" / "vllm-0.32-metrics.txt").read_text()
    ongoing, tokens = parse_metrics(scrape)
    assert ongoing is not None
    assert tokens is not None
    assert tokens > 0
    text = "vllm:num_requests_running 2.0\nvllm:num_requests_waiting 1.0\n"
    assert parse_metrics(text) == (3, None)
    assert parse_metrics("# nothing\n") == (None, None)


def test_metrics_beyond_all_counts_are_unknown() -> None:
    """Whoever answers at an address must not end a cycle with a number."""
    text = "vllm:num_requests_running 1e999\nvllm:generation_tokens_total 1e999\n"
    assert parse_metrics(text) == (None, None)
