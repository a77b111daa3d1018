"""The adapters of a simulated world: the reconciler's Protocols, and where faults enter.

Each call begins and ends at a boundary: time passes there, other things happen, the invariants are
checked, and a crash of the reconciler may come (`Killed`).
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from random import Random

from reconciler.adapters import slurm_cli
from reconciler.adapters.ports import ImagePin, Listing, LogPart, Result
from reconciler.batch import slurm_time
from reconciler.errors import (
    GatewayFailed,
    SecretsFailed,
    SlurmUnavailable,
    StateFailed,
    SubmitRejected,
    SubmitUnknown,
)
from reconciler.observe import World
from reconciler.plan import Action, JobRef
from reconciler.routes import GatewayFiles
from reconciler.spec import Fleet
from reconciler.state import (
    Credentials,
    GatewayView,
    Health,
    Job,
    JobKey,
    Keyring,
    Memory,
    Probe,
    Traffic,
    Trial,
    Trust,
    Usage,
)
from reconciler.usage import Tallies
from tests.simulation.cluster import USER, Cluster, Engine, SimJob
from tests.simulation.gateways import Configuration, SimGateway
from tests.simulation.secrets import MemorySecrets
from tests.simulation.specs import ALLOWANCE, WORSE
from tests.simulation.timeline import START, Timeline

# munge's credentials are refused if they seem older, or newer, than that: seen on 24.11.
MOST_SKEW_S = 300.0
# The reconciler's host has been up for so long when a run begins.
BOOTED_BEFORE_S = 5_000.0


class Killed(BaseException):
    """The reconciler's process ends here, as by kill -9."""


@dataclass(slots=True)
class Cycle:
    """What happened in one cycle so far, for the invariants."""

    calls: Counter[str] = field(default_factory=Counter)
    believable: bool = False  # the plan's listing was whole and true
    garbled: int | None = None  # the job whose record could not be read
    suspicious: bool = False  # the reconciler waits for one more look, and will believe that
    hidden: bool = False  # the listing was empty, and no memory or gateway tells of any job
    cut: bool = False  # no probe got out
    views: tuple[GatewayView, ...] = ()
    probes: Mapping[JobKey, Probe] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)  # of the images that could be read
    fleet: Fleet | None = None
    clock_offset_s: float = 0.0  # when it began


class Watch:
    """What the world tells the invariants; each method may raise Violation."""

    def call(self, what: str) -> None:
        """An adapter is asked."""

    def probed(self, probes: Mapping[JobKey, Probe]) -> None:
        """The engines have answered."""

    def accepted(self, job: SimJob) -> None:
        """Slurm has taken a submission."""

    def told(self, ref: JobRef, job: SimJob | None) -> None:
        """A job is about to be told to drain."""

    def cancelled(self, ref: JobRef, job: SimJob | None, *, pending: bool) -> None:
        """A job is about to be cancelled."""

    def changed(self) -> None:
        """A gateway is about to be changed."""

    def rerouted(self, gateway: SimGateway, before: Configuration | None) -> None:
        """A gateway runs another configuration."""


