"""Replicas over HTTP: who answers at an address, is it well, and how busy is it.

Paths as vLLM serves them: /health, /v1/models, /metrics, /v1/completions. The identity is the
served name `<model>@<job id>` that only that job's engine was started with.
"""

import asyncio
import json
import re
import ssl
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Self, TypeVar

import httpcore

from reconciler.adapters.secrets import FileSecrets
from reconciler.errors import SecretsFailed
from reconciler.naming import Run, tls_name
from reconciler.state import Health, Job, JobKey, Probe

E = TypeVar("E", bound=BaseException)

_TIMEOUT_S = 3.0
# Engines warm up before they listen, so a first token takes moments. The whole cycle waits for it:
# one that needs longer is silent, and has the next cycle's chance.
_COMPLETION_TIMEOUT_S = 10.0
# Replicas asked at once: one thread reads all their answers, well within the timeout even where it
# gets a fraction of a core (some 1.5 ms each), and a process has some 1,024 sockets.
_AT_ONCE = 128

# A scrape of vLLM is some 50 KB; whoever sends more than this is something else.
_ANSWER_MAX = 4 * 1024 * 1024
_METRIC_MAX = 1e15

# OpenSSL's X509_V_ERR_CERT_NOT_YET_VALID and _HAS_EXPIRED, which it says only of a certificate that
# the fleet's authority has signed.
_OUT_OF_DATE = (9, 10)

# Over all engines of one API server (the label `engine`).
_ONGOING = re.compile(r"vllm:num_requests_(?:running|waiting)(?:\{[^}]*\})? ([0-9.eE+-]+)")
# A step of the engine counts too: a long prompt takes many of them before its first token.
_TOKENS = re.compile(
    r"vllm:(?:generation_tokens_total|iteration_tokens_total_count)(?:\{[^}]*\})? ([0-9.eE+-]+)"
)
_COUNTED = ("vllm:num_requests_", "vllm:generation_tokens_", "vllm:iteration_tokens_total_count")


# What an answer is that no engine gives.
_NO_ENGINE = (httpcore.ProtocolError, httpcore.NetworkError, ValueError)


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
    """One replica's address, asked over one connection."""

    def __init__(self, job: Job, address: str, access: _Access) -> None:
        host, _, port = address.partition(":")
        protected = bool(_keys_of(job))
        self._headers = [("Host", address), ("Accept", "*/*")]
        # TLS asks for this name, and the certificate must be made out to it.
        name = tls_name(job.name.fleet, job.name.model)
        self._extensions = {"sni_hostname": name} if protected else {}
        known = [access.keys[key] for key in _keys_of(job) if key in access.keys]
        if known:
            self._headers.append(("Authorization", f"Bearer {known[-1]}"))
        self._origin = httpcore.Origin(b"https" if protected else b"http", host.encode(), int(port))
        self._connection = httpcore.AsyncHTTPConnection(
            self._origin, ssl_context=access.trusted, network_backend=_Network()
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._connection.aclose()

    async def ask(self, path: str, body: object = None) -> tuple[int, str]:
        """Return status and text of an answer; the caller's clock bounds it.

        Raises httpcore's errors, or ValueError for an endless one.
        """
        headers, content = self._headers, None
        if body is not None:
            content = json.dumps(body).encode()
            length = ("Content-Length", str(len(content)))
            headers = [*headers, ("Content-Type", "application/json"), length]
        url = httpcore.URL(
            scheme=self._origin.scheme,
            host=self._origin.host,
            port=self._origin.port,
            target=path,
        )
        request = httpcore.Request(
            "GET" if content is None else "POST",
            url,
            headers=headers,
            content=content,
            extensions=self._extensions,
        )
        answer = await self._connection.handle_async_request(request)
        received = bytearray()
        try:
            async for part in answer.aiter_stream():
                received += part
                if len(received) > _ANSWER_MAX:
                    raise ValueError("longer than any answer of an engine")
        finally:
            await answer.aclose()
        return answer.status, received.decode(errors="replace")


class _Network(httpcore.AsyncNetworkBackend):
    """asyncio's streams for httpcore: its own way there, anyio, takes half of a probe's time."""

    async def connect_tcp(self, host: str, port: int, *_: Any, **__: Any) -> "_Stream":
        with _as_httpcores(httpcore.ConnectError):
            return _Stream(*await asyncio.open_connection(host, port))


class _Stream(httpcore.AsyncNetworkStream):
    """One connection. The prober's clock bounds every step, so that none needs a timeout here."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ARG002
        with _as_httpcores(httpcore.ReadError):
            return await self._reader.read(max_bytes)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ARG002
        with _as_httpcores(httpcore.WriteError):
            self._writer.write(buffer)
            await self._writer.drain()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ARG002
    ) -> "_Stream":
        with _as_httpcores(httpcore.ConnectError):
            await self._writer.start_tls(ssl_context, server_hostname=server_hostname)
        return self

    async def aclose(self) -> None:
        # What the other side would say to that is of no interest.
        self._writer.transport.abort()

    def get_extra_info(self, info: str) -> Any:
        return self._writer.get_extra_info(info)


@contextmanager
def _as_httpcores(kind: type[httpcore.NetworkError]) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # of TLS too
        raise kind(str(error)) from error


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
    except httpcore.NetworkError as error:
        doubted = _found(error, ssl.SSLCertVerificationError)
        if doubted is not None and doubted.verify_code in _OUT_OF_DATE:
            # Of all of them at once if this host's clock has jumped; gateways have their own.
            return Probe(health=Health.SILENT, detail="its certificate is out of date here")
        if _has(error, ssl.SSLError) and not _has(error, ssl.SSLEOFError):
            detail = "it has no certificate of this model's replicas"
            return Probe(health=Health.IMPOSTOR, detail=detail)
        if _has(error, ConnectionRefusedError):
            return Probe(health=Health.STARTING, detail="nothing listens at its address")
        # Unreachable or reset: that says something of the way there, not of the engine.
        return Probe(health=Health.SILENT, detail="it can't be reached")
    except (*_NO_ENGINE, KeyError, TypeError, RecursionError) as error:
        detail = f"not an answer of an engine: {type(error).__name__}"
        return Probe(health=Health.SICK, detail=detail)


def _has(error: BaseException, kind: type[BaseException]) -> bool:
    """Tell whether an error of this kind lies at the bottom of another.

    Such as a refused connection: the process is gone.
    """
    return _found(error, kind) is not None


def _found(error: BaseException | None, kind: type[E]) -> E | None:
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__
    return error


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
    except (TimeoutError, *_NO_ENGINE):
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
    """Return running plus waiting requests, and tokens plus steps; None for what is not told."""
    # Few of a scrape's lines are ours, and an expression is slow to pass over the others.
    lines = [line for line in metrics.split("\n") if line.startswith(_COUNTED)]
    ongoing, tokens = (_sum(map(name.fullmatch, lines)) for name in (_ONGOING, _TOKENS))
    return (None if ongoing is None else round(ongoing)), tokens


def _sum(matches: Iterable[re.Match[str] | None]) -> float | None:
    values = [float(match[1]) for match in matches if match is not None]
    # What no engine counts up to would be no number to calculate with.
    return sum(values) if values and max(values) < _METRIC_MAX else None
