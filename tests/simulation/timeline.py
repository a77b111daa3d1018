"""One virtual time for everything that is simulated."""

import heapq
from collections.abc import Callable

START = 1_000_000.0


class Timeline:
    """A clock and what is going to happen. `watch` is called after each thing that happened."""

    def __init__(self) -> None:
        self.now = START
        self.watch: Callable[[], None] = lambda: None
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def after(self, delay_s: float, happen: Callable[[], None]) -> None:
        """Let something happen later; things of one moment happen in the order of their calls."""
        self._count += 1
        heapq.heappush(self._queue, (self.now + delay_s, self._count, happen))

    def advance(self, seconds: float) -> None:
        """Let time pass and happen what is due."""
        until = self.now + seconds
        while self._queue and self._queue[0][0] <= until:
            self.now, _, happen = heapq.heappop(self._queue)
            happen()
            self.watch()
        self.now = until
