"""What every end-to-end test of a fault or a kill asks: who was lost, and has the fleet settled."""

import asyncio
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

from tests.lab.fleet import Fleet
from tests.lab.load import Client, Load, Request, constant
from tests.lab.wait import wait_for

# Requests are looked up in the gateway's log by their ids, so no two loads have the same.
_LOADS = itertools.count()
_NAMES = itertools.count()

LIVE = ("PENDING", "RUNNING", "COMPLETING")


def live(fleet: Fleet) -> list[str]:
    """Return the ids of our user's live jobs."""
    return sorted(job[0] for job in fleet.jobs() if job[2] in LIVE)


def routed(fleet: Fleet) -> list[str]:
    return sorted(str(r["job_id"]) for r in fleet.replicas() if r["routed"])


def reconfigure(fleet: Fleet) -> None:
    """Edit the spec so that the gateways get another configuration, which routes the same."""
    now = re.search(r"  listen: 8080\n(  server_name: .*\n)?", fleet.spec_file.read_text())
    assert now is not None
    fleet.edit(now[0], f"  listen: 8080\n  server_name: name-{next(_NAMES)}\n")


@contextmanager
def running(
    fleet: Fleet,
    env: Mapping[str, str] | None = None,
    *,
    interval: str = "1",
    options: Sequence[str] = (),
) -> Iterator[None]:
    """Have `fleet run` at work, by default one cycle a second."""
    command = fleet.command("run", "--interval", interval, *options)
    with fleet.lab.popen("login", command, env=env) as reconciler:
        try:
            yield
        finally:
            reconciler.kill()


def under_load(
    fleet: Fleet, work: Callable[[], object], *, streams: int = 3, tokens: int = 40
) -> list[Request]:
    """Do the work under the load of `mixed` clients at every gateway; return all requests."""
    clients = [client for url in fleet.urls for client in mixed(url, streams, tokens)]
    return under(clients, work)


def mixed(url: str, streams: int, tokens: int, key: str = "none") -> list[Client]:
    """Return clients of every kind, half of the streams of the official client."""
    client = partial(Client, url=url, tokens=tokens, key=key)
    return [
        *(client(how=how) for how in ("openai", "http", "upload")),
        # Of this one there are many while of another there is one.
        client(how="raw", tokens=3),
        *(client(how=("openai", "http")[n % 2], stream=True) for n in range(streams)),
    ]


def under(
    clients: Sequence[Client], work: Callable[[], object], *, at_least: int = 0
) -> list[Request]:
    """Do the work while the clients ask all the time; return what became of all requests.

    They go on asking until there are `at_least` so many.
    """

    async def go() -> Load:
        async with constant(clients, name=f"load-{next(_LOADS)}") as load:
            await asyncio.to_thread(work)
            while len(load.requests) < at_least:
                await asyncio.sleep(0.1)
        return load

    requests = asyncio.run(go()).requests
    print(f"{len(requests)} requests, {len(lost(requests))} lost")
    return requests


def lost(requests: Sequence[Request]) -> list[str]:
    return [f"{r.id}: {r.status} {r.finish} {r.error}" for r in requests if not r.succeeded]


def assert_settled(fleet: Fleet, *, replicas: int, timeout_s: float = 60) -> None:
    """No orphan, no duplicate, nothing left to do: jobs, replicas and routes are the same."""
    wait_for(
        "the fleet to be as its spec says",
        lambda: _settled(fleet, replicas),
        timeout_s=timeout_s,
    )


def _settled(fleet: Fleet, replicas: int) -> bool:
    """Whether all of it holds at one time: where walltimes are short, the next change is near."""
    before = live(fleet)
    status = fleet.status()
    if status["actions"]:
        return False
    jobs = [job for job in fleet.jobs() if job[2] in LIVE]
    known = {str(replica["job_id"]): replica for replica in status["replicas"]}
    wanted = {model["name"]: model["revision"] for model in status["models"]}
    names = [replica["name"] for replica in known.values()]
    return (
        before == sorted(known) == sorted(job[0] for job in jobs)
        and len({job[1] for job in jobs}) == len(jobs) == replicas
        and all(replica["routed"] for replica in known.values())
        and all(name["revision"] == wanted[name["model"]] for name in names)
    )
