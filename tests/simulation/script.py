"""A run as text: what a failing seed prints, what a named case in `cases/` is.

::

    # Why this case is here, in as many lines as it needs.
    seed 17
    cycles 60
    12 node_fails 7 40
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tests.simulation.faults import Event, parse
from tests.simulation.run import Result, simulate


@dataclass(frozen=True, slots=True)
class Script:
    """A seed (latencies, choices of the world), a length, and every event by itself."""

    seed: int
    cycles: int
    events: tuple[Event, ...]

    def __str__(self) -> str:
        head = [f"seed {self.seed}", f"cycles {self.cycles}"]
        return "\n".join([*head, *map(str, self.events)]) + "\n"


def read_script(text: str) -> Script:
    """Return the script that a text holds. Raises ValueError."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    (seed_word, seed), (cycles_word, cycles) = lines[0].split(), lines[1].split()
    if (seed_word, cycles_word) != ("seed", "cycles"):
        raise ValueError("a script begins with its seed and its cycles")
    return Script(int(seed), int(cycles), tuple(map(parse, lines[2:])))


def script_of(result: Result) -> Script:
    """Return the script that replays a run, up to where it failed."""
    cycles = min(result.cycles, result.failed_at + 1) if result.violation else result.cycles
    events = tuple(event for event in result.events if event.cycle <= cycles)
    return Script(result.seed, cycles, events)


def shrink(script: Script, number: int) -> Script:
    """Return the script without the events that its violation does not need."""

    def fails(events: Sequence[Event]) -> bool:
        result = simulate(script.seed, script.cycles, events)
        return result.violation is not None and result.violation.number == number

    events = list(script.events)
    size = max(1, len(events) // 2)
    while events:
        at = 0
        while at < len(events):
            fewer = events[:at] + events[at + size :]
            if fails(fewer):
                events = fewer
            else:
                at += size
        if size == 1:
            break
        size = max(1, size // 2)
    return Script(script.seed, script.cycles, tuple(events))
