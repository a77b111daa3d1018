"""What a client gets for each kind of request, of a real NGINX of each Debian release."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from reconciler import routes
from reconciler.state import Target
from tests.gateway.conftest import RELEASES
from tests.gateway.front import CHAT, KEYS, NAMES, Front, digest, tenants
from tests.gateway.nginx import running
from tests.gateway.recorder import recording

TINY = {"model": "tiny", "messages": []}
JSON_PATHS = [
    *(CHAT, "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/messages"),
    *("/v1/messages/count_tokens", "/tokenize", "/detokenize", "/v1/score", "/score"),
    *("/v1/rerank", "/v2/rerank", "/rerank", "/classify", "/pooling"),
]
# Of vLLM: what changes it or shows its inside. Of us: what is not there.
CLOSED_PATHS = [
    *("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/sleep", "/wake_up", "/metrics"),
    *("/collective_rpc", "/server_info", "/reset_prefix_cache", "/start_profile", "/load"),
    *("/invocations", "/ping", "/health", "/version", "/pause", "/abort_requests", "/docs"),
    *("/inference/v1/generate", "/scale_elastic_ep", "/update_weights", "/openapi.json"),
    *("/generation", "/", "/v1", "/v1/", "/v1/chat", f"{CHAT}/", "/.error", "/V1/chat/completions"),
]


@pytest.mark.parametrize("path", JSON_PATHS)
def test_path_of_the_api_reaches_the_model_that_the_body_names(front: Front, path: str) -> None:
    """By the body's model, and unchanged; the path and query arrive as they were sent."""
    for model in ("tiny", "big"):
        body = json.dumps({"model": model, "text": "é🙂"}, ensure_ascii=False).encode()
        got = front.passed("POST", f"{path}?a=b", body)
        assert (got.replica, got.line) == (model, f"POST {path}?a=b HTTP/1.1")
        assert got.body == body


@pytest.mark.parametrize("path", CLOSED_PATHS)
def test_path_that_is_not_of_the_api_reaches_no_replica(front: Front, path: str) -> None:
    """Only what is named passes: by itself, and below a model's path."""
    assert front.refused("POST", path, TINY) == (404, "unknown_url")
    assert front.refused("GET", path) == (404, "unknown_url")
    assert front.refused("POST", f"/m/tiny{path}", TINY) == (404, "unknown_url")
    assert front.refused("GET", f"/m/tiny{path}") == (404, "unknown_url")


@pytest.mark.parametrize("name", NAMES)
def test_R37_any_name_of_a_model_routes_and_is_found(front: Front, name: str) -> None:
    """Quotes, dollars, slashes, unicode, JavaScript's own words: a name is data."""
    assert front.passed("POST", CHAT, {"model": name}).replica == "tiny"
    quoted = "".join(f"%{byte:02X}" for byte in name.encode())
    found = front.ask("GET", f"/v1/models/{quoted}")
    assert (found.status, found.body.get("id")) == (200, name)
    assert front.refused("POST", CHAT, {"model": f"{name}x"}) == (404, "model_not_found")


WRONG: dict[str, tuple[int, str, list[Any]]] = {
    "no key": (401, "invalid_api_key", ["POST", CHAT, TINY, {"key": None}]),
    "bad key": (401, "invalid_api_key", ["POST", CHAT, TINY, {"key": "key-of-nobody"}]),
    "empty key": (401, "invalid_api_key", ["POST", CHAT, TINY, {"key": ""}]),
    "no key, no such path": (401, "invalid_api_key", ["GET", "/none", None, {"key": None}]),
    "no key, huge": (401, "invalid_api_key", ["POST", CHAT, b"x" * 500_000, {"key": None}]),
    "not its model": (403, "model_not_found", ["POST", CHAT, TINY, {"key": KEYS["bob"]}]),
    "not its model, by path": (
        *(403, "model_not_found"),
        ["POST", f"/m/tiny{CHAT}", TINY, {"key": KEYS["bob"]}],
    ),
    "tokens used up": (429, "insufficient_quota", ["POST", CHAT, TINY, {"key": KEYS["carol"]}]),
    "unknown model": (404, "model_not_found", ["POST", CHAT, {"model": "none"}]),
    "JavaScript's own word": (404, "model_not_found", ["POST", CHAT, {"model": "toString"}]),
    "unknown model, by path": (404, "model_not_found", ["POST", f"/m/none{CHAT}", TINY]),
    "served name in a path": (404, "unknown_url", ["POST", f"/m/org/Tiny-8B{CHAT}", TINY]),
    "starting": (503, "model_not_ready", ["POST", CHAT, {"model": "cold"}]),
    "at zero": (503, "model_not_ready", ["POST", CHAT, {"model": "off"}]),
    "at zero, by path": (503, "model_not_ready", ["POST", f"/m/off{CHAT}", TINY]),
    "a GET": (405, "method_not_supported", ["GET", CHAT]),
    "a PUT": (405, "method_not_supported", ["PUT", CHAT, TINY]),
    "a POST of a list": (405, "method_not_supported", ["POST", "/v1/models", TINY]),
    "a DELETE of a model": (405, "method_not_supported", ["DELETE", "/v1/models/tiny"]),
    "a TRACE": (405, "method_not_supported", ["TRACE", CHAT]),
    "not JSON": (400, "invalid_json", ["POST", CHAT, b"model=tiny"]),
    "no body": (400, "invalid_json", ["POST", CHAT, b""]),
    "two values": (400, "invalid_json", ["POST", CHAT, b'{"model":"tiny"}{}']),
    "no model": (400, "model_required", ["POST", CHAT, {"messages": []}]),
    "model of another type": (400, "model_required", ["POST", CHAT, {"model": ["tiny"]}]),
    "empty model": (400, "model_required", ["POST", CHAT, {"model": ""}]),
    "no object": (400, "model_required", ["POST", CHAT, b'"tiny"']),
    "null": (400, "model_required", ["POST", CHAT, b"null"]),
    "inherited model": (400, "model_required", ["POST", CHAT, b'{"__proto__":{"model":"tiny"}}']),
    "too large": (413, "request_too_large", ["POST", CHAT, b"x" * (1 << 20 | 1)]),
    "too large, by path": (
        *(413, "request_too_large"),
        ["POST", "/m/tiny/v1/audio/translations", b"x" * (2 << 20 | 1)],
    ),
    "audio without a model": (404, "unknown_url", ["POST", "/v1/audio/transcriptions", b"x"]),
    "too long an address": (414, "request_too_large", ["GET", "/" + "x" * 20_000]),
}


