"""Reads a scenario folder: `fleet.yaml` as `fleet` does, and `observation.json` as follows.

::

    {"about": "the rule that the plan shows, in one sentence",
     "jobs": [JOB, ...],            null: the queue can't be read ("jobs_error" says why)
     "odd_lines": 1,                of squeue that could not be read
     "nodes": {"node1": "draining"},   node1 to node9 are idle otherwise
     "maintenances": ["+6h"],       when they begin; only asked if a job waits for one
     "gateways": [GATEWAY, ...],    by default each host of the spec, with the default routes
     "image_errors": {"engine": "why its digest is not known"},
     "keys": ["aaaaaaaa", "bbbbbbbb"],   that there are; or "keys_error": "why that is not known"
     "usage": {"tokens": {"alice": 99}, "complete": true},   counted today; null: not known
     "log_problems": {"gateway": "why its log is not counted"},
     "trials": {"chat": {"canary": [200, 20, 0.5], "rest": [900, 3, 0.4]}},
                                    requests, failed ones, median time to the first byte
     "external_keys": {"/etc/chat.key": "0a1b2c3d"},   a fallback's key file and its id; or
     "external_errors": {"/etc/chat.key": "why there is none"},
     "memory": MEMORY,              of the cycle before; by default nothing
     "allow_destroy": ["model"],
     "pauses": [{"model": "chat", "reason": "why", "by": "who", "until": "+2h"}]}

    JOB: {"id": 11, "model": "chat", "ordinal": 0,
          "revision": "current",    or "old", "canary", "kept" (see MEMORY), or eight hex digits
          "state": "RUNNING", "reason": "None", "node": "node1", "gpus": 2, "exit_status": null,
          "submitted": "-1h", "limit": "24h", "started": "-1h", "ends": "+20h", "restarts": 0,
          "published": true,        the job has written its address ("run_node": on another node)
          "ready": "-50m",          null: not ready by its own word yet
          "trap_ready": true, "draining": false, "succeeds": 10, "protect": false,
          "keys": ["aaaaaaaa", "bbbbbbbb"],   that it takes
          "comment": "unreadable",  a vandal was there
          "avoids": "node7",        nodes that it was told to avoid when it was submitted
          "excluded": "node[7-8]",  those that it avoids by Slurm's word; by default the same
          "placement": "0a1b2c3d",  of the slurm block that it was submitted by; by default as now
          "probe": "ready"}         or {"health": "ready", "ongoing": 3, "tokens": 5, "detail": ""}

    GATEWAY: {"name": "gateway",
              "routes": [11],       by default all running jobs that are ready by their own word;
                                    {"id": 9, "model": "chat"} is a route to a job that is gone
              "exhausted": [],      tenants that it refuses
              "outdated": false,    it runs another configuration than these routes give
              "old_workers": 0, "error": null}

    MEMORY: {"misses": {"11": 1},   by job id
             "drains": {"11": {"since": "-30s", "idle_since": null}},
             "failures": {"chat": {"count": 3, "last": "-5s", "was_ready": false,
                                   "recent": [{"node": "node1", "cause": "out of memory",
                                               "at": "-5s"}]}},   of the current revision
             "leads": {"chat": [300]}, "progress": {"11": {"tokens": 5, "since": "-3m"}},
             "kept": {"chat": {"seed": 1}},   the arguments of the revision that was ready last
             "aborted": {"chat": {"revision": "canary", "why": "why", "jobs": [13]}},
             "emptied": "-2s"}

Everything but `about` has a default. A time is `-5m` or `+2h` from the look, in s, m, h or d.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from reconciler.memory import learn
from reconciler.naming import Comment, ReplicaName, Run
from reconciler.plan import Plan, to_json
from reconciler.planner import plan
from reconciler.render import plan_text
from reconciler.spec import Fleet, load_fleet
from reconciler.state import (
    Aborted,
    Cause,
    DrainClock,
    Failure,
    Failures,
    GatewayView,
    Health,
    Job,
    JobKey,
    Keyring,
    Memory,
    Observation,
    Pause,
    Probe,
    Progress,
    Recipe,
    Target,
    Traffic,
    Trial,
    Usage,
)
from tests.unit.build import KEYS, RING, rendered

FOLDER = Path(__file__).parent
AT = datetime(2026, 3, 1, 12, tzinfo=UTC).timestamp()
DIGEST = "sha256:engine"
OLD = "0" * 8
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_GONE_SINCE = int(AT) - 3600

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One folder."""

    folder: Path
    about: str
    fleet: Fleet
    observation: Observation
    memory: Memory
    allow_destroy: frozenset[str]
    pauses: tuple[Pause, ...]

    @property
    def expected(self) -> Path:
        return self.folder / "plan.txt"

    def plan(self) -> Plan:
        """Return what a cycle decides: it learns from the look first."""
        memory = learn(self.memory, self.observation)
        return plan(self.fleet, self.observation, memory, self.allow_destroy, self.pauses)

    def text(self) -> str:
        """Return what `fleet plan` prints."""
        return plan_text(json.loads(to_json(self.plan()))) + "\n"


