"""Requests in flight, counted by how they ended: for the demo and the end-to-end tests."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urlsplit

import httpx
import openai

# A client's patience; what takes longer has failed.
PATIENCE_S = 60.0
# How a slow client sends its body: so many pieces, so long between two of them.
PIECES, PAUSE_S = 20, 0.15
# A gateway says half a second before a reload that connections end (gateway.sh). Who has not asked
# for nearly as long has not heard it, and so does not rely on an old connection.
FRESH_S = 0.4


@dataclass(slots=True)
class Request:
    """One request and how it ended. `finish` is the engine's own word: length, stop or abort."""

    id: str
    stream: bool
    model: str = "tiny"
    seconds: float = 0.0
    status: int = 0
    chunks: int = 0  # parts of the answer that came: then no other replica can be asked for it
    finish: str | None = None
    done: bool = False  # a stream that reached [DONE], or a whole answer
    error: str = ""
    # Who says to have answered: the replica `<model>@<job id>`, the last name that it serves.
    replica: str = ""

    @property
    def succeeded(self) -> bool:
        return self.status == 200 and self.done and self.finish in ("length", "stop")


@dataclass(slots=True)
class Load:
    """Requests that run until they end; `begun` is set once all of them are in flight."""

    requests: list[Request]
    begun: asyncio.Event = field(default_factory=asyncio.Event)

    def of(self, *, stream: bool) -> list[Request]:
        return [request for request in self.requests if request.stream is stream]


@asynccontextmanager
async def in_flight(
    url: str,
    model: str,
    *,
    plain: int,
    streams: int,
    tokens: int,
    name: str = "load",
    key: str = "none",
) -> AsyncIterator[Load]:
    """Send all requests at once; enter when every stream has begun and every plain one is sent.

    The exit waits for all of them. `key` is the tenant's, if the fleet has tenants.
    """
    load = Load(
        [Request(id=f"{name}-plain-{n}", stream=False, model=model) for n in range(plain)]
        + [Request(id=f"{name}-stream-{n}", stream=True, model=model) for n in range(streams)]
    )
    async with aclosing(_Http(url, key)) as http:
        tasks = [asyncio.create_task(_timed(http.send, r, tokens)) for r in load.requests]
        while not all(r.chunks or r.seconds for r in load.of(stream=True)):
            await asyncio.sleep(0.02)
        load.begun.set()
        yield load
        await asyncio.gather(*tasks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """One who asks again as soon as the answer has ended, whatever it was; never tries twice.

    `how` is "http"; "upload" (its body takes three seconds to send); "openai", the official Python
    client; or "raw", a keep-alive connection by hand that costs a tenth of the others.
    """

    url: str
    how: str = "http"
    stream: bool = False
    model: str = "tiny"
    tokens: int = 40
    key: str = "none"


@asynccontextmanager
async def constant(clients: Sequence[Client], *, name: str = "load") -> AsyncIterator[Load]:
    """Keep every client asking; exit when each has its last answer.

    Enter when each has asked and every stream has begun.
    """
    load, enough = Load([]), asyncio.Event()
    tasks = [
        asyncio.create_task(_ask(client, f"{name}-{client.how}-{n}", load.requests, enough))
        for n, client in enumerate(clients)
    ]
    while len(load.requests) < len(clients) or not all(
        request.chunks or request.seconds
        for request in load.requests[: len(clients)]  # the first of each
        if request.stream
    ):
        await asyncio.sleep(0.02)
    load.begun.set()
    try:
        yield load
    finally:
        enough.set()
        await asyncio.gather(*tasks)


async def _ask(client: Client, name: str, requests: list[Request], enough: asyncio.Event) -> None:
    """Ask at least once, and again until it is enough."""
    count = 0
    async with aclosing(_WAYS[client.how](client.url, client.key)) as way:
        while count == 0 or not enough.is_set():
            request = Request(id=f"{name}-{count}", stream=client.stream, model=client.model)
            requests.append(request)
            await _timed(way.send, request, client.tokens)
            count += 1


async def _timed(
    send: Callable[[Request, int], Awaitable[None]], request: Request, tokens: int
) -> None:
    began = time.monotonic()
    try:
        async with asyncio.timeout(PATIENCE_S):
            await send(request, tokens)
    except openai.APIStatusError as error:
        request.status, request.error = error.status_code, str(error)
    except (httpx.HTTPError, openai.APIError, OSError, EOFError, ValueError) as error:
        request.error = f"{type(error).__name__}: {error} {error.__cause__ or ''}"
    request.seconds = time.monotonic() - began


def _body(request: Request, tokens: int) -> dict[str, Any]:
    # Who asks for a stream's usage is told its engine's fingerprint too (docs/decisions/0010).
    options = {"stream_options": {"include_usage": True}} if request.stream else {}
    return {
        "model": request.model,
        "prompt": "Once upon a time",
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": request.stream,
        **options,
    }


class _Way(Protocol):
    """How a client sends its requests, one after another."""

    async def send(self, request: Request, tokens: int) -> None:
        """Send it, and note in it what comes back until that has ended."""

    async def aclose(self) -> None: ...


class _Http:
    """Any HTTP client: httpx."""

    def __init__(self, url: str, key: str) -> None:
        self._url = f"{url}/v1/completions"
        self._key = key
        limits = httpx.Limits(max_connections=None)
        self._client = httpx.AsyncClient(timeout=PATIENCE_S, limits=limits, trust_env=False)

    async def aclose(self) -> None:
        await self._client.aclose()

    async def send(self, request: Request, tokens: int) -> None:
        await self._post(request, {"json": _body(request, tokens)})

    async def _post(self, request: Request, body: Mapping[str, Any]) -> None:
        headers = {"X-Request-Id": request.id, "Authorization": f"Bearer {self._key}"}
        sent = {**body, "headers": headers | body.get("headers", {})}
        async with self._client.stream("POST", self._url, **sent) as answer:
            request.status = answer.status_code
            if not request.stream or answer.status_code != 200:
                _take_whole(request, (await answer.aread()).decode())
                return
            async for line in answer.aiter_lines():
                _take_event(request, line)


class _Upload(_Http):
    """A client behind a slow line: its body comes in pieces."""

    async def send(self, request: Request, tokens: int) -> None:
        record = _body(request, tokens) | {"prompt": "once " * 2000}
        data = json.dumps(record).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data))}
        await self._post(request, {"content": self._pieces(data), "headers": headers})

    async def _pieces(self, data: bytes) -> AsyncIterator[bytes]:
        size = len(data) // PIECES + 1
        for start in range(0, len(data), size):
            await asyncio.sleep(PAUSE_S)
            yield data[start : start + size]


