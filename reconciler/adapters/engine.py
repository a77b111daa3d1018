"""Replicas over HTTP: who answers at an address, is it well, and how busy is it.

Paths as vLLM serves them: /health, /v1/models, /metrics, /v1/completions. The identity is the
served name `<model>@<job id>` that only that job's engine was started with.
"""

import asyncio
import io
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from http.client import HTTPException, HTTPResponse

from reconciler.naming import Run
from reconciler.state import Health, Job, JobKey, Probe

_TIMEOUT_S = 3.0
# Engines warm up before they listen, so a first token takes moments. The whole cycle waits for it:
# one that needs longer is silent, and has the next cycle's chance.
_COMPLETION_TIMEOUT_S = 10.0
# Replicas asked at once: one thread reads all their answers, well within the timeout even where it
# gets a fraction of a core (some 1.5 ms each), and a process has some 1,024 sockets.
_AT_ONCE = 128

# A scrape of vLLM is some 50 KB; whoever sends more than this is something else.
_ANSWER_MAX = 4 * 1024 * 1024

# Over all engines of one API server (the label `engine`).
_ONGOING = re.compile(
    r"^vllm:num_requests_(?:running|waiting)(?:\{[^}]*\})? ([0-9.eE+-]+)$", re.MULTILINE
)
_TOKENS = re.compile(r"^vllm:generation_tokens_total(?:\{[^}]*\})? ([0-9.eE+-]+)$", re.MULTILINE)


class HttpEngines:
    """The adapter for OpenAI-compatible engines with vLLM's paths."""

    def probe(self, jobs: Sequence[Job], proven: Iterable[JobKey]) -> Mapping[JobKey, Probe]:
        published = [(job, job.run) for job in jobs if job.run is not None]
        return asyncio.run(self._probe_all(published, frozenset(proven)))

    async def _probe_all(
        self, jobs: Sequence[tuple[Job, Run]], proven: Collection[JobKey]
    ) -> Mapping[JobKey, Probe]:
        slots = asyncio.Semaphore(_AT_ONCE)

        async def probe(job: Job, run: Run) -> Probe:
            # The clock of a probe starts with its turn, so that it never counts others' time.
            async with slots:
                return await _probe(job, run.address, job.key in proven)

        probes = await asyncio.gather(*(probe(job, run) for job, run in jobs))
        return {job.key: probe for (job, _), probe in zip(jobs, probes, strict=True)}


async def _probe(job: Job, address: str, proven: bool) -> Probe:
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            wrong = await _introduce(address, f"{job.name.model}@{job.id}")
        if wrong is not None:
            return wrong
        if not proven:
            async with asyncio.timeout(_COMPLETION_TIMEOUT_S):
                wrong = await _complete(address, job.name.model)
        return wrong or await _load(address)
    except TimeoutError:
        return Probe(health=Health.SILENT, detail="no answer in time")
    except ConnectionRefusedError:
        return Probe(health=Health.STARTING, detail="nothing listens at its address")
    # Before OSError: that nothing was answered is told by an error that is both.
    except (HTTPException, ValueError, KeyError, TypeError, RecursionError) as error:
        detail = f"not an answer of an engine: {type(error).__name__}"
        return Probe(health=Health.SICK, detail=detail)
    except OSError:
        # Unreachable or reset: that says something of the way there, not of the engine.
        return Probe(health=Health.SILENT, detail="it can't be reached")


async def _introduce(address: str, identity: str) -> Probe | None:
    """Return what is wrong with who answers and how it feels, or None."""
    models = json.loads(_well(await _ask(address, "/v1/models")))
    names = {str(item["id"]) for item in models["data"]}
    if identity not in names:
        return Probe(health=Health.IMPOSTOR, detail=f"it serves {', '.join(sorted(names))[:80]}")
    status, _ = await _ask(address, "/health")
    if status != 200:
        return Probe(health=Health.SICK, detail=f"/health answers {status}")
    return None


async def _complete(address: str, model: str) -> Probe | None:
    """Return what is wrong with a completion of one token, or None."""
    body = {"model": model, "prompt": "a", "max_tokens": 1}
    status, text = await _ask(address, "/v1/completions", body)
    if status != 200 or not json.loads(text)["choices"]:
        return Probe(health=Health.SICK, detail=f"a one-token completion answers {status}")
    return None


async def _load(address: str) -> Probe:
    """Return a ready replica's probe with what its metrics tell; without them that is unknown."""
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            metrics = _well(await _ask(address, "/metrics"))
    except (OSError, HTTPException, ValueError):
        return Probe(health=Health.READY)
    ongoing, tokens = parse_metrics(metrics)
    return Probe(health=Health.READY, ongoing=ongoing, tokens=tokens)


def _well(answer: tuple[int, str]) -> str:
    """Return the text of an answer that went well. Raises HTTPException for any other."""
    status, text = answer
    if status != 200:
        raise HTTPException(status)
    return text


async def _ask(address: str, path: str, body: object = None) -> tuple[int, str]:
    """Return the status and text of an answer: GET, or POST with a body of JSON.

    Each question has a connection of its own, which the engine closes behind its answer: a client
    that keeps connections costs several times the processor time, for a thousand replicas.
    Raises OSError, HTTPException, or ValueError for an answer without an end.
    """
    host, _, port = address.partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(_request(address, path, body))
        received = bytearray()
        while part := await reader.read(_ANSWER_MAX):
            received += part
            if len(received) > _ANSWER_MAX:
                raise ValueError("longer than any answer of an engine")
    finally:
        writer.transport.abort()
    answer = HTTPResponse(_Received(received))  # type: ignore[arg-type] # it asks for no more
    answer.begin()
    return answer.status, answer.read().decode(errors="replace")


def _request(address: str, path: str, body: object) -> bytes:
    text = b"" if body is None else json.dumps(body).encode()
    head = (
        f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nHost: {address}\r\n"
        "Connection: close\r\n"
    )
    if body is not None:
        head += f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n"
    return f"{head}\r\n".encode() + text


class _Received:
    """What was received, in the shape in which HTTPResponse takes it: as a socket's file."""

    def __init__(self, received: bytes | bytearray) -> None:
        self._file = io.BytesIO(received)

    def makefile(self, _mode: str) -> io.BytesIO:
        return self._file


def parse_metrics(metrics: str) -> tuple[int | None, float | None]:
    """Return running plus waiting requests, and generated tokens; None for what is not told."""
    ongoing, tokens = (_sum(names.findall(metrics)) for names in (_ONGOING, _TOKENS))
    return (None if ongoing is None else round(ongoing)), tokens


def _sum(values: Sequence[str]) -> float | None:
    return sum(map(float, values)) if values else None
