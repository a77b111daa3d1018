"""`fleet backend-key`: the keys that gateways show to replicas, which clients never see.

To rotate is to add a newer one. Replicas take all keys that there were when they were submitted;
gateways show the newest that all of theirs take; to revoke one replaces every replica that has it.
"""

import json
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from reconciler.errors import FleetError

if TYPE_CHECKING:
    from reconciler.adapters.secrets import BackendKey, FileSecrets
    from reconciler.spec import Fleet
    from reconciler.state import GatewayView, Job

_spec = click.argument("spec", type=click.Path(path_type=Path), envvar="FLEET_SPEC")


@click.group()
def backend_key() -> None:
    """Show, rotate and revoke the keys between gateways and replicas."""


@backend_key.command()
@_spec
def rotate(spec: Path) -> None:
    """Add a newer key; it is in use when every replica that gets requests takes it."""
    _, secrets = _secrets(spec)
    _some(secrets.backend_keys())
    id = secrets.add_key()
    click.echo(f"added backend key {id}: replicas that are submitted from now on take it")


@backend_key.command()
@_spec
@click.argument("id")
def revoke(spec: Path, id: str) -> None:
    """Remove the key ID for good; each replica that takes it is replaced, as for a new revision."""
    from reconciler.adapters.slurm_cli import SlurmCli

    fleet, secrets = _secrets(spec)
    ids = [key.id for key in _some(secrets.backend_keys())]
    jobs = SlurmCli().jobs(fleet.fleet).jobs
    why = refusal(id, ids, jobs)
    if why is not None:
        raise FleetError(why)
    secrets.remove_key(id)
    count = len(_taking(id, jobs))
    click.echo(f"revoked backend key {id}: {count} live jobs take it and will be replaced")


@backend_key.command("list")
@_spec
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def list_(spec: Path, as_json: bool) -> None:
    """Show each key's id, its age, how many live jobs take it, and which gateways show it."""
    from reconciler.adapters.nginx import NginxGateways
    from reconciler.adapters.slurm_cli import SlurmCli
    from reconciler.render import backend_keys_text

    fleet, secrets = _secrets(spec)
    jobs, views = (
        SlurmCli().jobs(fleet.fleet).jobs,
        NginxGateways(fleet.gateway, fleet.fleet).look(),
    )
    record = listing(secrets.backend_keys(), jobs, views, time.time())
    click.echo(json.dumps(record, indent=2) if as_json else backend_keys_text(record))


def refusal(id: str, ids: Sequence[str], jobs: Iterable["Job"]) -> str | None:
    """Return why a key can't be revoked now, None if it can.

    A job that runs and takes no other key could not be reached before it is replaced. One whose
    comment can't be read may be such a job.
    """
    from reconciler.adapters.secrets import FEWEST_KEYS
    from reconciler.state import Phase

    left = set(ids) - {id}
    if id not in ids:
        return f'there is no key "{id}"; the keys are {", ".join(ids)}'
    if len(left) < FEWEST_KEYS:
        return f"there are only {len(ids)} keys: rotate first"
    for job in (job for job in jobs if job.phase in (Phase.RUNNING, Phase.UNKNOWN)):
        if job.comment is None:
            return f"which keys job {job.id} takes can't be read: it may take no other"
        if job.comment.keys and not left.intersection(job.comment.keys):
            return f"job {job.id} takes no other key that is left: wait until it has been replaced"
    return None


def listing(
    keys: Sequence["BackendKey"], jobs: Sequence["Job"], views: Iterable["GatewayView"], at: float
) -> dict[str, object]:
    """Return what is known of each key at a time, as JSON has it, oldest first."""
    from reconciler.routes import key_in_use

    ids = [key.id for key in keys]
    shown = [(view.name, key_in_use(ids, view.targets)) for view in views if view.error is None]
    rows = [
        {
            "id": key.id,
            "made": f"{datetime.fromtimestamp(key.made_at, UTC):%Y-%m-%d %H:%M:%S}",
            "age_s": max(0, round(at) - key.made_at),
            "jobs": len(_taking(key.id, jobs)),
            "gateways": [name for name, shows in shown if shows == key.id],
        }
        for key in keys
    ]
    return {"keys": rows}


def _taking(id: str, jobs: Iterable["Job"]) -> list["Job"]:
    from reconciler.state import Phase

    live = (job for job in jobs if job.phase is not Phase.ENDED and job.comment is not None)
    return [job for job in live if job.comment is not None and id in job.comment.keys]


def _secrets(spec: Path) -> tuple["Fleet", "FileSecrets"]:
    from reconciler.adapters.secrets import FileSecrets
    from reconciler.spec import load_fleet

    fleet = load_fleet(spec)
    return fleet, FileSecrets(fleet.secret_dir, fleet.fleet)


def _some(keys: Sequence["BackendKey"]) -> Sequence["BackendKey"]:
    if not keys:
        raise FleetError("no keys are made yet: the first protected replica's submission does")
    return keys
