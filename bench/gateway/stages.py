"""The stages: one connection, sixteen, a stream's first byte, many requests of about a second."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException

from bench.gateway import figures
from bench.gateway.figures import Goal, Row, Run, added, share, spread, turns, void
from bench.gateway.load import Stream, Ticks, wrk
from bench.gateway.ways import RUN, Way, chat, chat_stream, completion

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
# What the paper's bridge adds, in ms, to so many requests at once (its table).
PAPER_MS = {100: 450, 500: 480, 1000: 520}
# Of the issue that asked for it.
MOST_ADDED = Goal(limit=0.3)
LEAST_OF_NGINX = Goal(limit=0.40, at_least=True)
LEAST_OF_ROUTER = Goal(limit=1.5, at_least=True)
MOST_TO_FIRST_BYTE = Goal(limit=1.0)
MOST_IN_A_CROWD = Goal(limit=10.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How long is measured: rounds for each size of a body in KiB, of streams, of crowds."""

    sizes: Mapping[int, int]
    streams: tuple[int, int]  # rounds, and streams of each way in one
    crowds: Sequence[int]
    crowd_rounds: int
    crowd_s: int


FULL = Pace(
    sizes={1: 5, 32: 3, 256: 3},
    streams=(7, 20),
    crowds=(100, 500, 1000),
    crowd_rounds=3,
    crowd_s=4,
)
QUICK = Pace(sizes={1: 1}, streams=(3, 5), crowds=(100,), crowd_rounds=1, crowd_s=3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """The ways of one mode, and how long each is measured."""

    mode: str
    ways: Mapping[str, Way]
    pace: Pace


def one_connection(stage: Stage) -> Iterator[Row]:
    """What each way adds to the median request when nothing else is under way."""
    for size, rounds in stage.pace.sizes.items():
        runs, why = _runs(stage.ways, chat(size), rounds, connections=1)
        for name in stage.ways:
            yield figures.row(
                runs[name],
                lambda run: run.p50_ms,
                where=(stage.mode, "1 connection", f"{size} KiB"),
                way=name,
                unit="ms",
                comparisons=[added(runs, name, "direct", _of_ours(name, MOST_ADDED))],
                why=why.get(name, ""),
            )


def sixteen_connections(stage: Stage) -> Iterator[Row]:
    """How many requests a second each way passes on when sixteen connections never pause."""
    for size, rounds in stage.pace.sizes.items():
        runs, why = _runs(stage.ways, chat(size), rounds, connections=16)
        for name in stage.ways:
            comparisons = [share(runs, name, "nginx", _of_ours(name, LEAST_OF_NGINX))]
            if name == "ours":
                comparisons.append(share(runs, name, "vllm-router", LEAST_OF_ROUTER))
            yield figures.row(
                runs[name],
                lambda run: run.per_s,
                where=(stage.mode, "16 connections", f"{size} KiB"),
                way=name,
                unit="/s",
                comparisons=comparisons,
                why=why.get(name, ""),
            )


def streams(stage: Stage) -> Iterator[Row]:
    """How much later the first byte of a stream comes; connecting is a part of it, for all ways."""
    rounds, count = stage.pace.streams
    text = chat_stream()
    clients = {name: Stream(way.port, way.context) for name, way in stage.ways.items()}
    runs: dict[str, dict[int, Run]] = {name: {} for name in stage.ways}
    why: dict[str, str] = {}
    for at in range(rounds):
        taken: dict[str, list[float]] = {name: [] for name in stage.ways if name not in why}
        began = Ticks.now()
        for _, name in turns(list(taken), count):
            try:
                ms = clients[name].first_byte_ms(CHAT, text, stage.ways[name].key)
                taken[name].append(ms)
            except (ValueError, OSError, HTTPException) as error:
                why[name] = str(error)
        busy, others = began.shares(Ticks.now())
        for name, values in taken.items():
            if name not in why:
                p50, most = spread(values).median, max(values)
                runs[name][at] = Run(p50_ms=p50, p99_ms=most, per_s=0, busy=busy, others=others)
    for client in clients.values():
        client.close()
    for name in stage.ways:
        yield figures.row(
            {} if name in why else runs[name],
            lambda run: run.p50_ms,
            where=(stage.mode, "first byte of a stream", ""),
            way=name,
            unit="ms",
            comparisons=[added(runs, name, "direct", _of_ours(name, MOST_TO_FIRST_BYTE))],
            why=why.get(name, ""),
        )


def crowds(stage: Stage) -> Iterator[Row]:
    """What is added to many requests of a second at once, where the machine is not the limit."""
    ways = {name: stage.ways[name] for name in CROWDED if name in stage.ways}
    for crowd in stage.pace.crowds:
        runs, why = _crowd(ways, crowd, stage.pace)
        for name in ways:
            load = f"{crowd} at once (the paper: +{PAPER_MS[crowd]} ms)"
            yield figures.row(
                runs[name],
                lambda run: run.p50_ms,
                where=(stage.mode, "requests of 1 s", load),
                way=name,
                unit="ms",
                comparisons=[added(runs, name, "direct", _of_ours(name, MOST_IN_A_CROWD))],
                why=why,
            )


# A router of others would only cost time here: no goal looks at it.
CROWDED = ("direct", "nginx", "ours")
STAGES = {
    "one": one_connection,
    "sixteen": sixteen_connections,
    "streams": streams,
    "crowds": crowds,
}


def _crowd(ways: Mapping[str, Way], crowd: int, pace: Pace) -> tuple[figures.Runs, str]:
    """Return the rounds in which no run was void, and why the last other one was."""
    runs: dict[str, dict[int, Run]] = {name: {} for name in ways}
    why = ""
    for at in range(2 * pace.crowd_rounds):
        found, failed = _runs(
            ways,
            completion(),
            1,
            path=COMPLETIONS,
            connections=crowd,
            seconds=pace.crowd_s,
            spread_ms=1000,
            backwards=at % 2 == 1,
        )
        said = [*failed.values(), *(void(run[0]) for run in found.values() if run)]
        if any(said):
            why = next(filter(None, said))
            continue
        for name, run in found.items():
            runs[name][at] = run[0]
        if all(len(some) == pace.crowd_rounds for some in runs.values()):
            break
    return runs, why


def _runs(
    ways: Mapping[str, Way],
    body: bytes,
    rounds: int,
    *,
    connections: int,
    path: str = CHAT,
    seconds: int = 1,
    spread_ms: int = 0,
    backwards: bool = False,
) -> tuple[figures.Runs, Mapping[str, str]]:
    """Return the runs by way and round, taken in turns, and why a way's last failed run did."""
    file = RUN / "body"
    file.write_bytes(body)
    runs: dict[str, dict[int, Run]] = {name: {} for name in ways}
    why: dict[str, str] = {}
    order = [*ways][:: -1 if backwards else 1]
    for at, name in turns(order, rounds):
        try:
            run = wrk(
                ways[name].url + path,
                ways[name].key,
                file,
                connections=connections,
                seconds=seconds,
                spread_ms=spread_ms,
            )
        except ValueError as error:
            why[name] = str(error)
            continue
        if run.failed:
            why[name] = void(run)
        else:
            runs[name][at] = run
    return runs, why


def _of_ours(name: str, goal: Goal) -> Goal | None:
    return goal if name == "ours" else None
