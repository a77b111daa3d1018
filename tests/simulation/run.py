"""One run: a spec, a world, a seed, and cycles in which things go wrong; then calm, and it settles.

Safety: whatever goes wrong, the invariants hold at every instant. Liveness: once nothing goes wrong
any more, the fleet becomes what the spec says within a bound, and stays so.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from random import Random
from typing import Any, TypeVar
from unittest.mock import patch

from reconciler.cycle import cycle
from reconciler.errors import FleetError
from reconciler.memory import FORGET_MAINTENANCES_S
from reconciler.naming import parse_comment
from reconciler.plan import NoteKind, Plan, Status
from reconciler.planner import plan
from reconciler.routes import GatewayFiles, render_gateway
from reconciler.spec import Access, Fleet, Model
from reconciler.state import Target, Trust
from tests.simulation import faults
from tests.simulation.cluster import Cluster, SimJob
from tests.simulation.faults import Event
from tests.simulation.gateways import SimGateway
from tests.simulation.invariants import Invariants, Violation
from tests.simulation.specs import BAD, NAMES, first_spec
from tests.simulation.timeline import Timeline
from tests.simulation.world import Cycle, Killed, SimWorld

T = TypeVar("T")

# A revision that failed by chance five times in a row is halted for an hour (failures.HALT_S).
SETTLES_WITHIN_S = 2 * 3600.0
STAYS_FOR_CYCLES = 4
BAD_RELEASE_CYCLES = 150


@dataclass(slots=True, kw_only=True)
class Result:
    """What a run has shown."""

    seed: int
    cycles: int
    events: Sequence[Event]
    violation: Violation | None = None
    failed_at: int = 0
    struck: Counter[str] = field(default_factory=Counter)
    boundaries: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    settled_after_s: float = 0.0
    held_back: bool = False  # by its spec: see _may_take_no_step

    @property
    def script(self) -> str:
        """The run as text that replays it."""
        lines = [f"seed {self.seed}", f"cycles {self.cycles}", *map(str, self.events)]
        return "\n".join(lines) + "\n"


class HeldBack(Exception):
    """The spec itself lets the run go no further."""


class Simulation:
    """One seed's world and its reconciler."""

    def __init__(
        self,
        seed: int,
        cycles: int,
        events: Sequence[Event] | None = None,
        *,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self._seed, self._cycles = seed, cycles
        random = Random(seed)
        self.spec = first_spec(random)
        drawn = faults.draw(random, cycles)
        self._events = drawn if events is None else list(events)
        self._by_cycle: dict[int, list[Event]] = {}
        for event in self._events:
            self._by_cycle.setdefault(event.cycle, []).append(event)
        self.timeline = Timeline()
        min_job_age_s = random.choice((5.0, 30.0, 300.0))
        cluster = Cluster(
            self.timeline, seed, nodes=4, gpus_per_node=4, min_job_age_s=min_job_age_s
        )
        gateways = [
            SimGateway(f"gateway{at}", self.timeline) for at in range(1, self.spec.gateways + 1)
        ]
        self.world = SimWorld(self.timeline, cluster, gateways)
        self.invariants = Invariants(self.world)
        self.world.watch = self.invariants
        self.timeline.watch = self.invariants.instant
        self._adapters = self.world.adapters
        self._say = say
        self._at_cycle = 0
        self._plan: Plan | None = None
        self.result = Result(seed=seed, cycles=cycles, events=self._events)

    def run(self) -> Result:
        """Run all cycles, then the calm. A violation ends the run and is in the result."""
        try:
            for _ in range(self._cycles):
                self._cycle(self._by_cycle.get(self._at_cycle, ()))
            self.timeline.advance(faults.LATEST_S)
            self._heal()
            self._forget_maintenances()
            self._settle()
            if self._seed % 3 == 0:
                self._release_badly()
        except HeldBack:
            self.result.held_back = True
        except Violation as violation:
            self.result.violation = violation
        self.result.violation = self.invariants.violation or self.result.violation
        self.result.failed_at = self._at_cycle
        self.result.struck = self.world.struck
        self.result.boundaries = self.world.boundaries
        return self.result

    # -- one cycle

    def _cycle(self, events: Sequence[Event]) -> Plan | None:
        """Let one cycle happen, and the time until the next. Returns its plan if it had one."""
        world = self.world
        random = world.random = Random(self._seed * 10_007 + self._at_cycle)
        world.cycle = Cycle()
        for event in events:
            self._tell(f"    {event}")
            self._apply(event, random)
        world.cycle.fleet = self.spec.fleet
        world.cycle.clock_offset_s = world.clock_offset_s
        self.invariants.begin()
        plan = self._once()
        for fault in faults.ARMED_ONCE:
            world.armed.pop(fault, None)
        world.crash_in = None
        self._at_cycle += 1
        acted = plan is not None and plan.actions
        pause_s = 1.0 if acted else random.choice((2.0, 10.0, 10.0, 30.0))
        self.timeline.advance(pause_s / 2)
        self._traffic(random)
        self.timeline.advance(pause_s / 2)
        self.invariants.instant()
        return plan

    def _apply(self, event: Event, random: Random) -> None:
        """Edits and armed faults at once, the others at some moment of the cycle."""
        if event.kind in faults.STRIKES:
            self.timeline.after(
                random.random() * 6.0, lambda: faults.apply(event, self.world, self.spec)
            )
        else:
            faults.apply(event, self.world, self.spec)

    def _once(self) -> Plan | None:
        """Run one cycle of the reconciler, as `fleet run` does."""
        world, fleet = self.world, self.spec.fleet
        self._plan = None
        try:
            with self._adapters.store.locked():
                outcome = cycle(
                    fleet,
                    self._adapters,
                    at=world.clock(),
                    commit=None,
                    say=self._tell,
                    allow_destroy=self.spec.allow_destroy,
                    pauses=self.spec.pauses,
                )
            for error in outcome.errors:
                self._tell(f"failed: {error}")
            told = [note for note in outcome.plan.notes if note.kind is NoteKind.LEFT_OVER]
            self.result.notes[NoteKind.LEFT_OVER] += len(told)
        except Killed as where:
            self._tell(f"killed {where}")
        except FleetError as error:
            self._tell(f"nothing done in this cycle: {error}")
        except Violation:
            raise
        except Exception as error:
            self._tell(f"{type(error).__name__}: {error}")
            self.invariants.stopped(error)
        return self._plan

    def planned(self, plan: Plan) -> None:
        """The reconciler has decided; called before anything of it is done."""
        self._plan = plan
        for action in plan.actions:
            if hasattr(action, "reason"):
                self.result.reasons[action.reason] += 1
        for note in plan.notes:
            self.result.notes[note.kind] += 1
            if note.kind is NoteKind.SUSPICIOUS_LISTING:
                self.world.cycle.suspicious = self.world.lied = True
        if self._say is not None:
            self._describe(plan)
        self.invariants.planned(plan)

    def _traffic(self, random: Random) -> None:
        """Send requests through every route there is."""
        now = self.timeline.now
        for gateway in self.world.gateways.values():
            for target in gateway.routes():
                job = self.world.cluster.engines.get(target.address)
                if job is None or job.engine is None or not job.engine.serves:
                    continue
                if random.random() < 0.6:
                    length_s = random.choice((0.5, 3.0, 8.0, 20.0, 45.0))
                    job.engine.streams.append(now + length_s)
                elif random.random() < 0.02:
                    job.engine.streams.append(now + 600.0)

    # -- the calm

    def _heal(self) -> None:
        """End every fault that lasts. What was broken by then stays for the reconciler to mend."""
        world, cluster = self.world, self.world.cluster
        now = self.timeline.now
        world.cut_until = world.disk_full_until = world.secrets_gone_until = now
        world.external_key_gone_until = world.logs_gone_until = world.spent_until = now
        world.armed.clear()
        world.set_clock(0.0)
        world.image_missing_until = dict.fromkeys(world.image_missing_until, now)
        for gateway in world.gateways.values():
            gateway.unreachable_until = now
        cluster.up = True
        cluster.maintenance_at = None
        for node in cluster.nodes:
            cluster.restore_power(node)
            cluster.resume_node(node)
        for job in list(cluster.jobs.values()):
            job.held, job.shown = False, None
            if job.base and job.live:
                _heal_job(job)
                cluster.publish(job)
        for wanted in self.spec.models.values():
            wanted.suspend = wanted.paused = False
            wanted.behaviour, wanted.partition = "good", "gpu"
        self.spec.walltime = "8:00:00"
        self.spec.allow_destroy = frozenset(NAMES)
        if not self.spec.commit():
            raise AssertionError("the healed spec is refused")
        cluster.kick()

    def _forget_maintenances(self) -> None:
        """Let what is remembered of maintenances be forgotten: it cuts walltimes short."""
        began = self.timeline.now
        while self._cycle(()) and self.timeline.now - began < FORGET_MAINTENANCES_S:
            known = self.world.memory.maintenances
            if known is None or not known.begin:
                break
        self._heal()

    def _settle(self) -> None:
        """Liveness: the fleet becomes what the spec says within a bound, and stays so."""
        began, quiet = self.timeline.now, 0
        while quiet < STAYS_FOR_CYCLES:
            unlike = self._unlike(self._cycle(()))
            if unlike is None:
                quiet += 1
                if quiet == 1:
                    self.result.settled_after_s = self.timeline.now - began
            elif quiet:
                raise Violation(0, f"settled, and yet: {unlike}")
            elif self.timeline.now - began > SETTLES_WITHIN_S:
                if self._may_take_no_step():
                    raise HeldBack
                raise Violation(0, f"not settled after an hour of calm: {unlike}")

    def _may_take_no_step(self) -> bool:
        """Whether the spec forbids both steps that a rollout could take, and the plan says so.

        The last replica of a model still holds the GPUs of its old, larger shape. There is no room
        for a new one in the budget, and with `max_unavailable: 0` the old one must not go first.
        """
        fleet = self.spec.fleet
        if self._plan is None or fleet.defaults.rollout.max_unavailable:
            return False
        needs = {model.name: model.resources.gpus for model in fleet.models}
        jobs = ((job.name.split(".")[1], job.gpus) for job in self.world.cluster.ours)
        larger = {name for name, gpus in jobs if gpus > needs.get(name, gpus)}
        return any(
            note.kind is NoteKind.BUDGET
            and "rollout.max_unavailable" in note.text
            and note.subject.split(".")[1] in larger
            for note in self._plan.notes
        )

    def _release_badly(self) -> None:
        """Invariants 8 and 9: a revision that never serves costs its model and the others nothing.

        The fleet has settled; one model gets a release that is no good, another a good one at the
        same time; the bad one is taken back later.
        """
        random = Random(self._seed)
        bad, *others = random.sample(sorted(self.spec.models), len(self.spec.models))
        wanted = self.spec.models[bad]
        good = wanted.version, wanted.behaviour
        wanted.version, wanted.behaviour = wanted.version + 1000, random.choice((*BAD, "rejected"))
        for name in others[:1]:
            self.spec.models[name].version += 1000
        self.spec.commit()
        for at in range(BAD_RELEASE_CYCLES):
            plan = self._cycle(())
            for model in self.spec.fleet.models:
                self._serves(model)
            if at > BAD_RELEASE_CYCLES / 3 and plan is not None and _is_new(plan, others[:1]):
                break
        else:
            raise Violation(9, f"{bad} can't be released, and neither is {others}")
        wanted.version, wanted.behaviour = good
        self.spec.commit()
        self._settle()

    def _serves(self, model: Model) -> None:
        """Raise Violation unless each gateway has as many that serve as a rollout leaves."""
        least = model.replicas - self.spec.fleet.defaults.rollout.max_unavailable
        engines = self.world.cluster.engines
        for gateway in self.world.gateways.values():
            targets = gateway.running.targets if gateway.running is not None else ()
            jobs = [engines.get(target.address) for target in targets if target.model == model.name]
            serving = sum(job is not None and job.serves for job in jobs)
            if serving < least:
                raise Violation(
                    8, f"{gateway.name} has {serving} of {model.name}, {least} served before"
                )

    def _unlike(self, plan: Plan | None) -> str | None:
        """Return how the fleet differs from the spec, by its plan or in truth, or None."""
        if plan is None:
            return "no plan at all"
        if not plan.converged:
            return _difference(plan)
        wanted = sum(view.wanted for view in plan.models)
        most = sum(one.most for one in self.spec.models.values()) - len(plan.aborted)
        if wanted != most:
            return f"{wanted} replicas are wanted by the plan, {most} by the spec"
        ours = [job for job in self.world.cluster.ours if job.state != "COMPLETING"]
        sick = [job.name for job in ours if not job.serves]
        if sick:
            return f"not serving: {sick}"
        if len(ours) != wanted:
            return (
                f"{len(ours)} jobs instead of {wanted}: {[(j.id, j.name, j.state) for j in ours]}"
            )
        for gateway in self.world.gateways.values():
            routed = len(gateway.running.targets) if gateway.running is not None else 0
            if routed != wanted:
                return f"{gateway.name} routes to {routed} instead of {wanted}"
            if gateway.running is not None and gateway.running.exhausted:
                return f"{gateway.name} refuses {gateway.running.exhausted}"
        return None

    # -- for people

    def _tell(self, text: str) -> None:
        if self._say is not None:
            self._say(f"[{self.timeline.now - 1_000_000:8.1f}] {self._at_cycle:3} {text}")

    def _describe(self, plan: Plan) -> None:
        jobs = ", ".join(
            f"{view.job_id}:{view.name.model}.{view.name.revision[:3]}.{view.name.ordinal}"
            f" {view.status}{'+' if view.routed else ''}"
            for view in plan.replicas
        )
        self._tell(f"sees {jobs or 'no jobs'}; {plan.gpus_held}/{plan.gpus_budget} GPUs")
        for note in plan.notes:
            self._tell(f"  note {note.kind}: {note.subject}: {note.text}")
        for action in plan.actions:
            self._tell(f"  {action.kind}: {_action(action)}")


def _is_new(plan: Plan, names: Sequence[str]) -> bool:
    """Whether these models have all their replicas of the wanted revision, ready."""
    ready = {
        name: sum(
            view.name.model == name and view.current and view.status is Status.READY
            for view in plan.replicas
        )
        for name in names
    }
    return all(ready[view.name] >= view.wanted for view in plan.models if view.name in ready)


def _heal_job(job: SimJob) -> None:
    engine = job.engine
    if engine is not None and engine.mode != "well":
        engine.mode = "sick"  # for ever: the reconciler must replace it
    job.eligible_at = 0.0
    job.walltime_s = 8 * 3600
    if job.ends_at is not None:
        job.ends_at += 8 * 3600


def _action(action: Any) -> str:
    if action.kind == "submit":
        return f"{action.name} ({action.reason})"
    if action.kind == "route":
        return f"{' '.join(action.gateways)} to {[t.job_id for t in action.targets]}"
    return f"job {action.job.id} ({action.reason})"


def _difference(plan: Plan) -> str:
    notes = "; ".join(f"{note.kind} {note.subject} {note.text}" for note in plan.notes)
    odd = [view for view in plan.replicas if view.status is not Status.READY or not view.current]
    return f"{len(plan.actions)} actions, {[(str(v.name), str(v.status)) for v in odd]}, {notes}"


# -- what is pure is worked out once


_Rendered = tuple[
    int, tuple[Target, ...], Trust | None, tuple[str, ...], tuple[tuple[str, str], ...]
]


@contextmanager
def harness(simulation: Simulation) -> Iterator[None]:
    """Show each plan to the running simulation, and look up what pure functions gave before.

    The reconciler's code runs as it is: only rendering, hashing and parsing, which would take
    most of a cycle and are pure, are not done again for the same arguments.
    """
    rendered: dict[_Rendered, GatewayFiles] = {}
    revisions: dict[tuple[int, str, Access], str] = {}
    kept: list[object] = []  # an id is one object's only while that lives
    plain_revision = Model.revision

    def shown_plan(*arguments: Any, **keys: Any) -> Plan:
        decided = plan(*arguments, **keys)
        simulation.planned(decided)
        return decided

    def render(
        fleet: Fleet,
        targets: Iterable[Target],
        trust: Trust | None = None,
        exhausted: Collection[str] = (),
        external: Mapping[str, str] | None = None,
    ) -> GatewayFiles:
        elsewhere = tuple((external or {}).items())
        key = (id(fleet), tuple(sorted(targets)), trust, tuple(exhausted), elsewhere)
        if key not in rendered:
            kept.append(fleet)
            rendered[key] = render_gateway(fleet, key[1], trust, key[3], dict(elsewhere))
        return rendered[key]

    def revision(model: Model, image_digest: str, access: Access = "protected") -> str:
        key = (id(model), image_digest, access)
        if key not in revisions:
            kept.append(model)
            revisions[key] = plain_revision(model, image_digest, access)
        return revisions[key]

    with (
        patch("reconciler.cycle.plan", shown_plan),
        patch("reconciler.adapters.slurm_cli.parse_comment", lru_cache(parse_comment)),
        patch("reconciler.planner.render_gateway", render),
        patch("reconciler.execute.render_gateway", render),
        patch("reconciler.execute.ThreadPoolExecutor", OneThread),
        patch.object(Model, "revision", revision),
    ):
        yield


class OneThread(Executor):
    """What ThreadPoolExecutor(1) does, without the thread: switching costs a quarter of a run."""

    def __init__(self, at_once: int) -> None:
        assert at_once == 1

    def submit(self, call: Callable[..., T], /, *words: Any, **options: Any) -> "Future[T]":
        """Make the call now. What it raises, a kill among it, is its future's."""
        future: Future[T] = Future()
        try:
            future.set_result(call(*words, **options))
        except BaseException as error:
            future.set_exception(error)
        return future


def simulate(
    seed: int,
    cycles: int,
    events: Sequence[Event] | None = None,
    *,
    say: Callable[[str], None] | None = None,
) -> Result:
    """Run one seed; with `events` those happen and no others."""
    simulation = Simulation(seed, cycles, events, say=say)
    with harness(simulation):
        return simulation.run()
