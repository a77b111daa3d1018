"""The command `fleet`: arguments only; builds the adapters and calls the cycle.

Heavy imports (HTTP, validation) stand in the commands that need them, so that `--help` is quick.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from reconciler import __version__
from reconciler.errors import FleetError, SpecError

if TYPE_CHECKING:
    from reconciler.cycle import Outcome
    from reconciler.observe import World
    from reconciler.plan import Plan
    from reconciler.spec import Fleet

# Exit codes, docs/architecture.md: 0 done, 1 error, 2 changes, 4 something could not be observed.
_EXIT_CHANGES = 2
_EXIT_UNOBSERVED = 4
# One line at least this often while waiting, so that nobody wonders.
_HEARTBEAT_S = 10.0

_INTERVAL = click.FloatRange(0.1, 3600)
_INTERVAL_HELP = "Seconds between cycles."
_spec = click.argument("spec", type=click.Path(path_type=Path), envvar="FLEET_SPEC")
_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
_allow_destroy = click.option(
    "--allow-destroy",
    multiple=True,
    metavar="MODEL",
    help="Let this model's serving replicas end, as its block is gone from the spec.",
)
_state_dir = click.option(
    "--state-dir",
    type=click.Path(path_type=Path),
    envvar="FLEET_STATE_DIR",
    help="Local folder of lock and memory; default: ~/.local/state/modelfleet/FLEET.",
)


class _OneLineErrors(click.Group):
    """Shows a FleetError as its one line (a SpecError as one per mistake), never a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SpecError as error:
            _fail(str(error))
        except FleetError as error:
            _fail(f"fleet: {error}")


def _fail(text: str) -> NoReturn:
    click.echo(text, err=True)
    sys.exit(1)


