"""Strategies of specs, observations and memories: small, and as strange as the world can be."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from hypothesis import strategies as st

from reconciler.hostlist import expand
from reconciler.naming import Comment, ReplicaName, Run
from reconciler.plan import Plan
from reconciler.planner import plan
from reconciler.spec import Fleet, impossibilities
from reconciler.state import (
    PHASES,
    Cause,
    DrainClock,
    Failure,
    Failures,
    GatewayView,
    Health,
    Job,
    JobKey,
    Memory,
    Observation,
    Phase,
    Probe,
    Progress,
    Target,
)
from tests.unit.build import AT, DIGEST, KEYS, OLD, RING, fleet, model_record, rendered

NAMES = ("alpha", "beta", "gamma")
GONE = "gone"  # a model that no spec has
IMAGES = ("one", "two")
NODES = ("node1", "node2", "node3")
WIDE = ("node[1-2]", "node[1,3]")
# Words that no release of Slurm has had, and the adapter's own.
UNKNOWN_STATES = ("HIBERNATED", "", "running", "UNREADABLE")
# What jobs take: all there are, fewer or one that was revoked, or that none is needed.
_KEYS = (KEYS, KEYS, KEYS, KEYS[:1], (), ("cccccccc", *KEYS), ("cccccccc",))
STATES = (*PHASES, *UNKNOWN_STATES)
_AT = int(AT)
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """The arguments of one plan()."""

    fleet: Fleet
    observation: Observation
    memory: Memory
    allow_destroy: frozenset[str] = frozenset()

    def plan(self) -> Plan:
        return plan(self.fleet, self.observation, self.memory, self.allow_destroy)

    @property
    def jobs(self) -> Mapping[JobKey, Job]:
        return {job.key: job for job in self.observation.jobs or ()}


# Made once: building and checking strategies anew costs more than all that is drawn from them.
_INDEX = {size: st.integers(0, size - 1) for size in range(1, 40)}


@dataclass(frozen=True, slots=True)
class Pick:
    """Draws one of several values; the first is the simplest, which failures shrink to."""

    draw: st.DrawFn

    def __call__(self, *values: T) -> T:
        return values[self.draw(_INDEX[len(values)])]

    def some(self, values: Sequence[T]) -> list[T]:
        """Draw a third of the values or so."""
        return [value for value in values if self(False, False, True)]

    def maybe(self, value: T) -> T | None:
        return self(None, value)


@st.composite
def fleets(draw: st.DrawFn, *, roomy: bool = False) -> Fleet:
    """A spec that `fleet validate` takes; `roomy`: its budget lets every rollout take a step."""
    pick = Pick(draw)
    models = [_model(pick, name, roomy) for name in NAMES[: pick(1, 2, 3)]]
    sizes = [model["resources"]["gpus"] * model["resources"]["nodes"] for model in models]
    held = sum(model["replicas"] * size for model, size in zip(models, sizes, strict=True))
    most = max(sizes)
    rollouts = [(1, 0), (0, 1), (1, 1), (2, 0), (0, 2), (2, 2)]
    surge, unavailable = pick(*rollouts)
    built = fleet(
        *models,
        budget={"gpus": max(held, most) + pick(0, 1, 2, 4) + (most if roomy else 0)},
        images={name: {"runtime": "none", "path": f"/opt/{name}"} for name in IMAGES},
        gateway={"hosts": [{"name": f"gateway{at}"} for at in range(pick(1, 2))]},
        defaults={
            "startup_timeout_s": 600,
            "drain_timeout_s": 60,
            "rollout": {"max_surge": surge, "max_unavailable": unavailable},
        },
    )
    assert not list(impossibilities(built))
    return built


def _model(pick: Pick, name: str, roomy: bool) -> dict[str, Any]:
    return model_record(
        name=name,
        image=pick("one", "one", "two"),
        replicas=pick(1, 0, 2, 3),
        # A suspended model may hold what others need for as long as it likes.
        suspend=not roomy and pick(False, False, False, True),
        protect=pick(False, True),
        resources={"nodes": pick(1, 1, 2), "gpus": pick(1, 1, 2, 3), "memory": "1G"},
        args={"tensor-parallel-size": 2},
    )


def wanted_revision(spec: Fleet, name: str) -> str:
    """The revision of a model as the spec wants it, if its image can be read."""
    model = spec.model(name)
    return OLD if model is None else model.revision(DIGEST, spec.replica_access)


def _job(pick: Pick, spec: Fleet, id: int) -> Job:
    """A job of our fleet: half of them run and are well, half are as anything may leave them."""
    well = pick(True, False)
    model = pick(*(one.name for one in spec.models), GONE)
    wanted = wanted_revision(spec, model)
    revision = pick(wanted, wanted, OLD)
    state = "RUNNING" if well else pick("RUNNING", "PENDING", "any")
    state = pick(*STATES) if state == "any" else state
    nodes = pick(*NODES, *WIDE)
    submitted_at = _AT + pick(0, -5, -90, -700, -5_000, -100_000)
    ends_in = pick(None, 100_000, 10_000, 1_500, 400, 100, 30, -10)
    return Job(
        id=id,
        submitted_at=submitted_at,
        name=ReplicaName(fleet=spec.fleet, model=model, revision=revision, ordinal=pick(*range(5))),
        state=state,
        reason=pick("None", "Resources", "InvalidQOS"),
        nodes="" if state == "PENDING" else nodes,
        started_at=None if state == "PENDING" else submitted_at,
        ends_at=None if ends_in is None else _AT + ends_in,
        restarts=0 if well else pick(0, 0, 1),
        comment=_comment(pick, id, expand(nodes)[0], well)
        if well or pick(True, True, False)
        else None,
        exit_status=pick(None, 0, 1, 2, 66, 69, 71),
    )


def _comment(pick: Pick, id: int, node: str, well: bool) -> Comment:
    """What a job carries: nothing of its run, its run, or that of an earlier node."""
    run = Run(
        node=node if well else pick(node, node, "elsewhere"),
        restarts=0 if well else pick(0, 0, 1),
        address=f"10.0.0.{id}:20000",
        trap_ready=well or pick(True, False),
        ready_at=pick(_AT - 50, _AT - 4, None),
        draining=not well and pick(False, True),
    )
    return Comment(
        gpus=pick(1, 0, 2, 3),
        commit=None,
        run=run if well else pick(run, None),
        succeeds=pick(None, None, (1, _AT - 90), (2, _AT)),
        protect=pick(False, True),
        keys=pick(*_KEYS),
    )


def _probe(pick: Pick) -> Probe:
    return Probe(
        health=pick(Health.READY, *Health),
        ongoing=pick(0, 0, 7, None),
        tokens=pick(None, 0.0, 5.0),
        detail=pick("", "no such model"),
    )


def target(job: Job) -> Target:
    """The route to where a job says that it is, or to where nothing is."""
    run = job.comment.run if job.comment else None
    return Target(
        model=job.name.model,
        job_id=job.id,
        submitted_at=job.submitted_at,
        address=run.address if run else "10.9.9.9:1",
        keys=job.comment.keys if job.comment else KEYS,
    )


_GHOST = Target(model=GONE, job_id=99, submitted_at=1, address="10.9.9.9:2")


def _view(pick: Pick, spec: Fleet, name: str, seen: Sequence[Job]) -> GatewayView:
    """What a gateway runs: current, outdated, of dead jobs, or not to be known."""
    if pick(False, False, False, False, True):
        return GatewayView(name=name, error="no answer")
    possible = [*map(target, seen), _GHOST]
    targets = tuple(sorted(one for one in possible if pick(True, False)))
    generation = rendered(spec, targets).generation
    return GatewayView(
        name=name,
        generation=pick(generation, generation, "outdated", None),
        targets=targets,
        old_workers=pick(0, 0, 1),
    )


def _past(pick: Pick) -> float:
    return AT - pick(0.0, 3.0, 59.0, 61.0, 150.0, 5_000.0)


def _failures(pick: Pick, keys: Sequence[JobKey]) -> Failures:
    failed = [
        Failure(node=pick(*NODES, *WIDE), cause=pick(*Cause), at=_past(pick))
        for _ in range(pick(0, 2, 5))
    ]
    return Failures(
        count=pick(0, 1, 3, 6, 2_000),
        last_at=_past(pick),
        counted=frozenset(pick.some(keys)),
        recent=tuple(failed),
        was_ready=pick(False, True),
    )


def _memory(pick: Pick, spec: Fleet, seen: Sequence[Job]) -> Memory:
    """What may be remembered of these jobs, of others and of nothing at all."""
    keys = [*(job.key for job in seen), (98, 1)]
    names = [one.name for one in spec.models]
    return Memory(
        misses={key: pick(1, 2, 4, 1_000) for key in pick.some(keys)},
        drains={
            key: DrainClock(since=_past(pick), idle_since=pick.maybe(_past(pick)))
            for key in pick.some(keys)
        },
        failures={
            f"{name}.{wanted_revision(spec, name)}": _failures(pick, keys)
            for name in pick.some(names)
        },
        leads={name: pick((0.0, 30.0), (3_000.0,)) for name in pick.some(names)},
        led=frozenset(pick.some(keys)),
        progress={key: Progress(tokens=5.0, since=_past(pick)) for key in pick.some(keys)},
        emptied_at=pick(None, None, None, None, AT - 1, AT - 60),
    )


@st.composite
def worlds(draw: st.DrawFn, *, roomy: bool = False) -> World:
    """Any spec, any look at its jobs, and any memory."""
    pick = Pick(draw)
    spec = draw(_ROOMY if roomy else _TIGHT)
    seen = tuple(_job(pick, spec, id) for id in range(1, pick(*range(8)) + 1))
    readable = pick(IMAGES, IMAGES, IMAGES, IMAGES[:1], ())
    observation = Observation(
        at=AT,
        jobs=seen,
        odd_lines=pick(0, 0, 1),
        nodes=pick.maybe({node: pick(*_NODE_WORDS) for node in pick.some(NODES)}),
        probes={job.key: _probe(pick) for job in seen if job.run and pick(True, True, False)},
        gateways=tuple(_view(pick, spec, host.name, seen) for host in spec.gateway.hosts),
        image_digests=dict.fromkeys(readable, DIGEST),
        image_errors=dict.fromkeys(set(IMAGES) - set(readable), "no manifest"),
        keyring=RING,
    )
    return World(
        fleet=spec,
        observation=observation,
        memory=_memory(pick, spec, seen),
        allow_destroy=pick(frozenset(), frozenset({GONE})),
    )


_TIGHT, _ROOMY = fleets(), fleets(roomy=True)
_NODE_WORDS = ("idle", "allocated", "draining", "drained", "down", "down*")


def unseen(world: World) -> World:
    """The same world when the queue can't be read."""
    return replace(
        world,
        observation=replace(world.observation, jobs=None, jobs_error="squeue: timed out"),
    )


def is_known(job: Job) -> bool:
    """Whether anything at all may be done to a job: only if its state has a meaning."""
    return job.phase in (Phase.PENDING, Phase.RUNNING)
