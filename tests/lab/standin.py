#!/opt/modelfleet/venv/bin/python
"""The stand-in engine: to the outside what vLLM 0.32 is, without a model.

    standin.py serve MODEL --host H --port P --served-model-name NAME NAME@JOBID ...

It takes vLLM's command line (flags that it has no use for are ignored) and shows vLLM's paths,
error bodies, metrics, processes, and ways to drain and to die; tests/engine holds the same tests
for both.  Every answer names its replica (the last served name) in `system_fingerprint`.  With
--nnodes it is one rank of several: when another is lost rank 0 dies of the next request, and the
others stay when rank 0 goes, as vLLM's do.  What may go wrong is switched on by the environment:

    STANDIN_TOKENS_PER_S    pace of each stream (200)
    STANDIN_START_S         seconds until it listens; the port is taken at once, as vLLM does (0)
    STANDIN_EXIT_CODE       exit at once with this code
    STANDIN_CRASH_AFTER_S   the engine's process is killed that long after it was ready
    STANDIN_HANG_AFTER_S    from then on no stream moves; /health says 200
    STANDIN_STALL_METRICS   1: /metrics repeats its first answer for ever
    STANDIN_IMPOSTOR        the only model that this server claims to serve
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
import yaml
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    Summary,
    generate_latest,
)
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

VERSION = "0.32.0"
# The scrape of a real vLLM says which metrics there are, of what type, with what labels.
SCRAPE = Path(__file__).resolve().parents[1] / "fixtures" / "vllm-0.32-metrics.txt"
# vLLM needs about this long to see that its engine died, and says 503 meanwhile.
DEATH_NOTICE_S = 0.5
# As vLLM 0.32 without max_tokens in a completion (a chat goes on to the end of the context).
COMPLETION_TOKENS = 16

SYLLABLES = ("ba", "be", "bi", "bo", "bu", "da", "de", "di", "do", "du")
QUEUE_FULL = (
    "The engine is currently busy and cannot accept new requests."
    " Please try again later or on a different instance."
)
SHUT_DOWN = "cannot schedule new futures after shutdown"
DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."

Json = dict[str, Any]


def switch(name: str, default: float) -> float:
    return float(os.environ.get(f"STANDIN_{name}") or default)


class RequestError(Exception):
    """A request that is answered with vLLM's error body."""

    def __init__(
        self, code: int, message: str, kind: str = "BadRequestError", param: str | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def failed(message: str) -> RequestError:
    return RequestError(500, message, "InternalServerError")


class Metrics:
    """The metrics of a recorded scrape, all at zero, for a model of our own."""

    def __init__(self, model: str, scrape: str) -> None:
        self.registry = CollectorRegistry()
        self.model = model
        self.labels: dict[str, list[dict[str, str]]] = {}
        self.metrics: dict[str, MetricWrapperBase] = {}
        self.frozen: bytes | None = None
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        for family in text_string_to_metric_families(scrape):
            # prometheus_client makes the twins `_created` by itself.
            ours = family.name.startswith(("vllm:", "http_"))
            if ours and not family.name.endswith("_created"):
                self._declare(family)

    def _declare(self, family: Any) -> None:
        plain = [s for s in family.samples if not s.name.endswith(("_bucket", "_sum"))]
        kind = {"counter": Counter, "gauge": Gauge, "histogram": Histogram, "summary": Summary}
        options: Json = {}
        if family.type == "histogram":
            options["buckets"] = sorted(
                {float(s.labels["le"]) for s in family.samples if "le" in s.labels}
            )
        metric = kind[family.type](
            family.name,
            family.documentation,
            sorted(plain[0].labels) if plain else [],
            registry=self.registry,
            **options,
        )
        self.metrics[family.name] = metric
        for sample in plain:
            labels = sample.labels | (
                {"model_name": self.model} if "model_name" in sample.labels else {}
            )
            self.labels.setdefault(family.name, []).append(labels)
            child = metric.labels(**labels) if labels else metric
            if family.name.endswith("_info"):
                child.set(1)

    def child(self, name: str, **chosen: str) -> Any:
        """The one time series of `vllm:NAME` whose labels have the chosen values."""
        name = f"vllm:{name}"
        fits = (row for row in self.labels[name] if chosen.items() <= row.items())
        return self.metrics[name].labels(**next(fits))

    def render(self) -> bytes:
        text = generate_latest(self.registry)
        if os.environ.get("STANDIN_STALL_METRICS") == "1":
            self.frozen = self.frozen or text
            return self.frozen
        return text


def finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


@dataclass
class Engine:
    """Slots, a queue, and a process of its own that the streams live and die with."""

    slots: int
    metrics: Metrics
    queue_limit: int | None = None
    running: int = 0
    queue: deque[asyncio.Future[None]] = field(default_factory=deque)
    waits: set[asyncio.Future[None]] = field(default_factory=set)
    draining: bool = False
    dead: bool = False
    # Its process was ended on purpose while streams were open: they never end by themselves.
    frozen: bool = False
    hangs_at: float = float("inf")
    # What ends the engine's process at the next request, when another rank is gone.
    lost_rank: Callable[[], None] | None = None

    @property
    def in_flight(self) -> int:
        return self.running + len(self.queue)

    def check(self) -> None:
        """Raise what vLLM answers to a new request in the engine's present state."""
        if self.lost_rank is not None and not self.dead:
            self.lost_rank()
            raise failed(DEAD)
        if self.dead:
            raise failed(DEAD)
        if self.draining:
            raise failed(SHUT_DOWN)
        if self.queue_limit is not None and self.in_flight >= self.queue_limit:
            self.metrics.child("admission_rejections", reason="max_num_queued_reqs").inc()
            raise RequestError(503, QUEUE_FULL, "Service Unavailable")

    def die(self) -> None:
        """The process is gone: whoever waits for a token or a slot gets an error."""
        self.dead = True
        for wait in self.waits:
            if not wait.done():
                wait.set_exception(failed(DEAD))

    async def wait(self, seconds: float | None, until: asyncio.Future[None] | None = None) -> None:
        """Wait, for ever if `seconds` is None, unless the engine dies first."""
        if self.dead:  # while this stream waited for its client
            raise failed(DEAD)
        until = until or asyncio.get_running_loop().create_future()
        if seconds is not None:
            timer = asyncio.get_running_loop().call_later(max(seconds, 0), finish, until)
        self.waits.add(until)
        try:
            await until
        finally:
            self.waits.discard(until)
            if seconds is not None:
                timer.cancel()

    @contextlib.asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Hold one of the slots; first come, first served."""
        if self.running < self.slots:
            self.running += 1
        else:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self.queue.append(turn)
            self.gauge()
            try:
                # Whoever leaves a slot hands it over, so that `running` stays as it is.
                await self.wait(None, turn)
            except BaseException:
                if turn in self.queue:
                    self.queue.remove(turn)
                elif turn.done() and not turn.cancelled() and turn.exception() is None:
                    self.leave()
                raise
        self.gauge()
        try:
            yield
        finally:
            self.leave()

    def leave(self) -> None:
        while self.queue:
            turn = self.queue.popleft()
            if not turn.done():
                turn.set_result(None)
                break
        else:
            self.running -= 1
        self.gauge()

    def gauge(self) -> None:
        self.metrics.child("num_requests_running").set(self.running)
        self.metrics.child("num_requests_waiting").set(len(self.queue))
        self.metrics.child("num_requests_waiting_by_reason", reason="capacity").set(len(self.queue))
        self.metrics.child("kv_cache_usage_perc").set(self.running / self.slots)

    async def generate(self, prompt_tokens: int, max_tokens: int) -> AsyncIterator[str]:
        """Yield the tokens of one request at the pace of STANDIN_TOKENS_PER_S."""
        metrics, pace = self.metrics, switch("TOKENS_PER_S", 200)
        arrived, reason = time.monotonic(), "abort"
        try:
            async with self.slot():
                started = last = time.monotonic()
                metrics.child("request_queue_time_seconds").observe(started - arrived)
                metrics.child("prompt_tokens").inc(prompt_tokens)
                for index in range(max_tokens):
                    await self.wait(started + (index + 1) / pace - time.monotonic())
                    if self.frozen or time.monotonic() >= self.hangs_at:
                        await self.wait(None)
                    now = time.monotonic()
                    metrics.child("generation_tokens").inc()
                    metrics.child("iteration_tokens_total").observe(1)
                    name = "inter_token_latency_seconds" if index else "time_to_first_token_seconds"
                    metrics.child(name).observe(now - (last if index else arrived))
                    last = now
                    yield f" {SYLLABLES[index % len(SYLLABLES)]}"
                reason = "length"
        except RequestError:
            reason = "error"
            raise
        finally:
            metrics.child("request_success", finished_reason=reason).inc()
            metrics.child("e2e_request_latency_seconds").observe(time.monotonic() - arrived)


@dataclass(frozen=True)
class Ask:
    """A request that passed the checks."""

    chat: bool
    stream: bool
    usage: bool
    prompt_tokens: int
    max_tokens: int


def integer(body: Json, name: str) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    try:
        number = int(value)
    except (TypeError, ValueError):
        raise invalid(
            "int_parsing",
            f"body.{name}",
            "Input should be a valid integer, unable to parse string as an integer",
            f"'{value}'",
        ) from None
    if number < 1:
        message = f"{name} must be at least 1, got {number}. (parameter={name}, value={number})"
        raise RequestError(400, message, param=name)
    return number


def invalid(kind: str, place: str, message: str, given: str, more: str = "") -> RequestError:
    text = f"{{'type': '{kind}', 'loc': '{place}', 'msg': '{message}', 'input': {given}{more}}}"
    return RequestError(400, f"1 validation error:\n  {text}", "Bad Request", place)


async def body_of(request: Request) -> Json:
    raw = await request.body()
    if not request.headers.get("content-type", "").startswith("application/json"):
        message = (
            "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed"
        )
        raise RequestError(400, message, "Bad Request")
    if not raw:
        raise invalid("missing", "body", "Field required", "'None'")
    try:
        body = json.loads(raw)
    except ValueError as error:
        reason = getattr(error, "msg", "not UTF-8")
        place = f"body.{getattr(error, 'pos', 0)}"
        more = f", 'ctx': {{'error': '{reason}'}}"
        raise invalid(
            "json_invalid", place, "JSON decode error", "'<dict of 0 items>'", more
        ) from None
    if not isinstance(body, dict):
        wanted = "Input should be a valid dictionary or object to extract fields from"
        raise invalid("model_attributes_type", "body", wanted, f"'<list of {len(body)} items>'")
    return body


def text_of(body: Json, chat: bool) -> str:
    """The prompt's text; what is missing or of the wrong kind is refused."""
    if not chat:
        if not body.get("prompt"):
            message = (
                "Either prompt or prompt_embeds must be provided and non-empty. (parameter=prompt)"
            )
            raise RequestError(400, message, param="prompt")
        return str(body["prompt"])
    messages = body.get("messages")
    if messages is None:
        raise invalid(
            "missing", "body.messages", "Field required", f"'<dict of {len(body)} items>'"
        )
    if not isinstance(messages, list):
        message = "Input should be a valid list"
        raise invalid("list_type", "body.messages", message, f"'{messages}'")
    if not messages:
        raise RequestError(
            400,
            "Cannot apply chat template to an empty conversation. Provide at least one message.",
        )
    return " ".join(str(message.get("content")) for message in messages)


@dataclass(frozen=True)
class Api:
    """The HTTP side: OpenAI's paths in vLLM's words."""

    names: list[str]
    root: str
    max_model_len: int
    engine: Engine
    fingerprint: str

    def check(self, body: Json, chat: bool) -> Ask:
        """Refuse what vLLM refuses, in its words; return what is left."""
        text = text_of(body, chat)
        most = integer(body, "max_completion_tokens") or integer(body, "max_tokens")
        if body.get("stream_options") and not body.get("stream"):
            message = (
                "Stream options can only be defined when `stream=True`. (parameter=stream_options)"
            )
            raise RequestError(400, message, param="stream_options")
        model = body.get("model") or self.names[0]
        if model not in self.names:
            aliases = ", ".join(self.names)
            message = f"The model `{model}` does not exist. Valid aliases: {aliases}."
            raise RequestError(404, message, "NotFoundError", "model")
        prompt = len(text.split())
        if prompt >= self.max_model_len:
            raise RequestError(
                400,
                f"This model's maximum context length is {self.max_model_len} tokens. However, your"
                f" prompt contains {len(text)} characters. Please reduce the length of the input"
                f" prompt. (parameter=input_text, value={len(text)})",
                param="input_text",
            )
        if most is not None and most > self.max_model_len:
            raise RequestError(
                400,
                f"max_tokens={most} cannot be greater than max_model_len={self.max_model_len}."
                f" Please request fewer output tokens. (parameter=max_tokens, value={most})",
                param="max_tokens",
            )
        rest = self.max_model_len - prompt
        wanted = most or (rest if chat else COMPLETION_TOKENS)
        usage = bool((body.get("stream_options") or {}).get("include_usage"))
        return Ask(chat, bool(body.get("stream")), usage, prompt, min(wanted, rest))

    async def complete(self, request: Request) -> Response:
        ask = self.check(await body_of(request), request.url.path.startswith("/v1/chat/"))
        self.engine.check()
        kind = "chat.completion" if ask.chat else "text_completion"
        head: Json = {
            "id": f"{'chatcmpl' if ask.chat else 'cmpl'}-{uuid.uuid4().hex[:16]}",
            "object": f"{kind}.chunk" if ask.chat and ask.stream else kind,
            "created": int(time.time()),
            "model": self.names[0],
        }
        tokens = self.engine.generate(ask.prompt_tokens, ask.max_tokens)
        if ask.stream:
            return StreamingResponse(self.events(ask, head, tokens), media_type="text/event-stream")
        text = "".join([token async for token in tokens])
        choice: Json = {
            "index": 0,
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
        choice |= (
            {"message": {"role": "assistant", "content": text}} if ask.chat else {"text": text}
        )
        more = {"system_fingerprint": self.fingerprint, "usage": usage_of(ask)}
        return JSONResponse(head | {"choices": [choice]} | more)

    async def events(self, ask: Ask, head: Json, tokens: AsyncIterator[str]) -> AsyncIterator[str]:
        """Server-sent events: a piece each, perhaps the usage, and in any case [DONE]."""
        print_mark = {"system_fingerprint": self.fingerprint}
        try:
            if ask.chat:
                delta = {"role": "assistant", "content": ""}
                yield event(head | {"choices": [piece({"delta": delta}, None)]})
            index = 0
            async for token in tokens:
                index += 1
                last = index == ask.max_tokens
                content = {"delta": {"content": token}} if ask.chat else {"text": token}
                choices = {"choices": [piece(content, "length" if last else None)]}
                # The fingerprint is in the last event only: here, or with the usage.
                yield event(head | choices | (print_mark if last and not ask.usage else {}))
            if ask.usage:
                yield event(head | {"choices": [], "usage": usage_of(ask)} | print_mark)
        except RequestError as refused:
            yield event(refused.body)
        yield "data: [DONE]\n\n"

    async def models(self, _: Request) -> Response:
        common = {"object": "model", "created": int(time.time()), "owned_by": "vllm"}
        more = {"root": self.root, "parent": None, "max_model_len": self.max_model_len}
        rows = [{"id": name} | common | more | {"permission": []} for name in self.names]
        return JSONResponse({"object": "list", "data": rows})

    async def health(self, _: Request) -> Response:
        return Response(status_code=503 if self.engine.dead else 200)

    async def metrics(self, _: Request) -> Response:
        # The content type of the text format that vLLM writes.
        return Response(
            self.engine.metrics.render(), media_type="text/plain; version=1.0.0; charset=utf-8"
        )

    async def version(self, _: Request) -> Response:
        return JSONResponse({"version": VERSION})

    def app(self, keys: set[str]) -> Starlette:
        async def refuse(_: Request, error: Exception) -> Response:
            assert isinstance(error, RequestError)
            return JSONResponse(error.body, status_code=error.code)

        async def detail(_: Request, error: Exception) -> Response:
            assert isinstance(error, HTTPException)
            return JSONResponse({"detail": error.detail}, error.status_code, error.headers)

        return Starlette(
            routes=[
                Route("/health", self.health),
                Route("/ping", self.health, methods=["GET", "POST"]),
                Route("/metrics", self.metrics),
                Route("/version", self.version),
                Route("/v1/models", self.models),
                Route("/v1/chat/completions", self.complete, methods=["POST"]),
                Route("/v1/completions", self.complete, methods=["POST"]),
            ],
            middleware=[Middleware(Guard, keys=keys)] if keys else [],
            exception_handlers={RequestError: refuse, HTTPException: detail},
        )


class Guard:
    """A key for /v1; all else stays open, as in vLLM."""

    def __init__(self, app: ASGIApp, keys: set[str]) -> None:
        self.app = app
        self.accepted = {f"Bearer {key}".encode() for key in keys}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self.app
        guarded = scope["type"] == "http" and scope["path"].startswith("/v1")
        if guarded and dict(scope["headers"]).get(b"authorization") not in self.accepted:
            app = JSONResponse({"error": "Unauthorized"}, status_code=401)
        await app(scope, receive, send)


def usage_of(ask: Ask) -> Json:
    total = ask.prompt_tokens + ask.max_tokens
    return {
        "prompt_tokens": ask.prompt_tokens,
        "total_tokens": total,
        "completion_tokens": ask.max_tokens,
    }


def piece(content: Json, finish: str | None) -> Json:
    return {"index": 0} | content | {"logprobs": None, "finish_reason": finish}


def event(body: Json) -> str:
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"


class Server(uvicorn.Server):
    """uvicorn without its own signals: TERM means something else here."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(options: argparse.Namespace, sock: socket.socket) -> None:
    """Serve until TERM, or the end of the engine's process; see `drain` for what TERM does."""
    names = options.served_model_name or [options.model]
    replica = names[-1]
    if impostor := os.environ.get("STANDIN_IMPOSTOR"):
        names = [impostor]
    engine = Engine(
        slots=options.max_num_seqs,
        metrics=Metrics(names[0], SCRAPE.read_text()),
        queue_limit=options.max_num_queued_reqs,
    )
    api = Api(names, options.model, options.max_model_len, engine, f"standin-{VERSION}-{replica}")
    config = uvicorn.Config(
        api.app(keys_of(options)),
        log_level="warning",
        timeout_keep_alive=int(os.environ.get("VLLM_HTTP_TIMEOUT_KEEP_ALIVE") or 5),
        ssl_certfile=options.ssl_certfile,
        ssl_keyfile=options.ssl_keyfile,
        lifespan="off",
    )
    server = Server(config)
    me = str(os.getpid())
    process = await asyncio.create_subprocess_exec(sys.executable, __file__, "engine-core", me)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(
        signal.SIGTERM, lambda: keep(drain(engine, process, server, options.shutdown_timeout))
    )
    keep(watch(engine, process, server))
    if options.nnodes > 1:
        for rank in await meet(options):
            keep(follow(rank, engine, process))
    await asyncio.sleep(switch("START_S", 0))
    engine.hangs_at = time.monotonic() + switch("HANG_AFTER_S", float("inf"))
    if crash_after_s := switch("CRASH_AFTER_S", 0):
        loop.call_later(crash_after_s, process.kill)
    await server.serve(sockets=[sock])
    if process.returncode is None:
        process.kill()
        await process.wait()


async def meet(options: argparse.Namespace) -> list[asyncio.StreamReader]:
    """Return a connection from each other rank, when all of them are there."""
    arrived: asyncio.Queue[asyncio.StreamReader] = asyncio.Queue()
    writers: list[asyncio.StreamWriter] = []

    def arrive(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)  # an unreferenced one would be closed
        arrived.put_nowait(reader)

    master = await asyncio.start_server(arrive, options.master_addr, options.master_port)
    readers = [await arrived.get() for _ in range(options.nnodes - 1)]
    master.close()
    return readers


async def follow(
    rank: asyncio.StreamReader, engine: Engine, process: asyncio.subprocess.Process
) -> None:
    """When another rank is gone the engine dies of the requests it has, or of the next one."""
    with contextlib.suppress(OSError):
        await rank.read()
    engine.lost_rank = process.kill
    if engine.in_flight:
        process.kill()


def headless(options: argparse.Namespace) -> None:
    """Another rank: it joins rank 0, and stays until a signal, also when rank 0 has gone."""
    while True:
        with contextlib.suppress(OSError):
            master = socket.create_connection((options.master_addr, options.master_port), timeout=5)
            break
        time.sleep(0.1)
    print(f"standin: rank {options.node_rank} has joined {master.getpeername()}", file=sys.stderr)
    while True:
        signal.pause()


# The loop itself forgets tasks that nobody holds.
TASKS: set[asyncio.Task[None]] = set()


def keep(work: Coroutine[Any, Any, None]) -> None:
    task = asyncio.get_running_loop().create_task(work)
    TASKS.add(task)
    task.add_done_callback(TASKS.discard)


async def drain(
    engine: Engine, process: asyncio.subprocess.Process, server: Server, timeout_s: float
) -> None:
    """Let the streams in flight end, refuse new ones, then go.

    vLLM 0.32 does not end what is still open when the time is over (at once, by default): it stops
    the engine and listening, and stays until the last client has left by itself.
    """
    if engine.draining:
        return
    engine.draining = True
    deadline = time.monotonic() + timeout_s
    while engine.in_flight and not engine.dead and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    engine.frozen = True
    server.should_exit = True
    if process.returncode is None:
        process.kill()


async def watch(engine: Engine, process: asyncio.subprocess.Process, server: Server) -> None:
    """When the engine's process ends and nobody asked it to, so does the server."""
    await process.wait()
    if not engine.frozen:
        engine.die()
        await asyncio.sleep(DEATH_NOTICE_S)
        server.should_exit = True


def keys_of(options: argparse.Namespace) -> set[str]:
    """The accepted keys: those of the options if there are any, else that of VLLM_API_KEY."""
    return set(options.api_key or filter(None, [os.environ.get("VLLM_API_KEY")]))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="standin.py", allow_abbrev=False)
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("model")
    parser.add_argument("--host", default="0.0.0.0")  # noqa: S104  (vLLM's default)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--served-model-name", nargs="+")
    parser.add_argument("--max-model-len", type=int, default=32768)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-queued-reqs", type=int)
    parser.add_argument("--shutdown-timeout", type=float, default=0)
    parser.add_argument("--api-key", nargs="+")
    parser.add_argument("--ssl-certfile")
    parser.add_argument("--ssl-keyfile")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--nnodes", type=int, default=1)
    parser.add_argument("--node-rank", type=int, default=0)
    parser.add_argument("--master-addr")
    parser.add_argument("--master-port", type=int)
    parser.add_argument("--headless", action="store_true")
    return parser


def options_of(argv: list[str]) -> argparse.Namespace:
    """The options; what the file of --config says counts less than the command line."""
    options, _ = parser().parse_known_args(argv)
    if options.config:
        written = yaml.safe_load(options.config.read_text()) or {}
        extra: list[str] = []
        for key, value in written.items():
            extra += [f"--{key.replace('_', '-')}"]
            extra += [str(item) for item in (value if isinstance(value, list) else [value])]
        options, _ = parser().parse_known_args([*argv[:2], *extra, *argv[2:]])
    return options


def bind(host: str, port: int) -> socket.socket:
    """Take the port at once, without listening: a connection is refused until the start is over."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((host, port))
    return sock


def engine_core(parent: int) -> None:
    """The engine's process: it lives until a signal, or until its parent is gone."""
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text("VLLM::EngineCor")
    while os.getppid() == parent:
        time.sleep(1)


def main(argv: list[str]) -> int:
    if argv[0] == "engine-core":
        engine_core(int(argv[1]))
        return 0
    if code := os.environ.get("STANDIN_EXIT_CODE"):
        return int(code)
    options = options_of(argv)
    if options.headless:
        headless(options)
    try:
        sock = bind(options.host, options.port)
    except OSError as error:
        print(f"standin: {options.host}:{options.port}: {error.strerror}", file=sys.stderr)
        return 1
    asyncio.run(serve(options, sock))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
