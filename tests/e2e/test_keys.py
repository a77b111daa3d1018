"""What stands between clients, replicas and everybody else on the cluster: TLS and backend keys."""

import asyncio
import base64
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from reconciler.adapters import certificates
from tests.e2e.checks import assert_settled, lost, running, under_load
from tests.lab.fleet import Fleet, gateway_log
from tests.lab.load import in_flight
from tests.lab.wait import wait_for

PYTHON = "/opt/modelfleet/venv/bin/python"
IMPOSTOR = "/opt/modelfleet/src/tests/lab/impostor.py"
GATEWAY = "/var/lib/modelfleet/gateway"
SEEK = "/opt/modelfleet/src/tests/lab/seek.py"
TLS_NAME = "tiny.demo.modelfleet.internal"


@pytest.fixture
def served(fleet: Fleet) -> Fleet:
    """Two replicas, ready and routed."""
    fleet.run("apply", "--wait", "--timeout", "90s")
    return fleet


def _keys(fleet: Fleet) -> dict[str, str]:
    """Return every backend key by its id, oldest first."""
    folder = fleet.lab.shared / "secrets" / fleet.name / "keys"
    return {file.suffix[1:]: file.read_text() for file in sorted(folder.iterdir())}


def _listed(fleet: Fleet) -> list[dict[str, Any]]:
    """Return what `fleet backend-key list` shows."""
    argv = ["fleet", "backend-key", "list", fleet.spec, "--json"]
    keys: list[dict[str, Any]] = json.loads(fleet.lab.run("login", argv).stdout)["keys"]
    return keys


def _shown(fleet: Fleet) -> list[str]:
    """Return which keys a gateway shows."""
    return [key["id"] for key in _listed(fleet) if key["gateways"]]


def _tried(fleet: Fleet) -> set[str]:
    """Return the addresses that the gateway has tried."""
    return {address for tries in gateway_log(fleet.lab).values() for address in tries}


def _ended(fleet: Fleet, replica: dict[str, Any]) -> None:
    """End a replica's engine, so that its port is free while its job still runs."""
    node, port = replica["node"], replica["address"].partition(":")[2]
    fleet.lab.run(node, ["pkill", "-STOP", "-f", "slurm_script"], user="root")
    fleet.lab.run(node, ["pkill", "-KILL", "-f", "standin.py"], user="root")
    listening = ["ss", "--no-header", "--listening", "--tcp", f"sport = :{port}"]
    wait_for("the port to be free", lambda: not fleet.lab.run(node, listening).stdout)


@contextmanager
def _impostor(fleet: Fleet, replica: dict[str, Any], *certificate: str) -> Iterator[str]:
    """Have mallory at a replica's address; yields where she writes down what she gets."""
    address, _, port = replica["address"].partition(":")
    record = f"/tmp/record-{len(certificate)}"
    name = f"tiny@{replica['job_id']}"
    argv = [PYTHON, IMPOSTOR, address, port, name, record, *certificate]
    with fleet.lab.popen(replica["node"], argv, user="mallory") as impostor:
        try:
            has_begun = ["test", "-e", record]
            listens = lambda: not fleet.lab.run(replica["node"], has_begun, check=False).returncode  # noqa: E731
            wait_for("the impostor", listens)
            yield record
        finally:
            impostor.kill()


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_impostor_on_a_freed_port_gets_no_request_and_no_key(served: Fleet, tls: bool) -> None:
    """Whatever it answers: neither the gateway nor a probe says anything to it."""
    victim = served.replicas()[0]
    lab, node = served.lab, victim["node"]
    _ended(served, victim)
    certificate = []
    if tls:
        hers = certificates.new_certificate(certificates.new_authority("demo"), TLS_NAME, 1e6)
        lab.run(node, ["tee", "/tmp/hers.pem"], user="mallory", input=hers)
        certificate = ["/tmp/hers.pem"]

    async def requests() -> list[str]:
        async with in_flight(served.url, "tiny", plain=20, streams=4, tokens=5) as load:
            pass
        return lost(load.requests)

    with _impostor(served, victim, *certificate) as record:
        assert asyncio.run(requests()) == []
        wait_for("the gateway to have tried it", lambda: victim["address"] in _tried(served))
        [seen] = [one for one in served.replicas() if one["job_id"] == victim["job_id"]]
        assert seen["status"] == "impostor"
        got = lab.run(node, ["base64", record], user="root").stdout
        # It writes down what arrives: this one does not care whom it talks to.
        scheme = "https" if tls else "http"
        control = ["curl", "--insecure", "--silent", f"{scheme}://{victim['address']}/control"]
        lab.run("gateway", control)
        records = lambda: "/control" in lab.run(node, ["cat", "-v", record], user="root").stdout  # noqa: E731
        wait_for("the control to be recorded", records)
    received = base64.b64decode(got)
    # Of TLS nothing came through; in the clear each is the first message of TLS, of type 22.
    assert received.strip() == b"" if tls else received.startswith(b"\x16\x03")
    for word in (b"POST", b"GET", b"HTTP", b"Bearer", b"Once upon", *_texts(served)):
        assert word not in received