class SimWorld:
    """Everything outside of the reconciler's process."""

    def __init__(
        self, timeline: Timeline, cluster: Cluster, gateways: Sequence[SimGateway]
    ) -> None:
        self.timeline = timeline
        self.cluster = cluster
        self.gateways = {gateway.name: gateway for gateway in gateways}
        self.watch = Watch()
        self.cycle = Cycle()
        self.random = Random(0)  # another one for each cycle: latencies and the like
        self.armed: dict[str, int] = {}  # faults that wait for their call -> their amount
        self.struck: Counter[str] = Counter()  # faults that have happened
        self.boundaries: Counter[str] = Counter()  # where the reconciler was killed
        self.crash_in: int | None = None  # boundaries to go
        self.clock_offset_s = 0.0
        self.lied = False  # the last listing was no good, and said so to nobody
        self.cut_until = 0.0  # no probe leaves the reconciler's host until then
        self.images = {"one": 1, "two": 1}
        self.image_missing_until = {"one": 0.0, "two": 0.0}
        self.disk_full_until = 0.0
        self.secrets = MemorySecrets()
        self.secrets_gone_until = 0.0
        self.external_key_gone_until = 0.0
        self.spent_until = 0.0  # the tenant's tokens of the day
        self.logs_gone_until = 0.0
        self.memory = Memory()  # as the disk has it
        self.unsaved: Memory | None = None  # as the reconciler's process has it, if that differs
        self.submitted: SimJob | None = None

    @property
    def adapters(self) -> World:
        """The world as the reconciler gets it."""
        return World(
            slurm=SimSlurm(self),
            engines=SimEngines(self),
            gateways=SimGateways(self),
            images=SimImages(self),
            secrets=SimSecrets(self),
            store=SimStore(self),
            booted_at=lambda: START - BOOTED_BEFORE_S + self.clock_offset_s,
            at_once=1,  # one order of things, so that a seed is one run
        )

    def clock(self) -> float:
        """Return the time that the reconciler's host believes in."""
        return self.timeline.now + self.clock_offset_s

    def set_clock(self, offset_s: float) -> None:
        """Let the clock of the reconciler's host jump; Slurm's and the nodes' clocks are right."""
        self.clock_offset_s = offset_s

    @property
    def slurm_answers(self) -> bool:
        """Whether slurmctld is up, and takes what this host says when as true."""
        return self.cluster.up and abs(self.clock_offset_s) <= MOST_SKEW_S

    def strikes(self, fault: str) -> bool:
        """Whether an armed fault strikes now; it strikes once."""
        if self.armed.pop(fault, None) is None:
            return False
        self.struck[fault] += 1
        return True

    def boundary(self, where: str) -> None:
        """Let a moment pass, and the reconciler's process end if its time has come."""
        self.timeline.advance(self.random.random() * 0.4)
        if self.strikes(f"crash_{where.replace(' ', '_')}"):
            self._kill(where)
        if self.crash_in is None:
            return
        self.crash_in -= 1
        if self.crash_in < 0:
            self.crash_in = None
            self.struck["crash"] += 1
            self._kill(where)

    def _kill(self, where: str) -> None:
        self.boundaries[where] += 1
        if self.unsaved is not None:
            self.unsaved = None
            for job in self.cluster.jobs.values():
                job.remembered = job.saved
        raise Killed(where)

    @contextmanager
    def call(self, what: str) -> Iterator[None]:
        """Wrap one call of an adapter into its two boundaries."""
        self.boundary(f"before {what}")
        self.cycle.calls[what] += 1
        self.watch.call(what)
        yield
        self.boundary(f"after {what}")


