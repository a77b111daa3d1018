"""Replicas over HTTP: who answers at an address, is it well, and how busy is it.

Paths as vLLM serves them: /health, /v1/models, /metrics, /v1/completions. The identity is the
served name `<model>@<job id>` that only that job's engine was started with.
"""

import asyncio
import json
import re
import ssl
from collections.abc import Collection, Iterable, Mapping, Sequence

import httpx

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
        # It trusts nobody, and none is asked: to load what a host trusts takes as long as ten probes.
        certificates = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

        async def probe(job: Job, run: Run) -> Probe:
            # The clock of a probe starts with its turn, so that it never counts others' time. It
            # has a client of its own, as one pool's search for a connection grows with its size.
            async with (
                slots,
                httpx.AsyncClient(
                    base_url=f"http://{run.address}",
                    timeout=_TIMEOUT_S,
                    verify=certificates,
                    trust_env=False,
                ) as client,
            ):
                return await _probe(client, job, job.key in proven)

        probes = await asyncio.gather(*(probe(job, run) for job, run in jobs))
        return {job.key: probe for (job, _), probe in zip(jobs, probes, strict=True)}


async def _probe(client: httpx.AsyncClient, job: Job, proven: bool) -> Probe:
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            wrong = await _introduce(client, f"{job.name.model}@{job.id}")
        if wrong is not None:
            return wrong
        if not proven:
            async with asyncio.timeout(_COMPLETION_TIMEOUT_S):
                wrong = await _complete(client, job.name.model)
        return wrong or await _load(client)
    except (TimeoutError, httpx.TimeoutException):
        return Probe(health=Health.SILENT, detail="no answer in time")
    except httpx.NetworkError as error:
        if _refused(error):
            return Probe(health=Health.STARTING, detail="nothing listens at its address")
        # Unreachable or reset: that says something of the way there, not of the engine.
        return Probe(health=Health.SILENT, detail="it can't be reached")
    except (httpx.HTTPError, ValueError, KeyError, TypeError, RecursionError) as error:
        detail = f"not an answer of an engine: {type(error).__name__}"
        return Probe(health=Health.SICK, detail=detail)


def _refused(error: BaseException | None) -> bool:
    """Tell whether a refused connection lies at the bottom of an error: the process is gone."""
    while error is not None:
        if isinstance(error, ConnectionRefusedError):
            return True
        error = error.__cause__ or error.__context__
    return False


async def _introduce(client: httpx.AsyncClient, identity: str) -> Probe | None:
    """Return what is wrong with who answers and how it feels, or None."""
    models = json.loads(await _get(client, "/v1/models"))
    names = {str(item["id"]) for item in models["data"]}
    if identity not in names:
        return Probe(health=Health.IMPOSTOR, detail=f"it serves {', '.join(sorted(names))[:80]}")
    try:
        await _get(client, "/health")
    except httpx.HTTPStatusError as error:
        return Probe(health=Health.SICK, detail=f"/health answers {error.response.status_code}")
    return None


async def _complete(client: httpx.AsyncClient, model: str) -> Probe | None:
    """Return what is wrong with a completion of one token, or None."""
    body = {"model": model, "prompt": "a", "max_tokens": 1}
    answer = await client.post("/v1/completions", json=body, timeout=_COMPLETION_TIMEOUT_S)
    if answer.status_code != 200 or not answer.json()["choices"]:
        detail = f"a one-token completion answers {answer.status_code}"
        return Probe(health=Health.SICK, detail=detail)
    return None


async def _load(client: httpx.AsyncClient) -> Probe:
    """Return a ready replica's probe with what its metrics tell; without them that is unknown."""
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            metrics = await _get(client, "/metrics")
    except (TimeoutError, httpx.HTTPError, ValueError):
        return Probe(health=Health.READY)
    ongoing, tokens = parse_metrics(metrics)
    return Probe(health=Health.READY, ongoing=ongoing, tokens=tokens)


async def _get(client: httpx.AsyncClient, url: str) -> str:
    """Return the text of an answer. Raises httpx.HTTPError, or ValueError for an endless one."""
    text = bytearray()
    async with client.stream("GET", url) as answer:
        answer.raise_for_status()
        async for part in answer.aiter_bytes():
            text += part
            if len(text) > _ANSWER_MAX:
                raise ValueError("longer than any answer of an engine")
    return text.decode(errors="replace")


def parse_metrics(metrics: str) -> tuple[int | None, float | None]:
    """Return running plus waiting requests, and generated tokens; None for what is not told."""
    ongoing, tokens = (_sum(names.findall(metrics)) for names in (_ONGOING, _TOKENS))
    return (None if ongoing is None else round(ongoing)), tokens


def _sum(values: Sequence[str]) -> float | None:
    return sum(map(float, values)) if values else None
