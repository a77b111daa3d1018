"""One engine over two hosts: what the job script of several nodes rests on, of both engines."""

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.engine.conftest import FLAGS, STOP_TIMEOUT_S, Engine, healthy, write_secrets
from tests.lab.lab import Lab
from tests.lab.wait import wait_for

NODES = ("gpu3", "gpu4")
# Two starts at once, and each waits for the other.
START_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Rank(Engine):
    """One rank on a host of its own."""

    place: str = ""

    @property
    def host(self) -> str:
        return self.place


@pytest.fixture
def ranks(
    kind: str, lab: Lab, command: Callable[[str], list[str]], tmp_path: Path
) -> Iterator[list[Rank]]:
    """Rank 0, healthy, and the other one; at the end nothing of them is left."""
    started = []
    for at, place in enumerate(NODES):
        # VLLM_HOST_IP as the job script sets it; the image has no compiler for the other.
        settings = {"VLLM_HOST_IP": lab.address(place), "TORCHDYNAMO_DISABLE": "1"}
        env = {f"APPTAINERENV_{key}": value for key, value in settings.items()}
        words = ["--tensor-parallel-size", "2", "--nnodes", "2", "--node-rank", str(at)]
        words += ["--master-addr", lab.address(NODES[0]), "--master-port", "9101"]
        words += ["--headless"] if at else ["--port", "9100"]
        session = ["setsid", "sh", "-c", 'echo $$; exec "$@"', "sh"]
        log = tmp_path / place
        write_secrets(lab, place)
        with log.open("w") as out:
            argv = [*session, *command(kind), *words, *FLAGS]
            process = lab.popen(place, argv, env=env, stdout=out, stderr=out)
        started.append(Rank(kind, lab, 9100, process, log, False, place))
    try:
        wait_for("rank 0 to be healthy", lambda: healthy(started[0]), timeout_s=START_TIMEOUT_S)
        yield started
    finally:
        for rank in started:
            lab.run(rank.host, ["pkill", "-KILL", "-s", str(rank.session)], check=False)
            rank.started.wait(STOP_TIMEOUT_S)


def test_rank_that_is_lost_takes_rank_0_with_it(ranks: list[Rank]) -> None:
    """Both answer as one; without the other, rank 0 fails the next request and ends by itself."""
    first, other = ranks
    with first.client() as client:
        body = {"model": "tiny", "prompt": "a", "max_tokens": 3}
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] == 3
        other.lab.run(other.host, ["pkill", "-KILL", "-s", str(other.session)])
        wait_for("its end", lambda: not other.processes())
        assert client.get("/health").status_code == 200
        assert client.post("/v1/completions", json=body).status_code == 500
    wait_for("rank 0 to end", lambda: not first.processes(), timeout_s=STOP_TIMEOUT_S)


def test_rank_outlives_rank_0(ranks: list[Rank]) -> None:
    """When rank 0 has drained, the others don't know: the job script must end them."""
    first, other = ranks
    first.signal(signal.SIGTERM, first.api().pid)
    wait_for("rank 0 to end", lambda: not first.processes(), timeout_s=STOP_TIMEOUT_S)
    assert any("--headless" in process.command for process in other.processes())