@pytest.mark.parametrize("name", WRONG)
def test_request_that_is_wrong_gets_its_status_and_reaches_no_replica(
    front: Front, name: str
) -> None:
    """In OpenAI's shape, with OpenAI's code where it has one."""
    status, code, args = WRONG[name]
    keys = args.pop() if isinstance(args[-1], dict) and "key" in args[-1] else {}
    assert front.refused(*args, **keys) == (status, code)
    if keys:
        args.append(keys)  # for the other release


def test_answer_says_when_to_come_back(front: Front) -> None:
    """Sooner for a model that starts; not before midnight (UTC) for used up tokens."""
    cold, off = (front.ask("POST", CHAT, {"model": name}) for name in ("cold", "off"))
    assert (cold.headers["Retry-After"], off.headers["Retry-After"]) == ("15", "30")
    used_up = front.ask("POST", CHAT, TINY, key=KEYS["carol"])
    assert 0 < int(used_up.headers["Retry-After"]) <= 86400
    assert used_up.headers["X-Should-Retry"] == "false"
    assert "Retry-After" not in front.ask("POST", CHAT, TINY).headers


def test_replica_that_is_gone_is_a_502_that_says_when_to_come_back(front: Front) -> None:
    """No replica takes the connection: one clear error, and a reason to try again."""
    gone = Target(model="tiny", job_id=1, submitted_at=1, address="127.0.0.1:1")
    front.nginx.change(front.fleet(), [gone])
    answer = front.ask("POST", CHAT, TINY)
    assert (answer.status, answer.code) == (502, "bad_gateway")
    assert answer.headers["Retry-After"] == "5"
    front.change()


@pytest.mark.parametrize(
    ("key", "names"),
    [(KEYS["alice"], ["tiny", *NAMES, "big", "cold", "off"]), (KEYS["bob"], ["big"])],
)
def test_list_of_models_is_what_the_tenant_may_use(
    front: Front, key: str, names: list[str]
) -> None:
    """With the state of each; what it may not use is not there, not even by name."""
    answer = front.ask("GET", "/v1/models", key=key)
    assert [entry["id"] for entry in answer.body["data"]] == names
    states = {"big": "ready", "cold": "starting", "off": "stopped"}
    for entry in answer.body["data"]:
        assert entry["state"] == states.get(entry["id"], "ready")
    hidden = front.ask("GET", "/v1/models/cold", key=key)
    assert hidden.status == (200 if "cold" in names else 404)
    assert front.ask("HEAD", "/v1/models", key=key).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer key-of-alice"},
        {"Authorization": "bearer  key-of-alice "},
        {"api-key": "key-of-alice"},
        {"x-api-key": "key-of-alice"},
    ],
)
def test_R36_key_opens_in_each_usual_header_and_never_goes_on(
    front: Front, headers: dict[str, str]
) -> None:
    """OpenAI's, Azure's and Anthropic's way; a replica sees no header that could hold it."""
    got = front.passed("POST", CHAT, TINY, key=None, **headers, Cookie="a=key-of-alice")
    assert "key-of-alice" not in str(got)
    assert set(got.headers) <= {
        *("host", "connection", "content-type", "content-length", "x-request-id", "accept"),
    }


