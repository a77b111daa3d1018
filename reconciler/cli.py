"""The command `fleet`: arguments only; builds the adapters and calls the cycle.

Heavy imports (HTTP, validation) stand in the commands that need them, so that `--help` is quick.
"""

import atexit
import gc
import json
import os
import pwd
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from reconciler import __version__
from reconciler.errors import FleetError, PlanDiffers, SpecError
from reconciler.terminal import Ending, Progress, ending, record_of

if TYPE_CHECKING:
    from reconciler.cycle import Outcome
    from reconciler.observe import World
    from reconciler.plan import Plan
    from reconciler.spec import Fleet
    from reconciler.state import Orders

# What a start makes (modules, the spec) stays: to look for garbage among it over and over, and once
# more at the end, is a tenth of a short command. Long cycles are still cleaned up after.
gc.set_threshold(100_000, 50, 50)
atexit.register(gc.freeze)

# A plugin that happens to be installed must not change what a spec means, and to look for one would
# take a tenth of `validate`'s time.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

# Exit codes, docs/architecture.md: 0 done, 1 error, and:
_EXIT_CHANGES = 2
_EXIT_DIFFERS = 3
_EXIT_UNOBSERVED = 4
# Long enough for every drain, short enough that next month's mistake is caught again.
_ALLOWED_S = 3600.0
# How often a followed log is looked at.
_FOLLOW_S = 0.5

_INTERVAL = click.FloatRange(0.1, 3600)
_INTERVAL_HELP = "Seconds between cycles."
_spec = click.argument("spec", type=click.Path(path_type=Path), envvar="FLEET_SPEC")
_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
_allow_destroy = click.option(
    "--allow-destroy",
    multiple=True,
    metavar="MODEL",
    help="Let this model's serving replicas end as the spec's edit would have it (for an hour).",
)
_state_dir = click.option(
    "--state-dir",
    type=click.Path(path_type=Path),
    envvar="FLEET_STATE_DIR",
    help="Local folder of lock and memory; default: ~/.local/state/modelfleet/FLEET.",
)


