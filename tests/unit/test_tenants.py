"""Tenants in the spec, and `fleet tenant`: keys are printed once, the spec holds their hashes."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from reconciler.cli import main
from reconciler.spec import load_fleet
from tests.unit.test_spec import GOOD, validate

A, B, C = "a" * 64, "b" * 64, "c" * 64


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    """A spec without tenants."""
    (tmp_path / "fleet.yaml").write_text(GOOD)
    return tmp_path


def tenant(*words: object) -> Result:
    return CliRunner().invoke(main, ["tenant", *map(str, words)])


def keys(spec: Path, name: str = "alice") -> tuple[str, ...]:
    [found] = [one for one in load_fleet(spec).tenants if one.name == name]
    return found.key_sha256


def digest(result: Result) -> str:
    """The hash of the key that a command printed, and nothing else."""
    assert result.exit_code == 0, result.output
    [key] = result.stdout.splitlines()
    assert len(key) > 40
    return hashlib.sha256(key.encode()).hexdigest()


def write(spec: Path, *records: str) -> Path:
    (spec / "tenants").mkdir(exist_ok=True)
    for at, text in enumerate(records):
        (spec / "tenants" / f"{at}.yaml").write_text(text)
    return spec


MISTAKES: dict[str, tuple[str, str]] = {
    "unknown key": (f"name: a\nkey_sha256: [{A}]\nkeys: []\n", '0.yaml:3:1: unknown key "keys"'),
    "misspelt": (
        f"name: a\nkey_sha256: [{A}]\nconcurency: 3\n",
        '0.yaml:3:1: unknown key "concurency"; did you mean "concurrency"?',
    ),
    "unknown model": (
        f"name: a\nkey_sha256: [{A}]\nmodels: [tinny]\n",
        '0.yaml:3:10: no model "tinny" under models; did you mean "tiny"?',
    ),
    "no key": ("name: a\n", '0.yaml:1:1: "key_sha256" is missing'),
    "empty list": (
        "name: a\nkey_sha256: []\n",
        "0.yaml:2:1: no key: nobody could call as this tenant",
    ),
    "name": (f"name: A b\nkey_sha256: [{A}]\n", "0.yaml:1:1: tenants.0.name: must be a DNS label"),
    "burst alone": (f"name: a\nkey_sha256: [{A}]\nburst: 3\n", "0.yaml:3:1: burst needs requests"),
    "rate of nothing": (
        f"name: a\nkey_sha256: [{A}]\nrequests_per_second: 0\n",
        "0.yaml:3:1: tenants.0.requests_per_second: ",
    ),
    "key twice": (
        f"name: a\nkey_sha256: [{A}, {A}]\n",
        '0.yaml:2:80: already a key of the tenant "a"',
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_in_a_tenants_file_is_one_line_with_its_place(spec: Path, name: str) -> None:
    """As in every other file of a spec."""
    text, line = MISTAKES[name]
    [said] = validate(write(spec, text))
    assert said.startswith(f"tenants/{line}")


def test_key_or_name_of_two_tenants_is_a_mistake(spec: Path) -> None:
    """A request is of one tenant."""
    first, second = f"name: a\nkey_sha256: [{A}]\n", f"name: b\nkey_sha256: [{B}, {A}]\n"
    said = validate(write(spec, first, second))
    assert said == ['tenants/1.yaml:2:80: already a key of the tenant "a"']
    said = validate(write(spec, first, f"name: a\nkey_sha256: [{B}]\n"))
    assert said == ['tenants/1.yaml:1:1: two tenants are named "a"']


def test_R36_key_in_place_of_its_hash_is_not_shown(spec: Path) -> None:
    """Errors go to logs; who confuses the two is told what is wanted, not what was given."""
    [said] = validate(write(spec, "name: a\nkey_sha256: [mf-a-secret]\n"))
    assert "secret" not in said


def test_tenants_of_all_files_are_read_as_one(spec: Path) -> None:
    """In fleet.yaml first, then by file name; what a tenant may is what it says."""
    more = f"tenants:\n  - {{name: inline, key_sha256: [{C}], concurrency: 3}}\n"
    (spec / "fleet.yaml").write_text(GOOD + more)
    write(
        spec,
        f"name: a\nkey_sha256: [{A}]\nrequests_per_second: 2.5\n",
        f"name: b\nkey_sha256: [{B}]\n",
    )
    tenants = load_fleet(spec).tenants
    assert [one.name for one in tenants] == ["inline", "a", "b"]
    assert [one.rate for one in tenants] == [None, (150, 3), None]


def test_R35_tenants_that_can_not_be_read_are_never_no_tenants(spec: Path) -> None:
    """Without tenants a gateway is open to everyone: that must be meant."""
    (spec / "tenants").write_text("not a folder")
    [said] = validate(spec)
    assert said.startswith("tenants:1:1: can't be read")


def test_fleet_without_tenants_is_a_warning(spec: Path) -> None:
    """It is open to everyone who reaches it; validate says so and ends well."""
    result = CliRunner().invoke(main, ["validate", str(spec)])
    assert result.exit_code == 0
    assert "fleet.yaml:7:1: warning: no tenants: whoever reaches the gateway" in result.stderr
    digest(tenant("add", spec, "alice"))
    assert "warning" not in CliRunner().invoke(main, ["validate", str(spec)]).stderr


def test_R36_new_tenant_is_its_hash_alone(spec: Path) -> None:
    """The key is printed once, by itself; the file holds its hash, and is read at once."""
    result = tenant("add", spec, "alice")
    assert keys(spec) == (digest(result),)
    text = (spec / "tenants/alice.yaml").read_text()
    assert result.stdout.strip() not in text
    assert [path.name for path in (spec / "tenants").iterdir()] == ["alice.yaml"]


def test_tenant_is_not_made_twice(spec: Path) -> None:
    """Whether its name or its file is there: what is there stays."""
    first = digest(tenant("add", spec, "alice"))
    assert "is there already" in tenant("add", spec, "alice").stderr
    file = spec / "tenants/bob.yaml"
    file.write_text(f"name: carol\nkey_sha256: [{A}]\n")
    assert tenant("add", spec, "bob").exit_code == 1
    assert (keys(spec), keys(spec, "carol")) == ((first,), (A,))


@pytest.mark.parametrize("name", ["A", "a b", "../x", "-a", "", "a" * 41, "a.b"])
def test_name_that_is_no_label_makes_no_tenant(spec: Path, name: str) -> None:
    """One line, and no file anywhere."""
    assert tenant("add", spec, "--", name).exit_code == 1
    assert not (spec / "tenants").exists()


WRITTEN: dict[str, str] = {
    "by us": f'name: alice\nkey_sha256:\n  - "{A}"\n',
    "by hand": f"# ours\nkey_sha256:\n- {A} # old\nname: alice  # who\nmodels: [tiny]\n",
    "two, no newline": f"name: alice\nkey_sha256:\n  - {B}\n  - {A}",
}


@pytest.mark.parametrize("name", WRITTEN)
def test_rotation_adds_a_key_and_revocation_takes_one(spec: Path, name: str) -> None:
    """Both keys are valid in between, and nothing else in the file changes."""
    text = WRITTEN[name]
    write(spec, text)
    before = keys(spec)
    new = digest(tenant("rotate", spec, "alice"))
    assert keys(spec) == (*before, new)
    result = tenant("revoke", spec, "alice", A[:8])
    assert result.exit_code == 0, result.output
    assert keys(spec) == tuple(key for key in (*before, new) if key != A)
    kept = [line for line in text.splitlines() if A not in line]
    left = (spec / "tenants/0.yaml").read_text().splitlines()
    assert [line for line in left if new not in line] == kept


def test_tenant_in_fleet_yaml_is_rotated_there(spec: Path) -> None:
    """A key is added where the others stand."""
    bob = f"  - name: bob\n    key_sha256: [{C}]\n"
    alice = f"  - name: alice\n    key_sha256:\n      - {A}\n"
    (spec / "fleet.yaml").write_text(f"{GOOD}tenants:\n{bob}{alice}")
    new = digest(tenant("rotate", spec, "alice"))
    assert (keys(spec), keys(spec, "bob")) == ((A, new), (C,))


def test_file_that_is_written_otherwise_is_left_alone(spec: Path) -> None:
    """What can't be edited surely is said, with its place; no key is shown."""
    text = f"name: alice\nkey_sha256: [{A}, {B}]\n"
    write(spec, text)
    for words in (("rotate", spec, "alice"), ("revoke", spec, "alice", A[:8])):
        result = tenant(*words)
        assert (result.exit_code, result.stdout) == (1, "")
        assert "0.yaml:2" in result.stderr
        assert "one a line" in result.stderr
    assert (spec / "tenants/0.yaml").read_text() == text


