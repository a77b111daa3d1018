"""Small makers of specs and observations: each names only what its test is about."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from reconciler.naming import Comment, ReplicaName, Run
from reconciler.plan import Cancel, Drain, Note, NoteKind, Plan, Route, Submit
from reconciler.routes import GatewayFiles, key_in_use, render_gateway
from reconciler.spec import Fleet, Model
from reconciler.state import (
    GatewayView,
    Health,
    Job,
    JobKey,
    Keyring,
    Memory,
    Observation,
    Probe,
    Target,
    Trust,
)

AT = 1_000_000.0
DIGEST = "path:/opt/engine"
OLD = "0" * 8
KEYS = ("aaaaaaaa", "bbbbbbbb")
RING = Keyring(ids=KEYS, authority="0123456789ab")


def spec_record(*models: Mapping[str, Any], **keys: Any) -> dict[str, Any]:
    """What fleet.yaml holds: valid, small, with the given models and top-level keys."""
    return {
        "version": 1,
        "fleet": "demo",
        "slurm": {"partition": "gpu", "walltime": "4:00:00", "log_dir": "/shared/logs"},
        "budget": {"gpus": 8},
        "images": {"engine": {"runtime": "none", "path": "/opt/engine"}},
        "gateway": {"hosts": [{"name": "gateway"}]},
        "defaults": {"startup_timeout_s": 600, "drain_timeout_s": 60},
        "secret_dir": "/shared/secrets",
        "models": list(models) or [model_record()],
        **keys,
    }


def model_record(**keys: Any) -> dict[str, Any]:
    """One model of a spec: valid, small, with the given keys."""
    return {
        "name": "tiny",
        "image": "engine",
        "weights": "/models/tiny",
        "resources": {"gpus": 1, "cpus": 2, "memory": "4G"},
        "replicas": 2,
        **keys,
    }


def fleet(*models: Mapping[str, Any], **keys: Any) -> Fleet:
    """The fleet of `spec_record`."""
    return Fleet.model_validate(spec_record(*models, **keys))


def model(**keys: Any) -> Model:
    """The model of `model_record`."""
    return Model.model_validate(model_record(**keys))


def revision(wanted: Fleet, name: str = "tiny") -> str:
    """The revision of a model as the fleet wants it."""
    found = wanted.model(name)
    assert found is not None
    return found.revision(DIGEST, wanted.replica_access)


def job(
    of: str,
    *,
    id: int = 1,
    model: str = "tiny",
    ordinal: int = 0,
    fleet: str = "demo",
    state: str = "RUNNING",
    submitted_at: int = 999_000,
    started_at: int | None = 999_900,
    ends_at: int | None = 1_010_000,
    reason: str = "None",
    restarts: int = 0,
    node: str = "node1",
    run_node: str | None = None,
    run_restarts: int = 0,
    published: bool = True,
    ready_at: int | None = 999_950,
    trap_ready: bool = True,
    draining: bool = False,
    vandalised: bool = False,
    gpus: int = 1,
    keys: tuple[str, ...] = KEYS,
    placement: str | None = None,
    avoids: str = "",
) -> Job:
    """A job of revision `of`: running, with its address published, unless told otherwise."""
    run = Run(
        node=run_node or node,
        restarts=run_restarts,
        address=f"10.0.0.{id}:20000",
        trap_ready=trap_ready,
        ready_at=ready_at,
        draining=draining,
    )
    waiting = state == "PENDING"
    told = run if published and not waiting else None
    comment = Comment(
        gpus=gpus, commit=None, run=told, keys=keys, placement=placement, avoids=avoids
    )
    return Job(
        id=id,
        submitted_at=submitted_at,
        name=ReplicaName(fleet=fleet, model=model, revision=of, ordinal=ordinal),
        state=state,
        reason=reason,
        nodes="" if waiting else node,
        started_at=None if waiting else started_at,
        ends_at=ends_at,
        restarts=restarts,
        comment=None if vandalised else comment,
        excluded=avoids,
    )


def target(of: Job) -> Target:
    """The route to a job, as a gateway has it."""
    return Target(
        model=of.name.model,
        job_id=of.id,
        submitted_at=of.submitted_at,
        address=f"10.0.0.{of.id}:20000",
        keys=of.comment.keys if of.comment else KEYS,
    )


def trusted(targets: Iterable[Target], ring: Keyring = RING) -> Trust | None:
    """What a gateway shows to these targets."""
    key = key_in_use(ring.ids, targets)
    return None if key is None else Trust(key=key, authority=ring.authority)


def rendered(
    wanted: Fleet,
    targets: Iterable[Target],
    ring: Keyring = RING,
    exhausted: Collection[str] = (),
    external: Mapping[str, str] = MappingProxyType({}),
) -> GatewayFiles:
    """What a gateway that routes to these targets runs."""
    ordered = tuple(targets)
    return render_gateway(wanted, ordered, trusted(ordered, ring), exhausted, external)


def view(
    wanted: Fleet,
    *routed: Job,
    name: str = "gateway",
    old_workers: int = 0,
    error: str | None = None,
) -> GatewayView:
    """A gateway that runs exactly these routes, or one that can't be asked."""
    if error is not None:
        return GatewayView(name=name, error=error)
    targets = tuple(sorted(map(target, routed)))
    generation = rendered(wanted, targets).generation
    return GatewayView(name=name, generation=generation, targets=targets, old_workers=old_workers)