@dataclass(frozen=True, slots=True)
class SimSlurm:
    """The Slurm adapter."""

    world: SimWorld

    def jobs(self, fleet: str) -> Listing:
        world = self.world
        with world.call("jobs"):
            first = world.cycle.calls["jobs"] == 1
            if not world.slurm_answers or world.strikes("listing_fails"):
                raise SlurmUnavailable("squeue gave no answer in 20 s")
            mark = "|mark|"
            text = self._text(mark)
            if text and world.strikes("listing_partial"):
                text = text[: 1 + world.random.randrange(len(text) - 1)]
                text = text.rstrip("\n")
            # Twice in a row is believed, as it must be.
            lie = bool(world.cluster.ours) and not world.lied and world.strikes("listing_empty")
            if lie:
                text = ""
            world.lied = world.lied or lie or world.cycle.garbled is not None
            listing = slurm_cli.parse_listing(text, mark=mark, fleet=fleet, user=USER)
            if lie:
                world.cycle.hidden = not self._missed()
            # What the executor's second listing shows, the plan does not know.
            if first and not lie:
                world.cycle.believable = True
                for job in world.cluster.jobs.values():
                    job.listed = True
            return listing

    def _missed(self) -> bool:
        """Whether the reconciler has been told of any of the jobs that there are."""
        world = self.world
        routed = any(view.targets for view in world.cycle.views)
        return routed or any(job.remembered for job in world.cluster.ours)

    def _text(self, mark: str) -> str:
        """What squeue prints: the fields in the adapter's order, each with the mark behind it."""
        world = self.world
        records = [_record(job) for job in world.cluster.jobs.values()]
        if world.cluster.ours and world.strikes("listing_garbled"):
            live = {str(job.id) for job in world.cluster.ours}
            victims = [record for record in records if record["JobID"] in live]
            victim = victims[world.random.randrange(len(victims))]
            world.cycle.garbled = int(victim["JobID"])
            field_name = world.random.choice(("State", "SubmitTime", "RestartCnt", "JobID"))
            victim[field_name] = "" if field_name == "State" else "N/A"
        return "".join(
            "".join(f"{record.get(name, '')}{mark}" for name in slurm_cli._FIELDS) + "\n"
            for record in records
        )

    def nodes(self) -> Mapping[str, str]:
        with self.world.call("nodes"):
            if not self.world.slurm_answers or self.world.strikes("nodes_fail"):
                raise SlurmUnavailable("sinfo gave no answer in 20 s")
            return self.world.cluster.words()

    def maintenances(self) -> Sequence[float]:
        with self.world.call("maintenances"):
            if not self.world.slurm_answers:
                raise SlurmUnavailable("scontrol gave no answer in 20 s")
            begin = self.world.cluster.maintenance_at
            return [] if begin is None else [float(int(begin))]

    def script(self, job_id: int) -> str:
        with self.world.call("script"):
            job = self.world.cluster.jobs.get(job_id)
            if job is None or not self.world.cluster.up:
                raise SlurmUnavailable("scontrol: Invalid job id specified")
            return job.script

    def submit(self, script: str) -> int:
        world = self.world
        with world.call("submit"):
            if "SIM_BEHAVIOUR=rejected" in script:
                raise SubmitRejected("sbatch: Invalid account")
            if not world.slurm_answers:
                raise SubmitUnknown("sbatch: Unable to contact slurm controller")
            if world.strikes("submit_rejected"):
                raise SubmitRejected("sbatch: Invalid qos specification")
            if world.strikes("submit_lost_never"):
                raise SubmitUnknown("sbatch gave no answer in 20 s")
            if "submit_lost_late" in world.armed:
                delay_s = 1.0 + world.armed["submit_lost_late"] / 2
                world.strikes("submit_lost_late")
                world.timeline.after(delay_s, lambda: self._land(script))
                raise SubmitUnknown("sbatch gave no answer in 20 s")
            job = world.cluster.accept(script)
            # By its name: the cycle has saved what it is about to submit, or could not.
            job.remembered, job.saved = True, world.unsaved is None
            world.watch.accepted(job)
            if world.strikes("submit_lost_now"):
                raise SubmitUnknown("sbatch: Socket timed out on send/recv operation")
            return job.id

    def _land(self, script: str) -> None:
        # A crash of slurmctld in between takes it along.
        if self.world.cluster.up:
            with suppress(SubmitRejected):
                self.world.cluster.accept(script)

    def drain(self, job: JobRef) -> None:
        world = self.world
        with world.call("drain"):
            if not world.slurm_answers or world.strikes("drain_fails"):
                raise SlurmUnavailable("scancel gave no answer in 20 s")
            found = world.cluster.jobs.get(job.id)
            world.watch.told(job, found)
            if _is(found, job) and found is not None and found.state == "RUNNING":
                found.told_at = world.timeline.now
                world.cluster.signal(found)
            if world.strikes("drain_lost"):
                raise SlurmUnavailable("scancel: Socket timed out on send/recv operation")

    def cancel(self, job: JobRef, *, pending: bool) -> None:
        world = self.world
        with world.call("cancel"):
            if not world.slurm_answers or world.strikes("cancel_fails"):
                raise SlurmUnavailable("scancel gave no answer in 20 s")
            found = world.cluster.jobs.get(job.id)
            world.watch.cancelled(job, found, pending=pending)
            if _is(found, job) and found is not None and (found.state == "PENDING" or not pending):
                world.cluster.cancel(found)
            if world.strikes("cancel_lost"):
                raise SlurmUnavailable("scancel: Socket timed out on send/recv operation")