@click.group(cls=_OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fleet")
def main() -> None:
    """Keep fleets of language models on Slurm as their specs in git say.

    SPEC is a folder that holds fleet.yaml (and models/*.yaml).
    """


@main.command()
@_spec
@_as_json
def validate(spec: Path, as_json: bool) -> None:
    """Check a spec; every mistake gets one line with its position."""
    from reconciler.spec import read_fleet

    try:
        fleet, warnings = read_fleet(spec)
    except SpecError as error:
        if not as_json:
            raise
        click.echo(json.dumps({"problems": [*map(asdict, error.problems)]}, indent=2))
        sys.exit(1)
    replicas = sum(model.replicas for model in fleet.models)
    if as_json:
        click.echo(json.dumps({"problems": [], "warnings": [*map(asdict, warnings)]}))
    else:
        for item in warnings:
            place = f"{item.file}:{item.line}:{item.column}"
            click.echo(f"{place}: warning: {item.message}", err=True)
        click.echo(f"{spec}: fleet {fleet.fleet}, {len(fleet.models)} models, {replicas} replicas")


@main.command()
@_spec
@_as_json
@_state_dir
@_allow_destroy
@click.option("--detailed-exitcode", is_flag=True, help="Exit with 2 if there is something to do.")
def plan(
    spec: Path,
    as_json: bool,
    state_dir: Path | None,
    allow_destroy: tuple[str, ...],
    detailed_exitcode: bool,
) -> None:
    """Show what `apply` would do now, and why; change nothing."""
    fleet, world = _load(spec, state_dir)
    from reconciler.cycle import look
    from reconciler.render import plan_text

    decided, _ = look(fleet, world, time.time(), frozenset(allow_destroy))
    _show(decided, plan_text, as_json)
    if detailed_exitcode and decided.actions and decided.observed:
        sys.exit(_EXIT_CHANGES)
    _exit_unless_observed(decided)


@main.command()
@_spec
@_as_json
@_state_dir
def status(spec: Path, as_json: bool, state_dir: Path | None) -> None:
    """Show each model and each replica as it is now."""
    fleet, world = _load(spec, state_dir)
    from reconciler.cycle import look
    from reconciler.render import status_text

    decided, _ = look(fleet, world, time.time())
    _show(decided, status_text, as_json)
    _exit_unless_observed(decided)


@main.command()
@_spec
@_as_json
@_state_dir
@_allow_destroy
@click.option("--wait", is_flag=True, help="Go on until the fleet is as the spec says.")
@click.option("--timeout", default="30m", show_default=True, help="Of --wait: 90s, 30m, 2h.")
@click.option("--interval", type=_INTERVAL, default=2.0, show_default=True, help=_INTERVAL_HELP)
def apply(
    spec: Path,
    as_json: bool,
    state_dir: Path | None,
    allow_destroy: tuple[str, ...],
    wait: bool,
    timeout: str,
    interval: float,
) -> None:
    """Run one cycle; with --wait, cycles until nothing is left to do or to wait for."""
    timeout_s = _seconds(timeout)
    fleet, world = _load(spec, state_dir)
    from reconciler.cycle import cycle
    from reconciler.render import plan_text

    progress = _Progress(quiet=as_json)
    with world.store.locked():
        while True:
            outcome = cycle(
                fleet,
                world,
                at=time.time(),
                commit=_commit(spec),
                say=progress.say,
                allow_destroy=frozenset(allow_destroy),
            )
            progress.show(outcome)
            if not wait or outcome.plan.converged or progress.elapsed_s >= timeout_s:
                break
            time.sleep(_pause_s(outcome, interval))
    if as_json or not wait:
        _show(outcome.plan, plan_text, as_json)
    if wait and not outcome.plan.converged:
        raise FleetError(f"not as the spec says after {timeout}: {progress.waiting(outcome)}")
    if outcome.errors:
        sys.exit(1)
    _exit_unless_observed(outcome.plan)


@main.command()
@_spec
@_state_dir
@click.option("--interval", type=_INTERVAL, default=10.0, show_default=True, help=_INTERVAL_HELP)
def run(spec: Path, state_dir: Path | None, interval: float) -> None:
    """Repeat the cycle until told to end (TERM or Ctrl-C); the spec is read anew each time."""
    fleet, world = _load(spec, state_dir)
    ours = fleet.fleet
    from reconciler.cycle import cycle

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    progress = _Progress(quiet=False)
    store = world.store
    with store.locked():
        while not stop.is_set():
            pause_s = interval
            try:
                fleet, world = _load(spec, state_dir)
                if fleet.fleet != ours:
                    # Its jobs would be nobody's, and the lock is for the old name.
                    raise FleetError(f"the spec now names the fleet {fleet.fleet}, not {ours}")
                world = replace(world, store=store)  # it holds the lock and the open file
                outcome = cycle(
                    fleet, world, at=time.time(), commit=_commit(spec), say=progress.say
                )
                progress.show(outcome)
                pause_s = _pause_s(outcome, interval)
            except FleetError as error:
                # A checkout in progress or a full disk passes; the gateway serves meanwhile.
                progress.say(f"nothing done in this cycle: {error}")
            stop.wait(pause_s)


@main.command()
@_spec
@_as_json
@_state_dir
@click.option("--last", default=50, show_default=True, type=click.IntRange(min=1), help="How many.")
def events(spec: Path, as_json: bool, state_dir: Path | None, last: int) -> None:
    """Show what this host's `apply` and `run` did, the latest last."""
    from reconciler.adapters.store import read_events
    from reconciler.render import events_text
    from reconciler.spec import load_fleet

    record = {"events": read_events(_state_folder(load_fleet(spec), state_dir), last) or []}
    click.echo(json.dumps(record, indent=2) if as_json else events_text(record))


@main.command()
@_spec
@click.argument("name", metavar="REPLICA_OR_MODEL")
@_as_json
@_state_dir
def explain(spec: Path, name: str, as_json: bool, state_dir: Path | None) -> None:
    """Show all that is known of one model or replica: status, plan, notes, last events."""
    fleet, world = _load(spec, state_dir)
    from reconciler.adapters.store import read_events
    from reconciler.cycle import look
    from reconciler.errors import StateFailed
    from reconciler.render import explain_text, explanation

    decided, _ = look(fleet, world, time.time())
    try:
        events = read_events(_state_folder(fleet, state_dir)) or []
    except StateFailed as error:
        _warn(str(error))
        events = []  # the plan alone explains most
    record = explanation(_record(decided), events, name)
    if record is None:
        models = ", ".join(model.name for model in fleet.models)
        raise FleetError(f'no model or replica "{name}" is known; the models are {models}')
    click.echo(json.dumps(record, indent=2) if as_json else explain_text(record))
    _exit_unless_observed(decided)


@main.command()
@_spec
@click.argument("model")
def render(spec: Path, model: str) -> None:
    """Print the batch script of a model's next replica; nothing is submitted."""
    fleet, world = _load(spec, None)
    from reconciler.batch import batch_script
    from reconciler.naming import ReplicaName
    from reconciler.plan import Reason, Submit

    wanted = fleet.model(model)
    if wanted is None:
        raise FleetError(f'no model "{model}" in {spec}')
    pins, errors = world.images.pins(fleet)
    if wanted.image in errors:
        raise FleetError(errors[wanted.image])
    pin = pins[wanted.image]
    name = ReplicaName(
        fleet=fleet.fleet, model=model, revision=wanted.revision(pin.digest), ordinal=0
    )
    submit = Submit(name=name, gpus=wanted.resources.gpus_total, reason=Reason.MISSING)
    script = batch_script(fleet, wanted, submit, program=pin.program, commit=_commit(spec))
    click.echo(script, nl=False)


@main.command()
def schema() -> None:
    """Print the JSON Schema of fleet.yaml, for editors."""
    from reconciler.spec import json_schema

    click.echo(json.dumps(json_schema(), indent=2))


def _load(spec: Path, state_dir: Path | None) -> "tuple[Fleet, World]":
    """Read the spec and build the adapters that it asks for."""
    from reconciler.adapters.engine import HttpEngines
    from reconciler.adapters.images import ImageFolder
    from reconciler.adapters.nginx import NginxGateways
    from reconciler.adapters.slurm_cli import SlurmCli
    from reconciler.adapters.store import SqliteStore
    from reconciler.observe import World
    from reconciler.spec import load_fleet

    fleet = load_fleet(spec)
    return fleet, World(
        slurm=SlurmCli(),
        engines=HttpEngines(),
        gateways=NginxGateways(fleet.gateway),
        images=ImageFolder(),
        store=SqliteStore(_state_folder(fleet, state_dir), _warn),
    )


def _state_folder(fleet: "Fleet", state_dir: Path | None) -> Path:
    home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return state_dir or home / "modelfleet" / fleet.fleet


def _warn(text: str) -> None:
    click.echo(f"fleet: {text}", err=True)


class _Progress:
    """Prints what changes, with the time since the start, and says what is being waited for."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._began = self._said = time.monotonic()
        self._last: dict[str, Any] | None = None
        self._errors: tuple[str, ...] = ()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._began

    def say(self, text: str) -> None:
        if not self._quiet:
            self._said = time.monotonic()
            click.echo(f"[{self.elapsed_s:6.1f} s] {text}")

    def show(self, outcome: "Outcome") -> None:
        from reconciler.render import changes

        record = _record(outcome.plan)
        for line in changes(self._last, record):
            self.say(line)
        self._last = record
        for error in outcome.errors:
            # The same failure in every cycle is said once, then by the heartbeat.
            if error not in self._errors:
                self.say(f"failed: {error}")
        self._errors = outcome.errors
        if not outcome.plan.converged and time.monotonic() - self._said >= _HEARTBEAT_S:
            self.say(f"waiting: {self.waiting(outcome)}")

    def waiting(self, outcome: "Outcome") -> str:
        from reconciler.render import waiting_text

        failed = [f"failed: {error}" for error in outcome.errors]
        return "; ".join([waiting_text(_record(outcome.plan)), *failed])


def _record(plan: "Plan") -> dict[str, Any]:
    from reconciler.plan import to_json

    record: dict[str, Any] = json.loads(to_json(plan))
    return record


def _show(plan: "Plan", text: Callable[[dict[str, Any]], str], as_json: bool) -> None:
    record = _record(plan)
    click.echo(json.dumps(record, indent=2) if as_json else text(record))


def _exit_unless_observed(plan: "Plan") -> None:
    if not plan.observed:
        sys.exit(_EXIT_UNOBSERVED)


def _pause_s(outcome: "Outcome", interval: float) -> float:
    # A cycle that acted has changed the world: look again soon.
    return min(interval, 1.0) if outcome.plan.actions else interval


def _seconds(text: str) -> float:
    units = {"s": 1, "m": 60, "h": 3600}
    if text[-1:] not in units or not re.fullmatch(r"[0-9]{1,6}", text[:-1]):
        raise click.BadParameter("write a number with its unit: 90s, 30m or 2h")
    return float(int(text[:-1]) * units[text[-1]])


def _commit(spec: Path) -> str | None:
    """Return the spec's git commit, or None where it is not in git."""
    argv = ["git", "-C", str(spec), "rev-parse", "--short=12", "HEAD"]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if re.fullmatch(r"[0-9a-f]{12}", done.stdout.strip()) else None