@pytest.mark.parametrize(
    "value", ["Basic a2V5", "key-of-alice", "Bearer", "Bearer key of alice", "Bearer k\u00e9y"]
)
def test_header_that_holds_no_key_is_refused(front: Front, value: str) -> None:
    """Only a Bearer with one word is looked at."""
    refused = front.refused("POST", CHAT, TINY, key=None, Authorization=value)
    assert refused == (401, "invalid_api_key")


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        *(("my-request_1.2:3", True), ("a" * 128, True), ("a" * 129, False), ("a b", False)),
        *(('"}', False), ("", False), (None, False)),
    ],
)
def test_request_id_is_kept_if_it_is_sane(front: Front, sent: str | None, kept: bool) -> None:
    """Kept or made, it is the same for the client and the replica."""
    headers = {} if sent is None else {"X_Request_Id": sent}
    before = len(front.replicas.got)
    answer = front.ask("POST", CHAT, TINY, **headers)
    [got] = front.replicas.got[before:]
    made = answer.headers["X-Request-Id"]
    assert got.headers["x-request-id"] == made
    assert made == sent if kept else re.fullmatch(r"[0-9a-f]{32}", made)


def test_upload_goes_by_path_as_it_is(front: Front) -> None:
    """What is no JSON, larger than a JSON request may be; to the model of the path alone."""
    body, kind = bytes(range(256)) * 6000, "multipart/form-data; boundary=x"
    got = front.passed("POST", "/m/big/v1/audio/transcriptions", body, Content_Type=kind)
    assert (got.replica, got.line) == ("big", "POST /v1/audio/transcriptions HTTP/1.1")
    assert got.headers["content-type"] == kind
    assert got.body == body


def test_stored_response_is_asked_for_by_path(front: Front) -> None:
    """What has no body has no model in it."""
    got = front.passed("GET", "/m/tiny/v1/responses/resp_1-a?stream=true")
    assert got.line == "GET /v1/responses/resp_1-a?stream=true HTTP/1.1"
    got = front.passed("POST", "/m/tiny/v1/responses/resp_1/cancel", b"")
    assert got.line == "POST /v1/responses/resp_1/cancel HTTP/1.1"
    assert front.refused("POST", "/m/tiny/v1/responses/resp_1", b"")[0] == 405
    assert front.refused("GET", "/m/tiny/v1/responses/a%2Fb") == (404, "unknown_url")


def test_answer_tells_little_of_the_gateway(front: Front) -> None:
    """No version; nothing that a browser would run, guess or keep."""
    for answer in (
        front.ask("POST", CHAT, TINY),
        front.ask("GET", "/none"),
        front.ask("PUT", CHAT),
    ):
        assert answer.headers["Server"] == "nginx"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cache-Control"] == "no-store"
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]


def test_key_is_rotated_and_revoked_by_a_reload(front: Front) -> None:
    """Two keys open at once; one that is taken away opens no more."""
    old, new = KEYS["alice"], "new-key-of-alice"
    both = {"alice": {"key_sha256": [digest(old), digest(new)]}}
    front.change(tenants=tenants(**both))
    assert [front.ask("POST", CHAT, TINY, key=key).status for key in (old, new)] == [200, 200]
    front.change(tenants=tenants(alice={"key_sha256": [digest(new)]}))
    assert [front.ask("POST", CHAT, TINY, key=key).status for key in (old, new)] == [401, 200]
    front.change()


def test_fleet_without_tenants_is_open(front: Front) -> None:
    """Whoever reaches it may use every model, whatever key is sent."""
    front.change(tenants=[])
    for key in (None, "anything"):
        assert front.ask("POST", CHAT, TINY, key=key).status == 200
        assert len(front.ask("GET", "/v1/models", key=key).body["data"]) == len(NAMES) + 4
    front.change()


@pytest.mark.parametrize("release", RELEASES)
def test_R29_code_that_does_not_load_changes_nothing(
    release: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NGINX's own test does not run it, so the reload fails: what ran goes on, and the link too."""
    with recording(["tiny", "big"]) as replicas, running(release, tmp_path) as nginx:
        front = Front(nginx, replicas)
        front.change()
        before = (nginx.folder / "current").readlink()
        monkeypatch.setattr(routes, "_GATEWAY_LUA", "nonsense")
        with pytest.raises(AssertionError, match="init_by_lua error"):
            front.change(tenants=[])
        assert (nginx.folder / "current").readlink() == before
        assert front.passed("POST", CHAT, TINY).replica == "tiny"


@pytest.mark.parametrize("release", RELEASES)
def test_caller_whom_nobody_has_let_in_may_use_nothing(
    release: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A location that forgets to ask who calls opens no model, and lists none."""
    conf = routes._GATEWAY_CONF
    monkeypatch.setattr(routes, "_GATEWAY_CONF", conf.replace("gateway.admit()", ""))
    with recording(["tiny", "big"]) as replicas, running(release, tmp_path) as nginx:
        front = Front(nginx, replicas)
        front.change()
        assert front.refused("POST", CHAT, TINY) == (403, "model_not_found")
        assert front.ask("GET", "/v1/models").body["data"] == []
        assert front.refused("GET", "/v1/models/tiny") == (404, "model_not_found")


def test_configuration_raises_no_warning(front: Front) -> None:
    """With TLS or without, NGINX has nothing to say about it."""
    assert "[warn]" not in front.nginx.check()