def _is(found: SimJob | None, ref: JobRef) -> bool:
    """scancel's own check: --user and --name."""
    return found is not None and found.user == USER and found.name == str(ref.name)


def _record(job: SimJob) -> dict[str, str]:
    """One job as squeue prints it, by squeue's names of the fields."""
    return {
        "JobID": str(job.id),
        "UserName": job.user,
        "State": job.shown or job.state,
        "SubmitTime": str(job.submitted_at),
        "StartTime": str(job.started_at or "N/A"),
        "EndTime": str(job.ends_at or "N/A"),
        "NodeList": job.node,
        "Reason": job.reason,
        "RestartCnt": str(job.restarts),
        "exit_code": f"{job.exit_status}:0",
        "TimeLimit": slurm_time(job.walltime_s),
        "NumNodes": "1",
        "tres-per-node": f"gres/gpu:{job.gpus}",
        "ExcNodes": ",".join(sorted(job.exclude)),
        "Name": job.name,
        "Comment": job.comment,
    }


@dataclass(frozen=True, slots=True)
class SimEngines:
    """The engines' adapter."""

    world: SimWorld

    def probe(self, jobs: Sequence[Job], proven: Iterable[JobKey]) -> Mapping[JobKey, Probe]:
        known = frozenset(proven)
        with self.world.call("probe"):
            self.world.cycle.cut = self.world.timeline.now < self.world.cut_until
            probes = {
                job.key: self._probe(job, job.run.address, proven=job.key in known)
                for job in jobs
                if job.run is not None
            }
            self.world.cycle.probes = probes
            self.world.watch.probed(probes)
            return probes

    def _probe(self, job: Job, address: str, *, proven: bool) -> Probe:
        world = self.world
        if world.timeline.now < world.cut_until:
            return Probe(health=Health.SILENT, detail="no answer in time")
        found = world.cluster.engines.get(address)
        engine = found.engine if found is not None else None
        if engine is None:
            node = next((n for n in world.cluster.nodes if address.startswith(f"{n.ip}:")), None)
            alive = node is not None and node.power
            return Probe(health=Health.STARTING if alive else Health.SILENT)
        probe = _answer(engine, proven=proven, now=world.timeline.now)
        if probe.health is Health.READY and found is not None and found.id != job.id:
            return Probe(health=Health.IMPOSTOR, detail="it serves another job's name")
        return probe


def _answer(engine: Engine, *, proven: bool, now: float) -> Probe:
    """What reconciler/adapters/engine.py makes of an engine's answers."""
    if engine.mode == "hung":
        return Probe(health=Health.SILENT, detail="no answer in time")
    if engine.mode == "impostor":
        return Probe(health=Health.IMPOSTOR, detail="it serves something else")
    if not engine.listens:
        return Probe(health=Health.STARTING, detail="nothing listens at its address")
    if engine.mode == "sick":
        return Probe(health=Health.SICK, detail="/health answers 503")
    # An engine that drains still answers everything but a completion.
    if not proven and engine.mode == "stuck":
        return Probe(health=Health.SILENT, detail="no answer in time")
    if not proven and (engine.draining or not engine.completes):
        return Probe(health=Health.SICK, detail="a one-token completion answers 500")
    if not engine.metrics:
        return Probe(health=Health.READY)
    if engine.mode == "stuck":
        return Probe(health=Health.READY, ongoing=1, tokens=0.0)
    return Probe(health=Health.READY, ongoing=engine.ongoing(now), tokens=10 * now)