def _texts(fleet: Fleet) -> list[bytes]:
    return [key.encode() for key in _keys(fleet).values()]


def test_replica_answers_nobody_who_has_no_key(served: Fleet) -> None:
    """On any node, for any path below /v1: no key, a wrong one, no TLS."""
    replica = served.replicas()[0]
    head = [
        "curl",
        "--silent",
        "--insecure",
        "--output",
        "/dev/null",
        "--write-out",
        "%{http_code}",
    ]
    post = ["--data", '{"model":"tiny","prompt":"a","max_tokens":1}']
    post += ["--header", "Content-Type: application/json"]
    wrong = ["--header", "Authorization: Bearer wrong"]
    base = f"https://{replica['address']}"
    for words in ([], wrong):
        for path in ("models", "completions", "chat/completions"):
            more = [] if path == "models" else post
            argv = [*head, *words, *more, f"{base}/v1/{path}"]
            answer = served.lab.run("gpu4", argv, user="mallory", check=False)
            assert answer.stdout == "401", argv
    plain = served.lab.run("gpu4", [*head, f"http://{replica['address']}/v1/models"], check=False)
    assert plain.stdout == "000"
    key = next(iter(_keys(served).values()))
    known = [*head, *post, "--header", "@-", f"{base}/v1/completions"]
    answer = served.lab.run("gpu4", known, input=f"Authorization: Bearer {key}\n")
    assert answer.stdout == "200"


def test_key_is_rotated_and_revoked_without_a_lost_request(served: Fleet) -> None:
    """Gateways go over to the new key when all take it; who takes a revoked one is replaced."""
    first, second = _keys(served)
    assert _shown(served) == [second]
    before = {replica["job_id"] for replica in served.replicas()}
    old = _keys(served)

    def change() -> None:
        added = re.findall(
            r"added backend key (\w{8})",
            served.lab.run("login", ["fleet", "backend-key", "rotate", served.spec]).stdout,
        )
        assert _shown(served) == [second]
        revoke = ["fleet", "backend-key", "revoke", served.spec, first]
        served.lab.run("login", revoke)
        # Those that run take one of the two that are left: it can't go before they have.
        stuck = served.lab.run("login", [*revoke[:-1], second], check=False)
        assert stuck.returncode == 1
        assert stuck.stderr.startswith("fleet: there are only 2 keys")
        wait_for("the new key", lambda: _shown(served) == added, timeout_s=120)

    with running(served):
        requests = under_load(served, change)
        assert_settled(served, replicas=2)
    assert lost(requests) == []
    assert not before & {replica["job_id"] for replica in served.replicas()}
    assert [key["jobs"] for key in _listed(served)] == [2, 2]
    # No older generation on the gateway's disk has a key.
    files = served.lab.run("gateway", ["find", GATEWAY, "-name", "replica-key.conf"]).stdout
    assert len(files.split()) == 1
    for key in old.values():
        assert served.lab.run("gateway", ["grep", "-rF", key, GATEWAY], check=False).stdout == ""