def folders() -> list[Path]:
    """Return all scenarios' folders."""
    return sorted(path.parent for path in FOLDER.glob("*/observation.json"))


def load(folder: Path) -> Scenario:
    """Read a folder. Raises ValueError for a key that this file does not describe."""
    fleet = load_fleet(folder)
    record = json.loads((folder / "observation.json").read_text(encoding="utf-8"))
    known(
        record,
        *("about", "jobs", "jobs_error", "odd_lines", "nodes", "gateways", "image_errors"),
        "maintenances",
        *("memory", "allow_destroy", "pauses", "keys", "keys_error", "usage", "log_problems"),
        *("trials", "external_keys", "external_errors"),
    )
    memory = record.get("memory", {})
    kept = {name: _recipe(fleet, name, args) for name, args in memory.get("kept", {}).items()}
    listed = record.get("jobs", [])
    submitted = {item["id"]: int(_moment(item.get("submitted", "-1h"))) for item in listed or ()}
    jobs = tuple(_job(fleet, kept, item, submitted) for item in listed or ())
    probes = {
        job.key: _probe(item.get("probe", "ready"))
        for job, item in zip(jobs, listed or (), strict=True)
        if job.run is not None and item.get("probe", "ready") is not None
    }
    errors = record.get("image_errors", {})
    return Scenario(
        folder=folder,
        about=record["about"],
        fleet=fleet,
        observation=Observation(
            at=AT,
            jobs=None if listed is None else jobs,
            jobs_error=record.get("jobs_error"),
            odd_lines=record.get("odd_lines", 0),
            nodes={f"node{at}": "idle" for at in range(1, 10)} | record.get("nodes", {}),
            maintenances=_begins(record.get("maintenances")),
            probes=probes,
            gateways=_gateways(fleet, jobs, record),
            image_digests={name: DIGEST for name in fleet.images if name not in errors},
            image_errors=errors,
            keyring=None if "keys_error" in record else _keyring(record),
            keyring_error=record.get("keys_error"),
            usage=_usage(record.get("usage")),
            log_problems=record.get("log_problems", {}),
            trials={
                f"{name}.{_canary(fleet, name)}": Trial(**{k: _side(v) for k, v in one.items()})
                for name, one in record.get("trials", {}).items()
            },
            external_keys=record.get("external_keys", {}),
            external_errors=record.get("external_errors", {}),
        ),
        memory=replace(_memory(fleet, jobs, memory), kept=kept),
        allow_destroy=frozenset(record.get("allow_destroy", ())),
        pauses=tuple(_pause(one) for one in record.get("pauses", ())),
    )


def _keyring(record: Record) -> Keyring:
    ids = tuple(record.get("keys", KEYS))
    return replace(RING, ids=ids) if ids else Keyring()


def known(record: Record, *keys: str) -> None:
    """Refuse a record with other keys than these: a misspelt one would be a default in silence."""
    others = record.keys() - set(keys)
    if others:
        raise ValueError(f"unknown: {', '.join(sorted(others))}; known: {', '.join(keys)}")


def moment(text: str | None) -> int | None:
    """Return a time relative to the look as epoch seconds."""
    if text is None:
        return None
    sign = {"-": -1, "+": 1}[text[0]]
    return int(AT) + sign * int(text[1:-1]) * _UNITS[text[-1]]


def _moment(text: str) -> float:
    at = moment(text)
    assert at is not None
    return float(at)


def _revision(fleet: Fleet, model: str) -> str:
    found = fleet.model(model)
    return OLD if found is None else found.revision(DIGEST)


