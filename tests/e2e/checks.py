"""What every end-to-end test of a fault or a kill asks: who was lost, and has the fleet settled."""

import asyncio
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from tests.lab.fleet import Fleet
from tests.lab.load import Load, Request, in_flight
from tests.lab.wait import wait_for

# Requests are looked up in the gateway's log by their ids, so no two batches have the same.
_BATCHES = itertools.count()

LIVE = ("PENDING", "RUNNING", "COMPLETING")


def live(fleet: Fleet) -> list[str]:
    """Return the ids of our user's live jobs."""
    return sorted(job[0] for job in fleet.jobs() if job[2] in LIVE)


def routed(fleet: Fleet) -> list[str]:
    return sorted(str(r["job_id"]) for r in fleet.replicas() if r["routed"])


@contextmanager
def running(fleet: Fleet, env: Mapping[str, str] | None = None) -> Iterator[None]:
    """Have `fleet run` at work, one cycle a second."""
    command = fleet.command("run", "--interval", "1")
    with fleet.lab.popen("login", command, env=env) as reconciler:
        try:
            yield
        finally:
            reconciler.kill()


def under_load(
    fleet: Fleet, work: Callable[[], object], *, streams: int = 3, tokens: int = 100
) -> list[Request]:
    """Do the work with requests in flight, batch after batch until it is done; return them all."""

    async def go() -> list[Load]:
        loads: list[Load] = []
        doing: asyncio.Task[object] | None = None
        while doing is None or not doing.done():
            name = f"batch-{next(_BATCHES)}"
            async with in_flight(
                fleet.url, "tiny", plain=3, streams=streams, tokens=tokens, name=name
            ) as load:
                doing = doing or asyncio.create_task(asyncio.to_thread(work))
                loads.append(load)
        await doing
        return loads

    return [request for load in asyncio.run(go()) for request in load.requests]


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
    if "nothing to do" not in fleet.run("plan", check=False):
        return False
    before = live(fleet)
    status = fleet.status()
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