class _OpenAI:
    """The official Python client, without its own retries."""

    def __init__(self, url: str, key: str) -> None:
        self._client = openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=PATIENCE_S
        )

    async def aclose(self) -> None:
        await self._client.close()

    async def send(self, request: Request, tokens: int) -> None:
        body = _body(request, tokens)
        more = {"ignore_eos": body.pop("ignore_eos")}
        answer = await self._client.completions.with_raw_response.create(
            **body, extra_body=more, extra_headers={"X-Request-Id": request.id}
        )
        request.status = answer.status_code
        parsed = answer.parse()
        if request.stream:
            async for chunk in parsed:
                request.chunks += 1
                _take_record(request, chunk.to_dict())
            request.done = request.finish is not None
        else:
            _take_record(request, parsed.to_dict())
            request.done = True


class _Raw:
    """Plain requests over one connection, with no more work than they need; as wrk does."""

    def __init__(self, url: str, key: str) -> None:
        self._key = key
        self._host, self._port = urlsplit(url).hostname, urlsplit(url).port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._asked = 0.0

    async def aclose(self) -> None:
        self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        # Twice, so that what has come is read: a connection that was closed is not used again.
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        fresh = time.monotonic() - self._asked < FRESH_S
        if not fresh or self._reader is None or self._writer is None or self._reader.at_eof():
            self._close()
            self._reader, self._writer = await asyncio.open_connection(self._host, self._port)
        self._asked = time.monotonic()
        return self._reader, self._writer

    async def send(self, request: Request, tokens: int) -> None:
        data = json.dumps(_body(request, tokens)).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {self._host}\r\nX-Request-Id: {request.id}\r\n"
            f"Authorization: Bearer {self._key}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\n\r\n"
        )
        try:
            reader, writer = await self._connection()
            writer.write(head.encode() + data)
            text, keep = await _answer(request, reader)
        except BaseException:
            self._close()
            raise
        if not keep:
            self._close()
        _take_whole(request, text)


async def _answer(request: Request, reader: asyncio.StreamReader) -> tuple[str, bool]:
    """Read one answer; return its body and whether the connection stays."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    request.status = int(head.split()[1])
    request.chunks = int(request.status == 200)
    headers = dict(line.split(": ", 1) for line in head.split("\r\n")[1:-2])
    if "content-length" in headers:
        body = await reader.readexactly(int(headers["content-length"]))
    else:
        body = b""
        while size := int(await reader.readline(), 16):
            body += await reader.readexactly(size)
            await reader.readline()
        await reader.readline()
    return body.decode(), headers.get("connection") != "close"


_WAYS: Mapping[str, Callable[[str, str], _Way]] = {
    "http": _Http,
    "upload": _Upload,
    "openai": _OpenAI,
    "raw": _Raw,
}


def _take_event(request: Request, line: str) -> None:
    if line == "data: [DONE]":
        request.done = True
    elif line.startswith("data: "):
        request.chunks += 1
        _take_record(request, json.loads(line.removeprefix("data: ")))


def _take_whole(request: Request, text: str) -> None:
    answer = json.loads(text)
    if request.status != 200:
        request.error = str(answer)
        return
    _take_record(request, answer)
    request.done = True


def _take_record(request: Request, record: Mapping[str, Any]) -> None:
    """Note what an answer, or an event of a stream, says."""
    if "error" in record:
        request.error = str(record["error"])
    for choice in record.get("choices", []):
        request.finish = choice.get("finish_reason") or request.finish
    mark = record.get("system_fingerprint") or ""
    request.replica = "-".join(mark.split("-")[2:]) or request.replica
