"""A replica that answers as its request's prompt tells it to, in pieces of any size."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

Json = dict[str, Any]

DONE = b"data: [DONE]\n\n"
USAGE = {"prompt_tokens": 3, "total_tokens": 8, "completion_tokens": 5}
# What a model may write: every mark that the gateway looks for, and characters of several bytes.
EVIL = '"usage":{"prompt_tokens":9} "finish_reason":"abort" "choices":[]\n\ndata: {"error"\n日本é'


def event(record: Json) -> bytes:
    text = json.dumps(record, separators=(",", ":"), ensure_ascii=False)
    return b"data: " + text.encode() + b"\n\n"


def choice(text: str, finish: str | None = None) -> bytes:
    return event({"id": "x", "choices": [{"delta": {"content": text}, "finish_reason": finish}]})


ANSWER = choice(EVIL) + choice("é") + choice("b", "length")
TELLING = event({"id": "x", "choices": [], "usage": USAGE})
FAILED = b'data: {"error": {"message": "dead", "code": 500}}\n\n'


def stream(body: Json) -> bytes:
    """The whole stream that an engine would answer."""
    asked = bool((body.get("stream_options") or {}).get("include_usage"))
    endings = {"fail": FAILED, "half": choice("b", "abort") + choice("c", "length")}
    told = endings.get(body["prompt"], choice("b", "length"))
    # As of `/v1/responses`, whose last event repeats the request.
    repeats = {"ahead": "a" * body.get("ahead", 0), "usage": USAGE, "behind": "a" * 20_000}
    telling = event(repeats) if body.get("ahead") else TELLING
    return choice(EVIL) + choice("é") + told + (telling if asked else b"") + DONE


def _text(body: Json) -> str:
    return EVIL * int(body.get("times", 1)) + "a" * int(body.get("more", 0))


def whole(body: Json) -> bytes:
    """The whole answer that is no stream."""
    record = {
        "choices": [{"text": _text(body), "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 7, "total_tokens": 9, "completion_tokens": 2},
        # As vLLM does where `return_token_ids` is asked for.
        "prompt_token_ids": [12345] * body.get("ids", 0),
    }
    return json.dumps(record, separators=(",", ":"), ensure_ascii=False).encode()


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            lines = head.decode("latin-1").lower().split("\r\n")
            [length] = [line.split(":")[1] for line in lines if line.startswith("content-length:")]
            body = json.loads(await reader.readexactly(int(length)))
            if not body.get("stream"):
                text = whole(body)
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                    b"Content-Length: %d\r\n\r\n" % len(text) + text
                )
                await writer.drain()
                continue
            await _answer(body, writer)
            if body["prompt"] == "cut":
                break
    except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
        pass  # NGINX left, or the test is over
    finally:
        writer.close()


async def _answer(body: Json, writer: asyncio.StreamWriter) -> None:
    writer.write(
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n"
    )
    text = stream(body)
    if body["prompt"] in ("cut", "wait"):
        text = text[: len(choice(EVIL)) + 20]
    size = body.get("size", len(text))
    for begin in range(0, len(text), size):
        piece = text[begin : begin + size]
        writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        await writer.drain()
        await asyncio.sleep(0.001)  # so that each piece is a read of its own
    if body["prompt"] == "wait":
        await asyncio.sleep(60)
    if body["prompt"] != "cut":
        writer.write(b"0\r\n\r\n")
        await writer.drain()


@contextmanager
def replica() -> Iterator[int]:
    """Serve on loopback; the port."""
    begun: Future[tuple[int, Callable[[], object]]] = Future()

    async def serve() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        async with await asyncio.start_server(_serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            begun.set_result((port, lambda: loop.call_soon_threadsafe(stop.set)))
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    port, end = begun.result(timeout=10)
    try:
        yield port
    finally:
        end()
        thread.join()
