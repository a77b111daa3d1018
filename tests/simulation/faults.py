"""What can go wrong, and what people do meanwhile: each kind by its name, picked by a number.

An event is (cycle, kind, pick, amount): `pick` chooses among what the event could strike, `amount`
(0 to 99) says how hard or how long. So a script of events means the same in every replay, and one
event can be taken out of it without changing what the others strike.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from reconciler.adapters.secrets import FEWEST_KEYS, MOST_KEYS
from reconciler.naming import parse_comment
from tests.simulation.cluster import FLEET, USER, SimJob
from tests.simulation.gateways import SimGateway
from tests.simulation.specs import BAD, CANARY, NAMES, SHARES, Spec, Wanted
from tests.simulation.world import MOST_SKEW_S, SimWorld

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that goes wrong, or is edited, in one cycle."""

    cycle: int
    kind: str
    pick: int
    amount: int

    def __str__(self) -> str:
        return f"{self.cycle} {self.kind} {self.pick} {self.amount}"


# They wait for the reconciler's next call of that sort, in this cycle only.
ARMED_ONCE = (
    *("listing_fails", "listing_empty", "listing_partial", "listing_garbled", "nodes_fail"),
    *("submit_rejected", "submit_lost_now", "submit_lost_late", "submit_lost_never"),
    "memory_lost",
)
# They wait for as long as it takes: few cycles have such a call.
ARMED = (
    *ARMED_ONCE,
    *("drain_fails", "drain_lost", "cancel_fails", "cancel_lost"),
    *("change_test_fails", "change_slow", "change_lost", "change_lingers"),
    *("crash_before_submit", "crash_after_submit", "crash_before_change", "crash_after_change"),
    *("crash_inside_change", "crash_before_drain", "crash_after_drain"),
    *("crash_before_cancel", "crash_after_cancel", "crash_before_save", "crash_after_save"),
)
# The reconciler makes some 12 to 30 calls of two boundaries a cycle; most do little.
_MOST_BOUNDARIES = 24

# What was lost in a call lands this much later at most.
LATEST_S = 60.0

World = Callable[[SimWorld, int, int], bool]
Edit = Callable[[SimWorld, Spec, int, int], bool]


def _picked(things: Iterable[T], pick: int) -> T | None:
    listed = list(things)
    return listed[pick % len(listed)] if listed else None


def _engines(world: SimWorld, *, mode: str = "well") -> list[SimJob]:
    return [
        job
        for job in world.cluster.ours
        if job.state == "RUNNING" and job.engine is not None and job.engine.mode == mode
    ]


def _serving(world: SimWorld) -> list[SimJob]:
    return [job for job in _engines(world) if job.engine is not None and job.engine.serves]


def _pending(world: SimWorld) -> list[SimJob]:
    return [job for job in world.cluster.ours if job.state == "PENDING"]


# -- engines


def _ends(final: str) -> World:
    def strike(world: SimWorld, pick: int, _amount: int) -> bool:
        job = _picked(_engines(world), pick)
        if job is not None:
            world.cluster.end(job, final)
        return job is not None

    return strike


def _turns(mode: str) -> World:
    """A serving engine changes its mode, for a while or for ever."""

    def strike(world: SimWorld, pick: int, amount: int) -> bool:
        job = _picked(_serving(world), pick)
        if job is None or job.engine is None:
            return False
        engine = job.engine
        engine.mode = mode
        if mode in ("sick", "impostor"):
            engine.streams.clear()  # whoever answers now has not got them

        def recover() -> None:
            if engine.mode == mode and world.cluster.engines.get(engine.address) is job:
                engine.mode = "well"

        if amount < 60:
            world.timeline.after(float(amount), recover)
        return True

    return strike


def _loses_completions(world: SimWorld, pick: int, _amount: int) -> bool:
    job = _picked((j for j in _engines(world) if j.engine and not j.engine.listens), pick)
    if job is None or job.engine is None:
        return False
    job.engine.completes = False
    return True


def _loads_for_ever(world: SimWorld, pick: int, _amount: int) -> bool:
    job = _picked((j for j in _engines(world) if j.engine and not j.engine.listens), pick)
    if job is None:
        return False
    world.cluster.slow_start(job)
    return True


