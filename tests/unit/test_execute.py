"""Actions are performed in order; what fails stops nothing else; nobody else's job is ended."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Barrier, Lock, get_ident
from typing import Any

import pytest

from reconciler.adapters.ports import Listing, LogPart, Result
from reconciler.adapters.secrets import FileSecrets
from reconciler.errors import (
    FleetError,
    GatewayFailed,
    SlurmUnavailable,
    StateFailed,
    SubmitRejected,
    SubmitUnknown,
)
from reconciler.execute import DEADLINE_S, execute
from reconciler.observe import World
from reconciler.plan import (
    Action,
    Cancel,
    Drain,
    JobRef,
    Note,
    NoteKind,
    Plan,
    Reason,
    Route,
    Submit,
)
from reconciler.planner import plan
from reconciler.routes import AUTHORITY_FILE, KEY_FILE, GatewayFiles
from reconciler.state import GatewayView, Job, Memory, Recipe, Trial, Trust, Usage
from reconciler.usage import Tallies
from tests.simulation.secrets import MemorySecrets
from tests.unit.build import (
    DIGEST,
    KEYS,
    RING,
    fleet,
    job,
    model_record,
    observation,
    rendered,
    revision,
    target,
    trusted,
    view,
)

FLEET = fleet(
    model_record(replicas=2),
    model_record(name="other", replicas=1),
    gateway={"hosts": [{"name": "a"}, {"name": "b"}]},
)
REV = revision(FLEET)
RECIPES = [
    Recipe.of(FLEET, model, digest=DIGEST, program="/opt/engine", commit=None)
    for model in FLEET.models
]


@dataclass
class FakeWorld:
    """Slurm and gateways that write down what is done, and fail where they are told to."""

    live: Sequence[Job] = ()
    fail: Mapping[str, FleetError] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)
    scripts: Mapping[int, str] = field(default_factory=dict)
    journal: "FakeJournal" = field(default_factory=lambda: FakeJournal())
    submitted: list[str] = field(default_factory=list)
    changed: list[GatewayFiles] = field(default_factory=list)
    at_once: int = 1  # in the plan's order, so that a test can say what was done when

    def _do(self, what: str) -> None:
        if what in self.fail:
            raise self.fail[what]
        self.done.append(what)

    def world(self) -> World:
        unused: Any = None  # execute asks no replica and no image
        self.journal.done = self.done
        return World(
            slurm=self,
            gateways=FakeGateways(self),
            engines=unused,
            images=unused,
            secrets=MemorySecrets([*KEYS]),
            store=self.journal,
            at_once=self.at_once,
        )

    def jobs(self, fleet: str) -> Listing:
        self._do(f"list {fleet}")
        return Listing(jobs=tuple(self.live), odd_lines=0)

    def nodes(self) -> Mapping[str, str]:
        return {}

    def maintenances(self) -> Sequence[float]:
        return []

    def script(self, job_id: int) -> str:
        return self.scripts[job_id]

    def submit(self, script: str) -> int:
        [name] = [
            line.removeprefix("#SBATCH --job-name=")
            for line in script.splitlines()
            if line.startswith("#SBATCH --job-name=")
        ]
        self._do(f"submit {name}")
        self.submitted.append(script)
        return 100 + len(self.done)

    def drain(self, job: JobRef) -> None:
        self._do(f"drain {job.id}")

    def cancel(self, job: JobRef, *, pending: bool) -> None:
        self._do(f"cancel {job.id}{' if pending' if pending else ''}")


@dataclass
class FakeGateways:
    """The gateways of a FakeWorld."""

    world: FakeWorld

    def look(self) -> tuple[GatewayView, ...]:
        return ()

    def change(self, name: str, files: GatewayFiles) -> None:
        self.world._do(f"change {name} {files.generation}")
        self.world.changed.append(files)

    def log(self, name: str, position: str) -> LogPart:
        assert name
        return LogPart(lines=b"", position=position, ended=True)


@dataclass
class FakeJournal:
    """A store that lists what is written; `full` is after how many writes its disk is full."""

    full: int = 1000
    done: list[str] = field(default_factory=list)  # of the world, to know what came first
    rows: list[str] = field(default_factory=list)
    memory: Memory = field(default_factory=Memory)

    def intend(self, at: float, action: Action) -> int:
        self._write(f"{action.kind} intended at {at:.0f}, {len(self.done)} done")
        return len(self.rows)

    def conclude(self, intent: int, result: Result, detail: str) -> None:
        assert "intended" in self.rows[intent - 1]
        self._write(f"{intent} {result}, {len(self.done)} done: {detail}")

    def load(self) -> Memory:
        return self.memory

    def save(self, memory: Memory) -> None:
        assert memory is not None
        self._write(f"memory saved, {len(self.done)} done")

    def log_positions(self) -> Mapping[str, str]:
        return {}

    def count(self, gateway: str, part: LogPart, tallies: Tallies) -> None:
        assert gateway
        assert part.ended
        assert tallies == Tallies()

    def usage(self, at: float, gateways: frozenset[str]) -> tuple[Usage, None, Mapping[str, Trial]]:
        assert at
        assert gateways
        return Usage(tokens_today={}, complete=True), None, {}

    def locked(self) -> AbstractContextManager[None]:
        return nullcontext()

    def _write(self, row: str) -> None:
        if len(self.rows) >= self.full:
            raise StateFailed("state.sqlite can't be written: disk is full")
        self.rows.append(row)


def made(*actions: Action) -> Plan:
    """A plan of exactly these actions."""
    return replace(plan(FLEET, observation(), Memory()), actions=actions)


def perform(decided: Plan, fake: FakeWorld, say: Callable[[str], None] | None = None) -> list[str]:
    done = execute(decided, FLEET, fake.world(), RECIPES, say=say or (lambda _: None))
    return list(done.errors)


def ref(of: Job) -> JobRef:
    return JobRef(id=of.id, submitted_at=of.submitted_at, name=of.name)


def drain(of: Job) -> Drain:
    return Drain(job=ref(of), reason=Reason.SURPLUS)


def cancel(of: Job, *, pending: bool = False) -> Cancel:
    return Cancel(job=ref(of), pending=pending, reason=Reason.SURPLUS)


def to(*jobs: Job) -> Route:
    targets = tuple(sorted(map(target, jobs)))
    return Route(
        gateways=("a", "b"),
        generation=rendered(FLEET, targets).generation,
        targets=targets,
        added=(),
        removed=(),
        trust=trusted(targets),
    )


ONE, TWO = job(REV, id=1), job(REV, id=2, ordinal=1)


def test_actions_are_performed_in_order_and_told() -> None:
    """Submit, route, drain, cancel: each is done once, and one line says so."""
    [submit, *_] = plan(FLEET, observation(), Memory()).actions
    decided = made(submit, to(ONE), drain(ONE), cancel(TWO, pending=True))
    generation = to(ONE).generation
    fake, said = FakeWorld(live=(ONE, TWO)), list[str]()
    assert perform(decided, fake, said.append) == []
    assert fake.done == [
        *("list demo", f"submit demo.tiny.{REV}.0", f"change a {generation}"),
        *(f"change b {generation}", "drain 1", "cancel 2 if pending"),
    ]
    assert len(said) == 5
    assert said[0] == f"submitted demo.tiny.{REV}.0 as job 102"


def test_R08_action_that_fails_stops_no_other() -> None:
    """Each failure is one line that names its action; all others are done."""
    submits = plan(FLEET, observation(), Memory()).actions
    assert [action.kind for action in submits] == ["submit"] * 3
    fails: dict[str, FleetError] = {
        f"submit demo.tiny.{REV}.0": SubmitRejected("sbatch: no"),
        f"submit demo.tiny.{REV}.1": SubmitUnknown("sbatch: timed out"),
        f"change a {to(ONE).generation}": GatewayFailed("gateway a: broken"),
        "drain 1": SlurmUnavailable("scancel: no answer"),
    }
    fake = FakeWorld(live=(ONE, TWO), fail=fails)
    errors = perform(made(*submits, to(ONE), drain(ONE), cancel(TWO)), fake)
    assert errors == [
        f"submit demo.tiny.{REV}.0: sbatch: no",
        f"submit demo.tiny.{REV}.1: sbatch: timed out",
        "route to a, b: gateway a: broken",
        f"drain demo.tiny.{REV}.0: scancel: no answer",
    ]
    assert fake.done == [
        *("list demo", f"submit demo.other.{revision(FLEET, 'other')}.0"),
        *(f"change b {to(ONE).generation}", "cancel 2"),
    ]


def test_actions_past_the_deadline_are_left_for_the_next_cycle() -> None:
    """What was seen at the beginning is not acted on for ever; the next cycle looks again."""
    submits = plan(FLEET, observation(), Memory()).actions
    fake = FakeWorld()
    times = iter([0.0, 1.0, DEADLINE_S - 1, DEADLINE_S])
    done = execute(
        made(*submits),
        FLEET,
        fake.world(),
        RECIPES,
        say=lambda _: None,
        clock=lambda: next(times),
    )
    line = "1 of 3 actions left for the next cycle: this one took too long"
    assert list(done.errors) == [line]
    assert done.left_over == (Note(kind=NoteKind.LEFT_OVER, subject="cycle", text=line),)
    assert len(fake.done) == 2


def test_submissions_without_an_answer_are_left_over() -> None:
    """Slurm's rate limiter lets some of many wait for too long: a note says how many there were."""
    submits = plan(FLEET, observation(), Memory()).actions
    slow = SubmitUnknown("sbatch gave no answer in 20 s")
    fails: dict[str, FleetError] = {f"submit demo.tiny.{REV}.{at}": slow for at in (0, 1)}
    world = FakeWorld(fail=fails).world()
    done = execute(made(*submits), FLEET, world, RECIPES, say=lambda _: None)
    [note] = done.left_over
    assert note.text.startswith("2 of 3 actions had no answer in time")


