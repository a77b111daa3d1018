"""Thousands of random requests: each answer is the one that reading them by the rules gives."""

import asyncio
import contextlib
import json
import random
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from tests.gateway.front import KEYS, MAY_USE, NAMES, Front
from tests.gateway.recorder import Got
from tests.gateway.test_answers import CLOSED_PATHS, JSON_PATHS
from tests.gateway.test_hostile import LAST

SEED = 20
REQUESTS = 20_000
CONNECTIONS = 16
READY = ("tiny", "big")
MODELS = dict.fromkeys(["tiny", *NAMES], "tiny") | {name: name for name in ("big", "cold", "off")}
# Bytes that mean something to one of those who read a request.
SPICE = b"\"\\{}[]:,/ \r\n\t\0%;?#&='$\x7f\x80\xc3\xe2\xf0\xff"
LENGTH = re.compile(rb"\r\ncontent-length: (\d+)\r\n", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Shot:
    """One request: its bytes, and what must become of it (no status: NGINX may say anything)."""

    raw: bytes
    tenant: str | None
    status: int | None
    replica: str | None


class Gun:
    """Makes requests from a seed; it reads what it made as the rules say, not as NGINX does.

    No numbers stand in the bodies: cjson reads some that engines refuse, see test_hostile.py.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def shot(self, name: str) -> Shot:
        sound = self._sound(name)
        return sound if self._random.random() < 0.8 else self._broken(sound)

    def _sound(self, name: str) -> Shot:
        """A request that is well framed, whatever its body and path are."""
        method = self._random.choice(["POST"] * 8 + ["GET", "PUT"])
        path, model = self._path()
        tenant = self._random.choice(["alice", "alice", "alice", "bob", "carol", None])
        body = self._body()
        status, replica = _rule(method, path, model, tenant, body)
        return Shot(self._raw(name, method, path, tenant, body), tenant, status, replica)

    def _broken(self, sound: Shot) -> Shot:
        """The same with bytes changed, lost or put in, anywhere."""
        raw = bytearray(sound.raw)
        for _ in range(self._random.randint(1, 4)):
            at = self._random.randrange(len(raw))
            what = self._random.random()
            if what < 0.4:
                raw[at] = self._random.choice(SPICE)
            elif what < 0.7:
                raw.insert(at, self._random.choice(SPICE))
            else:
                del raw[at : at + self._random.randint(1, 9)]
        return Shot(bytes(raw), sound.tenant, None, None)

    def _path(self) -> tuple[str, str | None]:
        """A path, and the model that it names if it is one for routing by path."""
        what = self._random.random()
        if what < 0.7:
            return self._random.choice(JSON_PATHS), None
        if what < 0.85:
            model = self._random.choice(["tiny", "big", "cold", "off", "none", "constructor"])
            return f"/m/{model}{self._random.choice(JSON_PATHS)}", model
        return self._random.choice([*CLOSED_PATHS, "/v1/models", "/v1/models/tiny"]), None

    def _body(self) -> bytes:
        what = self._random.random()
        if what < 0.1:
            return bytes(self._random.choices(SPICE, k=self._random.randint(0, 60)))
        text = self._value_with_model()
        if what < 0.75:
            return text
        spoilt = bytearray(text)
        for _ in range(self._random.randint(1, 3)):
            spoilt.insert(self._random.randrange(len(spoilt)), self._random.choice(SPICE))
        return bytes(spoilt)

    def _value_with_model(self) -> bytes:
        """An object in JSON, by hand, as keys may come twice."""
        pairs = [
            (self._random.choice(["messages", "x", "Model", "model ", "__proto__"]), self._value(3))
            for _ in range(self._random.randint(0, 3))
        ]
        for _ in range(self._random.choice([0, 1, 1, 1, 1, 1, 2])):
            named = self._random.choice([*MODELS, "tiny", "big", "none"])
            value: Any = named if self._random.random() < 0.9 else self._value(2)
            pairs.insert(self._random.randint(0, len(pairs)), ("model", value))
        plain = self._random.random() < 0.5
        parts = (
            f"{json.dumps(key)}:{json.dumps(value, ensure_ascii=plain)}" for key, value in pairs
        )
        return ("{" + ",".join(parts) + "}").encode()

    def _value(self, depth: int) -> Any:
        what = self._random.randrange(8 if depth else 5)
        if what < 5:
            return self._random.choice([None, True, "", "tiny", "é\u2028🙂", '"model":"big"'])
        if what < 6:
            return [self._value(depth - 1) for _ in range(self._random.randint(0, 3))]
        names = self._random.choices(["model", "a", "__proto__"], k=2)
        return {name: self._value(depth - 1) for name in names}

    def _raw(self, name: str, method: str, path: str, tenant: str | None, body: bytes) -> bytes:
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nX-Request-Id: {name}\r\n"
        if tenant is not None:
            head += f"Authorization: Bearer {KEYS[tenant]}\r\n"
        if self._random.random() < 0.2:
            cut = self._random.randint(0, len(body))
            chunks = b"".join(b"%x\r\n%b\r\n" % (len(c), c) for c in (body[:cut], body[cut:]) if c)
            return f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + chunks + b"0\r\n\r\n"
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def _refuse(word: str) -> None:
    raise ValueError(word)


def _read(body: bytes) -> Any:
    """What a body says. Raises ValueError if it is not JSON, or has half a surrogate."""
    read = json.loads(body.decode("utf-8-sig"), parse_constant=_refuse)
    json.dumps(read, ensure_ascii=False).encode()
    return read


def _is_json(body: bytes) -> bool:
    with contextlib.suppress(ValueError):
        _read(body)
        return True
    return False


def _named(body: bytes) -> tuple[int, Any]:
    """What a body names: 200 and a model's name, or the status that it is refused with."""
    try:
        read = _read(body)
    except ValueError:
        return 400, None
    name = read.get("model") if isinstance(read, dict) else None
    return (200, name) if isinstance(name, str) and name else (400, None)


def _rule(
    method: str, path: str, model: str | None, tenant: str | None, body: bytes
) -> tuple[int, str | None]:
    """The status of a well framed request, and the replica that must get it."""
    if path == "/.error":
        return 404, None  # NGINX's own, with or without a key
    if tenant is None:
        return 401, None
    if path.startswith("/v1/models"):
        known = path == "/v1/models" or tenant not in MAY_USE
        return (405 if method != "GET" else 200 if known else 404), None
    if path in CLOSED_PATHS:
        return 404, None
    if method != "POST":
        return 405, None
    by_path = model is not None
    if model is None:
        status, name = _named(body)
        if status != 200:
            return status, None
        model = MODELS.get(name)
    if model not in MODELS.values():
        return 404, None
    if by_path and path.endswith("completions") and not _is_json(body):
        return 400, None
    if tenant in MAY_USE and model not in MAY_USE[tenant]:
        return 403, None
    if tenant == "carol":
        return 429, None
    return (200, model) if model in READY else (503, None)


async def _fire(front: Front, shots: list[Shot], wrong: list[str]) -> None:
    """Send the sound shots one by one, on a connection that is kept as long as NGINX keeps it."""
    pair = None
    for shot in shots:
        if pair is None:
            pair = await asyncio.open_connection("127.0.0.1", front.port)
        pair[1].write(shot.raw)
        status, kept = await asyncio.wait_for(_answer(pair[0]), 60)
        if status != shot.status:
            wrong.append(f"{status} and not {shot.status}: {shot.raw!r}")
        if not kept:
            pair[1].close()
            pair = None
    if pair is not None:
        pair[1].close()


async def _answer(reader: asyncio.StreamReader) -> tuple[int, bool]:
    """Read one answer: its status, and whether the connection is kept."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = LENGTH.search(head)
    assert length is not None, head
    await reader.readexactly(int(length[1]))
    return int(head.split()[1]), b"Connection: close" not in head


async def _fire_broken(front: Front, shots: list[Shot]) -> None:
    """Send each broken shot on a connection of its own, and read whatever comes."""
    for shot in shots:
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        with contextlib.suppress(OSError):  # NGINX may close at once
            writer.write(shot.raw + LAST)
            # If it waits for more, there is no more: what matters is what reached a replica.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reader.read(1), 0.1)
            writer.write_eof()
            await asyncio.wait_for(reader.read(), 60)
        writer.close()


async def _fire_all(front: Front, shots: list[Shot]) -> list[str]:
    wrong: list[str] = []
    sound = [shot for shot in shots if shot.status is not None]
    broken = [shot for shot in shots if shot.status is None]
    await asyncio.gather(
        *(_fire(front, sound[at::CONNECTIONS], wrong) for at in range(CONNECTIONS)),
        *(_fire_broken(front, broken[at::CONNECTIONS]) for at in range(CONNECTIONS)),
    )
    return wrong


def _harm(got: Got, shot: Shot | None) -> str | None:
    """Why a replica should not have got this, or None."""
    method, path, _ = got.line.split(" ")
    if method != "POST" or path.partition("?")[0] not in JSON_PATHS:
        return "a path that is closed"
    if not set(got.headers) <= {"host", "content-length", "x-request-id", "content-type", "accept"}:
        return "a header that is not for it"
    if shot is None:
        return None  # its id was broken: who sent it can't be told
    if shot.tenant in (None, "carol"):
        return "no key, or no tokens"
    if got.replica not in MAY_USE.get(shot.tenant or "", READY):
        return "another tenant's model"
    if b"/m/" not in shot.raw and MODELS.get(_named(got.body)[1]) != got.replica:
        return "a body that names another model"
    return None


def test_R37_random_requests_get_what_the_rules_say(front: Front) -> None:
    """Every sound one its status and its own replica; of the broken ones none does harm."""
    gun = Gun(SEED)
    names = (f"shot-{at}-{at * 7919 % 9973}" for at in range(REQUESTS))  # broken, it is no name
    fired = {name: gun.shot(name) for name in names}
    del front.replicas.got[:]
    wrong = asyncio.run(_fire_all(front, list(fired.values())))
    assert wrong[:5] == []
    got = front.replicas.got
    harm = [
        (why, one) for one in got if (why := _harm(one, fired.get(one.headers["x-request-id"])))
    ]
    assert harm[:5] == []
    reached = Counter((one.headers["x-request-id"], one.replica) for one in got)
    for name, shot in fired.items():
        if shot.status is not None:
            mine = {replica: reached[name, replica] for replica in READY if reached[name, replica]}
            assert mine == ({shot.replica: 1} if shot.replica else {}), shot
    assert {shot.status for shot in fired.values()} >= {200, 400, 401, 403, 404, 405, 429, 503}
    assert front.nginx.unharmed, front.nginx.faults