class _Fleet(click.Group):
    """Shows a FleetError as its one line (a SpecError as one per mistake), never a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), "backend-key", "tenant"])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        # Groups of their own modules, which no other command needs.
        if cmd_name == "backend-key":
            from reconciler.backend_keys import backend_key

            return backend_key
        if cmd_name == "tenant":
            from reconciler.tenants import tenant

            return tenant
        return super().get_command(ctx, cmd_name)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SpecError as error:
            _fail(str(error))
        except PlanDiffers as error:
            _fail(f"fleet: {error}", _EXIT_DIFFERS)
        except FleetError as error:
            _fail(f"fleet: {error}")


def _fail(text: str, status: int = 1) -> NoReturn:
    click.echo(text, err=True)
    sys.exit(status)


@click.group(cls=_Fleet, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fleet")
def main() -> None:
    """Keep fleets of language models on Slurm as their specs in git say.

    SPEC is a folder that holds fleet.yaml (and models/*.yaml, tenants/*.yaml).
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
    replicas = sum(one.replicas for model in fleet.models for one in model.variants)
    if as_json:
        click.echo(json.dumps({"problems": [], "warnings": [*map(asdict, warnings)]}))
    else:
        for item in warnings:
            place = f"{item.file}:{item.line}:{item.column}"
            click.echo(f"{place}: warning: {item.message}", err=True)
        wanted = f"{_count(len(fleet.models), 'model')}, {_count(replicas, 'replica')}"
        click.echo(f"{spec}: fleet {fleet.fleet}, {wanted}")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


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

    orders, at = _orders(fleet, state_dir), time.time()
    allowed = orders.allow_destroy(at) | set(allow_destroy)
    decided, _ = look(fleet, world, at, allowed, orders.pauses)
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

    orders, at = _orders(fleet, state_dir), time.time()
    decided, _ = look(fleet, world, at, orders.allow_destroy(at), orders.pauses)
    _show(decided, status_text, as_json)
    _exit_unless_observed(decided)


@main.command()
@_spec
@_as_json
@_state_dir
@_allow_destroy
@click.option(
    "--expect",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Do nothing, and exit with 3, unless the actions are those of this `plan --json`.",
)
@click.option("--wait", is_flag=True, help="Go on until the fleet is as the spec says.")
@click.option("--timeout", default="30m", show_default=True, help="Of --wait: 90s, 30m, 2h.")
@click.option("--interval", type=_INTERVAL, default=2.0, show_default=True, help=_INTERVAL_HELP)
def apply(
    spec: Path,
    as_json: bool,
    state_dir: Path | None,
    allow_destroy: tuple[str, ...],
    expect: Path | None,
    wait: bool,
    timeout: str,
    interval: float,
) -> None:
    """Run one cycle; with --wait, cycles until nothing is left to do or to wait for.

    Told to end (TERM or Ctrl-C), it finishes what has begun and exits with 1 if that was not all.
    """
    timeout_s = _seconds(timeout)
    fleet, world = _load(spec, state_dir)
    reviewed = None if expect is None else _reviewed(expect, fleet)
    from reconciler.render import plan_text

    progress = Progress(quiet=as_json)
    with world.store.locked(), ending() as end:
        while True:
            outcome = _cycle(
                fleet, world, spec, state_dir, progress, end, reviewed, frozenset(allow_destroy)
            )
            if allow_destroy:
                # Not before: a plan that differs, or another's lock, leaves no word behind.
                _allow(fleet, state_dir, allow_destroy)
            # What follows from the first step is done as it comes, and as it was allowed.
            reviewed, allow_destroy = None, ()
            progress.show(outcome)
            if not wait or outcome.plan.converged or progress.elapsed_s >= timeout_s:
                break
            end.pause(_pause_s(outcome, interval))
            if end.told():
                break
    if as_json or not wait:
        _show(outcome.plan, plan_text, as_json)
    if wait and not outcome.plan.converged:
        when = "when told to end" if end.told() else f"after {timeout}"
        raise FleetError(f"not as the spec says {when}: {progress.waiting(outcome)}")
    if outcome.errors:
        sys.exit(1)
    _exit_unless_observed(outcome.plan)


@main.command()
@_spec
@_state_dir
@click.option("--interval", type=_INTERVAL, default=10.0, show_default=True, help=_INTERVAL_HELP)
def run(spec: Path, state_dir: Path | None, interval: float) -> None:
    """Repeat the cycle until told to end (TERM or Ctrl-C); the spec is read anew each time.

    Told to end, it finishes what has begun and exits with 0; told twice, it ends at once.
    """
    fleet, world = _load(spec, state_dir)
    ours = fleet.fleet
    progress = Progress(quiet=False)
    store = world.store
    with store.locked(), ending() as end:
        while not end.told():
            pause_s = interval
            try:
                fleet, world = _load(spec, state_dir)
                if fleet.fleet != ours:
                    # Its jobs would be nobody's, and the lock is for the old name.
                    raise FleetError(f"the spec now names the fleet {fleet.fleet}, not {ours}")
                world = replace(world, store=store)  # it holds the lock and the open file
                outcome = _cycle(fleet, world, spec, state_dir, progress, end)
                progress.show(outcome)
                pause_s = _pause_s(outcome, interval)
            except FleetError as error:
                # A checkout in progress or a full disk passes; the gateway serves meanwhile.
                progress.say(f"nothing done in this cycle: {error}")
            end.pause(pause_s)


@main.command()
@_spec
@click.argument("model", required=False)
@_state_dir
@click.option("--until", metavar="TIME", help="90m, 12h, or 2026-11-30T18:00; default: resumed.")
@click.option("--reason", required=True, help="Shown to everybody who looks.")
def pause(
    spec: Path, model: str | None, state_dir: Path | None, until: str | None, reason: str
) -> None:
    """Leave MODEL, or all of them, alone: nothing is submitted or ended, dead routes still go."""
    from reconciler.spec import load_fleet
    from reconciler.state import Pause

    fleet = load_fleet(spec)
    _check_model(fleet, model)
    word = Pause(
        model=model,
        reason=" ".join(reason.split()),
        by=_user(),
        until=None if until is None else _moment(until),
    )
    _order(fleet, state_dir, lambda orders: replace(orders, pauses=(*orders.pauses, word)))
    end = "until it is resumed" if until is None else f"until {until}"
    click.echo(f"paused {model or 'every model'} of {fleet.fleet} {end}")


@main.command()
@_spec
@click.argument("model", required=False)
@_state_dir
def resume(spec: Path, model: str | None, state_dir: Path | None) -> None:
    """Take back a pause of MODEL; without one, every pause."""
    from reconciler.spec import load_fleet

    fleet = load_fleet(spec)

    def edit(orders: "Orders") -> "Orders":
        left = tuple(one for one in orders.pauses if model not in (None, one.model))
        if left == orders.pauses:
            raise FleetError(f"nothing is paused of {model or fleet.fleet}")
        return replace(orders, pauses=left)

    left = _order(fleet, state_dir, edit).pauses
    still = " (every model is still paused)" if any(one.model is None for one in left) else ""
    click.echo(f"resumed {model or 'every model'} of {fleet.fleet}{still}")


@main.command()
@_spec
@click.argument("models", nargs=-1, required=True)
@_state_dir
def allow_destroy(spec: Path, models: tuple[str, ...], state_dir: Path | None) -> None:
    """Let the serving replicas of MODELS end as the spec's edit would have it, for an hour.

    For a `fleet run` that is at work; `apply --allow-destroy` says the same and does it.
    """
    from reconciler.spec import load_fleet

    _allow(load_fleet(spec), state_dir, models)
    click.echo(f"allowed for an hour: {', '.join(models)}")


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
@_as_json
@_state_dir
@click.option("--day", metavar="DAY", help="One UTC day, as 2026-11-30; default: today.")
@click.option("--days", type=click.IntRange(1, 400), help="So many UTC days, today the last.")
@click.option("--tenant", help="Only what this tenant used.")
@click.option("--model", help="Only what this model was used for.")
def usage(
    spec: Path,
    as_json: bool,
    state_dir: Path | None,
    day: str | None,
    days: int | None,
    tenant: str | None,
    model: str | None,
) -> None:
    """Show requests, tokens and times to the first byte by day, tenant and model.

    They are what this host's `apply` and `run` have counted of the gateways' logs.
    """
    if day is not None and days is not None:
        raise click.UsageError("--day and --days exclude each other")
    from reconciler.adapters.store import read_days
    from reconciler.render import usage_text
    from reconciler.spec import load_fleet
    from reconciler.usage import report

    last = datetime.now(UTC).date() if day is None else _day(day)
    first = last - timedelta(days=(days or 1) - 1)
    folder = _state_folder(load_fleet(spec), state_dir)
    record = report(read_days(folder, str(first), str(last)) or {}, tenant, model)
    click.echo(json.dumps(record, indent=2) if as_json else usage_text(record))


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

    orders, at = _orders(fleet, state_dir), time.time()
    decided, _ = look(fleet, world, at, orders.allow_destroy(at), orders.pauses)
    try:
        events = read_events(_state_folder(fleet, state_dir)) or []
    except StateFailed as error:
        _warn(str(error))
        events = []  # the plan alone explains most
    record = explanation(record_of(decided), events, name)
    if record is None:
        models = ", ".join(model.name for model in fleet.models)
        raise FleetError(f'no model or replica "{name}" is known; the models are {models}')
    click.echo(json.dumps(record, indent=2) if as_json else explain_text(record))
    _exit_unless_observed(decided)


@main.command()
@_spec
@click.argument("name", metavar="REPLICA_OR_MODEL")
@_as_json
@click.option(
    "--lines", default=100, show_default=True, type=click.IntRange(min=1), help="How many."
)
@click.option("--follow", "-f", is_flag=True, help="Go on with what is added, until Ctrl-C.")
def logs(spec: Path, name: str, as_json: bool, lines: int, follow: bool) -> None:
    """Print the end of a job's log: of this replica, or of this model's newest job.

    It is read from the spec's log_dir, so this must run where that is mounted.
    """
    if as_json and follow:
        raise click.UsageError("--json and --follow exclude each other")
    from reconciler.adapters.logs import last_lines, newest_log, read_on
    from reconciler.render import log_text
    from reconciler.spec import load_fleet

    fleet = load_fleet(spec)
    log = newest_log(Path(fleet.slurm.log_dir), fleet.fleet, name)
    text, position = last_lines(log, lines)
    if as_json:
        record = {"name": str(log.name), "job_id": log.job_id, "file": str(log.path)}
        click.echo(json.dumps({**record, "lines": text.splitlines()}, indent=2))
        return
    click.echo(f"{log.path}:", err=True)
    with ending() as end:
        click.echo(log_text(text), nl=False)
        while follow and not end.told():
            text, position = read_on(log, position)
            click.echo(log_text(text), nl=False)
            if not text:
                end.pause(_FOLLOW_S)


@main.command()
@_spec
@click.argument("model")
def render(spec: Path, model: str) -> None:
    """Print the batch script of a model's next replica; nothing is submitted."""
    fleet, world = _load(spec, None)
    from reconciler.batch import batch_script
    from reconciler.naming import ReplicaName
    from reconciler.plan import Reason, Submit
    from reconciler.state import Credentials, Recipe

    wanted = fleet.model(model)
    if wanted is None:
        raise FleetError(f'no model "{model}" in {spec}')
    pins, errors = world.images.pins(fleet)
    if wanted.image in errors:
        raise FleetError(errors[wanted.image])
    pin = pins[wanted.image]
    recipe = Recipe.of(fleet, wanted, digest=pin.digest, program=pin.program, commit=_commit(spec))
    name = ReplicaName(fleet=fleet.fleet, model=model, revision=recipe.revision, ordinal=0)
    submit = Submit(name=name, gpus=wanted.resources.gpus_total, reason=Reason.MISSING)
    credentials = None
    if fleet.replica_access == "protected":
        # Those that are made with the first replica have no ids yet.
        folder, keys = f"{fleet.secret_dir}/{fleet.fleet}", world.secrets.keyring().ids
        credentials = Credentials(folder=folder, keys=keys)
    click.echo(batch_script(recipe, submit, credentials), nl=False)


@main.command()
@_spec
@_as_json
@_state_dir
def images(spec: Path, as_json: bool, state_dir: Path | None) -> None:
    """Show the images that must stay: the spec, a live job or memory names them.

    If that can't be known of all, nothing is shown and the exit code is 1.
    """
    fleet, world = _load(spec, state_dir)
    from reconciler.adapters.store import SqliteStore
    from reconciler.in_use import images_in_use
    from reconciler.render import images_text

    # Memory that is lost names nothing, which is no reason to remove what it named.
    strict = SqliteStore(_state_folder(fleet, state_dir), _refuse)
    record = {"images": images_in_use(fleet, replace(world, store=strict))}
    click.echo(json.dumps(record, indent=2) if as_json else images_text(record))


def _refuse(text: str) -> NoReturn:
    raise FleetError(text)


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
    from reconciler.adapters.secrets import FileSecrets
    from reconciler.adapters.slurm_cli import SlurmCli
    from reconciler.adapters.store import SqliteStore
    from reconciler.observe import World
    from reconciler.spec import load_fleet

    fleet = load_fleet(spec)
    secrets = FileSecrets(fleet.secret_dir, fleet.fleet)
    return fleet, World(
        slurm=SlurmCli(),
        engines=HttpEngines(secrets),
        gateways=NginxGateways(fleet.gateway, fleet.fleet),
        images=ImageFolder(),
        secrets=secrets,
        store=SqliteStore(_state_folder(fleet, state_dir), _warn),
    )


def _reviewed(file: Path, fleet: "Fleet") -> "Plan":
    """Read what `plan --json` wrote for this fleet."""
    from pydantic import ValidationError

    from reconciler.plan import from_json

    try:
        plan = from_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise FleetError(f"{file} can't be read: {error.strerror}") from None
    except (UnicodeDecodeError, ValidationError):
        raise FleetError(f"{file} is not what `fleet plan --json` of this version writes") from None
    if plan.fleet != fleet.fleet:
        raise FleetError(f"{file} is a plan of the fleet {plan.fleet}, not {fleet.fleet}")
    return plan


def _cycle(
    fleet: "Fleet",
    world: "World",
    spec: Path,
    state_dir: Path | None,
    progress: "Progress",
    end: "Ending",
    reviewed: "Plan | None" = None,
    allow_destroy: frozenset[str] = frozenset(),
) -> "Outcome":
    from reconciler.cycle import cycle

    orders, at = _orders(fleet, state_dir), time.time()
    return cycle(
        fleet,
        world,
        at=at,
        commit=_commit(spec),
        say=progress.say,
        allow_destroy=orders.allow_destroy(at) | allow_destroy,
        pauses=orders.pauses,
        reviewed=reviewed,
        told_to_end=end.told,
    )


def _orders(fleet: "Fleet", state_dir: Path | None) -> "Orders":
    from reconciler.adapters.orders import read_orders

    return read_orders(_state_folder(fleet, state_dir))


def _order(fleet: "Fleet", state_dir: Path | None, edit: "Callable[[Orders], Orders]") -> "Orders":
    from reconciler.adapters.orders import change_orders

    now = time.time()
    return change_orders(_state_folder(fleet, state_dir), lambda had: edit(had.current(now)))


def _allow(fleet: "Fleet", state_dir: Path | None, models: tuple[str, ...]) -> None:
    until = time.time() + _ALLOWED_S
    words = dict.fromkeys(models, until)
    _order(fleet, state_dir, lambda orders: replace(orders, allowed={**orders.allowed, **words}))


def _check_model(fleet: "Fleet", name: str | None) -> None:
    if name is not None and fleet.model(name) is None:
        models = ", ".join(model.name for model in fleet.models)
        raise FleetError(f'no model "{name}" in the spec; the models are {models}')


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"user {os.getuid()}"


def _moment(text: str) -> float:
    """Return the time (epoch seconds) of `2h` from now, or of an ISO time, which is local."""
    try:
        moment = datetime.fromisoformat(text).timestamp()
    except ValueError:
        moment = time.time() + _seconds(text)
    if moment <= time.time():
        raise click.BadParameter(f"{text} is over")
    return moment


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise click.BadParameter("write a UTC day as 2026-11-30", param_hint="--day") from None


def _state_folder(fleet: "Fleet", state_dir: Path | None) -> Path:
    home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return state_dir or home / "modelfleet" / fleet.fleet


def _warn(text: str) -> None:
    click.echo(f"fleet: {text}", err=True)


def _show(plan: "Plan", text: Callable[[dict[str, Any]], str], as_json: bool) -> None:
    record = record_of(plan)
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
    import subprocess

    argv = ["git", "-C", str(spec), "rev-parse", "--short=12", "HEAD"]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if re.fullmatch(r"[0-9a-f]{12}", done.stdout.strip()) else None
