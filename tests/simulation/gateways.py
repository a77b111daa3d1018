"""Simulated NGINX hosts: what gateway.sh and NGINX do with a change, and the requests they pass."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field

from reconciler.errors import GatewayFailed
from reconciler.routes import KEY_FILE, GatewayFiles, parse_exhausted, parse_targets
from reconciler.state import GatewayView, JobKey, Target
from tests.simulation.timeline import Timeline

# An old worker may still pass on a request whose upload began before the reload: the longest
# upload (client_body_timeout, 60 s) and the window for retries after it (routes.py, 25 s).
LONGEST_UPLOAD_S = 85.0


@dataclass(frozen=True, slots=True)
class Configuration:
    """What one generation routes."""

    generation: str
    targets: tuple[Target, ...]
    key: str | None = None  # that it shows to protected replicas
    exhausted: tuple[str, ...] = ()  # tenants that it refuses


@dataclass(slots=True)
class OldWorkers:
    """Workers of an earlier configuration: they may pass requests for a while, then only finish."""

    configuration: Configuration
    passes_until: float
    exits_at: float


@dataclass(slots=True, eq=False)
class SimGateway:
    """One NGINX host."""

    name: str
    timeline: Timeline
    running: Configuration | None = None
    linked: Configuration | None = None  # what a start of NGINX would read
    old: list[OldWorkers] = field(default_factory=list)
    slow: Configuration | None = None  # a reload that NGINX was asked for and has not done yet
    unreachable_until: float = 0.0
    left: dict[JobKey, float] = field(default_factory=dict)  # when it left the routes

    def view(self) -> GatewayView:
        """What `gateway.sh look` tells."""
        now = self.timeline.now
        if now < self.unreachable_until:
            return GatewayView(name=self.name, error=f"gateway {self.name}: no answer in 30 s")
        workers = sum(1 for old in self.old if old.exits_at > now)
        if self.running is None:
            return GatewayView(name=self.name, old_workers=workers)
        return GatewayView(
            name=self.name,
            generation=self.running.generation if self.linked == self.running else None,
            targets=self.running.targets,
            old_workers=workers,
            exhausted=self.running.exhausted,
        )

    def routes(self) -> Iterator[Target]:
        """Yield every target that a request could reach through this host now."""
        if self.running is not None:
            yield from self.running.targets
        now = self.timeline.now
        for old in self.old:
            if old.passes_until > now and old.exits_at > now:
                yield from old.configuration.targets

    def swap(self, files: GatewayFiles) -> Configuration | None:
        """Make a tested configuration current, not yet running. Returns what was current."""
        before = self.linked
        text = files.files["targets.json"]
        generation, targets = parse_targets(text)
        trust = json.loads(text)["trust"]
        if trust is not None and f"secret of {trust['key']}" not in files.secrets[KEY_FILE]:
            raise GatewayFailed(f"gateway {self.name}: nginx: no such file {KEY_FILE}")
        key = trust and trust["key"]
        self.linked = Configuration(generation, targets, key, parse_exhausted(text))
        return before

    def reload(self, *, uploads_s: float, streams_s: float) -> None:
        """Run what is linked; workers of what ran before pass uploads on, then finish streams."""
        now = self.timeline.now
        self.old = [old for old in self.old if old.exits_at > now]
        if self.running is not None and self.running != self.linked:
            gone = set(self.running.targets) - set(self.linked.targets if self.linked else ())
            for target in gone:
                self.left[target.key] = now
            exits_at = now + max(uploads_s, streams_s)
            if exits_at > now:
                self.old.append(OldWorkers(self.running, now + uploads_s, exits_at))
        self.running = self.linked

    def restart(self) -> None:
        """Start NGINX anew: it reads what is linked, and neither old worker nor reload is left."""
        self.old.clear()
        self.slow = None
        self.reload(uploads_s=0.0, streams_s=0.0)

    def refuse_if_unreachable(self) -> None:
        """Raise GatewayFailed while nobody can log in there."""
        if self.timeline.now < self.unreachable_until:
            raise GatewayFailed(f"gateway {self.name}: no answer in 30 s")
