"""TLS and HTTP/2 to the clients, where the spec names a certificate."""

import http.client
import ssl
from pathlib import Path

import pytest

from tests.gateway.front import CHAT, KEYS, Front
from tests.gateway.nginx import FOLDER


@pytest.fixture(scope="module")
def trusted(front: Front) -> ssl.SSLContext:
    """The gateway with a certificate of its own, and a client that trusts it alone."""
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    files = ["-keyout", f"{FOLDER}/tls.key", "-out", f"{FOLDER}/tls.pem"]
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    front.nginx.inside(["openssl", "req", "-x509", *kind, *names, *files])
    tls = {"certificate": f"{FOLDER}/tls.pem", "key": f"{FOLDER}/tls.key"}
    front.change(gateway={"tls": tls})
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
