"""Clients that are slow, that leave, or that are very many: R39."""

import asyncio
import http.client
import json
import os
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from urllib.parse import urlsplit

from tests.e2e.checks import lost, reconfigure, under_load
from tests.lab.fleet import Fleet
from tests.lab.load import in_flight
from tests.lab.wait import wait_for

STREAMS = 1000 if os.environ.get("SOAK") else 300
ERROR_LOG = "/var/lib/modelfleet/gateway/error.log"


def _served(fleet: Fleet, tokens_per_s: str, replicas: int = 2) -> Fleet:
    fleet.edit('STANDIN_TOKENS_PER_S: "20"', f'STANDIN_TOKENS_PER_S: "{tokens_per_s}"')
    fleet.edit("max-num-seqs: 16", "max-num-seqs: 1024")
    fleet.edit("replicas: 2", f"replicas: {replicas}")
    fleet.run("apply", "--wait", "--timeout", "90s")
    return fleet


def _old_workers(fleet: Fleet) -> int:
    look = ["pgrep", "-fc", "nginx: worker process is shutting down"]
    return int(fleet.lab.run("gateway", look, check=False).stdout)


def _metric(fleet: Fleet, name: str) -> float:
    """Return the sum of a metric over the replicas, which answer with TLS or without."""
    total = 0.0
    for replica in fleet.replicas():
        place = f"{replica['address']}/metrics"
        ask = f"curl -sf http://{place} || curl -skf https://{place}"
        text = fleet.lab.run("login", ["sh", "-c", ask]).stdout
        lines = [line for line in text.splitlines() if line.startswith(name)]
        total += sum(float(line.split()[-1]) for line in lines)
    return total


@contextmanager
def _stream(fleet: Fleet, tokens: int) -> Iterator[http.client.HTTPResponse]:
    """Ask for a stream, with the smallest buffer a client can have; enter when it has begun."""
    place = urlsplit(fleet.url)
    assert place.hostname is not None
    client = http.client.HTTPConnection(place.hostname, place.port)
    with closing(client), closing(socket.socket()) as client.sock:
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sock.settimeout(60)
        client.sock.connect((place.hostname, place.port))
        body = {"model": "tiny", "prompt": "a", "max_tokens": tokens, "stream": True}
        headers = {"Content-Type": "application/json"}
        client.request("POST", "/v1/completions", json.dumps(body), headers)
        with client.getresponse() as answer:
            assert answer.readline().startswith(b"data: ")
            yield answer


def test_R39_many_idle_streams_are_held_over_reloads(fleet: Fleet) -> None:
    """They hang on old workers and end whole, while others are served by the new ones."""
    _served(fleet, tokens_per_s="0.2")

    async def hold() -> list[str]:
        async with in_flight(
            fleet.url, "tiny", plain=0, streams=STREAMS, tokens=8, name="idle"
        ) as load:
            for _ in range(3):
                reconfigure(fleet)
                await asyncio.to_thread(fleet.run, "apply")
            held = sum(not request.done for request in load.requests)
            old = await asyncio.to_thread(_old_workers, fleet)
        assert (held, old > 0) == (STREAMS, True)
        return lost(load.requests)

    assert asyncio.run(hold()) == []
    assert "worker_connections" not in fleet.lab.run("gateway", ["cat", ERROR_LOG]).stdout


def test_R39_a_client_that_reads_slowly_gets_all_and_holds_up_nobody(fleet: Fleet) -> None:
    """What it has not read yet waits for it, over a reload too."""
    _served(fleet, tokens_per_s="2000", replicas=1)
    tokens = 4000
    with _stream(fleet, tokens) as answer:
        reconfigure(fleet)
        assert lost(under_load(fleet, lambda: fleet.run("apply"))) == []
        assert _old_workers(fleet) == 1
        events = sum(line.startswith(b"data: ") for line in answer)
    assert events == tokens  # without the first, with [DONE]


def test_R39_a_client_that_leaves_ends_the_generation_too(fleet: Fleet) -> None:
    """No GPU works for nobody: at once, and also when an old worker had the stream."""
    _served(fleet, tokens_per_s="50", replicas=1)
    running = "vllm:num_requests_running"
    with _stream(fleet, tokens=4000):
        assert _metric(fleet, running) == 1
    wait_for("the engine to stop", lambda: _metric(fleet, running) == 0)
    with _stream(fleet, tokens=4000):
        reconfigure(fleet)
        fleet.run("apply")
        assert _metric(fleet, running) == 1
    wait_for("the engine to stop", lambda: _metric(fleet, running) == 0)
    assert _metric(fleet, 'vllm:request_success_total{engine="0",finished_reason="abort"') == 2
    wait_for("the old worker to end", lambda: _old_workers(fleet) == 0)