@dataclass(frozen=True, slots=True)
class SimGateways:
    """The gateways' adapter."""

    world: SimWorld

    def look(self) -> tuple[GatewayView, ...]:
        with self.world.call("look"):
            views = tuple(gateway.view() for gateway in self.world.gateways.values())
            self.world.cycle.views = views
            return views

    def change(self, name: str, files: GatewayFiles) -> None:
        world, gateway = self.world, self.world.gateways[name]
        with world.call("change"):
            world.watch.changed()
            gateway.refuse_if_unreachable()
            if world.strikes("change_test_fails"):
                raise GatewayFailed(f"gateway {name}: nginx: configuration file test failed")
            before = gateway.swap(files)
            world.boundary("inside change")
            if world.strikes("change_slow"):
                # The script waits 10 s, puts the link back and says so; the reload may come later.
                self._finish_reload(gateway)
                gateway.slow = slow = gateway.linked
                world.timeline.after(
                    world.random.uniform(5, 25), lambda: self._finish_reload(gateway, slow)
                )
                world.timeline.advance(10.0)
                if gateway.linked == gateway.running:
                    return
                gateway.linked = before
                raise GatewayFailed(f"gateway {name}: it runs the old generation after the reload")
            self._reload(gateway)
            if world.strikes("change_lost"):
                raise GatewayFailed(f"gateway {name}: no answer in 30 s")

    def log(self, name: str, position: str) -> LogPart:
        """Nothing: what it would tell of is said by SimStore.usage."""
        assert name in self.world.gateways
        if self.world.timeline.now < self.world.logs_gone_until:
            raise GatewayFailed(f"gateway {name}: access.log: Permission denied")
        return LogPart(lines=b"", position=position, ended=True)

    def _reload(self, gateway: SimGateway) -> None:
        self._finish_reload(gateway)  # NGINX does one after the other
        world, before = self.world, gateway.running
        uploads_s = streams_s = 0.0
        if world.strikes("change_lingers"):
            uploads_s = world.random.uniform(0, 85)
            streams_s = world.random.choice((0.0, 120.0, 900.0))
        gateway.reload(uploads_s=uploads_s, streams_s=streams_s)
        world.watch.rerouted(gateway, before)

    def _finish_reload(self, gateway: SimGateway, slow: Configuration | None = None) -> None:
        """Do a reload that NGINX was asked for before: it runs what was linked then."""
        slow = slow or gateway.slow
        if slow is None or slow is not gateway.slow:
            return
        gateway.slow = None
        now_linked, before = gateway.linked, gateway.running
        gateway.linked = slow
        gateway.reload(uploads_s=0.0, streams_s=0.0)
        gateway.linked = now_linked
        self.world.watch.rerouted(gateway, before)


@dataclass(frozen=True, slots=True)
class SimImages:
    """The images' adapter."""

    world: SimWorld

    def pins(self, fleet: Fleet) -> tuple[Mapping[str, ImagePin], Mapping[str, str]]:
        world = self.world
        with world.call("pins"):
            pins, errors = {}, {}
            for name in fleet.images:
                if world.timeline.now < world.image_missing_until[name]:
                    errors[name] = f"the manifest of {name} can't be used"
                else:
                    digest = f"{name}:{world.images[name]}"
                    pins[name] = ImagePin(program=f"/opt/{name}", digest=digest)
            world.cycle.digests = {name: pin.digest for name, pin in pins.items()}
            return pins, errors


