"""Requests that mean harm: each gets a right status, and no replica gets what it should not."""

import contextlib
import json
import re
import socket
from typing import Any

import pytest

from tests.gateway.front import CHAT, KEYS, Front
from tests.gateway.recorder import Got

# What no request here may bring to a replica: it is hidden in the bodies and headers of others.
HIDDEN = b"POST /v1/load_lora_adapter HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
BODY = b'{"model": "tiny"}'


def engine_reads(body: bytes) -> Any:
    """The model that an engine finds in a body: vLLM reads it with Python's json."""
    try:
        read = json.loads(body)
    except (ValueError, RecursionError):
        return None  # it answers 400
    return read.get("model") if isinstance(read, dict) else None


# Behind each request: it is answered 401 if NGINX still reads where the request ended.
LAST = b"GET /last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
STATUS = re.compile(rb"HTTP/1\.1 (?!100)(\d+) ")


def send(front: Front, raw: bytes, answers: int) -> tuple[list[int], list[Got]]:
    """Send bytes, wait for so many answers, then send LAST; return all statuses but LAST's own.

    And what reached the replicas: whatever NGINX took for a request behind an answer is among it.
    """
    before = len(front.replicas.got)
    text = b""
    sock = socket.create_connection(("127.0.0.1", front.port), timeout=20)
    with sock, contextlib.suppress(OSError):  # refused before all of it was sent
        sock.sendall(raw)
        while len(STATUS.findall(text)) < answers and (data := sock.recv(65536)):
            text += data
        sock.sendall(LAST)
        sock.shutdown(socket.SHUT_WR)
        while data := sock.recv(65536):
            text += data
    statuses = [int(status) for status in STATUS.findall(text)]
    if len(statuses) == answers + 1 and statuses[-1] == 401:
        statuses.pop()
    return statuses, front.replicas.got[before:]


def head(*lines: str | bytes, path: str = CHAT) -> bytes:
    """A request's head with alice's key and these lines."""
    usual = [f"POST {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {KEYS['alice']}"]
    parts = [one if isinstance(one, bytes) else one.encode() for one in (*usual, *lines)]
    return b"\r\n".join([*parts, b"", b""])