def _hides_metrics(world: SimWorld, pick: int, _amount: int) -> bool:
    job = _picked(_serving(world), pick)
    if job is None or job.engine is None:
        return False
    job.engine.metrics = False
    return True


# -- Slurm and its nodes


def _node_fails(world: SimWorld, pick: int, amount: int) -> bool:
    node = _picked((node for node in world.cluster.nodes if node.power), pick)
    if node is None or sum(not node.power for node in world.cluster.nodes) > 1:
        return False
    world.cluster.cut_power(node, timeout_s=20.0 + amount)
    world.timeline.after(10.0 + 4 * amount, lambda: world.cluster.restore_power(node))
    return True


def _node_breaks(world: SimWorld, pick: int, amount: int) -> bool:
    node = _picked(world.cluster.nodes[:2], pick)
    assert node is not None
    node.broken = True
    world.timeline.after(60.0 + 6 * amount, lambda: world.cluster.resume_node(node))
    return True


def _node_drains(world: SimWorld, pick: int, amount: int) -> bool:
    node = _picked((node for node in world.cluster.nodes if node.usable), pick)
    if node is None or sum(not node.usable for node in world.cluster.nodes) > 1:
        return False
    world.cluster.drain_node(node)
    world.timeline.after(60.0 + 3 * amount, lambda: world.cluster.resume_node(node))
    return True


def _requeued(world: SimWorld, pick: int, _amount: int) -> bool:
    job = _picked(_engines(world), pick)
    if job is not None:
        world.cluster.put_back(job)
    return job is not None


def _cancelled_by_hand(world: SimWorld, pick: int, _amount: int) -> bool:
    job = _picked((j for j in world.cluster.ours if j.state != "COMPLETING"), pick)
    if job is not None:
        world.cluster.cancel(job)
    return job is not None


def _held(world: SimWorld, pick: int, amount: int) -> bool:
    job = _picked(_pending(world), pick)
    if job is None:
        return False
    world.cluster.hold(job)
    world.timeline.after(5.0 + amount, lambda: world.cluster.release(job))
    return True


def _priority_wait(world: SimWorld, pick: int, amount: int) -> bool:
    job = _picked(_pending(world), pick)
    if job is None:
        return False
    job.eligible_at = world.timeline.now + 5.0 + 3 * amount
    world.cluster.kick(5.1 + 3 * amount)
    return True


def _excluded(world: SimWorld, pick: int, amount: int) -> bool:
    """A waiting job avoids all nodes but one: since it was submitted, or by `scontrol update`."""
    job = _picked(_pending(world), pick)
    if job is None:
        return False
    before = job.exclude
    names = [node.name for node in world.cluster.nodes]
    others = [name for at, name in enumerate(names) if at != amount % len(names)]
    job.exclude = frozenset(others)
    if amount < 70:
        job.base = job.comment = json.dumps({**json.loads(job.base), "avoids": ",".join(others)})
        return True

    def take_back() -> None:
        job.exclude = before
        world.cluster.kick()

    world.timeline.after(60.0 + 6 * amount, take_back)
    return True


def _strange_state(world: SimWorld, pick: int, amount: int) -> bool:
    job = _picked((j for j in world.cluster.ours if j.state == "RUNNING"), pick)
    if job is None:
        return False
    job.shown = "HIBERNATING"

    def pass_by() -> None:
        job.shown = None

    world.timeline.after(2.0 + amount / 2, pass_by)
    return True


def _vandalised(world: SimWorld, pick: int, amount: int) -> bool:
    job = _picked(world.cluster.ours, pick)
    if job is None:
        return False
    taken = world.cluster.comment(job, ("", "to do", "{", "\n|", '{"v":1}', "x" * 900)[amount % 6])
    # The job itself writes again when something changes, here at the latest.
    if job.state == "RUNNING":
        world.timeline.after(5.0 + 2 * amount, lambda: world.cluster.publish(job))
    return taken


def _ctld_down(world: SimWorld, _pick: int, amount: int) -> bool:
    if not world.cluster.up:
        return False
    world.cluster.up = False
    world.timeline.after(1.0 + amount / 2, world.cluster.start_again)
    return True


def _ctld_crash(world: SimWorld, _pick: int, amount: int) -> bool:
    if not world.cluster.up:
        return False
    world.timeline.after(1.0 + amount / 10, world.cluster.start_again)
    return world.cluster.crash()


