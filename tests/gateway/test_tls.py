"""TLS and HTTP/2 to the clients, where the spec names a certificate."""

import http.client
import json
import os
import ssl
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest

from reconciler.state import Target
from tests.gateway.front import CHAT, KEYS, Front
from tests.gateway.nginx import FOLDER
from tests.gateway.replica import ANSWER, DONE, replica, whole

TLS = {"tls": {"certificate": f"{FOLDER}/tls.pem", "key": f"{FOLDER}/tls.key"}}
RELOADS = 20 if os.environ.get("SOAK") else 3


@pytest.fixture(scope="module")
def trusted(front: Front) -> ssl.SSLContext:
    """The gateway with a certificate of its own, and a client that trusts it alone."""
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    files = ["-keyout", f"{FOLDER}/tls.key", "-out", f"{FOLDER}/tls.pem"]
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    front.nginx.inside(["openssl", "req", "-x509", *kind, *names, *files])
    front.change(gateway=TLS)
    return ssl.create_default_context(cadata=front.nginx.read("tls.pem"))


def test_client_is_served_over_tls(front: Front, trusted: ssl.SSLContext) -> None:
    """As without, and told never to come back without."""
    connection = http.client.HTTPSConnection("localhost", front.port, context=trusted, timeout=30)
    headers = {"Authorization": f"Bearer {KEYS['alice']}"}
    connection.request("POST", CHAT, b'{"model":"tiny"}', headers)
    answer = connection.getresponse()
    assert (answer.status, b"tiny" in answer.read()) == (200, True)
    assert answer.headers["Strict-Transport-Security"] == "max-age=31536000"
    connection.close()


@pytest.mark.usefixtures("trusted")
def test_http_2_is_spoken_to_who_asks_for_it(front: Front) -> None:
    """On an NGINX that knows it as a word of `listen`, and on one that has a directive for it."""
    form = "%{http_version} %{response_code}"
    url = f"https://localhost:{front.port}{CHAT}"
    key = f"Authorization: Bearer {KEYS['alice']}"
    sent = ["--http2", "--json", '{"model":"big"}', "--header", key]
    argv = ["curl", "--silent", "--output", "/dev/null", "--write-out", form, *sent]
    said = front.nginx.inside([*argv, "--cacert", f"{FOLDER}/tls.pem", url]).stdout
    assert said == b"2 200"


@pytest.mark.usefixtures("trusted")
def test_body_of_http_2_needs_no_length(front: Front) -> None:
    """Its frames tell where it ends; a replica is told a length."""
    before = len(front.replicas.got)
    sent = ["--http2", "--request", "POST", "--upload-file", "-", "--expect100-timeout", "0"]
    key = f"Authorization: Bearer {KEYS['alice']}"
    argv = ["curl", "--silent", "--fail", *sent, "--header", key, "--cacert", f"{FOLDER}/tls.pem"]
    body = b'{"model":"big"}'
    front.nginx.inside([*argv, f"https://localhost:{front.port}{CHAT}"], stdin=body)
    [got] = front.replicas.got[before:]
    assert (got.replica, got.body) == ("big", body)


# What curl is told beside the request: a stream in many pieces, an answer of many buffers.
ASKED = {
    "stream": {"model": "tiny", "prompt": "x", "stream": True, "size": 7},
    "whole": {"model": "tiny", "prompt": "x", "times": 2_000},
}
TOLD = {"stream": ANSWER + DONE, "whole": whole(ASKED["whole"])}
EACH = 150


def ask_many(front: Front) -> list[tuple[str, bytes]]:
    """Send streams and others at once, over one connection as far as curl can; how each ended."""
    folder = front.nginx.folder / "answers"
    folder.mkdir(exist_ok=True)
    argv = ["curl", "--parallel", "--parallel-max", "16"]
    for kind, body in ASKED.items():
        argv += ["--silent", "--http2", "--cacert", f"{FOLDER}/tls.pem", "--json", json.dumps(body)]
        argv += ["--header", f"Authorization: Bearer {KEYS['alice']}"]
        argv += ["--write-out", "%{http_version} %{response_code}\\n"]
        argv += ["--output", f"{FOLDER}/answers/{kind}-#1"]
        argv += [f"https://localhost:{front.port}/v1/completions?[1-{EACH}]", "--next"]
    lines = front.nginx.inside(argv[:-1]).stdout.decode().splitlines()
    assert Counter(lines) == {"2 200": len(ASKED) * EACH}
    answers = [(file.name.split("-")[0], file.read_bytes()) for file in folder.iterdir()]
    for file in folder.iterdir():
        file.unlink()
    return answers


@pytest.mark.usefixtures("trusted")
def test_http_2_loses_nothing_over_reloads(front: Front) -> None:
    """Many requests at once on one connection, of a client that never tries twice by itself."""
    enough = Event()

    def load() -> list[tuple[str, bytes]]:
        ended = ask_many(front)
        while not enough.is_set():
            ended += ask_many(front)
        return ended

    with replica() as port, ThreadPoolExecutor(max_workers=1) as pool:
        target = Target(model="tiny", job_id=1, submitted_at=1, address=f"127.0.0.1:{port}")
        front.nginx.change(front.fleet(gateway=TLS), [target])
        asked = pool.submit(load)
        try:
            for at in range(RELOADS):
                exhausted = ["carol"] if at % 2 == 0 else []
                front.nginx.change(front.fleet(gateway=TLS), [target], exhausted)
        finally:
            enough.set()
        ended = asked.result()
    front.change(gateway=TLS)
    assert len(ended) >= len(ASKED) * EACH
    assert [(kind, text) for kind, text in ended if text != TOLD[kind]] == []


@pytest.mark.usefixtures("trusted")
def test_request_without_tls_is_told_so(front: Front) -> None:
    """A key that was sent in the clear opens nothing."""
    assert front.refused("POST", CHAT, {"model": "tiny"}) == (400, "bad_request")


def test_old_tls_is_refused(front: Front, trusted: ssl.SSLContext) -> None:
    """1.2 or newer: what is offered is what NGINX itself says it takes."""
    conf = (front.nginx.read("current/fleet.conf")).splitlines()
    assert "    ssl_protocols TLSv1.2 TLSv1.3;" in conf
    assert trusted.minimum_version >= ssl.TLSVersion.TLSv1_2


@pytest.mark.usefixtures("trusted")
def test_configuration_with_tls_raises_no_warning(front: Front) -> None:
    """Neither release has anything to say about it."""
    assert "[warn]" not in front.nginx.check()


def test_certificate_that_can_not_be_read_changes_nothing(front: Front) -> None:
    """NGINX refuses the staged files; what runs goes on."""
    with pytest.raises(AssertionError, match="cannot load certificate"):
        front.change(gateway={"tls": {"certificate": "/none.pem", "key": "/none.key"}})
    assert Path(f"/proc/{front.nginx.master}").exists()