@dataclass
class Together(FakeWorld):
    """A world in which no call of a phase ends before `at_once` of that phase have begun."""

    most: int = 0
    _under_way: int = 0
    _lock: Any = field(default_factory=Lock)
    _all: Any = None

    def __post_init__(self) -> None:
        self._all = Barrier(self.at_once)

    def _do(self, what: str) -> None:
        if what.startswith("list"):
            super()._do(what)
            return
        with self._lock:
            self._under_way += 1
            self.most = max(self.most, self._under_way)
        try:
            # Broken, and so an error of the action, unless the others come.
            self._all.wait(timeout=30)
            super()._do(what)
        finally:
            with self._lock:
                self._under_way -= 1


def test_actions_of_a_phase_are_under_way_side_by_side_and_no_more_than_allowed() -> None:
    """As many as allowed at once, never more; the gateways of one route too."""
    [submit, *_] = plan(FLEET, observation(), Memory()).actions
    assert isinstance(submit, Submit)
    submits = [replace(submit, name=replace(submit.name, ordinal=at)) for at in range(6)]
    fake = Together(live=(ONE, TWO), at_once=2)
    decided = made(*submits, to(ONE), drain(ONE), drain(TWO), cancel(ONE), cancel(TWO))
    assert perform(decided, fake) == []
    assert fake.most == 2
    phases = [what.split()[0] for what in fake.done]
    assert phases == ["list", *6 * ["submit"], *2 * ["change"], *2 * ["drain"], *2 * ["cancel"]]


