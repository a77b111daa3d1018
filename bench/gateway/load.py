"""The two clients, wrk and one that times a stream's first byte, and how busy the machine was."""

import http.client
import os
import ssl
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from bench.gateway.figures import Run, parse_wrk

_SCRIPT = Path(__file__).parent / "conf/wrk.lua"
_STAT = Path("/proc/stat")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticks:
    """Clock ticks since the start: of all processors, the busy ones, and those spent on us."""

    total: int
    busy: int
    ours: int

    @classmethod
    def now(cls) -> Self:
        total = [int(ticks) for ticks in _STAT.read_text().split("\n", 1)[0].split()[1:9]]
        _, _, _, idle, waiting, *_ = total
        return cls(total=sum(total), busy=sum(total) - idle - waiting, ours=_ours())

    def shares(self, later: "Ticks") -> tuple[float, float]:
        """Return the shares of busy time, and of what was busy with others, until `later`."""
        total = max(1, later.total - self.total)
        busy = later.busy - self.busy
        return busy / total, max(0, busy - (later.ours - self.ours)) / total


def _ours() -> int:
    """Sum over the bench's PID namespace; what has ended counts once this process waited for it."""
    ended = os.times()
    ticks = int((ended.children_user + ended.children_system) * os.sysconf("SC_CLK_TCK"))
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            user, system = stat.read_text().rpartition(")")[2].split()[11:13]
        except (FileNotFoundError, ProcessLookupError):
            continue
        ticks += int(user) + int(system)
    return ticks


def wrk(
    url: str, key: str, body: Path, *, connections: int, seconds: int, spread_ms: int = 0
) -> Run:
    """POST one body over and over on so many connections. Raises ValueError if nothing came back.

    With `spread_ms` the connections begin over that time, not in one wave.
    """
    threads = min(2, connections)
    began = Ticks.now()
    done = subprocess.run(
        [
            *("wrk", f"-t{threads}", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s"),
            *("-s", str(_SCRIPT), url, "--", str(body), key, str(spread_ms)),
            str(connections // threads),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds + 30,
    )
    busy, others = began.shares(Ticks.now())
    return replace(parse_wrk(done.stdout or done.stderr), busy=busy, others=others)


class Stream:
    """A connection of its own for each stream: after one of ours it ends (answer.js)."""

    def __init__(self, port: int, context: ssl.SSLContext | None) -> None:
        self._connection = (
            http.client.HTTPSConnection("127.0.0.1", port, timeout=10, context=context)
            if context
            else http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        )

    def first_byte_ms(self, path: str, body: bytes, key: str) -> float:
        """Return when the first byte of the body came; ValueError unless the whole stream did."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        began = time.perf_counter()
        self._connection.request("POST", path, body, headers)
        answer = self._connection.getresponse()
        first = answer.read1(65536)
        seconds = time.perf_counter() - began
        whole = first + answer.read()
        self._connection.close()
        if answer.status != 200 or not whole.endswith(b"data: [DONE]\n\n"):
            raise ValueError(f"no whole stream: {answer.status} {whole[:200]!r}")
        return seconds * 1e3

    def close(self) -> None:
        self._connection.close()
