"""A replica that records the bytes of every request and answers with its own name."""

import asyncio
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from reconciler.state import Target


@dataclass(frozen=True, slots=True)
class Got:
    """One request as it came over the wire; its headers' names in lower case."""

    replica: str
    line: str
    headers: dict[str, str]
    body: bytes


@dataclass(slots=True)
class Recorder:
    """Replicas on loopback, one for each name; `got` is everything that reached any of them."""

    ports: dict[str, int] = field(default_factory=dict)
    got: list[Got] = field(default_factory=list)
    # While it is not set, no request is answered.
    gate: threading.Event = field(default_factory=threading.Event)
    # While it is set, every request is answered as by an engine whose queue is full.
    full: bool = False

    def targets(self) -> list[Target]:
        """As the planner names them: one replica for each model."""
        return [
            Target(model=name, job_id=at, submitted_at=1, address=f"127.0.0.1:{port}")
            for at, (name, port) in enumerate(self.ports.items(), start=1)
        ]

    async def serve(
        self, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                line, *rest = head.decode("latin-1").rstrip("\r\n").split("\r\n")
                headers = {
                    key.strip().lower(): value.strip()
                    for key, _, value in (one.partition(":") for one in rest)
                }
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                self.got.append(Got(name, line, headers, body))
                if not self.gate.is_set():
                    await asyncio.to_thread(self.gate.wait)
                text = json.dumps({"object": "chat.completion", "choices": [], "model": name})
                status = b"503 Service Unavailable" if self.full else b"200 OK"
                writer.write(
                    # A replica that would lead NGINX elsewhere: it goes nowhere.
                    b"HTTP/1.1 " + status + b"\r\nX-Accel-Redirect: /v1/models\r\n"
                    b"Content-Type: application/json\r\n"
                    b"Content-Length: %d\r\n\r\n%b" % (len(text), text.encode())
                )
                await writer.drain()
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass  # NGINX left, or the test is over
        finally:
            writer.close()


@contextmanager
def recording(names: Sequence[str]) -> Iterator[Recorder]:
    """Run a replica for each name, in a thread of their own."""
    recorder = Recorder()
    recorder.gate.set()
    loop = asyncio.new_event_loop()

    async def start() -> list[asyncio.Server]:
        servers = []
        for name in names:

            async def serve(
                reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str = name
            ) -> None:
                await recorder.serve(name, reader, writer)

            server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=1 << 20)
            recorder.ports[name] = server.sockets[0].getsockname()[1]
            servers.append(server)
        return servers

    async def stop(servers: list[asyncio.Server]) -> None:
        for server in servers:
            server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    servers = loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield recorder
    finally:
        recorder.gate.set()
        asyncio.run_coroutine_threadsafe(stop(servers), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