def _maintenance(world: SimWorld, pick: int, amount: int) -> bool:
    world.cluster.maintenance_at = world.timeline.now + 100 + 5 * pick + amount
    return True


def _foreign_job(world: SimWorld, pick: int, amount: int) -> bool:
    names = (
        ("someone", f"{FLEET}.alpha.00000000.0"),
        (USER, f"{FLEET}.alpha"),
        (USER, f"{FLEET}.alpha.0000000g.1"),
        (USER, f"{FLEET}x.alpha.00000000.1"),
        (USER, f"{FLEET}.alpha.00000000.01"),
        (USER, "notebook\nx.y"),
    )
    user, name = names[pick % len(names)]
    comment = '{"v":1,"commit":null,"gpus":1}' if user != USER else ""
    world.cluster.add(
        name=name, user=user, gpus=1 + amount % 2, walltime_s=600 + amount, comment=comment
    )
    return True


# -- the network, the gateways, the reconciler's own host


def _probes_cut(world: SimWorld, _pick: int, amount: int) -> bool:
    world.cut_until = world.timeline.now + 1.0 + amount
    return True


def _gateway(strike: Callable[[SimWorld, SimGateway, int], None]) -> World:
    def strike_one(world: SimWorld, pick: int, amount: int) -> bool:
        gateway = _picked(world.gateways.values(), pick)
        assert gateway is not None
        strike(world, gateway, amount)
        return True

    return strike_one


def _unreachable(world: SimWorld, gateway: SimGateway, amount: int) -> None:
    gateway.unreachable_until = world.timeline.now + 1.0 + 1.5 * amount


def _restarts(world: SimWorld, gateway: SimGateway, _amount: int) -> None:
    before = gateway.running
    gateway.restart()
    world.watch.rerouted(gateway, before)


def _clock(sign: int) -> World:
    def strike(world: SimWorld, _pick: int, amount: int) -> bool:
        jump_s = float((1, 10, 120, 3600, 90_000)[amount % 5])
        world.set_clock(world.clock_offset_s + sign * jump_s)
        if abs(world.clock_offset_s) > MOST_SKEW_S:
            # Slurm refuses this host until somebody sets its clock right.
            world.timeline.after(5.0 + amount, lambda: world.set_clock(0.0))
        return True

    return strike


def _disk_full(world: SimWorld, _pick: int, amount: int) -> bool:
    world.disk_full_until = world.timeline.now + 1.0 + amount / 3
    return True


def _image_missing(world: SimWorld, pick: int, amount: int) -> bool:
    name = ("one", "two")[pick % 2]
    world.image_missing_until[name] = world.timeline.now + 1.0 + amount
    return True


def _image_rebuilt(world: SimWorld, pick: int, _amount: int) -> bool:
    world.images[("one", "two")[pick % 2]] += 1
    return True


def _secrets_gone(world: SimWorld, _pick: int, amount: int) -> bool:
    world.secrets_gone_until = world.timeline.now + 1.0 + amount / 2
    return True


def _external_key_gone(world: SimWorld, _pick: int, amount: int) -> bool:
    world.external_key_gone_until = world.timeline.now + 1.0 + amount
    return True


def _logs_gone(world: SimWorld, _pick: int, amount: int) -> bool:
    world.logs_gone_until = world.timeline.now + 1.0 + amount
    return True


def _tokens_spent(world: SimWorld, _pick: int, amount: int) -> bool:
    """A tenant has spent its tokens; it is midnight soon, or it is given more."""
    world.spent_until = world.timeline.now + 1.0 + 2 * amount
    return True


# -- people


def _key_rotated(world: SimWorld, _spec: Spec, _pick: int, _amount: int) -> bool:
    ids = world.secrets.ids
    if not ids or len(ids) >= MOST_KEYS:
        return False
    world.secrets.add_key()
    return True


def _key_revoked(world: SimWorld, _spec: Spec, pick: int, _amount: int) -> bool:
    """Remove a key, unless `fleet backend-key revoke` would refuse."""
    ids = world.secrets.ids
    key = _picked(ids, pick)
    if key is None or len(ids) <= FEWEST_KEYS:
        return False
    for job in (job for job in world.cluster.ours if job.state not in ("PENDING", "COMPLETING")):
        said, given = parse_comment(job.comment), parse_comment(job.base)
        if said is None or given is None or not set(given.keys) & set(ids) - {key}:
            return False
    world.secrets.remove_key(key)
    return True


