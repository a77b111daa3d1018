"""`fleet tenant`: keys of tenants, of which the spec holds only the sha256.

A key is printed once and stands nowhere. The spec's files are edited as text, so that comments and
everything else in them stay; what such an edit made is read back before it replaces the file.
"""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from reconciler.errors import FleetError
from reconciler.naming import LABEL, LABEL_MAX

if TYPE_CHECKING:
    from reconciler.spec import Fleet, Tenant

# How many hex digits of a hash are shown, and how few name one.
_SHOWN = 12
_FEWEST = 6
_SPEC = click.argument("spec", type=click.Path(path_type=Path), envvar="FLEET_SPEC")
_NAME = click.argument("name")


@click.group()
def tenant() -> None:
    """Make, change and take away the keys of tenants. Commit and apply what these write."""


@tenant.command()
@_SPEC
@_NAME
def add(spec: Path, name: str) -> None:
    """Make a key for a new tenant NAME: printed once; its hash goes to tenants/NAME.yaml."""
    if not re.fullmatch(LABEL, name) or len(name) > LABEL_MAX:
        raise FleetError(f"a tenant's name is a DNS label of {LABEL_MAX} characters at most")
    if name in (one.name for one in _load(spec).tenants):
        raise FleetError(f"the tenant {name} is there already; `fleet tenant rotate` adds a key")
    key, digest = _key()
    file = spec / "tenants" / f"{name}.yaml"
    _create(file, f'name: {name}\nkey_sha256:\n  - "{digest}"\n')
    _show(key, f"{file}: written")


@tenant.command()
@_SPEC
@_NAME
def rotate(spec: Path, name: str) -> None:
    """Make one more key for the tenant NAME, printed once; those before stay valid."""
    at, one = _tenant(_load(spec), name)
    key, digest = _key()
    last = len(one.key_sha256) - 1
    file = _edit(spec, (*_keys(at), last), [*one.key_sha256, digest], digest)
    _show(key, f"{file}: {name} has {len(one.key_sha256) + 1} keys now")


@tenant.command()
@_SPEC
@_NAME
@click.argument("hash_prefix")
def revoke(spec: Path, name: str, hash_prefix: str) -> None:
    """Take away the key of the tenant NAME whose hash begins with HASH_PREFIX."""
    at, one = _tenant(_load(spec), name)
    found = [key for key in one.key_sha256 if key.startswith(hash_prefix)]
    if len(hash_prefix) < _FEWEST or len(found) != 1:
        shown = ", ".join(key[:_SHOWN] for key in one.key_sha256)
        raise FleetError(f"give {_FEWEST} or more digits of one key of {name}: {shown}")
    if len(one.key_sha256) == 1:
        raise FleetError(f"the only key of {name}: rotate first, or remove the tenant")
    left = [key for key in one.key_sha256 if key != found[0]]
    file = _edit(spec, (*_keys(at), one.key_sha256.index(found[0])), left, None)
    click.echo(f"{file}: {found[0][:_SHOWN]} taken from {name}; it is valid until this is applied")


@tenant.command("list")
@_SPEC
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def list_(spec: Path, as_json: bool) -> None:
    """Show the tenants, the beginnings of their keys' hashes, and what they may use."""
    fleet = _load(spec)
    if as_json:
        click.echo(json.dumps({"tenants": [one.model_dump() for one in fleet.tenants]}, indent=2))
        return
    if not fleet.tenants:
        click.echo("no tenants: whoever reaches the gateway may use every model")
    for one in fleet.tenants:
        click.echo(_line(one))


def _line(one: "Tenant") -> str:
    keys = " ".join(key[:_SHOWN] for key in one.key_sha256)
    limits = [
        f"{value:g} {word}"
        for value, word in (
            (one.requests_per_second, "requests/s"),
            (one.concurrency, "at once"),
            (one.tokens_per_day, "tokens/day"),
        )
        if value is not None
    ]
    models = "all models" if one.models is None else " ".join(one.models) or "no model"
    return f"{one.name}  {models}  {', '.join(limits) or 'no limit'}  {keys}"


def _load(spec: Path) -> "Fleet":
    from reconciler.spec import load_fleet

    return load_fleet(spec)


def _tenant(fleet: "Fleet", name: str) -> "tuple[int, Tenant]":
    for at, one in enumerate(fleet.tenants):
        if one.name == name:
            return at, one
    names = ", ".join(one.name for one in fleet.tenants) or "none"
    raise FleetError(f'no tenant "{name}" in the spec; the tenants are: {names}')


def _keys(at: int) -> tuple[str | int, ...]:
    return ("tenants", at, "key_sha256")


def _key() -> tuple[str, str]:
    """Return a new key and its sha256."""
    import secrets

    key = f"mf-{secrets.token_urlsafe(32)}"
    return key, hashlib.sha256(key.encode()).hexdigest()


def _show(key: str, text: str) -> None:
    click.echo(f"{text}; this is the key, and it is shown only here:", err=True)
    click.echo(key)


def _edit(spec: Path, path: tuple[str | int, ...], wanted: list[str], added: str | None) -> Path:
    """Put a hash behind the one at `path`, or take that one out; return the file that was changed.

    Raises FleetError, with nothing changed, if that does not make the list that is wanted.
    """
    from reconciler.source import parse
    from reconciler.spec import place_of

    place = place_of(spec, path)
    file = Path(place.file)
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    at, line = place.line - 1, lines[place.line - 1]
    before = line[: place.column - 1]
    if before.strip() != "-":
        raise FleetError(f"{file}:{place.line}: write the hashes one a line, each behind a dash")
    if added is None:
        del lines[at]
    else:
        lines[at] = line if line.endswith("\n") else f"{line}\n"
        lines.insert(at + 1, f'{before}"{added}"\n')
    new = "".join(lines)
    if wanted not in _lists_of_keys(parse(str(file), new).value):
        raise FleetError(f"{file}:{place.line}: too unusual to be edited; do it by hand")
    try:
        part = _part(file, new)
        part.chmod(file.stat().st_mode & 0o777)
        part.replace(file)
    except OSError as error:
        raise FleetError(f"{file} can't be written: {error.strerror}") from None
    return file


def _lists_of_keys(value: Any) -> list[Any]:
    """Return each tenant's hashes in a file: of one tenant, or fleet.yaml."""
    tenants = [value, *(value.get("tenants") or [])] if isinstance(value, dict) else []
    return [one.get("key_sha256") for one in tenants if isinstance(one, dict)]


def _create(file: Path, text: str) -> None:
    """Write a new file, whole or not at all. Raises FleetError if there is one already."""
    try:
        file.parent.mkdir(exist_ok=True)
        part = _part(file, text)
        try:
            file.hardlink_to(part)
        finally:
            part.unlink()
    except FileExistsError:
        raise FleetError(f"{file} is there already; it is not overwritten") from None
    except OSError as error:
        raise FleetError(f"{file} can't be written: {error.strerror}") from None


def _part(file: Path, text: str) -> Path:
    """Write a text beside its file, where no reader of the spec looks, and return it."""
    import tempfile

    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    with os.fdopen(handle, "w", encoding="utf-8") as part:
        part.write(text)
        part.flush()
        os.fsync(part.fileno())
    path = Path(name)
    path.chmod(0o644)
    return path
