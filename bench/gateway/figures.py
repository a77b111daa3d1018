"""What becomes of measurements, without measuring: pairs, medians, void runs, goals. Pure."""

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

# Above this the machine's own queueing, not the way, is what a latency shows.
MOST_BUSY = 0.70


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of a client. Shares are of all processors of the machine."""

    p50_ms: float
    p99_ms: float
    per_s: float
    failed: int = 0
    busy: float = 0.0
    others: float = 0.0  # busy with what is no process of the bench


# By way and round. A round lacks a way that could not be measured in it.
Runs = Mapping[str, Mapping[int, Run]]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How a way stands to another one, round by round: ms added to it, or a share of it."""

    reference: str
    unit: str  # "ms" or "x"
    spread: Spread
    goal: Goal | None = None

    @property
    def met(self) -> bool | None:
        return None if self.goal is None else self.goal.met(self.spread.median)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way under one load: what was measured, or why it says nothing."""

    mode: str
    stage: str
    load: str
    way: str
    unit: str  # "ms", of the median request, or "/s"
    value: Spread | None
    p99_ms: float = 0.0
    busy: float = 0.0
    others: float = 0.0
    comparisons: Sequence[Comparison] = ()
    void: str = ""

    @property
    def load_of(self) -> tuple[str, str, str]:
        """What it shares with the rows that it is compared with."""
        return self.mode, self.stage, self.load


def parse_wrk(text: str) -> Run:
    """Return what wrk.lua printed at the end. Raises ValueError with wrk's last line otherwise."""
    last = (text.strip().splitlines() or ["nothing"])[-1]
    try:
        said = json.loads(last)
        if not said["requests"]:
            raise ValueError(f"no request was answered, {said['failed']} failed")
        return Run(
            p50_ms=said["p50_us"] / 1e3,
            p99_ms=said["p99_us"] / 1e3,
            per_s=said["requests"] / said["seconds"],
            failed=said["failed"],
        )
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f"wrk said {last}") from None


def turns(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Yield round and name; every other round backwards, so that no way always comes later."""
    for at in range(rounds):
        for name in names if at % 2 == 0 else reversed(names):
            yield at, name


def void(run: Run) -> str:
    """Return why a latency under a known load says nothing about the way, or nothing."""
    if run.failed:
        return f"{run.failed} requests failed"
    if run.busy > MOST_BUSY:
        return f"the processors were {run.busy:.0%} busy, more than {MOST_BUSY:.0%}"
    return ""


def spread(values: Sequence[float]) -> Spread:
    """Return median and reach of at least one value."""
    return Spread(
        median=statistics.median(values), low=min(values), high=max(values), count=len(values)
    )


def added(runs: Runs, way: str, reference: str, goal: Goal | None = None) -> Comparison | None:
    """Return how many ms the median request takes more; None without a common round."""
    pairs = _pairs(runs, way, reference)
    values = [ours.p50_ms - theirs.p50_ms for ours, theirs in pairs]
    return _comparison(reference, "ms", values, goal)


def share(runs: Runs, way: str, reference: str, goal: Goal | None = None) -> Comparison | None:
    """Return which share of the reference's requests a second it has; None as `added`."""
    values = [ours.per_s / theirs.per_s for ours, theirs in _pairs(runs, way, reference)]
    return _comparison(reference, "x", values, goal)


def _pairs(runs: Runs, way: str, reference: str) -> Sequence[tuple[Run, Run]]:
    if way == reference or way not in runs or reference not in runs:
        return []
    ours, theirs = runs[way], runs[reference]
    return [(ours[at], theirs[at]) for at in sorted(ours.keys() & theirs.keys())]


def _comparison(
    reference: str, unit: str, values: Sequence[float], goal: Goal | None
) -> Comparison | None:
    if not values:
        return None
    return Comparison(reference=reference, unit=unit, spread=spread(values), goal=goal)


def row(
    runs: Mapping[int, Run],
    of: Callable[[Run], float],
    *,
    where: tuple[str, str, str],
    way: str,
    unit: str,
    comparisons: Sequence[Comparison | None],
    why: str = "",
) -> Row:
    """Return the row of a way's runs; `where` is mode, stage, load, `why` what made runs void."""
    mode, stage, load = where
    some = list(runs.values())
    if not some:
        return Row(
            mode=mode, stage=stage, load=load, way=way, unit=unit, value=None, void=why or "no run"
        )
    return Row(
        mode=mode,
        stage=stage,
        load=load,
        way=way,
        unit=unit,
        value=spread([of(run) for run in some]),
        p99_ms=statistics.median(run.p99_ms for run in some),
        busy=statistics.median(run.busy for run in some),
        others=statistics.median(run.others for run in some),
        comparisons=[one for one in comparisons if one],
    )
