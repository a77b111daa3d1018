"""`specs/schema.json`, by which editors complete and check a spec, against the reader itself."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from click.testing import CliRunner
from pydantic import ValidationError

from reconciler import source
from reconciler.cli import main
from reconciler.spec import Fleet
from tests.unit.build import model_record, spec_record

SPECS = Path(__file__).parents[2] / "specs"
FILE = SPECS / "schema.json"
VALIDATOR = jsonschema.Draft202012Validator(json.loads(FILE.read_text(encoding="utf-8")))


def test_schema_in_git_is_current() -> None:
    """`python -m reconciler schema > specs/schema.json` after a change of the spec."""
    result = CliRunner().invoke(main, ["schema"])
    assert FILE.read_text(encoding="utf-8") == result.stdout


def test_schema_is_a_schema() -> None:
    """JSON Schema's own rules hold for it."""
    jsonschema.Draft202012Validator.check_schema(VALIDATOR.schema)


@pytest.mark.parametrize("file", sorted(SPECS.glob("*/fleet.yaml")))
def test_spec_of_this_repository_is_valid_by_the_schema(file: Path) -> None:
    """An editor underlines nothing in a spec that is right, and finds the schema from there."""
    text = file.read_text(encoding="utf-8")
    VALIDATOR.validate(source.parse(str(file), text).value)
    first = text.partition("\n")[0]
    assert (file.parent / first.removeprefix("# yaml-language-server: $schema=")).samefile(FILE)


BROKEN: dict[str, dict[str, Any]] = {
    "unknown-key": spec_record(replicas=1),
    "unknown-key-of-a-model": spec_record(model_record(replica=1)),
    "missing-key": {k: v for k, v in spec_record().items() if k != "budget"},
    "not-a-label": spec_record(model_record(name="Tiny_1")),
    "text-for-a-count": spec_record(model_record(replicas="2")),
    "negative-count": spec_record(model_record(replicas=-1)),
    "port-out-of-range": spec_record(gateway={"hosts": [{"name": "a"}], "listen": 65536}),
    "unknown-engine": spec_record(model_record(engine="vlm")),
    "number-for-a-version": spec_record(images={"engine": {"name": "x", "version": 0.32}}),
    "nothing-for-an-argument": spec_record(model_record(args={"seed": None})),
    "mapping-for-a-list": spec_record(models={}),
    "bad-name-of-a-variable": spec_record(model_record(env={"A-B": "x"})),
    "other-format": spec_record(version=2),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_spec_is_refused_by_schema_and_reader(name: str) -> None:
    """What an editor underlines is what `fleet validate` refuses."""
    assert not VALIDATOR.is_valid(BROKEN[name])
    with pytest.raises(ValidationError):
        Fleet.model_validate(BROKEN[name])


def test_schema_takes_what_the_broken_specs_were_made_from() -> None:
    """Each of them is broken by its one change."""
    VALIDATOR.validate(yaml.safe_load(yaml.safe_dump(spec_record())))
