"""What passes the gateway stays as it is, and the access log says how each request went."""

import http.client
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from reconciler.state import Target
from reconciler.usage import tally
from tests.gateway.front import digest
from tests.gateway.nginx import Nginx, free_port, running
from tests.gateway.replica import ANSWER, DONE, TELLING, replica, whole
from tests.lab.wait import wait_for
from tests.unit.build import fleet, model_record

KEY = "sk-0123456789"
CALLER = {"Authorization": f"Bearer {KEY}"}
TENANTS = [{"name": "alice", "key_sha256": [digest(KEY)]}]
PATHS = ("/v1/completions", "/v1/chat/completions", "/m/tiny/v1/completions")


@dataclass(frozen=True, slots=True)
class Gateway:
    """An NGINX in front of one replica."""

    nginx: Nginx
    port: int
    folder: Path

    def send(self, id: str, path: str = "/v1/completions", **body: Any) -> bytes:
        """Send a completion and return the answer's body, as far as it came."""
        text = json.dumps({"model": "tiny", "prompt": "secret words", **body}, ensure_ascii=False)
        return self.post(id, text.encode(), path)

    def post(self, id: str, body: bytes, path: str = "/v1/completions") -> bytes:
        """Send these bytes and return the answer's body, as far as it came."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        headers = {"Content-Type": "application/json", "X-Request-Id": id, **CALLER}
        try:
            connection.request("POST", path, body, headers)
            return connection.getresponse().read()
        except http.client.IncompleteRead as cut:
            return cut.partial
        finally:
            connection.close()

    def leave(self, id: str) -> None:
        """Leave in the middle of a stream."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        body = json.dumps({"model": "tiny", "prompt": "wait", "stream": True})
        connection.request("POST", "/v1/completions", body, {"X-Request-Id": id, **CALLER})
        connection.getresponse().read(1)
        connection.close()

    @property
    def log(self) -> bytes:
        path = self.folder / "access.log"
        return path.read_bytes() if path.exists() else b""

    def logged(self, id: str, timeout_s: float = 30) -> dict[str, Any]:
        """Return the one line of a request."""

        def found() -> list[dict[str, Any]]:
            lines = self.log.split(b"\n")[:-1]
            records = [json.loads(line.decode(errors="replace")) for line in lines]
            return [record for record in records if record["id"] == id]

        [record] = wait_for(f"the line of {id}", found, timeout_s=timeout_s)
        return record


@pytest.fixture(scope="module", params=["bookworm", "trixie"])
def gateway(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    """A gateway with one tenant and two models, of which one has a replica (job 77)."""
    folder = tmp_path_factory.mktemp("gateway")
    port = free_port()
    record = {"listen": port, "hosts": [{"name": "gateway"}]}
    wanted = fleet(model_record(), model_record(name="cold"), gateway=record, tenants=TENANTS)
    with running(request.param, folder) as nginx, replica() as behind:
        address = f"127.0.0.1:{behind}"
        nginx.change(wanted, [Target(model="tiny", job_id=77, submitted_at=1, address=address)])
        yield Gateway(nginx, port, folder)
        assert nginx.faults == []


def test_stream_is_the_engines_own_whatever_its_pieces(gateway: Gateway) -> None:
    """Who asks for usage gets all of it, who does not gets all but that; both are counted."""
    sizes = (1, 2, 7, 61, 100, 333, 100_000)
    cases = [(path, size, asks) for path in PATHS for size in sizes for asks in (True, False)]
    for at, (path, size, asks) in enumerate(cases):
        options = {"stream_options": {"include_usage": True}} if asks else {}
        got = gateway.send(f"stream-{at}", path, stream=True, size=size, **options)
        assert got == (ANSWER + TELLING + DONE if asks else ANSWER + DONE), (path, size, asks)
    for at, (path, _, _) in enumerate(cases):
        record = gateway.logged(f"stream-{at}")
        assert (record["prompt_tokens"], record["completion_tokens"]) == (3, 5)
        assert (record["finish"], record["path"]) == ("length", path)


@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}, {"include_usage": None}])
def test_usage_is_asked_for_beside_what_the_client_says(gateway: Gateway, options: Any) -> None:
    """A client that says no gets no usage, and is counted all the same."""
    id = f"options-{options}".replace(" ", "").replace("'", "").replace("{", "").replace("}", "")
    body = gateway.send(id, stream=True, stream_options=options)
    assert body == ANSWER + DONE
    assert gateway.logged(id)["completion_tokens"] == 5


