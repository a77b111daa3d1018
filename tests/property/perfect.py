"""A perfect world: what is submitted becomes ready, routes take, drains end, and all is seen."""

from dataclasses import dataclass, replace

from reconciler.memory import learn, remember
from reconciler.naming import Comment, ReplicaName, Run
from reconciler.plan import Cancel, Drain, Plan, Route, Submit
from reconciler.planner import plan
from reconciler.routes import render_gateway
from reconciler.spec import Fleet
from reconciler.state import GatewayView, Health, Job, Memory, Observation, Phase, Probe
from tests.property.worlds import World
from tests.unit.build import DIGEST, KEYS, RING

_STEP_S = 30.0
_WALLTIME_S = 4 * 3600
_DIGESTS = {"one": DIGEST, "two": DIGEST}


@dataclass(slots=True)
class Perfect:
    """What is true now. `cycle` looks, plans and acts once, and then time goes on."""

    fleet: Fleet
    memory: Memory
    allow_destroy: frozenset[str]
    at: float
    jobs: list[Job]
    gateways: tuple[GatewayView, ...]
    next_id: int = 1000
    step_s: float = _STEP_S

    def cycle(self) -> Plan:
        seen = self.look()
        self.memory = learn(self.memory, seen)
        decided = plan(self.fleet, seen, self.memory, self.allow_destroy)
        self.memory = remember(self.memory, decided)
        for action in decided.actions:
            self._act(action)
        self.at = self._later(decided)
        self.jobs = [self._mended(job) for job in self.jobs if self._lives(job)]
        self.gateways = tuple(replace(view, old_workers=0) for view in self.gateways)
        return decided

    def look(self) -> Observation:
        jobs = tuple(self.jobs)
        return Observation(
            at=self.at,
            jobs=jobs,
            nodes={},
            probes={
                job.key: Probe(health=Health.READY, ongoing=0)
                for job in jobs
                if job.run is not None
            },
            gateways=self.gateways,
            image_digests=_DIGESTS,
            keyring=RING,
        )

    def serving(self) -> set[ReplicaName]:
        """Who gets requests and answers them; of two jobs of one name one is enough."""
        routed = [{target.key for target in view.targets} for view in self.gateways]
        return {
            job.name
            for job in self.jobs
            if job.run is not None
            and not job.run.draining
            and all(job.key in keys for keys in routed)
        }

    def _act(self, action: Submit | Route | Drain | Cancel) -> None:
        match action:
            case Submit():
                self._submit(action)
            case Route():
                self.gateways = tuple(
                    replace(view, generation=action.generation, targets=action.targets)
                    if view.name in action.gateways
                    else view
                    for view in self.gateways
                )
            case Drain() | Cancel():
                self.jobs = [job for job in self.jobs if job.key != action.job.key]

    def _submit(self, action: Submit) -> None:
        model = self.fleet.model(action.name.model)
        assert model is not None
        self.next_id += 1
        self.jobs.append(
            Job(
                id=self.next_id,
                submitted_at=int(self.at),
                name=action.name,
                state="PENDING",
                reason="Priority",
                nodes="",
                started_at=None,
                ends_at=int(self.at) + (action.walltime_s or _WALLTIME_S),
                restarts=0,
                comment=Comment(
                    gpus=model.resources.gpus_total,
                    commit=None,
                    run=None,
                    succeeds=action.succeeds,
                    protect=model.protect,
                    keys=KEYS,
                ),
            )
        )

    def _later(self, decided: Plan) -> float:
        """The time of the next look: soon, or when what is waited for has passed."""
        waits = [note.until for note in decided.notes if note.until is not None]
        idle = not decided.actions and not decided.converged and waits
        return max(self.at + self.step_s, min(waits) if idle else 0.0)

    def _lives(self, job: Job) -> bool:
        ended = job.phase in (Phase.ENDED, Phase.ENDING)
        draining = job.run is not None and job.run.draining
        return not ended and not draining and (job.ends_at is None or job.ends_at > self.at)

    def _mended(self, job: Job) -> Job:
        """The job as a perfect world has it next: running, published, ready."""
        model = self.fleet.model(job.name.model)
        comment = job.comment or Comment(
            gpus=model.resources.gpus_total if model else 1, commit=None, run=None, keys=KEYS
        )
        run = Run(
            node="node1",
            restarts=0,
            # As in worlds.py: a world that has settled must not move.
            address=f"10.0.{job.id // 250}.{job.id % 250}:20000",
            trap_ready=True,
            ready_at=job.run.ready_at if job.run and job.run.ready_at else int(self.at),
            draining=False,
        )
        return replace(
            job,
            state="RUNNING",
            nodes="node1",
            restarts=0,
            started_at=job.started_at or int(self.at),
            comment=replace(comment, run=run),
        )


def start(world: World) -> Perfect:
    """The perfect world that begins as another one is: nothing of it needs to be right."""
    gateways = tuple(
        GatewayView(name=view.name, generation=render_gateway(world.fleet, ()).generation)
        if view.error
        else view
        for view in world.observation.gateways
    )
    jobs = [_possible(world.fleet, job) for job in world.observation.jobs or ()]
    return Perfect(
        fleet=world.fleet,
        memory=world.memory,
        allow_destroy=frozenset({"gone"}),
        at=world.observation.at,
        jobs=jobs,
        gateways=gateways,
    )


def _possible(fleet: Fleet, job: Job) -> Job:
    """The job without what no perfect world can mend."""
    model = fleet.model(job.name.model)
    if model is None:
        return job
    if job.comment is not None and job.name.revision == model.revision(DIGEST):
        # Of one revision all hold the same; more would block the budget for good.
        return replace(job, comment=replace(job.comment, gpus=model.resources.gpus_total))
    return job
