"""What becomes of measurements, without measuring: pairs, medians, void runs, goals. Pure."""

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

# Above this the machine's own queueing, not the path, is what a latency shows.
MOST_BUSY = 0.70


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of the load tool; shares are of all processors of the machine."""

    seconds: float
    requests: int
    p50_ms: float
    p99_ms: float
    failed: int
    busy: float = 0.0
    others: float = 0.0  # busy with what is no process of the bench

    @property
    def per_s(self) -> float:
        return self.requests / self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """The median of some values and how far they reach."""

    median: float
    low: float
    high: float
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What a value is to be: at most, or at least, so much."""

    limit: float
    at_least: bool = False

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


def parse_wrk(text: str) -> Run:
    """Return what wrk.lua printed at the end. Raises ValueError with wrk's last line otherwise."""
    last = (text.strip().splitlines() or ["no output"])[-1]
    try:
        said = json.loads(last)
        run = Run(
            seconds=said["seconds"],
            requests=said["requests"],
            p50_ms=said["p50_us"] / 1e3,
            p99_ms=said["p99_us"] / 1e3,
            failed=said["failed"],
        )
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"wrk said: {last}") from None
    if run.requests == 0:
        raise ValueError("wrk finished no request")
    return run


def turns(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Yield round and name; every other round backwards, so that no path always comes later."""
    for at in range(rounds):
        for name in names if at % 2 == 0 else reversed(names):
            yield at, name


def void(run: Run, most_busy: float = MOST_BUSY) -> str | None:
    """Return why a run says nothing about the path, or None."""
    if run.failed:
        return f"{run.failed} requests failed"
    if run.busy > most_busy:
        return f"the processors were {run.busy:.0%} busy"
    return None


def spread(values: Sequence[float]) -> Spread:
    """Return median and reach of at least one value."""
    return Spread(
        median=statistics.median(values), low=min(values), high=max(values), count=len(values)
    )


def paired(
    reference: Mapping[int, Run], runs: Mapping[int, Run], of: Callable[[Run, Run], float]
) -> Spread:
    """Return the spread of `of(reference, run)` over the rounds that both took part in."""
    return spread([of(reference[at], runs[at]) for at in sorted(reference.keys() & runs.keys())])


def added_ms(reference: Run, run: Run) -> float:
    """How much more the median request takes."""
    return run.p50_ms - reference.p50_ms


def rate_ratio(reference: Run, run: Run) -> float:
    """Requests a second, as a share of the reference's."""
    return run.per_s / reference.per_s