def _edit(change: Callable[[Wanted, int], None]) -> Edit:
    """Change one model; an edit that the spec's own checks refuse is taken back."""

    def strike(_world: SimWorld, spec: Spec, pick: int, amount: int) -> bool:
        name = _picked(sorted(spec.models), pick)
        assert name is not None
        wanted = spec.models[name]
        before = Wanted(**{slot: getattr(wanted, slot) for slot in Wanted.__slots__})
        change(wanted, amount)
        if not _fits(spec):
            spec.models[name] = before
            spec.commit()
            return False
        return before != wanted

    return strike


def _fits(spec: Spec) -> bool:
    """Whether an edit passes validation, and leaves room in the budget to surge in."""
    most = sum(wanted.most * wanted.gpus for wanted in spec.models.values())
    room = 0 if spec.rollout["max_unavailable"] else max(w.gpus for w in spec.models.values())
    return most + room <= spec.budget and spec.commit()


def _replicas(wanted: Wanted, amount: int) -> None:
    wanted.replicas = (0, 1, 1, 2, 2, 3, 4)[amount % 7]


def _version(wanted: Wanted, amount: int) -> None:
    wanted.version += 1 + amount
    wanted.behaviour = "good"


def _back(wanted: Wanted, amount: int) -> None:
    wanted.version = max(0, wanted.version - 1 - amount % 3)


def _bad_release(wanted: Wanted, amount: int) -> None:
    wanted.version += 1
    wanted.behaviour = BAD[amount % len(BAD)]


def _fixed(wanted: Wanted, _amount: int) -> None:
    wanted.behaviour = "good"


def _suspend(wanted: Wanted, _amount: int) -> None:
    wanted.suspend = not wanted.suspend


def _pause(wanted: Wanted, _amount: int) -> None:
    wanted.paused = not wanted.paused


def _canary(wanted: Wanted, amount: int) -> None:
    wanted.canary = not wanted.canary
    wanted.share = SHARES[amount % len(SHARES)]


def _promote(wanted: Wanted, _amount: int) -> None:
    if wanted.canary:
        wanted.version, wanted.canary = wanted.version + CANARY, False


def _fallback(wanted: Wanted, _amount: int) -> None:
    wanted.fallback = not wanted.fallback


def _partition(wanted: Wanted, amount: int) -> None:
    """Of `debug` the time limit is short: where walltimes are longer nothing starts there."""
    wanted.partition = "debug" if wanted.partition == "gpu" and amount < 40 else "gpu"


def _gpus(wanted: Wanted, amount: int) -> None:
    wanted.gpus = 1 + amount % 2


def _model_added(_world: SimWorld, spec: Spec, _pick: int, amount: int) -> bool:
    name = next((name for name in NAMES if name not in spec.models), None)
    if name is None:
        return False
    spec.allow_destroy -= {name}
    spec.models[name] = Wanted(replicas=1 + amount % 2, image=("one", "two")[amount % 2])
    if not _fits(spec):
        del spec.models[name]
        spec.commit()
        return False
    return True


def _model_removed(_world: SimWorld, spec: Spec, pick: int, amount: int) -> bool:
    if len(spec.models) == 1:
        return False
    name = _picked(sorted(spec.models), pick)
    assert name is not None
    del spec.models[name]
    if amount < 70:
        spec.allow_destroy |= {name}
    return spec.commit()


