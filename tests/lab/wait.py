"""Waiting: always for a named thing, with a deadline, and never silently."""

import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

# Short enough not to be felt, long enough to cost nothing; for what is slow to ask, in proportion.
POLL_S = 0.05
MOST_POLL_S = 2.0
# A person looking on wants a sign of life about this often.
ALOUD_EVERY_S = 5.0


class LabError(Exception):
    """The lab could not do what was asked; the message says what to look at."""


def wait_for(
    what: str,
    ask: Callable[[], T | None],
    *,
    timeout_s: float = 30.0,
    say: Callable[[str], None] | None = None,
) -> T:
    """Ask until the answer is true, and return it; LabError names what never came."""
    start = now = time.monotonic()
    told = start
    while True:
        asked = now
        if answer := ask():
            return answer
        now = time.monotonic()
        if now - start > timeout_s:
            raise LabError(f"waited {timeout_s:.0f} s for {what}")
        if say and now - told > ALOUD_EVERY_S:
            told = now
            say(f"waiting for {what}: {now - start:.0f} s")
        # Most of what is waited for tells nobody; what is slow to ask is asked less often.
        time.sleep(min(max(POLL_S, 2 * (now - asked)), MOST_POLL_S))
        now = time.monotonic()


def run_aloud(what: str, argv: Sequence[str], log: Path, say: Callable[[str], None]) -> None:
    """Run a long command: its output goes to the log, its latest line is said now and then."""
    start = time.monotonic()
    say(f"{what}: started")
    with log.open("a") as out:
        # Others must be able to read what is built, whatever the caller's umask.
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, umask=0o022
        )
        while True:
            try:
                code = process.wait(ALOUD_EVERY_S)
                break
            except subprocess.TimeoutExpired:
                say(f"{what}: {time.monotonic() - start:.0f} s, {tail(log)}")
    if code != 0:
        raise LabError(f"{what} failed ({code}): {tail(log, 5)} (see {log})")
    say(f"{what}: done in {time.monotonic() - start:.0f} s")


def tail(log: Path, lines: int = 1) -> str:
    """The last lines of a log that say something, for an error's message."""
    text = log.read_text(errors="replace") if log.exists() else ""
    said = [line.strip()[:200] for line in text.splitlines() if line.strip()]
    return "\n".join(said[-lines:]) or "no output"