def test_journal_and_words_stay_on_the_calling_thread() -> None:
    """SQLite's connection is one thread's; each action has its intent and its outcome."""

    class Here(FakeJournal):
        def _write(self, row: str) -> None:
            super()._write(f"{row} on {get_ident()}")

    submits = plan(FLEET, observation(), Memory()).actions
    fake, threads = Together(journal=Here(), at_once=3), list[int]()
    assert perform(made(*submits), fake, lambda _: threads.append(get_ident())) == []
    assert {row.split(" on ")[1] for row in fake.journal.rows} == {str(get_ident())}
    assert threads == 3 * [get_ident()]
    intents = [row for row in fake.journal.rows if "intended" in row]
    assert len(intents) == 3
    assert len(fake.journal.rows) == 6


def test_failures_side_by_side_are_told_in_the_order_of_the_plan() -> None:
    """Whichever ends first: the lines are the same, and what did not fail is done."""
    submits = plan(FLEET, observation(), Memory()).actions
    fails: dict[str, FleetError] = {
        f"submit demo.tiny.{REV}.{at}": SubmitRejected("sbatch: no") for at in (0, 1)
    }
    fake = Together(fail=fails, at_once=3)
    assert perform(made(*submits), fake) == [
        f"submit demo.tiny.{REV}.{at}: sbatch: no" for at in (0, 1)
    ]
    assert fake.done == [f"submit demo.other.{revision(FLEET, 'other')}.0"]


def test_R05_told_to_end_finishes_what_has_begun_and_begins_no_more() -> None:
    """What has begun gets its outcome; what has not is one line, and no later phase begins."""
    submits = plan(FLEET, observation(), Memory()).actions
    fake = Together(live=(ONE,), at_once=2)
    done = execute(
        made(*submits, to(ONE), drain(ONE)),
        FLEET,
        fake.world(),
        RECIPES,
        say=lambda _: None,
        told_to_end=lambda: bool(fake.journal.rows[1:]),  # while the second begins
    )
    assert list(done.errors) == ["3 of 5 actions left for the next cycle: told to end"]
    assert len(fake.done) == 3
    outcomes = [row for row in fake.journal.rows if "intended" not in row]
    assert [" ".join(row.split()[1:2]) for row in outcomes] == ["done,", "done,"]