EVERY_KIND = (
    b'{"a":[],"b":{},"c":[1,-0,2.50,1e9,-3E-7,1.5e+3],"stream" : false ,"d":[true,false,null],\n'
    b'"e":{"model":"big","f":[{"stream":true}," \\"model\\":\\u00e9\\\\ "]},"":"",'
    b'"model" : "%b","stream_options":null}'
)
BODIES: dict[str, tuple[bytes, int]] = {
    "last of two": (b'{"model":"big","model":"tiny"}', 200),
    "last of two, not a text": (b'{"model":"tiny","model":1}', 400),
    "last of two, unknown": (b'{"model":"tiny","model":"none"}', 404),
    "escaped": (b'{"mod\\u0065l":"t\\u0069ny"}', 200),
    "last of two, escaped": (b'{"model":"big","mod\\u0065l":"tiny"}', 200),
    "inner": (b'{"x":{"model":"big"},"model":"tiny","y":[{"model":"big"}]}', 200),
    "whitespace": (b' \t\r\n{"model"\n:\t"tiny"} \r\n', 200),
    "other whitespace": (b'\x0b{"model":"tiny"}', 400),
    "no-break space": ('\u00a0{"model":"tiny"}'.encode(), 400),
    "invalid UTF-8": (b'{"model":"tiny","x":"\xff"}', 400),
    "invalid UTF-8 in the name": (b'{"model":"tiny\xff"}', 400),
    "surrogates as UTF-8": (b'{"model":"tiny","x":"\xed\xa0\x80"}', 400),
    "overlong UTF-8": (b'{"model":"tiny","x":"\xc0\xaf"}', 400),
    "a replacement character": ('{"model":"tiny","x":"\ufffd"}'.encode(), 200),
    "half a surrogate": (b'{"model":"tiny\\ud800"}', 400),
    "UTF-16": ('{"model":"tiny"}'.encode("utf-16"), 400),
    "UTF-16 without a mark": ('{"model":"tiny"}'.encode("utf-16-le"), 400),
    "UTF-32": ('{"model":"tiny"}'.encode("utf-32"), 400),
    "NUL": (b'{"model":"tiny\x00"}', 400),
    "NUL after it": (b'{"model":"tiny"}\x00', 400),
    "escaped NUL": (b'{"model":"tiny\\u0000"}', 404),
    "control character": (b'{"model":"tiny","x":"\x01"}', 400),
    "line's end in a text": (b'{"model":"tiny","x":"\n"}', 400),
    "tab in a key": (b'{"model":"tiny","\t":1}', 400),
    "NaN": (b'{"model":"tiny","x":NaN}', 400),
    "comment": (b'{"model":"tiny"/**/}', 400),
    "trailing comma": (b'{"model":"tiny",}', 400),
    "single quotes": (b"{'model':'tiny'}", 400),
    "deep list": (b'{"model":"tiny","x":' + b"[" * 8_000 + b"]" * 8_000 + b"}", 400),
    "deep object": (b'{"x":' * 50_000 + b"1" + b"}" * 50_000, 400),
    "deep and cut short": (b"[" * 500_000, 400),
    "deep enough for a schema": (b'{"model":"tiny","x":' + b"[" * 30 + b"]" * 30 + b"}", 200),
    "deep": (b'{"model":"tiny","x":' + b"[" * 500 + b"]" * 500 + b"}", 200),
    "one too deep": (b'{"model":"tiny","x":' + b"[" * 1_000 + b"]" * 1_000 + b"}", 400),
    "every kind": (EVERY_KIND % b"tiny", 200),
    "every kind, unknown": (EVERY_KIND % b"none", 404),
    "bare word": (b'{"model":"tiny","x":[nul]}', 400),
    "unknown escape": (b'{"model":"tiny","x":"\\x"}', 400),
    "no comma": (b'{"model":"tiny","x":[1 2]}', 400),
    "no colon": (b'{"model":"tiny","x":{"a" 1}}', 400),
    "number as a key": (b'{"model":"tiny","x":{1:1}}', 400),
    "closed otherwise": (b'{"model":"tiny","x":{]}', 400),
    "comma in an empty list": (b'{"model":"tiny","x":[,]}', 400),
    "more behind it": (b'{"model":"tiny"}{}', 400),
    "half a surrogate in a text": (b'{"model":"tiny","x":"\\udc00"}', 400),
    "both halves of a surrogate": (b'{"model":"tiny","x":"\\ud83d\\ude00"}', 200),
    "long number": (b'{"model":"tiny","x":' + b"9" * 4000 + b"}", 200),
    "many keys": (b'{"model":"big",' + b'"a":1,' * 19_000 + b'"model":"tiny"}', 200),
    "model of 900 KB": (b'{"model":"' + b"a" * 900_000 + b'"}', 404),
    "number": (b'{"model":1}', 400),
    "true": (b'{"model":true}', 400),
    "null": (b'{"model":null}', 400),
    "object": (b'{"model":{"model":"tiny"}}', 400),
    "list": (b'[{"model":"tiny"}]', 400),
    "a form": (b"model=tiny", 400),
    "gzip": (b"\x1f\x8b\x08\x00", 400),
}
# These are glanced at, and looked through only where that could be read in two ways.
PAD = b'"x":"' + b'a \\"model\\":\\"big\\", \\n' * 2_000 + b'"'
BODIES |= {
    f"long: {name}": (body.replace(b"PAD", PAD), status)
    for name, (body, status) in {
        "first": (b'{"model":"tiny",PAD}', 200),
        "last": (b'{PAD, "model" : "tiny", "stream": false}', 200),
        "last of two": (b'{"model":"big",PAD,"model":"tiny"}', 200),
        "last of two, not a text": (b'{"model":"tiny",PAD,"model":1}', 400),
        "last of two, escaped": (b'{"model":"big",PAD,"mod\\u0065l":"tiny"}', 200),
        "second of two, not a text": (b'{"model":1,PAD,"model":"tiny"}', 200),
        "escaped value": (b'{PAD,"model":"t\\u0069ny"}', 200),
        "inner": (b'{"y":{"model":"big"},PAD,"model":"tiny"}', 200),
        "unknown": (b'{PAD,"model":"none"}', 404),
        "number": (b'{PAD,"model":1}', 400),
        "none": (b"{PAD}", 400),
        "list": (b'[{"model":"tiny"},{PAD}]', 400),
        "no JSON": (b'{PAD,"model":', 400),
        "more behind it": (b'{PAD,"stream":true,"model":"tiny"}{}', 400),
        "half a surrogate": (b'{"model":"big",PAD,"\\ud800":1,"mod\\u0065l":"tiny"}', 400),
        "deep enough": (
            b'{"stream":"no",PAD,"x":' + b"[" * 99 + b"]" * 99 + b',"model":"tiny"}',
            200,
        ),
        "brackets in texts": (b'{"stream":"no",PAD,"x":["]}",{"]":"[{"}],"model":"tiny"}', 200),
        "UTF-16": (b'{"model":"tiny",PAD}', 400),
    }.items()
}
body, status = BODIES["long: UTF-16"]
BODIES["long: UTF-16"] = body.decode().encode("utf-16"), status