@pytest.mark.parametrize("key", [b'"stream":true', b'"str\\u0065am" : true'])
@pytest.mark.parametrize("first", [True, False])
def test_stream_of_a_long_request_is_counted_too(
    gateway: Gateway, key: bytes, *, first: bool
) -> None:
    """However its key is spelled, before or behind the rest."""
    id = f"long-{len(key)}-{first}"
    rest = b'"model":"tiny","prompt":"' + b"a" * 40_000 + b'"'
    body = b"{" + b",".join([key, rest] if first else [rest, key]) + b"}"
    assert gateway.post(id, body) == ANSWER + DONE
    assert gateway.logged(id)["completion_tokens"] == 5


@pytest.mark.parametrize("times", [1, 5000])
def test_whole_answer_is_the_engines_own(gateway: Gateway, times: int) -> None:
    """Small or of many buffers: every byte arrives, and its tokens are counted."""
    id = f"whole-{times}"
    assert gateway.send(id, times=times) == whole({"times": times})
    record = gateway.logged(id)
    assert (record["prompt_tokens"], record["completion_tokens"]) == (7, 2)
    assert record["finish"] == "stop"
    assert record["first_byte"] <= record["seconds"]
    assert record["out"] > len(whole({"times": times}))


def test_caller_can_not_hide_its_tokens_behind_what_it_asks_for(gateway: Gateway) -> None:
    """Usage is found before a long end, and across the edges of NGINX's buffers."""
    ids = {f"behind-{more}": more for more in range(0, 4_200, 29)}
    for id, more in ids.items():
        assert gateway.send(id, more=more, ids=2_000) == whole({"more": more, "ids": 2_000})
    for id in ids:
        record = gateway.logged(id)
        assert (record["prompt_tokens"], record["completion_tokens"]) == (7, 2)
        assert record["finish"] == "stop"


def test_long_event_hides_no_tokens(gateway: Gateway) -> None:
    """It comes in many pieces, and its usage stands in any of them, or across two."""
    asks = {"include_usage": True}
    ids = {f"long-{ahead}": ahead for ahead in range(1, 4_200, 29)}
    for id, ahead in ids.items():
        gateway.send(id, ahead=ahead, stream=True, stream_options=asks)
    for id in ids:
        record = gateway.logged(id)
        assert (record["prompt_tokens"], record["completion_tokens"]) == (3, 5)
        assert record["finish"] == "length"


def test_log_tells_who_asked_whom_and_how_it_ended(gateway: Gateway) -> None:
    """Tenant, model, replica; an answer cut short, one that failed."""
    gateway.send("failed", prompt="fail", stream=True)
    gateway.send("half", prompt="half", stream=True, size=50)
    gateway.send("cut", prompt="cut", stream=True)
    ends = {"failed": "error", "half": "abort", "cut": "cut"}
    for id, finish in ends.items():
        record = gateway.logged(id)
        assert (record["finish"], record["status"]) == (finish, "200")
        names = [record[name] for name in ("tenant", "model", "replica", "tries")]
        assert names == ["alice", "tiny", "77", "200"]
        assert record["pieces"] >= 1


