"""Replicas over HTTP: who answers at an address, is it well, and how busy is it.

Paths as vLLM serves them: /health, /v1/models, /metrics, /v1/completions. The identity is the
served name `<model>@<job id>` that only that job's engine was started with.
"""

import asyncio
import json
import re
import ssl
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import httpx

from reconciler.adapters.secrets import FileSecrets
from reconciler.errors import SecretsFailed
from reconciler.naming import Run, tls_name
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
_ONGOING = re.compile(r"vllm:num_requests_(?:running|waiting)(?:\{[^}]*\})? ([0-9.eE+-]+)")
_TOKENS = re.compile(r"vllm:generation_tokens_total(?:\{[^}]*\})? ([0-9.eE+-]+)")


class HttpEngines:
    """The adapter for OpenAI-compatible engines with vLLM's paths.

    A job that was given keys is asked over TLS only, and shown a key only when it has proved by its
    certificate that it is a replica of its model.
    """

    def __init__(self, secrets: FileSecrets) -> None:
        self._secrets = secrets

    def probe(self, jobs: Sequence[Job], proven: Iterable[JobKey]) -> Mapping[JobKey, Probe]:
        published = [(job, job.run) for job in jobs if job.run is not None]
        try:
            access = self._access(any(_keys_of(job) for job, _ in published))
        except (SecretsFailed, ssl.SSLError) as error:
            silent = Probe(health=Health.SILENT, detail=str(error))
            return {job.key: silent for job, _ in published}
        return asyncio.run(_probe_all(published, access, frozenset(proven)))

    def _access(self, protected: bool) -> "_Access":
        # Without an authority it trusts nobody; to load what a host trusts would take long.
        access = _Access(trusted=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
        if not protected:
            return access
        access.trusted.load_verify_locations(cadata=self._secrets.authority())
        return replace(access, keys={key.id: key.text for key in self._secrets.backend_keys()})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Access:
    """Whom the probes of a cycle believe, and what they show to those: keys by their ids."""

    trusted: ssl.SSLContext
    keys: Mapping[str, str] = field(default_factory=dict, repr=False)


def _keys_of(job: Job) -> Sequence[str]:
    return job.comment.keys if job.comment is not None else ()


async def _probe_all(
    jobs: Sequence[tuple[Job, Run]], access: _Access, proven: Collection[JobKey]
) -> Mapping[JobKey, Probe]:
    slots = asyncio.Semaphore(_AT_ONCE)

    async def probe(job: Job, run: Run) -> Probe:
        # The clock of a probe starts with its turn, so that it never counts others' time.
        async with slots, _Replica(job, run.address, access) as replica:
            return await _probe(replica, job, job.key in proven)

    probes = await asyncio.gather(*(probe(job, run) for job, run in jobs))
    return {job.key: probe for (job, _), probe in zip(jobs, probes, strict=True)}


class _Replica:
    """One replica's address, asked over one connection.

    Of httpx only the transport: a client's cookies, redirects and merged addresses take longer than
    the questions, and one pool's search for a connection grows with its size.
    """

    def __init__(self, job: Job, address: str, access: _Access) -> None:
        self._transport = httpx.AsyncHTTPTransport(verify=access.trusted)
        self._base = f"http://{address}"
        self._headers: dict[str, str] = {}
        self._extensions: dict[str, str] = {}
        if not _keys_of(job):
            return
        self._base = f"https://{address}"
        # TLS asks for this name, and the certificate must be made out to it.
        self._extensions["sni_hostname"] = tls_name(job.name.fleet, job.name.model)
        known = [access.keys[key] for key in _keys_of(job) if key in access.keys]
        if known:
            self._headers["Authorization"] = f"Bearer {known[-1]}"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._transport.aclose()

    async def ask(self, path: str, body: object = None) -> tuple[int, str]:
        """Return status and text of an answer; the caller's clock bounds it.

        Raises httpx.HTTPError, or ValueError for an endless one.
        """
        method = "GET" if body is None else "POST"
        request = httpx.Request(
            method,
            f"{self._base}{path}",
            json=body,
            headers=self._headers,
            extensions=self._extensions,
        )
        answer = await self._transport.handle_async_request(request)
        received = bytearray()
        try:
            async for part in answer.aiter_bytes():
                received += part
                if len(received) > _ANSWER_MAX:
                    raise ValueError("longer than any answer of an engine")
        finally:
            await answer.aclose()
        return answer.status_code, received.decode(errors="replace")


async def _probe(replica: _Replica, job: Job, proven: bool) -> Probe:
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            wrong = await _introduce(replica, f"{job.name.model}@{job.id}")
        if wrong is not None:
            return wrong
        if not proven:
            async with asyncio.timeout(_COMPLETION_TIMEOUT_S):
                wrong = await _complete(replica, job.name.model)
        return wrong or await _load(replica)
    except TimeoutError:
        return Probe(health=Health.SILENT, detail="no answer in time")
    except httpx.NetworkError as error:
        if _has(error, ssl.SSLError) and not _has(error, ssl.SSLEOFError):
            detail = "it has no certificate of this model's replicas"
            return Probe(health=Health.IMPOSTOR, detail=detail)
        if _has(error, ConnectionRefusedError):
            return Probe(health=Health.STARTING, detail="nothing listens at its address")
        # Unreachable or reset: that says something of the way there, not of the engine.
        return Probe(health=Health.SILENT, detail="it can't be reached")
    except (httpx.HTTPError, ValueError, KeyError, TypeError, RecursionError) as error:
        detail = f"not an answer of an engine: {type(error).__name__}"
        return Probe(health=Health.SICK, detail=detail)


def _has(error: BaseException | None, kind: type[BaseException]) -> bool:
    """Tell whether an error of this kind lies at the bottom of another.

    Such as a refused connection: the process is gone.
    """
    while error is not None:
        if isinstance(error, kind):
            return True
        error = error.__cause__ or error.__context__
    return False


async def _introduce(replica: _Replica, identity: str) -> Probe | None:
    """Return what is wrong with who answers and how it feels, or None."""
    status, text = await replica.ask("/v1/models")
    if status == 401:
        return Probe(health=Health.SICK, detail="it takes none of the keys that it was given")
    models = json.loads(_well((status, text)))
    names = {str(item["id"]) for item in models["data"]}
    if identity not in names:
        return Probe(health=Health.IMPOSTOR, detail=f"it serves {', '.join(sorted(names))[:80]}")
    status, _ = await replica.ask("/health")
    if status != 200:
        return Probe(health=Health.SICK, detail=f"/health answers {status}")
    return None


async def _complete(replica: _Replica, model: str) -> Probe | None:
    """Return what is wrong with a completion of one token, or None."""
    body = {"model": model, "prompt": "a", "max_tokens": 1}
    status, text = await replica.ask("/v1/completions", body)
    if status != 200 or not json.loads(text)["choices"]:
        return Probe(health=Health.SICK, detail=f"a one-token completion answers {status}")
    return None


async def _load(replica: _Replica) -> Probe:
    """Return a ready replica's probe with what its metrics tell; without them that is unknown."""
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            metrics = _well(await replica.ask("/metrics"))
    except (TimeoutError, httpx.HTTPError, ValueError):
        return Probe(health=Health.READY)
    ongoing, tokens = parse_metrics(metrics)
    return Probe(health=Health.READY, ongoing=ongoing, tokens=tokens)


def _well(answer: tuple[int, str]) -> str:
    """Return the text of an answer that went well. Raises ValueError for any other."""
    status, text = answer
    if status != 200:
        raise ValueError(f"status {status}")
    return text


def parse_metrics(metrics: str) -> tuple[int | None, float | None]:
    """Return running plus waiting requests, and generated tokens; None for what is not told."""
    # Few of a scrape's lines are ours, and an expression is slow to pass over the others.
    lines = [line for line in metrics.split("\n") if line.startswith(("vllm:num_", "vllm:gen"))]
    ongoing, tokens = (_sum(map(name.fullmatch, lines)) for name in (_ONGOING, _TOKENS))
    return (None if ongoing is None else round(ongoing)), tokens


def _sum(matches: Iterable[re.Match[str] | None]) -> float | None:
    values = [float(match[1]) for match in matches if match is not None]
    return sum(values) if values else None