@pytest.mark.parametrize("name", BODIES)
def test_body_goes_where_the_engine_would_read_or_nowhere(front: Front, name: str) -> None:
    """The model that was looked up and allowed is the one that an engine reads there."""
    body, status = BODIES[name]
    before = len(front.replicas.got)
    answer = front.ask("POST", CHAT, body)
    passed = front.replicas.got[before:]
    assert (answer.status, len(passed)) == (status, status == 200)
    assert answer.code is not None or passed[0].body == body
    for got in passed:
        assert engine_reads(body) == got.replica


@pytest.mark.parametrize(
    "name", ["last of two", "last of two, escaped", "many keys", "long: last of two"]
)
def test_key_given_twice_does_not_open_another_model(front: Front, name: str) -> None:
    """bob may use big alone; that big is named first helps nothing."""
    refused = front.refused("POST", CHAT, BODIES[name][0], key=KEYS["bob"])
    assert refused == (403, "model_not_found")


@pytest.mark.parametrize(
    "body",
    [
        b"\xef\xbb\xbf" + BODY,
        b'{"model":"tiny","x":1.}',
        b'{"model":"tiny","x":.1}',
        b'{"model":"tiny","x":01}',
        b'{"model":"tiny","x":-}',
        b'{"model":"tiny","x":' + b"9" * 5000 + b"}",
    ],
)
def test_body_that_some_read_and_others_do_not_opens_no_other_model(
    front: Front, body: bytes
) -> None:
    """cjson is laxer than Python with numbers: what an engine refuses does no harm on the way."""
    before = len(front.replicas.got)
    assert front.ask("POST", CHAT, body).status in (200, 400)
    assert all(engine_reads(got.body) in (got.replica, None) for got in front.replicas.got[before:])


PARTS: dict[str, bytes] = {
    "keys": b"{" + b",".join(b'"%x":1' % key for key in range(40_000)) + b"}",
    "lists": b"[" + b",".join([b"[]"] * 300_000) + b"]",
    "objects": b"[" + b" , ".join([b"{}"] * 200_000) + b"]",
    "keys behind texts": b"{" + b",".join([b'"\\\\": "["'] * 30_000) + b"}",
}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("path", [CHAT, f"/m/tiny{CHAT}"])
def test_body_of_very_many_parts_passes(front: Front, path: str, name: str) -> None:
    """It is looked through and not read: no part of it takes memory."""
    body = b'{"stream":true,"model":"tiny","x":' + PARTS[name] + b"}"
    assert front.passed("POST", path, body).replica == "tiny"