STRIKES: dict[str, World] = {
    "engine_crashes": _ends("FAILED"),
    "engine_out_of_memory": _ends("OUT_OF_MEMORY"),
    "engine_hangs": _turns("hung"),
    "engine_stuck": _turns("stuck"),
    "engine_sick": _turns("sick"),
    "engine_impostor": _turns("impostor"),
    "engine_loses_completions": _loses_completions,
    "engine_loads_for_ever": _loads_for_ever,
    "engine_hides_metrics": _hides_metrics,
    "node_fails": _node_fails,
    "node_breaks": _node_breaks,
    "node_drains": _node_drains,
    "preempted": _ends("PREEMPTED"),
    "requeued": _requeued,
    "cancelled_by_hand": _cancelled_by_hand,
    "held": _held,
    "priority_wait": _priority_wait,
    "excluded": _excluded,
    "strange_state": _strange_state,
    "vandalised": _vandalised,
    "ctld_down": _ctld_down,
    "ctld_crash": _ctld_crash,
    "foreign_job": _foreign_job,
    "maintenance": _maintenance,
    "probes_cut": _probes_cut,
    "gateway_unreachable": _gateway(_unreachable),
    "gateway_restarts": _gateway(_restarts),
    "clock_forward": _clock(1),
    "clock_back": _clock(-1),
    "disk_full": _disk_full,
    "image_missing": _image_missing,
    "image_rebuilt": _image_rebuilt,
    "secrets_gone": _secrets_gone,
    "external_key_gone": _external_key_gone,
    "logs_gone": _logs_gone,
    "tokens_spent": _tokens_spent,
}
EDITS: dict[str, Edit] = {
    "edit_replicas": _edit(_replicas),
    "edit_version": _edit(_version),
    "edit_back": _edit(_back),
    "edit_bad_release": _edit(_bad_release),
    "edit_fixed": _edit(_fixed),
    "edit_suspend": _edit(_suspend),
    "edit_pause": _edit(_pause),
    "edit_canary": _edit(_canary),
    "edit_promote": _edit(_promote),
    "edit_fallback": _edit(_fallback),
    "edit_gpus": _edit(_gpus),
    "edit_partition": _edit(_partition),
    "edit_adds_model": _model_added,
    "edit_removes_model": _model_removed,
    "key_rotated": _key_rotated,
    "key_revoked": _key_revoked,
}
KINDS: Sequence[str] = (*ARMED, *STRIKES, *EDITS, "crash")

# More of what needs a coincidence to strike; less of what upsets everything.
_WEIGHTS = {
    "crash": 9.0,
    "edit_version": 6.0,
    "edit_replicas": 5.0,
    "edit_fixed": 3.0,
    "excluded": 3.0,
    "submit_lost_late": 3.0,
    "submit_lost_now": 3.0,
    "change_lingers": 3.0,
    "clock_forward": 0.3,
    "clock_back": 0.3,
    "image_rebuilt": 0.5,
    "edit_removes_model": 0.7,
    "disk_full": 0.5,
}


def parse(line: str) -> Event:
    """Return the event that a line of a script stands for. Raises ValueError."""
    cycle, kind, pick, amount = line.split()
    if kind not in KINDS:
        raise ValueError(f"no such event: {kind}")
    return Event(int(cycle), kind, int(pick), int(amount))


def draw(random: Random, cycles: int) -> list[Event]:
    """Return the events of a run: calm stretches and storms in turns."""
    events = []
    weights = [_WEIGHTS.get(kind, 1.0) for kind in KINDS]
    storm = False
    for cycle in range(1, cycles):
        if random.random() < 0.06:
            storm = not storm
        while random.random() < (0.55 if storm else 0.15):
            kind = random.choices(KINDS, weights)[0]
            events.append(Event(cycle, kind, random.randrange(1000), random.randrange(100)))
            # What needs a change of the fleet comes with one.
            if kind in _NEEDS_A_CHANGE and random.random() < 0.7:
                change = random.choice(("edit_version", "edit_replicas", "edit_replicas"))
                events.append(Event(cycle, change, random.randrange(1000), random.randrange(100)))
    return events


_NEEDS_A_CHANGE = frozenset(
    {
        kind
        for kind in ARMED
        if kind.startswith(("submit_", "change_", "cancel_", "drain_", "crash"))
    }
    | {"crash"}
)


def apply(event: Event, world: SimWorld, spec: Spec) -> None:
    """Let an event happen now, or arm it for the calls of this cycle."""
    if event.kind == "crash":
        world.crash_in = event.amount % _MOST_BOUNDARIES
    elif event.kind in ARMED:
        world.armed[event.kind] = event.amount
    elif event.kind in EDITS:
        if EDITS[event.kind](world, spec, event.pick, event.amount):
            world.struck[event.kind] += 1
    elif STRIKES[event.kind](world, event.pick, event.amount):
        world.struck[event.kind] += 1
