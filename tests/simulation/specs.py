"""The fleet spec of a run, and the edits that people make to it meanwhile."""

from dataclasses import dataclass, field
from random import Random
from typing import Any

from reconciler.spec import Fleet, impossibilities
from reconciler.state import Pause
from tests.simulation.cluster import FLEET

# Beyond any other edit, so that a canary's revision is nobody else's until it is promoted.
CANARY = 1_000_000
# A canary with no share of its own, with one, and with the one at which it does worse.
WORSE = 30
SHARES = (None, 20, WORSE)
NAMES = ("alpha", "beta", "gamma", "delta")
# What the one tenant may spend a day.
ALLOWANCE = 1000
_FALLBACK = {"url": "https://models.example.org/v1", "model": "big", "key_file": "/etc/fleet/key"}
BAD = ("crash", "oom", "hang", "sick", "arguments", "weights", "image", "rejected")


@dataclass(slots=True)
class Wanted:
    """One model of the spec, as an edit changes it."""

    replicas: int
    gpus: int = 1
    image: str = "one"
    partition: str = "gpu"
    version: int = 0  # any change of it is a new revision
    behaviour: str = "good"
    suspend: bool = False
    paused: bool = False
    canary: bool = False
    share: int | None = None
    fallback: bool = False

    @property
    def most(self) -> int:
        """How many replicas are wanted, with the canary's."""
        return self.replicas + self.canary


@dataclass(slots=True)
class Spec:
    """The spec of a run. An edit that would not pass `fleet validate` is taken back."""

    budget: int
    rollout: dict[str, int]
    walltime: str
    gateways: int
    models: dict[str, Wanted] = field(default_factory=dict)
    allow_destroy: frozenset[str] = frozenset()
    _built: Fleet | None = None

    @property
    def fleet(self) -> Fleet:
        """Return the fleet as the spec is now; the same object until the next edit."""
        if self._built is None:
            self._built = Fleet.model_validate(self._record())
        return self._built

    @property
    def pauses(self) -> tuple[Pause, ...]:
        """What somebody has paused."""
        return tuple(
            Pause(model=name, reason="an exercise", by="somebody")
            for name, wanted in self.models.items()
            if wanted.paused
        )

    def commit(self) -> bool:
        """Take an edit into use. Returns False if the spec would be refused."""
        self._built = None
        return not list(impossibilities(self.fleet))

    def _record(self) -> dict[str, Any]:
        return {
            "version": 1,
            "fleet": FLEET,
            "slurm": {"partition": "gpu", "walltime": self.walltime, "log_dir": "/shared/logs"},
            "budget": {"gpus": self.budget},
            "images": {
                name: {"runtime": "none", "path": f"/opt/{name}"} for name in ("one", "two")
            },
            "gateway": {
                "hosts": [{"name": f"gateway{at}"} for at in range(1, self.gateways + 1)],
                "external": {"resolvers": ["10.0.0.53"]},
            },
            "tenants": [{"name": "team", "key_sha256": ["0" * 64], "tokens_per_day": ALLOWANCE}],
            "defaults": {
                "startup_timeout_s": 90,
                "drain_timeout_s": 120,
                "rollout": self.rollout,
            },
            "secret_dir": "/shared/secrets",
            "models": [_model(name, wanted) for name, wanted in self.models.items()],
        }


def _model(name: str, wanted: Wanted) -> dict[str, Any]:
    return {
        "name": name,
        "image": wanted.image,
        "slurm": {"partition": wanted.partition},
        "weights": f"/models/{name}",
        "args": {"seed": wanted.version},
        "env": {} if wanted.behaviour == "good" else {"SIM_BEHAVIOUR": wanted.behaviour},
        "resources": {"gpus": wanted.gpus, "cpus": 4, "memory": "16G"},
        "replicas": wanted.replicas,
        "suspend": wanted.suspend,
        "canary": _canary(wanted) if wanted.canary else None,
        "fallback": _FALLBACK if wanted.fallback else None,
    }


def _canary(wanted: Wanted) -> dict[str, Any]:
    return {"args": {"seed": wanted.version + CANARY}, "share": wanted.share}


def first_spec(random: Random) -> Spec:
    """Return the spec that a run begins with: two or three models, seldom a tight budget."""
    tight = random.random() < 0.2
    chance = 0.2 if tight else random.random()
    spec = Spec(
        budget=6 if tight else 9,
        rollout={"max_surge": 0 if chance < 0.1 else 1, "max_unavailable": int(chance < 0.3)},
        walltime=random.choice(("0:10:00", "1:00:00", "8:00:00")),
        gateways=random.choice((1, 2, 2)),
    )
    for name in NAMES[: random.choice((2, 3))]:
        spec.models[name] = Wanted(replicas=random.choice((1, 2, 2)), image=random.choice(_IMAGES))
    return spec


_IMAGES = ("one", "two")