def test_R39_client_that_leaves_ends_its_request_at_the_replica_too(gateway: Gateway) -> None:
    """The replica would go on for a minute; the line is there when NGINX has left it."""
    gateway.leave("left")
    record = gateway.logged("left", timeout_s=15)
    assert (record["finish"], record["replica"]) == ("left", "77")
    [counted] = tally(json.dumps(record).encode()).days.values()
    assert counted.prompt_tokens == record["in"] // 4 > 0


def test_own_answers_say_why_there_was_no_replica(gateway: Gateway) -> None:
    """Demand for a model without a replica is seen, and who asked."""
    gateway.send("cold", model="cold")
    record = gateway.logged("cold")
    assert (record["status"], record["error"]) == ("503", "model_not_ready")
    assert (record["tenant"], record["model"], record["replica"]) == ("alice", "cold", "")
    gateway.send("nope", model="nope")
    record = gateway.logged("nope")
    assert (record["status"], record["error"], record["model"]) == ("404", "model_not_found", "")
    assert record["first_byte"] is None


def test_request_that_is_too_large_is_its_tenants(gateway: Gateway) -> None:
    """NGINX refuses it by its length, before anybody has looked who calls."""
    gateway.post("large", b" " * (8 << 20 | 1))
    record = gateway.logged("large")
    assert (record["status"], record["tenant"], record["finish"]) == ("413", "alice", "whole")


def test_no_request_forges_a_line_and_none_leaves_a_secret(gateway: Gateway) -> None:
    """Whatever stands in path, query and headers, each request is one line that can be read."""
    before = requests(gateway)
    strange = ['/v1/"},{"at":1', "/v1/%0a%22%7d%0a{", "/é", "/%ff%fe", "/v1/models?key=" + KEY]
    for at, path in enumerate(strange):
        headers = {"X-Request-Id": f'a"b\\\x01{at}', "User-Agent": '"}\\n{"', **CALLER}
        path = "".join(c if c.isascii() else f"%{ord(c):02x}" for c in path)
        ask_raw(gateway.port, path, headers)
    # Each of NGINX's workers writes its own lines, when it likes to.
    wait_for("a line each", lambda: requests(gateway) == before + len(strange))
    assert tally(gateway.log).odd_lines == 0
    assert KEY.encode() not in gateway.log
    assert b"secret words" not in gateway.log


def test_way_to_a_path_hides_no_tokens(gateway: Gateway) -> None:
    """No byte on the way there, such as one that is no text, keeps a request from being counted."""
    before = spent(gateway)
    body = json.dumps({"model": "tiny", "prompt": "a"})
    headers = {"X-Request-Id": "hidden", "Content-Length": str(len(body)), **CALLER}
    path = "/v1/\xff\xed\xa0\x80/../completions"
    ask_raw(gateway.port, path, headers, method="POST", body=body)
    assert gateway.logged("hidden")["status"] == "200"
    assert spent(gateway) == before + 9


def requests(gateway: Gateway) -> int:
    return sum(one.requests for one in tally(gateway.log).days.values())


def spent(gateway: Gateway) -> int:
    return sum(one.tokens for one in tally(gateway.log).days.values())


def ask_raw(
    port: int, path: str, headers: dict[str, str], method: str = "GET", body: str = ""
) -> None:
    """Send what an HTTP library would refuse to; a character of the path is a byte."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{lines}\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
        sock.sendall((head + body).encode("latin-1"))
        while sock.recv(65536):
            pass


def test_tenant_without_tokens_is_refused_and_counted(gateway: Gateway) -> None:
    """A generation that says so answers 429 insufficient_quota to that tenant."""
    port = free_port()
    record = {"listen": port, "hosts": [{"name": "gateway"}]}
    wanted = fleet(model_record(), gateway=record, tenants=TENANTS)
    gateway.nginx.change(wanted, [], ["alice"])
    replace(gateway, port=port).send("spent")
    record = gateway.logged("spent")
    assert (record["status"], record["error"]) == ("429", "insufficient_quota")
    assert (record["tenant"], record["replica"]) == ("alice", "")