def _canary(fleet: Fleet, model: str) -> str:
    found = fleet.model(model)
    assert found is not None
    return found.variants[-1].revision(DIGEST)


def _side(record: list[float]) -> Traffic:
    requests, errors, median = record
    times = (median, 2 * median, 3 * median)
    return Traffic(
        minutes=60, requests=int(requests), errors=int(errors), refused=0, first_byte_s=times
    )


def _begins(times: list[str] | None) -> tuple[float, ...] | None:
    return None if times is None else tuple(map(_moment, times))


def _usage(record: Record | None) -> Usage | None:
    if record is None:
        return None
    known(record, "tokens", "complete")
    return Usage(tokens_today=record["tokens"], complete=record.get("complete", True))


def _recipe(fleet: Fleet, name: str, args: Record) -> Recipe:
    model = fleet.model(name)
    assert model is not None
    model = model.model_copy(update={"args": args})
    return Recipe.of(fleet, model, digest=DIGEST, program="/opt/vllm", commit=None)


def _pause(record: Record) -> Pause:
    known(record, "model", "reason", "by", "until")
    return Pause(
        model=record.get("model"),
        reason=record["reason"],
        by=record["by"],
        until=moment(record.get("until")),
    )


def _job(
    fleet: Fleet, kept: Mapping[str, Recipe], record: Record, submitted: Mapping[int, int]
) -> Job:
    known(
        record,
        *("id", "model", "ordinal", "revision", "state", "reason", "node", "gpus", "exit_status"),
        *("submitted", "limit", "started", "ends", "restarts", "published", "run_node", "ready"),
        *("trap_ready", "draining", "succeeds", "protect", "comment", "probe"),
        *("keys", "avoids", "excluded", "placement"),
    )
    model = record.get("model", "chat")
    words = {"current": _revision(fleet, model), "old": OLD}
    if model in kept:
        words["kept"] = kept[model].revision
    wanted = fleet.model(model)
    if wanted is not None:
        words["canary"] = wanted.variants[-1].revision(DIGEST)
    revision: str = record.get("revision", "current")
    state = record.get("state", "RUNNING")
    waiting = state == "PENDING"
    return Job(
        id=record["id"],
        submitted_at=submitted[record["id"]],
        name=ReplicaName(
            fleet=fleet.fleet,
            model=model,
            revision=words.get(revision, revision),
            ordinal=record.get("ordinal", 0),
        ),
        state=state,
        reason=record.get("reason", "Priority" if waiting else "None"),
        nodes="" if waiting else record.get("node", "node1"),
        started_at=None
        if waiting
        else moment(record.get("started", record.get("submitted", "-1h"))),
        ends_at=None if waiting else moment(record.get("ends", "+20h")),
        restarts=record.get("restarts", 0),
        comment=None
        if record.get("comment") == "unreadable"
        else _comment(fleet, record, submitted),
        exit_status=record.get("exit_status"),
        limit_s=int(record.get("limit", "24h")[:-1]) * _UNITS[record.get("limit", "24h")[-1]],
        excluded=record.get("excluded", record.get("avoids", "")),
        gpus=record.get("gpus"),
    )


def _comment(fleet: Fleet, record: Record, submitted: Mapping[int, int]) -> Comment:
    model = fleet.model(record.get("model", "chat"))
    succeeds = record.get("succeeds")
    run = Run(
        node=record.get("run_node", record.get("node", "node1")),
        restarts=0,
        address=f"10.0.0.{record['id']}:20000",
        trap_ready=record.get("trap_ready", True),
        ready_at=moment(record.get("ready", record.get("submitted", "-1h"))),
        draining=record.get("draining", False),
    )
    published = record.get("published", record.get("state") != "PENDING")
    return Comment(
        gpus=record.get("gpus", model.resources.gpus_total if model else 1),
        commit=None,
        run=run if published else None,
        succeeds=None if succeeds is None else (succeeds, submitted.get(succeeds, _GONE_SINCE)),
        protect=record.get("protect", False),
        keys=tuple(record.get("keys", KEYS)),
        placement=record.get("placement", fleet.slurm_for(model).placement if model else None),
        avoids=record.get("avoids", ""),
    )


def _probe(record: Record | str) -> Probe:
    if isinstance(record, str):
        return Probe(health=Health(record), ongoing=0 if record == "ready" else None)
    known(record, "health", "ongoing", "tokens", "detail")
    return Probe(
        health=Health(record["health"]),
        ongoing=record.get("ongoing"),
        tokens=record.get("tokens"),
        detail=record.get("detail", ""),
    )


