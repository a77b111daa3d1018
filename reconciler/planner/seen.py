"""The observation, classified once: what each job is doing, and what each fact means for it."""

from collections.abc import Iterator, Mapping, Sequence

from reconciler.failures import quarantined
from reconciler.naming import ReplicaName
from reconciler.plan import Reason, Status
from reconciler.rollover import due, last_moment
from reconciler.spec import MARGIN_S, Access, Fleet, Model
from reconciler.state import (
    Aborted,
    DrainClock,
    Health,
    Job,
    JobKey,
    Memory,
    Observation,
    Pause,
    Phase,
    Probe,
    Recipe,
    Target,
)
from reconciler.trials import verdict

# Two looks without an answer and a replica leaves the upstreams; it takes more to replace it.
MISSES_TO_DEROUTE = 2
MISSES_TO_REPLACE = 4
# vLLM answers /health while it is hung; a token takes milliseconds, a long prompt some seconds.
HUNG_S = 120.0
# Of a node, by sinfo. A place in the queue is not given up for one that is full or gone.
_WITH_ROOM = ("idle", "mixed")


class Seen:
    """The observation, classified once. Read-only after construction."""

    def __init__(
        self, fleet: Fleet, observation: Observation, memory: Memory, pauses: Sequence[Pause] = ()
    ) -> None:
        self.fleet = fleet
        self.pauses = pauses
        self.observation = observation
        self.memory = memory
        self.at = observation.at
        # Adapters leave foreign jobs out; that nothing is ever done to one does not rest on it.
        ours = (job for job in observation.jobs or () if job.name.fleet == fleet.fleet)
        self.live = tuple(
            sorted(
                (job for job in ours if job.phase is not Phase.ENDED),
                key=lambda job: (job.name, job.key),
            )
        )
        self.routed: Mapping[JobKey, Target] = {
            target.key: target for view in observation.gateways for target in view.targets
        }
        self.quarantined = quarantined(memory, observation.at)
        self.routed_addresses = frozenset(target.address for target in self.routed.values())
        self.observer_suspect = self._observer_suspect()
        self.statuses = {job.key: self._status(job) for job in self.live}
        # Once for all jobs: a search for each would cost models times jobs.
        self.models = {model.name: model for model in fleet.models}
        digests = observation.image_digests
        self.variants = {
            model.name: tuple(
                (variant, _revision(variant, digests, fleet.replica_access))
                for variant in model.variants
            )
            for model in fleet.models
        }
        # Where the waiting ones' models are submitted now.
        waiting = {job.name.model for job in self.live if self.status(job) is Status.PENDING}
        self._placements = {
            name: fleet.slurm_for(self.models[name]).placement
            for name in waiting & self.models.keys()
        }
        self._jobs_of: dict[str, list[Job]] = {}
        for job in self.live:
            self._jobs_of.setdefault(job.name.model, []).append(job)
        self.gpus_held = sum(self._gpus(job) for job in self.live)
        self.aborted = {one.model: one for one in self._aborted()}
        # What was given up is wanted no more, as if its block were gone.
        for name in self.aborted:
            self.variants[name] = self.variants[name][:1]

    @property
    def gpus_free(self) -> int:
        """How many GPUs of the budget nothing holds; below 0 if it was made smaller."""
        return self.fleet.budget.gpus - self.gpus_held

    def jobs_of(self, model: str) -> Sequence[Job]:
        """Return the live jobs that bear a model's name, of any revision."""
        return self._jobs_of.get(model, ())

    def canary_jobs(self, model: str) -> Sequence[Job]:
        """Return which live jobs are a model's canary, with what is to succeed them.

        What has become the canary by an edit may serve in greater numbers: more than are wanted of
        it, and not succeeded by one of these, are stale replicas of the model, which leave when
        others serve in their place. What leaves whatever the others do takes nobody's place.
        """
        return [
            job
            for canary, revision in self.variants[model][1:]
            for job in self._canarys(canary, revision)
        ]

    def _canarys(self, canary: Model, revision: str | None) -> Sequence[Job]:
        all_ = [job for job in self.jobs_of(canary.name) if job.name.revision == revision]
        jobs = [
            job
            for job in all_
            if serves(job, self)
            and self.fault(canary, job) is None
            and not self.must_go(canary, job)
        ]
        # Nor may what succeeds an outdated one be taken for a replica too many.
        differing = frozenset(job.key for job in jobs if self.outdated(job) is not None)
        expiring = self.due(canary, jobs) | differing
        best = sorted(jobs, key=self._canary_order)
        lasting = [job for job in best if job.key not in expiring]
        leaving = [job for job in best if job.key in expiring]
        own = lasting[: canary.replicas] + leaving[: canary.replicas]
        succeeded = {job.comment.succeeds for job in own if job.comment is not None}
        own += [job for job in leaving[canary.replicas :] if job.key in succeeded]
        others = {job.key for job in all_} - {job.key for job in jobs}
        return own + [job for job in all_ if job.key in others]

    def _canary_order(self, job: Job) -> tuple[bool, int, bool, ReplicaName]:
        """Sort key, first to hold the canary's place first.

        One of which nothing is known may serve where requests still reach it, and is never
        touched; where none do, it must not push out what serves.
        """
        unknown = self.is_unknown(job)
        reached = unknown and self._may_be_routed(job)
        return (not reached, -progress(job, self), not unknown, job.name)

    def status(self, job: Job) -> Status:
        return self.statuses[job.key]

    def is_unknown(self, job: Job) -> bool:
        return self.status(job) is Status.UNKNOWN

    def probe(self, job: Job) -> Probe | None:
        return self.observation.probes.get(job.key)

    def misses(self, job: Job) -> int:
        return self.memory.misses.get(job.key, 0)

    def hung(self, job: Job) -> bool:
        """Whether it has had requests for long, and not one token came of them."""
        progress = self.memory.progress.get(job.key)
        return progress is not None and self.at - progress.since >= HUNG_S

    def due(self, model: Model, jobs: Sequence[Job]) -> frozenset[JobKey]:
        """Return which of a model's jobs of one revision must have a successor now."""
        return due(
            jobs,
            at=self.at,
            leads=self.memory.leads.get(model.name, ()),
            drain_timeout_s=self.fleet.drain_timeout_s(model),
            slots=self.gpus_free // model.resources.gpus_total,
            nodes=self.observation.nodes or {},
        )

    def fallback(self, model: Model, revision: str) -> Recipe | None:
        """Return what was ready last of a model, if its wanted revision fails: to go on with."""
        kept = self.memory.kept.get(model.name)
        failures = self.memory.failures.get(f"{model.name}.{revision}")
        failing = failures is not None and failures.count > 0
        return kept if failing and kept is not None and kept.revision != revision else None

    def weight(self, job: Job) -> int:
        """Return how much of its model's requests a job is to get: by its own revision's spec."""
        name, revision = job.name.model, job.name.revision
        for variant, one in self.variants.get(name, ()):
            if one == revision:
                return variant.weight
        kept = self.memory.kept.get(name)
        if kept is not None and kept.revision == revision:
            return kept.model.weight
        return self.models[name].weight if name in self.models else 1

    def outdated(self, job: Job) -> str | None:
        """Return what makes a job stale although its revision is wanted, None if nothing does."""
        if job.comment is None:
            # Until it starts, and writes its comment anew, nothing else tells that it is outdated.
            return "it can't start as it was submitted" if job.never_starts else None
        placement = self._placements.get(job.name.model)
        moved = placement is not None and job.comment.placement not in (None, placement)
        if moved and self.status(job) is Status.PENDING:
            return "it waits where its model is not to run any more (by its slurm block)"
        if self.observation.keyring is None:
            return None
        keys = job.comment.keys
        if self.fleet.replica_access == "protected" and not keys:
            return "it takes requests without a key"
        revoked = [key for key in keys if key not in self.observation.keyring.ids]
        return f"it takes the revoked key {revoked[0]}" if revoked else None

    def fault(self, model: Model, job: Job) -> Reason | None:
        """Return why a job goes whatever others do, None if it may stay. Not of one that drains."""
        if self._is_unhealthy(job):
            return Reason.UNHEALTHY
        if self._is_late(model, job):
            return Reason.STARTUP_TIMEOUT
        if self._fits_before_maintenance(model, job):
            return Reason.MAINTENANCE
        return Reason.QUARANTINE_OVER if self._avoids_in_vain(job) else None

    def must_go(self, model: Model, job: Job) -> bool:
        """Whether only the drain is left of its walltime."""
        if job.ends_at is None or job.phase is not Phase.RUNNING:
            return False
        return self.at >= last_moment(job.ends_at, self.fleet.drain_timeout_s(model))

    def before_maintenance_s(self) -> float | None:
        """Return how long a job may run that starts now, if Slurm holds jobs back for one."""
        known = self.memory.maintenances
        begins = [] if known is None else [one for one in known.begin if one > self.at]
        return min(begins) - self.at - MARGIN_S if begins else None

    def pause(self, model: str) -> Pause | None:
        """Return what has a model left alone now; the latest word if there are several."""
        return next((p for p in reversed(self.pauses) if p.holds(model, self.at)), None)

    def clock(self, job: Job) -> DrainClock:
        return self.memory.drains.get(job.key) or DrainClock(since=self.at)

    def is_routed(self, job: Job) -> bool:
        """Whether a gateway routes to it: requeued, it may have another key at its old address."""
        address = job.run.address if job.run is not None else None
        return job.key in self.routed or address in self.routed_addresses

    def is_routed_where_it_is(self, job: Job) -> bool:
        """Whether it gets requests at its address; at another, as requeued, it has all to prove."""
        routed = self.routed.get(job.key)
        return routed is not None and job.run is not None and routed.address == job.run.address

    def may_get_requests(self, job: Job) -> bool:
        """Whether it answers, and a gateway routes to it or can't be asked whether it does."""
        return self.status(job) in (Status.READY, Status.SILENT) and self._may_be_routed(job)

    def _may_be_routed(self, job: Job) -> bool:
        return self.is_routed(job) or any(view.error for view in self.observation.gateways)

    def _aborted(self) -> Iterator[Aborted]:
        """Yield the canaries that are given up: by an earlier word, or by their trial now."""
        for name, variants in self.variants.items():
            canary = self.models[name].canary
            if canary is None:
                continue
            revision, before = variants[1][1], self.memory.aborted.get(name)
            trial = self.observation.trials.get(f"{name}.{revision}")
            if before is not None and revision in (before.revision, None):
                yield before  # also while it can't be read which revision is wanted
            elif revision is not None and canary.share is not None and trial is not None:
                why = verdict(trial, canary.abort)
                if why is not None:
                    jobs = tuple(job.key for job in self.canary_jobs(name))
                    yield Aborted(model=name, revision=revision, why=why, jobs=jobs)

    def _observer_suspect(self) -> bool:
        """Most routed replicas silent at once: suspect the network here, not the fleet."""
        probes = [self.observation.probes.get(key) for key in self.routed]
        silent = sum(1 for probe in probes if probe is not None and probe.health is Health.SILENT)
        return silent >= 2 and 2 * silent > len(probes)

    def _status(self, job: Job) -> Status:
        if job.phase is Phase.PENDING:
            return Status.PENDING
        if job.phase is Phase.ENDING:
            return Status.ENDING
        if job.phase is Phase.UNKNOWN or job.comment is None:
            return Status.UNKNOWN
        if job.run is not None and job.run.draining:
            return Status.DRAINING
        return self._answering(job)

    def _answering(self, job: Job) -> Status:
        probe = self.probe(job)
        if probe is None or job.run is None:
            return Status.STARTING
        if probe.health is Health.READY:
            return Status.SICK if self.hung(job) else Status.READY
        if probe.health is Health.IMPOSTOR:
            return Status.IMPOSTOR
        was_ready = self.is_routed_where_it_is(job)
        if was_ready and (self.misses(job) < MISSES_TO_DEROUTE or self.observer_suspect):
            return Status.READY
        if probe.health is Health.SILENT:
            return Status.SILENT if was_ready or job.run.ready_at else Status.STARTING
        if probe.health is Health.STARTING and job.run.ready_at is None:
            return Status.STARTING
        return Status.SICK

    def _is_unhealthy(self, job: Job) -> bool:
        evident = self.status(job) in (Status.SICK, Status.IMPOSTOR)
        return evident and (self.misses(job) >= MISSES_TO_REPLACE or self.hung(job))

    def _is_late(self, model: Model, job: Job) -> bool:
        if self.status(job) is not Status.STARTING or job.started_at is None:
            return False
        return self.at - job.started_at > self.fleet.startup_timeout_s(model)

    def _fits_before_maintenance(self, model: Model, job: Job) -> bool:
        """Whether a job that waits for a maintenance to end could run before it if shorter.

        What was cut for it already waits for something else: to cut it again would not help.
        """
        left_s = self.before_maintenance_s()
        if not job.waits_for_reservation or left_s is None or job.limit_s is None:
            return False
        begins = self.at + left_s + MARGIN_S
        cut = job.submitted_at + job.limit_s <= begins
        return not cut and self.fleet.least_walltime_s(model) <= left_s < job.limit_s

    def _avoids_in_vain(self, job: Job) -> bool:
        """Whether a job waits for nodes, and avoids one with room that is in quarantine no more."""
        words = self.observation.nodes or {}
        over = job.avoids - self.quarantined.keys()
        return job.waits_for_nodes and any(words.get(name) in _WITH_ROOM for name in over)

    def _gpus(self, job: Job) -> int:
        """GPUs that count against the budget; of an unreadable comment, what Slurm knows."""
        if job.phase is Phase.ENDING and self._node_is_down(job):
            return 0  # it serves nobody, and a dead node must not block its own replacement
        if job.comment is not None:
            return job.comment.gpus
        if job.gpus is not None:
            return job.gpus
        model = self.models.get(job.name.model)
        return model.resources.gpus_total if model else 1

    def _node_is_down(self, job: Job) -> bool:
        # Of a job that ends Slurm lists the nodes that it still holds.
        words = [(self.observation.nodes or {}).get(name, "") for name in job.node_names]
        return bool(words) and all(w.startswith("down") or w.endswith("*") for w in words)


def serves(job: Job, seen: Seen) -> bool:
    """Whether the job serves or is going to: it counts as a replica that we have."""
    return seen.status(job) not in (Status.DRAINING, Status.ENDING)


def drain_has_begun(job: Job, seen: Seen) -> bool:
    """Whether a drain was allowed once: it goes on, nobody should have to say it twice."""
    return job.key in seen.memory.drains or seen.status(job) is Status.DRAINING


def progress(job: Job, seen: Seen) -> int:
    order = (Status.PENDING, Status.STARTING, Status.SICK, Status.SILENT, Status.READY)
    status = seen.status(job)
    return order.index(status) if status in order else 0


def _revision(model: Model, digests: Mapping[str, str], access: Access) -> str | None:
    """Return the revision that is wanted of a model, None while its image can't be read."""
    digest = digests.get(model.image)
    return None if digest is None else model.revision(digest, access)