@dataclass(frozen=True, slots=True)
class SimSecrets:
    """The secrets' adapter; their filesystem may be gone for a while."""

    world: SimWorld

    def keyring(self) -> Keyring:
        return self._secrets.keyring()

    def issue(self, model: str, walltime_s: float) -> Credentials:
        return self._secrets.issue(model, walltime_s)

    def external_keys(self, files: Iterable[str]) -> tuple[Mapping[str, str], Mapping[str, str]]:
        if self._external_key_gone:
            return {}, {file: f"{file}: No such file or directory" for file in files}
        return self.world.secrets.external_keys(files)

    def gateway_files(self, trust: Trust | None, external: Mapping[str, str]) -> Mapping[str, str]:
        if external and self._external_key_gone:
            raise SecretsFailed(f"{min(external.values())}: No such file or directory")
        return self._secrets.gateway_files(trust, external)

    @property
    def _external_key_gone(self) -> bool:
        return self.world.timeline.now < self.world.external_key_gone_until

    @property
    def _secrets(self) -> MemorySecrets:
        if self.world.timeline.now < self.world.secrets_gone_until:
            raise SecretsFailed("/shared/secrets: Stale file handle")
        return self.world.secrets


@dataclass(frozen=True, slots=True)
class SimStore:
    """Where memory lies; it may be lost, and its disk may be full."""

    world: SimWorld

    def load(self) -> Memory:
        with self.world.call("load"):
            if self.world.strikes("memory_lost"):
                self.world.memory, self.world.unsaved = Memory(), None
                for job in self.world.cluster.jobs.values():
                    job.remembered = job.saved = False
            return self.world.unsaved or self.world.memory

    def save(self, memory: Memory) -> None:
        """Like SqliteStore: what can't be written is known as long as this process lives."""
        world = self.world
        with world.call("save"):
            world.unsaved = memory
            self._remember()
            self._refuse_if_full()
            world.memory, world.unsaved = memory, None
            for job in world.cluster.jobs.values():
                job.saved = job.remembered

    def intend(self, at: float, action: Action) -> int:
        assert at > 0
        assert action
        with self.world.call("intend"):
            self._refuse_if_full()
            return self.world.cycle.calls["intend"]

    def conclude(self, intent: int, result: Result, detail: str) -> None:
        assert intent
        assert result
        assert "\n" not in detail
        with self.world.call("conclude"):
            self._refuse_if_full()

    def _refuse_if_full(self) -> None:
        if self.world.timeline.now < self.world.disk_full_until:
            raise StateFailed("memory.json can't be written: No space left on device")

    def _remember(self) -> None:
        """Mark which jobs a later look can miss: those that were shown before memory was kept."""
        cycle = self.world.cycle
        if not cycle.believable:
            return
        if cycle.garbled is None and not cycle.suspicious:
            self.world.lied = False
        for job in self.world.cluster.jobs.values():
            job.remembered = job.listed and job.state != "COMPLETING"

    def log_positions(self) -> Mapping[str, str]:
        return dict.fromkeys(self.world.gateways, "")

    def count(self, gateway: str, part: LogPart, tallies: Tallies) -> None:
        raise AssertionError(f"{gateway} has no log to count: {part}, {tallies}")

    def usage(self, at: float, gateways: frozenset[str]) -> tuple[Usage, None, Mapping[str, Trial]]:
        assert at > 0
        assert gateways
        tokens = ALLOWANCE * (self.world.timeline.now < self.world.spent_until)
        return Usage(tokens_today={"team": tokens}, complete=True), None, dict(self._trials())

    def _trials(self) -> Iterator[tuple[str, Trial]]:
        """Yield what the log tells of each canary that gets requests."""
        fleet = self.world.cycle.fleet
        shares = {
            model.name: model.canary.share
            for model in (fleet.models if fleet is not None else ())
            if model.canary is not None
        }
        for gateway in self.world.gateways.values():
            for target in gateway.routes():
                if target.canary:
                    bad = shares.get(target.model) == WORSE
                    tried = f"{target.model}.{target.canary}"
                    yield tried, Trial(canary=_had(errors=100 * bad), rest=_had(errors=0))

    @contextmanager
    def locked(self) -> Iterator[None]:
        yield


def _had(errors: int) -> Traffic:
    return Traffic(minutes=60, requests=500, errors=errors, refused=0, first_byte_s=(0.5, 1.0, 1.0))
