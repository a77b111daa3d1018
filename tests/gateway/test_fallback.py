"""What goes elsewhere while no replica of a model is ready, and what never does."""

import http.client
import json
import ssl
import stat
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingUDPServer
from typing import Any

import pytest

from reconciler.adapters.certificates import new_authority, new_certificate
from reconciler.adapters.secrets import certificates_in
from reconciler.routes import KEY_FILE
from tests.gateway.conftest import RELEASES
from tests.gateway.front import CHAT, KEYS, Answer, Front, tenants
from tests.gateway.nginx import FOLDER, running
from tests.gateway.recorder import Got, recording
from tests.gateway.replica import DONE, TELLING, stream
from tests.lab.wait import wait_for
from tests.unit.build import fleet, model_record

NAME = "api.example.org"
OTHER_NAME = "other.example.org"
SECRET = "sk-external-0123456789"
ASKED = {"model": "tiny", "prompt": "x", "seed": 7}


class _Dns(BaseRequestHandler):
    """Answers each question with this machine's own address (RFC 1035, 4.1)."""

    def handle(self) -> None:
        query, sock = self.request
        end = query.index(b"\0", 12) + 5
        answer = b"\xc0\x0c\x00\x01\x00\x01\x00\x00\x00\x3c\x00\x04\x7f\x00\x00\x01"
        head = query[:2] + b"\x81\x80\x00\x01\x00\x01\x00\x00\x00\x00"
        sock.sendto(head + query[12:end] + answer, self.client_address)


@dataclass(slots=True)
class Elsewhere:
    """An API like OpenAI's, with TLS, that records what it is asked."""

    port: int
    dns: int
    got: list[Got] = field(default_factory=list)
    status: int = 200


@contextmanager
def elsewhere(folder: Path, authority: str) -> Iterator[Elsewhere]:
    """Serve it on loopback as NAME."""
    (folder / "server.pem").write_text(new_certificate(authority, NAME, 3600))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            here.got.append(Got(NAME, self.requestline, headers, body))
            asked = json.loads(body)
            text = stream(asked) if asked.get("stream") else json.dumps({"from": NAME}).encode()
            self.send_response(here.status)
            kind = "text/event-stream" if asked.get("stream") else "application/json"
            for name, value in {"Content-Type": kind, "Set-Cookie": "a=b"}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with (
        ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server,
        ThreadingUDPServer(("127.0.0.1", 0), _Dns) as dns,
    ):
        server.socket = context.wrap_socket(server.socket, server_side=True)
        here = Elsewhere(server.server_address[1], dns.server_address[1])
        threads = [threading.Thread(target=one.serve_forever) for one in (server, dns)]
        for thread in threads:
            thread.start()
        try:
            yield here
        finally:
            for one in (server, dns):
                one.shutdown()
            for thread in threads:
                thread.join()


@dataclass(slots=True)
class Away(Front):
    """A gateway whose models have replicas or not, and a fallback or not."""

    there: Elsewhere = field(kw_only=True)

    def route(
        self, ready: Sequence[str] = (), name: str = NAME, key: str = SECRET, **gateway: Any
    ) -> None:
        """Change which models are ready, and the name by which the other API is known."""
        self.there.got.clear()
        self.there.status = 200
        url = f"https://{name}:{self.there.port}/api/v1"
        fallback = {"url": url, "model": "vendor/large", "key_file": "/etc/key"}
        external = {
            "resolvers": [f"127.0.0.1:{self.there.dns}"],
            "authorities": f"{FOLDER}/authority.pem",
        }
        wanted = fleet(
            model_record(served_names=["org/Tiny"], fallback=fallback),
            model_record(name="big", fallback=fallback, replicas=0),
            model_record(name="plain"),
            gateway={
                "hosts": [{"name": "gateway"}],
                "listen": self.port,
                "external": {**external, **gateway},
            },
            tenants=tenants(),
        )
        targets = [target for target in self.replicas.targets() if target.model in ready]
        self.nginx.change(wanted, targets, external=dict.fromkeys(["tiny", "big"], key))

    def sent(self, body: Mapping[str, Any], path: str = CHAT, **keys: Any) -> Got:
        """Send a request that must go elsewhere; return what came there."""
        before = len(self.there.got)
        answer = self.ask("POST", path, body, **keys)
        assert answer.status == 200, answer
        [got] = self.there.got[before:]
        return got


