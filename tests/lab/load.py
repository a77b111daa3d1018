"""Requests in flight, counted by how they ended: for the demo and the end-to-end tests."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx

# A client's patience; what takes longer has failed.
PATIENCE_S = 60.0


@dataclass(slots=True)
class Request:
    """One request and how it ended. `finish` is the engine's own word: length, stop or abort."""

    id: str
    stream: bool
    seconds: float = 0.0
    status: int = 0
    chunks: int = 0
    finish: str | None = None
    done: bool = False  # a stream that reached [DONE], or a whole answer
    error: str = ""

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
        [Request(id=f"{name}-plain-{n}", stream=False) for n in range(plain)]
        + [Request(id=f"{name}-stream-{n}", stream=True) for n in range(streams)]
    )
    limits = httpx.Limits(max_connections=plain + streams)
    headers = {"Authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(
        timeout=PATIENCE_S, limits=limits, trust_env=False, headers=headers
    ) as client:
        tasks = [asyncio.create_task(_send(client, url, model, tokens, r)) for r in load.requests]
        while not all(r.chunks or r.seconds for r in load.of(stream=True)):
            await asyncio.sleep(0.02)
        load.begun.set()
        yield load
        await asyncio.gather(*tasks)


async def _send(
    client: httpx.AsyncClient, url: str, model: str, tokens: int, request: Request
) -> None:
    began = time.monotonic()
    body = {
        "model": model,
        "prompt": "Once upon a time",
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": request.stream,
    }
    headers = {"X-Request-Id": request.id}
    try:
        async with client.stream(
            "POST", f"{url}/v1/completions", json=body, headers=headers
        ) as answer:
            request.status = answer.status_code
            lines: Sequence[str] = []
            async for line in answer.aiter_lines():
                if request.stream and answer.status_code == 200:
                    _take_event(request, line)
                else:
                    lines = [*lines, line]
            if not request.stream or answer.status_code != 200:
                _take_whole(request, "\n".join(lines))
    except (httpx.HTTPError, ValueError) as error:
        request.error = f"{type(error).__name__}: {error}"
    request.seconds = time.monotonic() - began


def _take_event(request: Request, line: str) -> None:
    if line == "data: [DONE]":
        request.done = True
    elif line.startswith("data: "):
        request.chunks += 1
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            request.error = str(event["error"])
        for choice in event.get("choices", []):
            request.finish = choice.get("finish_reason") or request.finish


def _take_whole(request: Request, text: str) -> None:
    answer = json.loads(text)
    if request.status != 200:
        request.error = str(answer)
        return
    request.finish = answer["choices"][0]["finish_reason"]
    request.done = True