REFUSED: list[tuple[list[Any], str]] = [
    (["revoke", "alice", B[:8]], "the only key of alice"),
    (["revoke", "alice", B[:3]], "give 6 or more digits"),
    (["revoke", "alice", "123456"], "give 6 or more digits"),
    (["revoke", "bob", A[:8]], 'no tenant "bob" in the spec; the tenants are: alice'),
    (["rotate", "bob"], 'no tenant "bob"'),
]


@pytest.mark.parametrize(("words", "line"), REFUSED)
def test_what_can_not_be_is_one_line_and_no_change(spec: Path, words: list[str], line: str) -> None:
    """A tenant keeps a key, and a key is named without doubt."""
    text = f"name: alice\nkey_sha256:\n  - {B}\n"
    write(spec, text)
    verb, *rest = words
    result = tenant(verb, spec, *rest)
    assert result.exit_code == 1
    assert line in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert (spec / "tenants/0.yaml").read_text() == text


def test_list_shows_who_may_what(spec: Path) -> None:
    """Beginnings of hashes, by which a key is revoked."""
    assert "no tenants" in tenant("list", spec).stdout
    write(spec, f"name: alice\nkey_sha256: [{A}]\nmodels: [tiny]\nrequests_per_second: 5\n")
    shown = tenant("list", spec).stdout
    assert shown == f"alice  tiny  5 requests/s  {A[:12]}\n"
    assert '"name": "alice"' in tenant("list", spec, "--json").stdout
