"""What a command that takes a while shows and hears: progress, and that it is told to end."""

import json
import os
import select
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from reconciler.cycle import Outcome
    from reconciler.plan import Plan

# One line at least this often while waiting, so that nobody wonders.
_HEARTBEAT_S = 10.0


class Ending:
    """Whether this process was told to end, and pauses that end when it is."""

    def __init__(self) -> None:
        self._told = False
        # Not an Event: its lock may be held by the very thread that runs the signal's handler.
        self._reader, self._writer = os.pipe()

    def told(self) -> bool:
        return self._told

    def pause(self, seconds: float) -> None:
        select.select([self._reader], [], [], seconds)

    def tell(self, number: int) -> None:
        self._told = True
        os.write(self._writer, b".")
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once

    def close(self) -> None:
        os.close(self._reader)
        os.close(self._writer)


@contextmanager
def ending() -> Iterator[Ending]:
    """Listen to TERM and Ctrl-C until the block's end."""
    listening = Ending()
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda n, _: listening.tell(n)) for number in numbers]
    try:
        yield listening
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
        listening.close()


class Progress:
    """Prints what changes, with the time since the start, and says what is being waited for."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._began = self._said = time.monotonic()
        self._last: dict[str, Any] | None = None
        self._errors: tuple[str, ...] = ()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._began

    def say(self, text: str) -> None:
        if not self._quiet:
            self._said = time.monotonic()
            click.echo(f"[{self.elapsed_s:6.1f} s] {text}")

    def show(self, outcome: "Outcome") -> None:
        from reconciler.render import changes

        record = record_of(outcome.plan)
        for line in changes(self._last, record):
            self.say(line)
        self._last = record
        for error in outcome.errors:
            # The same failure in every cycle is said once, then by the heartbeat.
            if error not in self._errors:
                self.say(f"failed: {error}")
        self._errors = outcome.errors
        if not outcome.plan.converged and time.monotonic() - self._said >= _HEARTBEAT_S:
            self.say(f"waiting: {self.waiting(outcome)}")

    def waiting(self, outcome: "Outcome") -> str:
        from reconciler.render import waiting_text

        failed = [f"failed: {error}" for error in outcome.errors]
        return "; ".join([waiting_text(record_of(outcome.plan)), *failed])


def record_of(plan: "Plan") -> dict[str, Any]:
    """Return the plan as what its JSON holds."""
    from reconciler.plan import to_json

    record: dict[str, Any] = json.loads(to_json(plan))
    return record
