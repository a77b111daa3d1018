"""Many seeds at once: on every processor, with progress, and a table of what has occurred."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context

from reconciler.plan import NoteKind, Reason
from tests.simulation.faults import KINDS
from tests.simulation.run import Result, simulate

# A rule that was never tried is not known to hold: everything must have occurred so often.
LEAST = 20
BOUNDARIES = tuple(
    f"{side} {call}"
    for call in ("submit", "change", "drain", "cancel", "save")
    for side in ("before", "after")
)

_NO_MISTAKES = """\
* **A clock that is ahead.** A walltime's last moment comes by the clock of the reconciler's
  host: it knows no other. One ahead of Slurm's (munge refuses whom it finds more than five
  minutes off) lets a replica without a ready successor go so early. It drains like any other,
  so no request is cut. What Slurm answers proves no offset that a lagging listing could not
  fake, and one that is wrongly believed would cut drains short.
* **A spec that allows no step.** A model's last replica holds the GPUs of its old, larger
  shape, the budget has no room beside it, and `max_unavailable: 0` forbids that it goes first.
  It serves on, and the plan's note names `rollout.max_unavailable`.
* **Jobs that nothing tells of.** An empty listing is suspicious if the memory knows a job,
  submitted one or was about to, or if a gateway routes to one. Where the memory is lost and
  nothing is routed, no trace of them is left to miss; Slurm runs no second job of a name all
  the same."""


@dataclass(slots=True)
class Totals:
    """What many runs have shown together."""

    seeds: int = 0
    cycles: int = 0
    slowest_s: float = 0.0
    failed: list[Result] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    held_back: int = 0

    def add(self, result: Result) -> None:
        """Add one run."""
        self.seeds += 1
        self.cycles += result.failed_at
        self.slowest_s = max(self.slowest_s, result.settled_after_s)
        if result.violation is not None:
            self.failed.append(result)
        self.faults += result.struck
        self.kills += result.boundaries
        self.reasons += result.reasons
        self.notes += result.notes
        self.held_back += result.held_back

    def missing(self, least: int = LEAST) -> list[str]:
        """Return what has occurred too seldom for the run to mean much."""
        wanted: list[tuple[str, Counter[str], Iterable[str]]] = [
            ("fault", self.faults, KINDS),
            ("kill", self.kills, BOUNDARIES),
            ("reason", self.reasons, Reason),
            ("note", self.notes, NoteKind),
        ]
        return [
            f"{sort} {name}: {counts[name]} times"
            for sort, counts, names in wanted
            for name in names
            if counts[name] < least
        ]

    def table(self) -> str:
        """Return the totals for people."""
        lines = [
            f"{self.seeds} seeds, {self.cycles} cycles, {len(self.failed)} failed; "
            f"slowest to settle: {self.slowest_s:.0f} s"
        ]
        for title, counts in self._counts():
            lines.append(f"{title}: {_words(counts)}")
        return "\n".join(lines)

    def markdown(self, seeds: Sequence[int], cycles: int, commit: str) -> str:
        """Return the totals as a page: what was tried how often, and what was let pass."""
        failed = ", ".join(str(result.seed) for result in self.failed) or "none"
        lines = [
            "# What the simulator has shown",
            "",
            "Whole cycles of the reconciler on a simulated cluster, everything going wrong, and a "
            "crash at any point ([development.md](development.md)). Made by",
            "",
            f"    python -m tests.simulation --soak {len(seeds)} --first {seeds[0]} "
            f"--cycles {cycles} --summary docs/simulation.md",
            "",
            "| | |",
            "|---|---:|",
            f"| commit | {commit} |",
            f"| seeds | {seeds[0]} to {seeds[-1]} |",
            f"| cycles | {self.cycles} |",
            f"| seeds that failed | {failed} |",
            f"| seeds that their spec let go no further | {self.held_back} |",
            f"| slowest to settle after the last fault | {self.slowest_s:.0f} s |",
            "",
            "## What is called no mistake",
            "",
            _NO_MISTAKES,
        ]
        for title, counts in self._counts():
            lines += ["", f"## {title.capitalize()}", "", f"{_words(counts)}."]
        return "\n".join(lines) + "\n"

    def _counts(self) -> Sequence[tuple[str, Counter[str]]]:
        return (
            ("faults", self.faults),
            ("killed", self.kills),
            ("reasons", self.reasons),
            ("notes", self.notes),
        )


def _words(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


def soak(
    seeds: Sequence[int],
    cycles: int,
    *,
    processes: int | None = None,
    say: Callable[[str], None] | None = None,
) -> Totals:
    """Run all seeds, on every processor if not told on how many. `say` is told of the progress."""
    totals = Totals()
    jobs = min(len(seeds), processes or os.cpu_count() or 1)
    # A fresh interpreter for each process: a copy of pytest's, threads and all, may deadlock.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        runs = pool.map(simulate, seeds, [cycles] * len(seeds), chunksize=5)
        for result in runs:
            totals.add(result)
            if say is not None and result.violation is not None:
                say(f"seed {result.seed}: {result.violation}")
            if say is not None and totals.seeds % 100 == 0:
                say(f"{totals.seeds} of {len(seeds)} seeds, {len(totals.failed)} failed")
    return totals