@pytest.fixture(scope="module", params=RELEASES)
def away(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Away]:
    """The gateway on one release, shared by the tests of this file; it ends without a fault."""
    folder, authority = tmp_path_factory.mktemp("gateway"), new_authority("elsewhere")
    with (
        recording(["tiny", "plain"]) as replicas,
        elsewhere(tmp_path_factory.mktemp("elsewhere"), authority) as there,
        running(request.param, folder) as nginx,
    ):
        [certificate] = certificates_in(authority)
        (folder / "authority.pem").write_text(certificate)
        yield Away(nginx, replicas, there=there)
        assert nginx.unharmed, nginx.faults


@pytest.mark.parametrize("model", ["tiny", "org/Tiny", "big"])
def test_model_without_a_replica_is_answered_elsewhere(away: Away, model: str) -> None:
    """By the name that it has there, with our key; the caller's own goes nowhere."""
    away.route()
    got = away.sent({**ASKED, "model": model}, x_api_key="more")
    assert json.loads(got.body) == {**ASKED, "model": "vendor/large"}
    assert got.line == "POST /api/v1/chat/completions HTTP/1.1"
    assert got.headers["authorization"] == f"Bearer {SECRET}"
    assert got.headers["host"] == f"{NAME}:{away.there.port}"
    assert KEYS["alice"] not in str(got)
    assert "x-api-key" not in got.headers


def test_model_with_a_replica_is_not(away: Away) -> None:
    """One that is ready is enough, and what it gets has no key of the other API."""
    away.route(ready=["tiny"])
    assert SECRET not in str(away.passed("POST", CHAT, ASKED))
    assert away.there.got == []


def test_answer_is_the_others_own(away: Away) -> None:
    """Its body comes as it is; cookies of its domain don't."""
    away.route()
    answer = away.ask("POST", CHAT, ASKED)
    assert answer.body == {"from": NAME}
    assert "Set-Cookie" not in answer.headers


@pytest.mark.parametrize("asks", [True, False])
def test_stream_is_the_others_own_and_counted(away: Away, asks: bool) -> None:
    """Its tokens are asked for, and told to nobody who did not ask for them."""
    away.route()
    before = away.nginx.read("access.log").count("\n")
    options = {"stream_options": {"include_usage": True}} if asks else {}
    raw = stream_of(away, {**ASKED, "stream": True, **options})
    assert (TELLING in raw, raw.endswith(DONE)) == (asks, True)
    [line] = wait_for("its line", lambda: away.nginx.read("access.log").splitlines()[before:])
    record = json.loads(line)
    assert (record["prompt_tokens"], record["completion_tokens"]) == (3, 5)
    assert (record["model"], record["replica"], record["tenant"]) == ("tiny", "", "alice")


def stream_of(away: Away, body: Mapping[str, Any]) -> bytes:
    """Return the bytes of a streamed answer."""
    connection = http.client.HTTPConnection("127.0.0.1", away.port, timeout=30)
    try:
        headers = {"Authorization": f"Bearer {KEYS['alice']}", "Content-Type": "application/json"}
        connection.request("POST", CHAT, json.dumps(body), headers)
        return connection.getresponse().read()
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("method", "path", "body", "code"),
    [
        ("POST", "/v1/score", ASKED, "model_not_ready"),
        ("POST", "/tokenize", ASKED, "model_not_ready"),
        ("POST", "/m/tiny/v1/audio/transcriptions", b"RIFF", "model_not_ready"),
        ("POST", "/m/tiny/v1/completions", b"[]", "model_not_ready"),
        ("POST", "/m/tiny/v1/completions", b"no json", "invalid_json"),
        ("GET", "/m/tiny/v1/responses/resp_1", None, "model_not_ready"),
        ("POST", CHAT, {"model": "plain"}, "model_not_ready"),
        ("POST", "/v1/models", ASKED, "method_not_supported"),
    ],
)
def test_what_no_other_api_knows_stays_here(
    away: Away, method: str, path: str, body: Any, code: str
) -> None:
    """Paths of vLLM's own, uploads, models without a fallback."""
    away.route()
    assert away.refused(method, path, body)[1] == code
    assert away.there.got == []