def test_R04_submission_of_unknown_outcome_is_not_repeated() -> None:
    """Whether the job exists is seen in the next cycle; here it is tried once."""
    [submit, *_] = plan(FLEET, observation(), Memory()).actions
    tried = []

    class Counting(FakeWorld):
        def submit(self, script: str) -> int:
            tried.append(script)
            raise SubmitUnknown("sbatch: timed out")

    assert len(perform(made(submit), Counting())) == 1
    assert len(tried) == 1


def test_R22_job_whose_submit_time_changed_is_not_ended() -> None:
    """The id is another job's by now: it is left alone and the line says so."""
    other = replace(ONE, submitted_at=ONE.submitted_at + 1)
    fake = FakeWorld(live=(other, TWO))
    errors = perform(made(drain(ONE), cancel(ONE), cancel(TWO)), fake)
    message = "the job is not there any more; looking again in the next cycle"
    assert errors == [f"drain {ONE.name}: {message}", f"cancel {ONE.name}: {message}"]
    assert fake.done == ["list demo", "cancel 2"]


def test_R27_job_of_another_name_is_not_ended() -> None:
    """Id and submit time agree, the name does not: it is not ours."""
    renamed = replace(ONE, name=replace(ONE.name, ordinal=9))
    fake = FakeWorld(live=(renamed,))
    assert len(perform(made(cancel(ONE)), fake)) == 1
    assert fake.done == ["list demo"]


def test_R01_nothing_is_ended_when_the_queue_can_not_be_read_again() -> None:
    """What can't be verified is not ended; routes and submissions go on."""
    fake = FakeWorld(live=(ONE,), fail={"list demo": SlurmUnavailable("squeue: no answer")})
    [submit, *_] = plan(FLEET, observation(), Memory()).actions
    errors = perform(made(submit, drain(ONE), cancel(ONE, pending=True)), fake)
    assert len(errors) == 2
    assert fake.done == [f"submit demo.tiny.{REV}.0"]


def test_R28_queue_is_not_asked_again_when_nothing_ends() -> None:
    """A plan without an end costs no further query."""
    fake = FakeWorld()
    perform(made(to()), fake)
    assert [what.split()[0] for what in fake.done] == ["change", "change"]


def test_model_that_left_the_spec_is_not_submitted() -> None:
    """What no recipe is known of is an error of that action."""
    submit = Submit(name=replace(ONE.name, model="gone"), gpus=1, reason=Reason.MISSING)
    assert perform(made(submit), FakeWorld()) == [
        f"submit demo.gone.{REV}.0: nothing is known any more of what its revision is made of"
    ]


def test_plan_of_a_converged_fleet_does_nothing() -> None:
    """No action, no call."""
    other = job(revision(FLEET, "other"), id=3, model="other")
    jobs = ONE, TWO, other
    gateways = [view(FLEET, *jobs, name=name) for name in ("a", "b")]
    fake = FakeWorld()
    assert perform(plan(FLEET, observation(*jobs, gateways=gateways), Memory()), fake) == []
    assert fake.done == []


def test_R05_intent_is_written_before_and_outcome_after_each_effect() -> None:
    """Done, failed or unknown, with the new job's id or the error's line."""
    submits = [
        Submit(name=replace(ONE.name, ordinal=at), gpus=1, reason=Reason.MISSING) for at in (0, 1)
    ]
    generation = to(ONE).generation
    fails: dict[str, FleetError] = {
        f"submit demo.tiny.{REV}.1": SubmitUnknown("sbatch: timed out"),
        f"change b {generation}": GatewayFailed("gateway b: broken"),
    }
    fake = FakeWorld(live=(ONE,), fail=fails)
    perform(made(*submits, to(ONE), drain(ONE), cancel(TWO)), fake)
    assert fake.done == [
        *("list demo", f"submit demo.tiny.{REV}.0", f"change a {generation}", "drain 1"),
    ]
    assert fake.journal.rows == [
        *("submit intended at 1000000, 1 done", "1 done, 2 done: job 102"),
        *("submit intended at 1000000, 2 done", "3 unknown, 2 done: sbatch: timed out"),
        *("route intended at 1000000, 2 done", "5 failed, 3 done: gateway b: broken"),
        *("drain intended at 1000000, 3 done", "7 done, 4 done: "),
        "cancel intended at 1000000, 4 done",
        "9 failed, 4 done: the job is not there any more; looking again in the next cycle",
    ]