def test_body_of_too_many_members_is_refused(front: Front) -> None:
    """Each takes its time: of its own members an object may have many, but not any number."""
    keys = b",".join(b'"%x":1' % key for key in range(20_001))
    body = b'{"stream":true,"model":"tiny",' + keys + b"}"
    assert front.refused("POST", CHAT, body) == (400, "invalid_json")


NO_PARTS: dict[str, Any] = {
    "brackets": "[{" * 200_000,
    "quotes": '[{"' * 100_000,
    "backslashes": '\\"[' * 100_000,
    "numbers": [1] * 300_000,
    "texts": ["a:"] * 100_000,
    "not too many": [["a" * 9]] * 8_000,
}


@pytest.mark.parametrize("name", NO_PARTS)
def test_body_of_what_only_looks_like_parts_passes(front: Front, name: str) -> None:
    """A text may hold whatever it likes, and a list very many numbers."""
    value = NO_PARTS[name]
    body = json.dumps({"model": "tiny", "x": value}, separators=(",", ":")).encode()
    assert front.passed("POST", CHAT, body).body == body


@pytest.mark.parametrize(
    ("body", "status"),
    [
        *((b'{"x":NaN}', 400), ('{"stream":true}'.encode("utf-16"), 400), (b"[" * 500, 400)),
        (b'{"stream":true}' + b" " * (1 << 20), 413),
    ],
    ids=["not a number", "another coding", "deep", "padded"],
)
def test_completion_by_path_is_read_like_any_other(front: Front, body: bytes, status: int) -> None:
    """One that only an engine could read would not be asked for its tokens."""
    assert front.refused("POST", f"/m/tiny{CHAT}", body)[0] == status