@pytest.mark.parametrize("path", ["/m/tiny/v1/completions", "/m/tiny/v1/embeddings"])
def test_request_by_path_goes_elsewhere_too(away: Away, path: str) -> None:
    """Whatever its body calls the model, or if it does not name one."""
    away.route()
    for body in ({"prompt": "x"}, {"prompt": "x", "model": "else"}):
        got = away.sent(body, path)
        assert json.loads(got.body) == {"prompt": "x", "model": "vendor/large"}
        assert got.line.split()[1] == path.replace("/m/tiny", "/api")


def test_tenants_are_held_to_what_they_may(away: Away) -> None:
    """A model that is not theirs, and tokens that are used up, are refused here."""
    away.route()
    assert away.ask("POST", CHAT, ASKED, key=KEYS["bob"]).code == "model_not_found"
    assert away.ask("POST", CHAT, ASKED, key=None).code == "invalid_api_key"
    assert away.there.got == []


def wrong(away: Away) -> Answer:
    answer = away.ask("POST", CHAT, ASKED)
    assert (answer.status, answer.code) == (502, "bad_gateway")
    return answer


def test_certificate_of_another_name_is_no_fallback(away: Away) -> None:
    """Its name is compared, so neither key nor prompt is sent to whoever answers."""
    away.route(name=OTHER_NAME)
    wrong(away)
    assert away.there.got == []


def test_certificate_of_an_unknown_authority_is_no_fallback(away: Away) -> None:
    """The system's own authorities do not know this one."""
    away.route(authorities="/etc/ssl/certs/ca-certificates.crt")
    wrong(away)
    assert away.there.got == []


def test_name_that_can_not_be_resolved_is_a_502_of_that_model_alone(away: Away) -> None:
    """Asked for with each request, not when NGINX starts: nothing else is held up by it."""
    away.route(ready=["plain"], resolvers=["127.0.0.1:1"])
    assert away.passed("POST", CHAT, {"model": "plain"}).replica == "plain"
    wrong(away)


@pytest.mark.parametrize("status", [401, 403, 404, 500, 503])
def test_refusal_of_our_key_or_name_is_no_mistake_of_the_caller(away: Away, status: int) -> None:
    """What the other API holds against us is our failure."""
    away.route()
    away.there.status = status
    answer = away.ask("POST", CHAT, ASKED)
    assert (answer.status, answer.code) == (502, "bad_gateway")
    assert answer.body["error"]["type"] == "server_error"
    assert "WWW-Authenticate" not in answer.headers


@pytest.mark.parametrize("status", [400, 429])
def test_others_answer_to_a_caller_passes(away: Away, status: int) -> None:
    """A mistake in the request, or too many of them."""
    away.route()
    away.there.status = status
    assert away.ask("POST", CHAT, ASKED).status == status


def test_R36_key_of_a_fallback_lies_in_one_closed_file(away: Away) -> None:
    """And in no other file, old generation or log, whatever was asked and answered."""
    away.route(key="sk-an-older-one")
    away.route()
    away.sent(ASKED)
    away.there.status = 401
    away.ask("POST", CHAT, ASKED)
    base = away.nginx.folder
    holding = [path for path in base.rglob("*") if path.is_file() and holds(path)]
    assert [path.name for path in holding] == [KEY_FILE]
    assert stat.S_IMODE(holding[0].stat().st_mode) == 0o600


def holds(path: Path) -> bool:
    text = path.read_bytes()
    return SECRET.encode() in text or b"sk-an-older-one" in text


def test_body_is_rewritten_whatever_it_holds(away: Away) -> None:
    """One `model`, however often and wherever the word stands in it."""
    away.route()
    body = (
        b'{"model":"tiny","x":{"model":"tiny"},"prompt":"\\"model\\": \xf0\x9f\x99\x82 }",'
        b'"model":"org/Tiny","a":[],"o":{},"i":9007199254740993,"f":1e308,"n":null}'
    )
    assert away.ask("POST", CHAT, body).status == 200
    [got] = away.there.got
    expected = json.loads(body)
    assert json.loads(got.body) == {**expected, "model": "vendor/large"}
    assert json.loads(got.body, object_pairs_hook=len) == len(expected)


def test_configuration_with_a_fallback_raises_no_warning(away: Away) -> None:
    """Neither release has anything to say about it."""
    away.route(ready=["tiny"])
    assert "[warn]" not in away.nginx.check()
