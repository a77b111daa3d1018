"""What a probe makes of a replica's address: asked of real sockets, hosts and engines."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from threading import Thread

import pytest

from reconciler.adapters import engine
from reconciler.adapters.engine import HttpEngines, parse_metrics
from reconciler.adapters.secrets import FileSecrets
from reconciler.naming import Comment, ReplicaName, Run
from reconciler.state import Health, Job, Probe
from tests.lab import Lab
from tests.lab.base import CHECKOUT
from tests.lab.wait import wait_for

STANDIN = "/opt/modelfleet/src/tests/lab/standin.py"
PORT = 20500
NO_SECRETS = FileSecrets(None, "probe")


def _job(address: str, job_id: int = 7) -> Job:
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
        comment=Comment(gpus=1, commit=None, run=run),
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
def _answering(answer: bytes) -> Iterator[str]:
    """Something at an address that reads a request, sends these bytes and closes."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                try:
                    connection.sendall(answer)
                except OSError:
                    return  # it has had enough

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