def chunked(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


CHUNKED = "Transfer-Encoding: chunked"
# Each is a head and body; the statuses of all answers, and how many requests may be passed on.
FRAMES: dict[str, tuple[bytes, list[int]]] = {
    "chunked": (head(CHUNKED) + chunked(BODY[:5], BODY[5:]), [200]),
    "chunked, byte by byte": (head(CHUNKED) + chunked(*(bytes([c]) for c in BODY)), [200]),
    "chunked, with an extension": (head(CHUNKED) + b"11;a=b\r\n" + BODY + b"\r\n0\r\n\r\n", [200]),
    "chunked, with a trailer": (
        head(CHUNKED) + b"11\r\n" + BODY + b"\r\n0\r\nAuthorization: Bearer x\r\n\r\n",
        [200],
    ),
    "chunked, too large": (head(CHUNKED) + chunked(b" " * (1 << 20 | 1)), [413]),
    "chunked, too many": (head(CHUNKED) + b"1\r\n \r\n" * 250_000 + b"0\r\n\r\n", [413]),
    "chunked, size too large": (head(CHUNKED) + b"f" * 17 + b"\r\n", [400]),
    "chunked, size is no number": (head(CHUNKED) + b"-11\r\n" + BODY + b"\r\n0\r\n\r\n", [400]),
    "length and chunked": (head("Content-Length: 17", CHUNKED) + chunked(BODY) + HIDDEN, [400]),
    "chunked and length": (head(CHUNKED, "Content-Length: 5") + b"0\r\n\r\n" + HIDDEN, [400]),
    "two lengths": (head("Content-Length: 17", "Content-Length: 0") + BODY, [400]),
    "the same length twice": (head("Content-Length: 17", "Content-Length: 17") + BODY, [400]),
    "list of lengths": (head("Content-Length: 17, 0") + BODY, [400]),
    "negative length": (head("Content-Length: -1") + BODY, [400]),
    "length with a sign": (head("Content-Length: +17") + BODY, [400]),
    "length in hex": (head("Content-Length: 0x11") + BODY, [400]),
    "length beyond numbers": (head("Content-Length: " + "9" * 40) + BODY, [400]),
    "chunked twice": (head(CHUNKED, CHUNKED) + chunked(BODY), [400]),
    "chunked by another name": (head("Transfer-Encoding: xchunked") + chunked(BODY), [501]),
    "chunked among others": (head("Transfer-Encoding: gzip, chunked") + chunked(BODY), [501]),
    "identity": (head("Transfer-Encoding: identity") + BODY, [501]),
    "chunked of HTTP/1.0": (
        head(CHUNKED).replace(b"HTTP/1.1", b"HTTP/1.0") + chunked(BODY) + HIDDEN,
        [400],
    ),
    "space before the colon": (head("Content-Length : 17") + BODY, [400]),
    "NUL in a header": (head(b"X-A: a\x00b", "Content-Length: 17") + BODY, [400]),
    "bare CR in a header": (head(b"X-A: a\rContent-Length: 3", "Content-Length: 17") + BODY, [400]),
    "no host": (b"POST / HTTP/1.1\r\n\r\n", [400]),
    "two hosts": (head("Host: y", "Content-Length: 17") + BODY, [400]),
    "host with a path": (head("Content-Length: 17").replace(b": x", b": x/y") + BODY, [400]),
    "huge header": (head("X-A: " + "a" * 20_000), [431]),
    "many headers": (head(*("X-A: " + "a" * 8000 for _ in range(9))), [431]),
    "no version": (f"POST {CHAT}\r\n\r\n".encode(), []),  # answered as of 1991: no status
    "other version": (b"GET / HTTP/3.0\r\nHost: x\r\n\r\n", [505]),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", [400]),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [400]),
    "a proxy's CONNECT": (b"CONNECT tiny:1 HTTP/1.1\r\nHost: tiny:1\r\n\r\n", [400]),
    "every path": (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    "nothing": (b"\r\n\r\n", []),
    "body cut short": (head("Content-Length: 99") + BODY, []),
    "expects to be asked": (head("Content-Length: 17", "Expect: 100-continue") + BODY, [200]),
    "two in a row": (2 * (head("Content-Length: 17") + BODY), [200, 200]),
    "hidden in a body": (head(f"Content-Length: {len(HIDDEN)}") + HIDDEN, [400]),
    "hidden behind a refused body": (
        head(f"Content-Length: {len(HIDDEN)}", path="/none") + HIDDEN + BODY,
        [404, 400],
    ),
}


@pytest.mark.parametrize("name", FRAMES)
def test_request_ends_where_everybody_says_it_ends(front: Front, name: str) -> None:
    """No second request is read out of a first; a replica gets one length and no coding."""
    raw, wanted = FRAMES[name]
    statuses, passed = send(front, raw, len(wanted))
    assert statuses == wanted
    assert len(passed) == wanted.count(200)
    for got in passed:
        assert (got.replica, got.line) == ("tiny", f"POST {CHAT} HTTP/1.1")
        assert "transfer-encoding" not in got.headers
        assert int(got.headers["content-length"]) == len(got.body)
        assert got.body == BODY


def test_body_of_a_request_that_is_answered_here_is_no_request(front: Front) -> None:
    """It is thrown away, as nobody reads it."""
    list_models = head(f"Content-Length: {len(HIDDEN)}", path="/v1/models")
    raw = list_models.replace(b"POST", b"GET", 1) + HIDDEN
    assert send(front, raw, 1) == ([200], [])


PATHS: dict[str, int] = {
    f"/v1/..{CHAT}": 200,
    f"/v1/load_lora_adapter/../..{CHAT}": 200,
    "/v1/%63hat/completions": 200,
    "/v1/chat%2Fcompletions": 200,
    "/v1/%2e%2e/v1/chat/completions": 200,
    f"http://elsewhere{CHAT}": 200,
    f"{CHAT}?model=big&x=%0d%0aHost:y": 200,
    f"{CHAT}#/../../sleep": 200,
    f"/m/big/../tiny{CHAT}": 200,
    f"/m/none/%2e%2e/tiny{CHAT}": 200,
    f"/{CHAT}": 404,
    "/v1//chat/completions": 404,
    f"{CHAT}/..;/../load_lora_adapter": 404,
    f"{CHAT}/..;": 404,
    f"{CHAT};x=1": 404,
    f"{CHAT}%20": 404,
    f"{CHAT}%0d%0aX:%20y": 404,
    f"{CHAT}%252e": 404,
    f"{CHAT}/../load_lora_adapter": 404,
    "/v1/Chat/completions": 404,
    "/v1\\chat\\completions": 404,
    f"/m/tiny/..{CHAT}/../../../sleep": 404,
    f"/m/tiny%2f..%2f..%2fsleep{CHAT}": 404,
    f"/m/tiny/{CHAT}": 404,
    f"/m//tiny{CHAT}": 404,
    f"/m/TINY{CHAT}": 404,
    f"/m/tiny%00{CHAT}": 400,
    f"/m/constructor{CHAT}": 404,
    f"/m/__proto__{CHAT}": 404,
    "/m/tiny": 404,
    "/m/": 404,
    "/..": 400,
    "/../../etc/passwd": 400,
    f"{CHAT}%": 400,
    f"{CHAT}%zz": 400,
    "v1/chat/completions": 400,
}


@pytest.mark.parametrize("path", PATHS)
def test_path_that_is_passed_on_is_the_one_that_was_allowed(front: Front, path: str) -> None:
    """Dots, codes, slashes and cases: what a replica is asked for was looked up as such."""
    raw = head("Content-Length: 17").replace(CHAT.encode(), path.encode(), 1) + BODY
    statuses, passed = send(front, raw, 1)
    assert statuses == [PATHS[path]]
    assert len(passed) == statuses.count(200)
    for got in passed:
        assert got.replica == "tiny"
        assert got.line.split()[1].partition("?")[0] == CHAT


def test_dots_in_a_path_do_not_open_another_model(front: Front) -> None:
    """bob may use big alone: what is allowed is where the path leads."""
    for path in (f"/m/big/../tiny{CHAT}", f"/m/big/%2e%2e/tiny{CHAT}", f"/m/big%2f..%2ftiny{CHAT}"):
        raw = head("Content-Length: 17", path=path) + BODY
        statuses, passed = send(front, raw.replace(b"key-of-alice", b"key-of-bob"), 1)
        assert (statuses, passed) == ([403], [])


@pytest.mark.parametrize(
    "line",
    [
        "X-Request-Id: a\tb",
        "X-Request-Id: a\r\n b",
        b"X-Request-Id: \xff\xfe",
        "X-Request-Id: a\nX-Evil: 1",
        "Connection: close, X-Request-Id",
        "Connection: Upgrade\r\nUpgrade: websocket",
        "TE: trailers",
        "X-Accel-Redirect: /v1/models",
        "X-Forwarded-For: 1.2.3.4",
        "X_Request_Id: under_score",
        "X-data-parallel-rank: 7",
        "Proxy-Authorization: Bearer key-of-alice",
    ],
)
def test_header_of_a_caller_changes_nothing_for_a_replica(front: Front, line: str | bytes) -> None:
    """Whatever is sent, a replica gets the same few headers and an id that can stand in a log."""
    statuses, passed = send(front, head(line, "Content-Length: 17") + BODY, 1)
    assert statuses == [400 if not passed else 200]
    for got in passed:
        assert set(got.headers) == {"host", "content-length", "x-request-id"}
        assert got.headers["x-request-id"].isascii()
        assert got.headers["x-request-id"].replace("-", "").isalnum()