def observation(
    *jobs: Job,
    healths: Mapping[int, Health] | None = None,
    gateways: Sequence[GatewayView] = (),
    ongoing: int | None = 0,
    at: float = AT,
    digests: Mapping[str, str] | None = None,
    **keys: Any,
) -> Observation:
    """A look at these jobs; each that published an address is READY unless `healths` (by id)."""
    probes = {
        job.key: Probe(health=(healths or {}).get(job.id, Health.READY), ongoing=ongoing)
        for job in jobs
        if job.run is not None
    }
    record: dict[str, Any] = {
        "at": at,
        "jobs": jobs,
        "probes": probes,
        "gateways": tuple(gateways),
        "image_digests": {"engine": DIGEST} if digests is None else digests,
        "keyring": RING,
        **keys,
    }
    return Observation(**record)


def misses(count: int, *jobs: Job) -> Memory:
    """A memory of so many failed looks at each job."""
    return Memory(misses={job.key: count for job in jobs})


def submits(plan: Plan) -> list[Submit]:
    """The plan's submissions."""
    return [action for action in plan.actions if isinstance(action, Submit)]


def ended(plan: Plan) -> dict[int, str]:
    """Which jobs the plan drains or cancels, by id, and why."""
    return {
        action.job.id: f"{action.kind}: {action.reason}"
        for action in plan.actions
        if isinstance(action, Drain | Cancel)
    }


def leaving(plan: Plan) -> dict[int, str]:
    """Which jobs leave, by id, and why."""
    return {
        view.job_id: view.detail for view in plan.replicas if view.status in ("leaving", "draining")
    }


def route(plan: Plan) -> Route | None:
    """The plan's change of routes, if it has one."""
    routes = [action for action in plan.actions if isinstance(action, Route)]
    assert len(routes) <= 1
    return routes[0] if routes else None


def routed_ids(plan: Plan) -> list[int] | None:
    """The ids of the jobs that get requests after the plan's change, None without a change."""
    change = route(plan)
    return None if change is None else sorted(target.job_id for target in change.targets)


def notes(plan: Plan, kind: NoteKind) -> list[Note]:
    """The plan's notes of one kind."""
    return [note for note in plan.notes if note.kind is kind]


def keys(*jobs: Job) -> tuple[JobKey, ...]:
    """The jobs' keys, sorted."""
    return tuple(sorted(job.key for job in jobs))


def comment_text(gpus: int = 1, **run: Any) -> str:
    """A job's comment; with keywords also what the job published, with those fields changed."""
    record: dict[str, Any] = {"v": 1, "commit": None, "gpus": gpus}
    if run:
        record["run"] = {
            "node": "node1",
            "restarts": 0,
            "address": "10.0.0.1:20000",
            "trap_ready": True,
            "ready": 999_950,
            "draining": False,
            **run,
        }
    return json.dumps(record)