def _gateways(fleet: Fleet, jobs: tuple[Job, ...], look: Record) -> tuple[GatewayView, ...]:
    ids = look.get("external_keys", {})
    external = {
        model.name: ids[model.fallback.key_file]
        for model in fleet.models
        if model.fallback is not None and model.fallback.key_file in ids
    }
    records = look.get("gateways") or [{"name": host.name} for host in fleet.gateway.hosts]
    return tuple(_gateway(fleet, jobs, record, external) for record in records)


def _gateway(
    fleet: Fleet, jobs: tuple[Job, ...], record: Record, external: Mapping[str, str]
) -> GatewayView:
    known(record, "name", "routes", "exhausted", "outdated", "old_workers", "error")
    if record.get("error") is not None:
        return GatewayView(name=record["name"], error=record["error"])
    ready = [job.id for job in jobs if job.run is not None and job.run.ready_at is not None]
    by_id = {job.id: job for job in jobs}
    targets = [
        _gone(route) if isinstance(route, dict) else _target(fleet, by_id[route])
        for route in record.get("routes", ready)
    ]
    exhausted = tuple(record.get("exhausted", ()))
    files = rendered(fleet, targets, exhausted=exhausted, external=external)
    return GatewayView(
        name=record["name"],
        generation="outdated" if record.get("outdated") else files.generation,
        targets=tuple(sorted(targets)),
        old_workers=record.get("old_workers", 0),
        exhausted=exhausted,
    )


def _target(fleet: Fleet, job: Job) -> Target:
    run = job.comment.run if job.comment else None
    model = fleet.model(job.name.model)
    tried = model is not None and model.canary is not None and model.canary.share is not None
    canary = tried and job.name.revision == _canary(fleet, job.name.model)
    address = run.address if run else f"10.0.0.{job.id}:20000"
    return Target(
        model=job.name.model,
        job_id=job.id,
        submitted_at=job.submitted_at,
        address=address,
        keys=job.comment.keys if job.comment else KEYS,
        canary=job.name.revision if canary else "",
    )


def _gone(record: Record) -> Target:
    known(record, "id", "model")
    return Target(
        model=record["model"],
        job_id=record["id"],
        submitted_at=_GONE_SINCE,
        address=f"10.0.0.{record['id']}:20000",
        keys=KEYS,
    )


def _memory(fleet: Fleet, jobs: tuple[Job, ...], record: Record) -> Memory:
    known(record, "misses", "drains", "failures", "leads", "progress", "kept", "emptied", "aborted")
    by_id = {str(job.id): job.key for job in jobs}

    def key(id: str) -> JobKey:
        return by_id.get(id, (int(id), _GONE_SINCE))

    return Memory(
        misses={key(id): count for id, count in record.get("misses", {}).items()},
        drains={key(id): _clock(one) for id, one in record.get("drains", {}).items()},
        failures={
            f"{model}.{_revision(fleet, model)}": _failures(one)
            for model, one in record.get("failures", {}).items()
        },
        leads={model: tuple(map(float, of)) for model, of in record.get("leads", {}).items()},
        progress={
            key(id): Progress(tokens=one["tokens"], since=_moment(one["since"]))
            for id, one in record.get("progress", {}).items()
        },
        aborted={
            name: Aborted(
                model=name,
                revision={"canary": _canary(fleet, name)}.get(one["revision"], one["revision"]),
                why=one["why"],
                jobs=tuple(key(str(id)) for id in one["jobs"]),
            )
            for name, one in record.get("aborted", {}).items()
        },
        emptied_at=moment(record.get("emptied")),
    )


def _clock(record: Record) -> DrainClock:
    known(record, "since", "idle_since")
    return DrainClock(since=_moment(record["since"]), idle_since=moment(record.get("idle_since")))


def _failures(record: Record) -> Failures:
    known(record, "count", "last", "was_ready", "recent")
    return Failures(
        count=record["count"],
        last_at=_moment(record["last"]),
        counted=frozenset(),
        recent=tuple(
            Failure(node=one["node"], cause=Cause(one["cause"]), at=_moment(one["at"]))
            for one in record.get("recent", ())
        ),
        was_ready=record.get("was_ready", False),
    )