@pytest.mark.soak
def test_replicas_are_opened_and_protected_again_without_a_lost_request(served: Fleet) -> None:
    """While some are of one kind and some of the other, each gets its share and what it takes."""
    settled = lambda: served.run("apply", "--wait", "--timeout", "120s")  # noqa: E731
    for old, new in (
        ("secret_dir:", "replica_access: open\nsecret_dir:"),
        ("access: open", "access: protected"),
    ):
        before = {replica["job_id"] for replica in served.replicas()}
        served.edit(old, new)
        assert lost(under_load(served, settled)) == []
        assert_settled(served, replicas=2)
        assert not before & {replica["job_id"] for replica in served.replicas()}
        conf = served.lab.run("gateway", ["cat", f"{GATEWAY}/current/fleet.conf"]).stdout
        assert ("upstream open.tiny" in conf) == ("open" in new)
        assert ("upstream model.tiny" in conf) != ("open" in new)


def _secret_lines(fleet: Fleet) -> str:
    """Return every backend key and every line of a private key, one on each line."""
    folder = fleet.lab.shared / "secrets" / fleet.name
    lines = [*_keys(fleet).values()]
    for file in (folder / "ca.pem", *(folder / "models").iterdir()):
        key = re.findall(r"PRIVATE KEY-----\n(.*?)\n-----END PRIV", file.read_text(), re.DOTALL)
        lines += [line for text in key for line in text.split("\n") if len(line) > 20]
    assert len(lines) > 5
    return "".join(f"{line}\n" for line in lines)


def _found(fleet: Fleet, host: str, *what: str, user: str = "root") -> list[str]:
    """Return where a secret is, of what this user may read on a host."""
    argv = [PYTHON, SEEK, *what]
    done = fleet.lab.run(host, argv, user=user, input=_secret_lines(fleet), check=False)
    assert (done.stderr, done.returncode) in (("", 0), ("", 1))
    return done.stdout.split("\n")[:-1] if done.returncode else []


def test_R36_no_secret_is_anywhere_but_in_its_file(served: Fleet) -> None:
    """A life under load: processes, Slurm, logs, journal, what is printed, what others may read."""
    found: list[str] = []
    said: list[str] = []

    def look_at_processes() -> None:
        for host in served.lab.hosts:
            found.extend(_found(served, host, "processes"))

    def life() -> None:
        served.edit("max-num-seqs: 16", "max-num-seqs: 32")
        said.append(served.run("plan", "--json"))
        look_at_processes()
        said.append(served.run("apply", "--wait", "--timeout", "120s"))
        look_at_processes()

    assert lost(under_load(served, life)) == []
    for verb in ("plan", "status", "events"):
        said.append(served.run(verb) + served.run(verb, "--json"))
    said.append(served.run("explain", "tiny") + served.run("render", "tiny"))
    said.append(json.dumps(_listed(served)))
    jobs = [
        f"scontrol show job -dd {j[0]}; scontrol write batch_script {j[0]} -" for j in served.jobs()
    ]
    slurm = ["squeue --all --states=all --Format=ALL", "scontrol show config", *jobs]
    found += _found(served, "login", "output", "; ".join(slurm))
    found += _found(served, "login", "files", "/shared/logs", "/home/fleet/.local", "/var/log")
    for host in served.lab.hosts:
        places = ["/shared", "/var", "/tmp", "/run", "/home", "/etc"]
        found += _found(served, host, "files", *places, user="mallory")
    assert found == []
    assert not any(line in "".join(said) for line in _secret_lines(served).split())
    # The same search finds them where they are.
    [key] = _found(served, "gateway", "files", GATEWAY)
    assert key.endswith("/replica-key.conf")
    assert len(_found(served, "login", "files", "/shared/secrets")) == 4


def test_keys_that_others_may_read_stop_everything_but_requests(served: Fleet) -> None:
    """One line says what is wrong; nothing is submitted or routed anew, and what serves goes on."""
    folder = served.lab.shared / "secrets"
    folder.chmod(0o750)
    served.edit("replicas: 2", "replicas: 3")
    jobs = len(served.jobs())
    done = served.lab.run("login", served.command("apply"), check=False)
    assert done.returncode == 4
    assert "/shared/secrets is open to other users: its mode is 0750, not 0700" in done.stdout
    assert len(served.jobs()) == jobs

    async def requests() -> list[str]:
        async with in_flight(served.url, "tiny", plain=3, streams=3, tokens=5) as load:
            pass
        return lost(load.requests)

    assert asyncio.run(requests()) == []
    folder.chmod(0o700)
    served.run("apply", "--wait", "--timeout", "90s")
    assert_settled(served, replicas=3)
