"""What must hold at every instant, by its number in docs/architecture.md.

The checks know the truth of the simulated world, and of the reconciler only its plans and what it
does to that world. Where the truth could not be known to it, the check says so.
"""

from collections.abc import Iterable, Mapping

from reconciler.naming import parse_comment, parse_name
from reconciler.plan import Cancel, Drain, JobRef, NoteKind, Plan, Reason, Route, Status, Submit
from reconciler.spec import MARGIN_S, Fleet, Model
from reconciler.state import Health, JobKey, Probe
from tests.simulation.cluster import FLEET, STARTED, SimJob
from tests.simulation.gateways import Configuration, SimGateway
from tests.simulation.world import Cycle, SimWorld, Watch

MOST_SLURM_QUERIES = 3
# A plan owns what was listed to it; a job this young may have come after that.
_YOUNG_S = 60.0
# A cycle's time is the one that it began at.
_SLACK_S = 5.0
_TOO_MANY = (Reason.STALE, Reason.SURPLUS)


class Violation(AssertionError):
    """An invariant does not hold. Number 0 is liveness: the fleet does not settle, or not stay."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(number, text)  # both, so that it can be sent between processes
        self.number = number
        self.text = text

    def __str__(self) -> str:
        return f"invariant {self.number}: {self.text}"


class Invariants(Watch):
    """Watches one world. Raises Violation, and keeps the first one in case it gets caught."""

    def __init__(self, world: SimWorld) -> None:
        self._world = world
        self._plan: Plan | None = None  # of this cycle, once it is made
        self._submitted_gpus = 0  # of this cycle
        self._submitted: set[str] = set()
        self._proven: set[tuple[JobKey, str]] = set()  # has answered a completion at that address
        self.violation: Violation | None = None

    # -- at every instant

    def instant(self) -> None:
        """Check what holds whatever happens."""
        ours = self._world.cluster.ours
        self._never_twice(ours)
        self._told_ones_are_unrouted(ours)

    def _never_twice(self, ours: Iterable[SimJob]) -> None:
        """Invariant 2: Slurm never runs two jobs of one name."""
        seen: set[str] = set()
        for job in ours:
            if job.state in STARTED:
                if job.name in seen:
                    self._fail(2, f"two jobs named {job.name} run at once")
                seen.add(job.name)

    def _told_ones_are_unrouted(self, ours: Iterable[SimJob]) -> None:
        """Invariant 7: no request can reach a replica that was told to drain."""
        told = {
            job.engine.address: job
            for job in ours
            if job.told_at is not None and job.engine is not None and job.engine.draining
        }
        if not told:
            return
        for gateway in self._world.gateways.values():
            for target in gateway.routes():
                job = told.get(target.address)
                if job is not None:
                    self._fail(7, f"{gateway.name} can send requests to {job.name}, told to end")

    # -- at each thing that the reconciler does

    def call(self, what: str) -> None:
        """Invariants 10 and 11: one look a cycle, and few queries."""
        calls = self._world.cycle.calls
        queries = sum(calls[one] for one in ("jobs", "nodes", "maintenances", "script"))
        if queries > MOST_SLURM_QUERIES:
            self._fail(11, "more than three Slurm queries in one cycle")
        if what in ("look", "probe", "pins", "load") and calls[what] > 1:
            self._fail(10, f"{what} is asked more than once in one cycle")

    def accepted(self, job: SimJob) -> None:
        """Invariants 1, 2, 3 and 5, when Slurm has taken a submission."""
        self._needs_a_listing("submitted")
        name, comment = parse_name(job.name), parse_comment(job.base)
        if name is None or name.fleet != FLEET or comment is None or comment.gpus != job.gpus:
            self._fail(3, f"{job.name} could not be found again")
            return
        if job.name in self._submitted:
            self._fail(2, f"{job.name} is submitted twice in one cycle")
        self._submitted.add(job.name)
        if not self._world.cycle.believable:
            return  # what it can't know it can't count
        self._within_budget(job)
        self._not_too_many(job, name.model)

    def _within_budget(self, new: SimJob) -> None:
        """What the reconciler could count, and what it has submitted in this cycle."""
        others = [
            job
            for job in self._world.cluster.ours
            if job is not new and job.listed and not self._on_dead_node(job)
        ]
        self._submitted_gpus += new.gpus
        held, budget = sum(job.gpus for job in others), self._fleet.budget.gpus
        if held + self._submitted_gpus > budget:
            text = f"{held} held and {self._submitted_gpus} submitted of {budget}"
            self._fail(5, f"{new.name}: {text}")

    def _on_dead_node(self, job: SimJob) -> bool:
        node = self._world.cluster.node(job.node)
        word = self._world.cluster.word(node) if node is not None else ""
        return job.state == "COMPLETING" and (word.startswith("down") or word.endswith("*"))

    def _not_too_many(self, new: SimJob, model_name: str) -> None:
        model = self._fleet.model(model_name)
        if model is None:
            self._fail(2, f"{new.name} is submitted, and the spec has no such model")
            return
        notes = self._plan.notes if self._plan is not None else ()
        if any(note.kind is NoteKind.GUARD and note.subject == model_name for note in notes):
            return  # those that are too many wait for somebody's word
        # A canary is wanted beside its model, however many of that there still are.
        canaries = self._canaries(model)
        canary = new.name.split(".")[2] in canaries
        # What is to be succeeded; of a canary also for its keys (a model has its surge for that).
        kinds = {NoteKind.EXPIRING, NoteKind.ROLLING} if canary else {NoteKind.EXPIRING}
        expiring = {note.subject for note in notes if note.kind in kinds}
        names = {
            job.name
            for job in self._world.cluster.ours
            if job.name.split(".")[1] == model_name
            and (job.name.split(".")[2] in canaries) == canary
            and job.state != "COMPLETING"
            and job.id not in self._leaving
            and job.name not in expiring
            and (job.listed or job.name in self._submitted)
            and not (job.engine is not None and job.engine.draining)
        }
        most = model.replicas + self._fleet.defaults.rollout.max_surge
        if canary:
            # What was ready last may have become the canary: then it stands in for the model too.
            tried = sum(variant.replicas for variant in model.variants[1:])
            tried = 0 if self._gave_up(model) else tried
            most = tried if not self._stands_in(new.name) else most + tried
        if len(names) > most:
            self._fail(2, f"{len(names)} replicas of {model_name}, {most} at most are wanted")

    def _stands_in(self, name: str) -> bool:
        """Whether a revision is the one that is kept alive while its model's release fails."""
        _, model, revision, _ = name.split(".")
        memory = self._world.unsaved or self._world.memory
        kept = memory.kept.get(model)
        return kept is not None and kept.revision == revision

    def _gave_up(self, model: Model) -> bool:
        """Whether the plan has given the model's canary up."""
        aborted = self._plan.aborted if self._plan is not None else ()
        return any(one.model == model.name for one in aborted)

    def _canaries(self, model: Model) -> set[str]:
        """The revision of a model's canary, if it has one, by the images as this cycle saw them."""
        digests = self._world.cycle.digests
        return {
            one.revision(digests[one.image]) for one in model.variants[1:] if one.image in digests
        }

    def told(self, ref: JobRef, job: SimJob | None) -> None:
        """Invariants 1, 4, 7 and 8, when a job is about to be told to drain."""
        self._needs_a_listing("told to drain")
        if job is None or job.name != str(ref.name):
            return  # gone, or its id is another's by now: Slurm checks the name before it acts
        self._not_foreign(job)
        if job.engine is None:
            return
        if job.state == "RUNNING" and not job.engine.trap:
            self._fail(7, f"{job.name} is signalled before it has its trap: that cuts it")
        self._spares_the_last(ref, job)

    def cancelled(self, ref: JobRef, job: SimJob | None, *, pending: bool) -> None:
        """Invariants 1, 4, 7 and 8, when a job is about to be cancelled."""
        self._needs_a_listing("cancelled")
        if job is None or job.name != str(ref.name):
            return
        self._not_foreign(job)
        if job.engine is None or pending:
            return
        self._cuts_nothing(job)
        # What has had its time to drain went when that began.
        if not self._has_had_its_time(job):
            self._spares_the_last(ref, job)

    def _routed(self, job: SimJob) -> bool:
        gateways = self._world.gateways.values()
        return any(job.key == target.key for g in gateways for target in g.routes())

    def _left_at(self, job: SimJob) -> float:
        """When the last gateway stopped to route to it."""
        gateways = self._world.gateways.values()
        return max((gateway.left.get(job.key, 0.0) for gateway in gateways), default=0.0)

    def _has_had_its_time(self, job: SimJob) -> bool:
        """Whether no gateway has routed to it for as long as it may take to drain."""
        off_s = self._world.timeline.now - self._left_at(job)
        return not self._routed(job) and off_s >= job.drain_timeout_s - _SLACK_S

    def _cuts_nothing(self, job: SimJob) -> None:
        """Invariant 7: streams are cut only past the time to drain, which begins off the routes."""
        engine, world = job.engine, self._world
        if engine is None or not engine.answers or self._has_had_its_time(job):
            return
        ongoing = engine.ongoing(world.timeline.now)
        if not ongoing and not self._routed(job):
            return
        self._fail(7, f"{job.name} is cancelled with {ongoing} requests in flight")

    def _spares_the_last(self, ref: JobRef, job: SimJob) -> None:
        """Invariant 8: what serves goes for a newer revision only when others serve in its place.

        The same for a walltime that ends, but for its last moments.
        """
        probe = self._world.cycle.probes.get(ref.key)
        model = self._fleet.model(ref.name.model)
        if self._plan is None or model is None or job.engine is None or not job.engine.serves:
            return
        if probe is None or probe.health is not Health.READY:
            return  # that it serves since a moment ago, nobody could know
        reason = next(
            (
                action.reason
                for action in self._plan.actions
                if isinstance(action, Drain | Cancel) and action.job.key == ref.key
            ),
            None,
        )
        if reason not in (Reason.STALE, Reason.EXPIRING, Reason.ABORTED):
            return
        if reason is Reason.EXPIRING and self._ends_soon(job):
            return
        canaries = self._canaries(model)
        canary = ref.name.revision in canaries and not self._gave_up(model)
        ready = sum(
            view.name.model == model.name
            and view.status is Status.READY
            and (not canary or view.name.revision in canaries)
            for view in self._plan.replicas
        )
        needed = model.replicas - self._fleet.defaults.rollout.max_unavailable
        if reason is Reason.ABORTED:
            needed = min(1, model.replicas)
        elif canary:
            needed = sum(variant.replicas for variant in model.variants[1:])
            if self._plan.gpus_budget - self._plan.gpus_held < model.resources.gpus_total:
                needed -= self._fleet.defaults.rollout.max_unavailable
        if ready < needed:
            self._fail(8, f"{job.name} goes although only {ready} of {needed} others serve")

    def _ends_soon(self, job: SimJob) -> bool:
        """Whether only the drain, and a while for cycles and reloads, is left of its walltime.

        By the clock of the reconciler's host: there is no other that it could know, and munge
        refuses everything it asks by one that is more than five minutes off.
        """
        world = self._world
        left_s = (job.ends_at or 0) - world.timeline.now - world.cycle.clock_offset_s
        return left_s <= job.drain_timeout_s + MARGIN_S

    def rerouted(self, gateway: SimGateway, before: Configuration | None) -> None:
        """Invariants 1 and 6, when a gateway runs another configuration."""
        old = set(before.targets) if before is not None else set()
        new = set(gateway.running.targets) if gateway.running is not None else set()
        key = gateway.running.key if gateway.running is not None else None
        for target in new:
            if key not in target.keys:
                self._fail(7, f"{gateway.name} shows {key} to {target}, which does not take it")
        for target in new - old:
            if (target.key, target.address) not in self._proven:
                self._fail(6, f"{gateway.name} routes to {target}, which has proved nothing")
            job = self._world.cluster.engines.get(target.address)
            name = parse_name(job.name) if job is not None and job.key == target.key else None
            if name is not None and name.model != target.model:
                self._fail(6, f"{gateway.name} sends {target.model} to {job and job.name}")

    def changed(self) -> None:
        """Invariant 1, when a gateway is about to be changed."""
        self._needs_a_listing("rerouted")

    # -- around a cycle

    def begin(self) -> None:
        """A cycle begins."""
        self._plan, self._submitted_gpus = None, 0
        self._submitted.clear()

    def planned(self, plan: Plan) -> None:
        """Invariants 1 and 3, when a cycle has decided."""
        self._plan = plan
        if plan.actions and not self._believable:
            self._fail(1, f"no listing to be trusted, and yet: {plan.actions[0].kind}")
        self._keeps_what_it_cannot_see(plan)
        self._owns_all(plan)
        self._takes_no_turns(plan)

    def _takes_no_turns(self, plan: Plan) -> None:
        """Invariant 2: none that waits goes as one too many while another like it is submitted."""
        new = {
            (one.name.model, one.name.revision) for one in plan.actions if isinstance(one, Submit)
        }
        for one in plan.actions:
            if isinstance(one, Cancel) and one.pending and one.reason in _TOO_MANY:
                name = one.job.name
                if (name.model, name.revision) in new and not self._is_outdated(one.job):
                    self._fail(2, f"{name} goes ({one.reason}), and one like it is submitted")

    def _is_outdated(self, ref: JobRef) -> bool:
        """Whether it has a revoked key, or waits where its model is not to run any more.

        Of one that Slurm has forgotten since it was listed nobody can tell.
        """
        job, model = self._world.cluster.jobs.get(ref.id), self._fleet.model(ref.name.model)
        if job is None or model is None:
            return job is None
        comment = parse_comment(job.comment)
        if comment is None:
            return job.reason == "PartitionTimeLimit"
        moved = comment.placement != self._fleet.slurm_for(model).placement
        return moved or not set(comment.keys) <= set(self._world.secrets.ids)

    def probed(self, probes: Mapping[JobKey, Probe]) -> None:
        """Note which addresses have answered a completion, by the truth of the engine there."""
        for key, probe in probes.items():
            job = self._world.cluster.jobs.get(key[0])
            if job is None or job.key != key or job.engine is None:
                continue
            if probe.health is Health.READY and job.engine.completes:
                self._proven.add((key, job.engine.address))

    def _keeps_what_it_cannot_see(self, plan: Plan) -> None:
        """Invariant 1: while no probe gets out, the routes of several replicas stay as they are."""
        cycle = self._world.cycle
        routed = {target.key for view in cycle.views for target in view.targets}
        silent = {key for key in routed if _silent(cycle, key)}
        if not cycle.cut or len(silent) < 2 or 2 * len(silent) <= len(routed):
            return
        # A job that has moved is not at the address that is routed: that route goes.
        here = {job.key: address for address, job in self._world.cluster.engines.items()}
        # What the log says against a canary is no matter of probes.
        given_up = {key for one in plan.aborted for key in one.jobs}
        keep = {
            (target.key, target.address)
            for view in cycle.views
            for target in view.targets
            if target.key in silent
            and target.job_id not in self._leaving
            and target.key not in given_up
            and here.get(target.key) == target.address
        }
        for action in plan.actions:
            if isinstance(action, Route) and keep - {(t.key, t.address) for t in action.targets}:
                self._fail(1, "no probe gets out, and that is taken for the fleet's fault")

    def _owns_all(self, plan: Plan) -> None:
        """Invariants 3 and 4: every live job of ours that was listed is in the plan, no other."""
        world = self._world
        for view in plan.replicas:
            listed = world.cluster.jobs.get(view.job_id)
            if listed is not None and listed.name == str(view.name):
                self._not_foreign(listed)
        if not world.cycle.believable or not plan.replicas:
            return
        known = {view.job_id for view in plan.replicas}
        for job in world.cluster.ours:
            old = job.listed and job.submitted_at < world.timeline.now - _YOUNG_S
            # A garbled record may have lost its id.
            if old and job.id not in known and 0 not in known:
                self._fail(3, f"job {job.id} ({job.name}) is in no plan")

    def stopped(self, error: BaseException) -> None:
        """Invariant 9: an error that is not one line for the user would stop every model."""
        self._fail(9, f"the cycle ended with {type(error).__name__}: {error}")

    # -- helpers

    @property
    def _fleet(self) -> Fleet:
        fleet = self._world.cycle.fleet
        assert fleet is not None
        return fleet

    @property
    def _leaving(self) -> set[int]:
        views = self._plan.replicas if self._plan is not None else ()
        return {v.job_id for v in views if v.status in (Status.LEAVING, Status.DRAINING)}

    @property
    def _believable(self) -> bool:
        """Whether this cycle has a listing, and not one that has lost every job that it knew.

        What was lost with the memory, and is routed by no gateway, nobody can miss: Slurm runs no
        second job of a name all the same.
        """
        return self._world.cycle.believable or self._world.cycle.hidden

    def _needs_a_listing(self, done: str) -> None:
        if not self._believable:
            self._fail(1, f"something was {done} without a listing to be trusted")

    def _not_foreign(self, job: SimJob) -> None:
        if not job.ours:
            self._fail(4, f"job {job.id} ({job.name} of {job.user}) is not ours")

    def _fail(self, number: int, text: str) -> None:
        violation = Violation(number, text)
        if self.violation is None:
            self.violation = violation
        raise violation


def _silent(cycle: Cycle, key: JobKey) -> bool:
    probe = cycle.probes.get(key)
    return probe is not None and probe.health is Health.SILENT