def test_R05_reconciler_killed_in_an_effect_leaves_an_intent_without_outcome() -> None:
    """What may have happened stays written down as such."""

    class Killed(BaseException):
        pass

    class Dying(FakeWorld):
        def submit(self, script: str) -> int:
            raise Killed(script)

    fake = Dying()
    with pytest.raises(Killed):
        perform(plan(FLEET, observation(), Memory()), fake)
    assert fake.journal.rows == ["submit intended at 1000000, 0 done"]


@pytest.mark.parametrize("full", range(5))
def test_R32_journal_that_can_not_be_written_stops_nothing(full: int) -> None:
    """Whichever write meets the full disk: every action is done, and one line says so."""
    fake = FakeWorld(live=(ONE, TWO), journal=FakeJournal(full=full))
    errors = perform(made(to(ONE), drain(ONE), cancel(TWO)), fake)
    assert errors == ["journal: state.sqlite can't be written: disk is full"]
    assert len(fake.journal.rows) == full
    assert [what.split()[0] for what in fake.done] == [
        "list",
        "change",
        "change",
        "drain",
        "cancel",
    ]


def test_R32_journal_error_comes_beside_those_of_actions() -> None:
    """One broken thing does not hide another."""
    fails: dict[str, FleetError] = {"drain 1": SlurmUnavailable("scancel: no answer")}
    fake = FakeWorld(live=(ONE,), fail=fails, journal=FakeJournal(full=0))
    errors = perform(made(drain(ONE)), fake)
    assert [error.split(":")[0] for error in errors] == [f"drain {ONE.name}", "journal"]


def test_submission_gives_a_protected_job_its_keys() -> None:
    """Their ids stand in its comment; an open fleet's jobs get none."""
    opened = fleet(model_record(replicas=2), replica_access="open")
    recipe = Recipe.of(opened, opened.models[0], digest=DIGEST, program="/opt/e", commit=None)
    name = replace(ONE.name, revision=recipe.revision, ordinal=7)
    for recipes, submit in (
        (RECIPES, Submit(name=replace(ONE.name, ordinal=7), gpus=1, reason=Reason.MISSING)),
        ([recipe], Submit(name=name, gpus=1, reason=Reason.MISSING)),
    ):
        fake = FakeWorld()
        execute(made(submit), FLEET, fake.world(), recipes, say=lambda _: None)
        [script] = fake.submitted
        assert ('"keys":["aaaaaaaa","bbbbbbbb"]' in script) == (recipes is RECIPES)


def test_route_brings_the_key_along_and_fails_when_it_is_gone() -> None:
    """The gateway keeps what it has until a plan is made with the keys that there are."""
    fake, route = FakeWorld(), to(ONE)
    assert perform(made(route), fake) == []
    assert fake.changed[0].secrets.keys() == {KEY_FILE, AUTHORITY_FILE}
    gone = replace(route, trust=Trust(key="cccccccc", authority=RING.authority))
    [error] = perform(made(gone), fake)
    assert "have changed meanwhile" in error
    assert len(fake.changed) == 2


def test_route_brings_the_key_of_a_fallback_along(tmp_path: Path) -> None:
    """Also where no replica has one; what the plan does not name is not read."""
    file = tmp_path / "external.key"
    file.write_text("sk-external")
    file.chmod(0o600)
    away = {"url": "https://api.example.org/v1", "model": "m"}
    wanted = fleet(
        model_record(fallback={**away, "key_file": str(file)}),
        model_record(name="other", fallback={**away, "key_file": "/nowhere"}),
        gateway={"hosts": [{"name": "a"}], "external": {"resolvers": ["10.0.0.53"]}},
    )
    fake, secrets = FakeWorld(), FileSecrets(None, "demo")
    asked = sorted({model.fallback.key_file for model in wanted.models if model.fallback})
    seen = observation(
        external_keys=secrets.external_keys(asked)[0], gateways=[GatewayView(name="a")]
    )
    decided = plan(wanted, seen, Memory())
    assert [note.subject for note in decided.notes if note.kind is NoteKind.FALLBACK] == ["other"]
    [route] = [action for action in decided.actions if isinstance(action, Route)]
    world = replace(fake.world(), secrets=secrets)
    assert execute(made(route), wanted, world, [], say=lambda _: None).errors == ()
    assert "Bearer sk-external" in fake.changed[0].secrets[KEY_FILE]
    assert "sk-external" not in str(fake.changed[0].files) + str(decided)
    file.unlink()
    [error] = execute(made(route), wanted, world, [], say=lambda _: None).errors
    assert f"{file}: No such file" in error
