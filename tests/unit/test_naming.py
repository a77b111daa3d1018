"""A replica's identity goes to Slurm and back; nothing else is taken for one."""

import json
from typing import Any

import pytest

from reconciler.adapters.secrets import MOST_KEYS
from reconciler.naming import (
    Comment,
    ReplicaName,
    Run,
    parse_comment,
    parse_name,
    submit_comment,
)
from reconciler.spec import Model
from tests.unit.build import comment_text, model_record

LABELS = ["a", "0", "llama-8b", "a--b", "x" * 40]


@pytest.mark.parametrize("fleet", LABELS)
@pytest.mark.parametrize("model", LABELS)
@pytest.mark.parametrize("ordinal", [0, 1, 10, 999_999])
def test_name_of_any_labels_round_trips(fleet: str, model: str, ordinal: int) -> None:
    """Whatever labels a spec may hold, the job name gives the same replica back."""
    name = ReplicaName(fleet=fleet, model=model, revision="0123abcd", ordinal=ordinal)
    assert parse_name(str(name)) == name


@pytest.mark.parametrize(
    "text",
    [
        *("", "demo", "demo.tiny", "demo.tiny.0123abcd", "demo.tiny.0123abcd.", "bash"),
        *("demo.tiny.0123abcd.00", "demo.tiny.0123abcd.-1", "demo.tiny.0123abcd.1000000"),
        *("demo.tiny.0123ABCD.0", "demo.tiny.0123abc.0", "demo.tiny.0123abcde.0"),
        *("Demo.tiny.0123abcd.0", "demo.-tiny.0123abcd.0", "demo.tiny-.0123abcd.0"),
        *("demo.ti.ny.0123abcd.0", "demo..0123abcd.0", " demo.tiny.0123abcd.0"),
        *("demo.tiny.0123abcd.0\n", "\ndemo.tiny.0123abcd.0", "demo.tiny.0123abcd.\u0661"),
        *("d\u00e9mo.tiny.0123abcd.0", "demo.tiny.0123abcd.0.1", "demo.tiny.0123abcd.0\0"),
    ],
)
def test_R27_name_of_another_shape_is_foreign(text: str) -> None:
    """A job is ours only if its name is exactly of our form."""
    assert parse_name(text) is None


@pytest.mark.parametrize("label", ["tiny\n", "-tiny", "tiny-", "Tiny", "t.y", "", "x" * 41, "é"])
def test_name_of_a_model_that_would_not_parse_is_no_label(label: str) -> None:
    """The spec refuses every name that the job name could not give back."""
    with pytest.raises(ValueError, match="name"):
        Model.model_validate(model_record(name=label))


def test_comment_of_a_submission_round_trips() -> None:
    """What a job is submitted with is read back, and has no address yet."""
    name = ReplicaName(fleet="demo", model="tiny", revision="0123abcd", ordinal=3)
    text = submit_comment(
        name, gpus=3, commit="0123456789ab", placement="01234567", avoids=("gpu1", "gpu2")
    )
    assert parse_comment(text) == Comment(
        gpus=3, commit="0123456789ab", run=None, placement="01234567", avoids="gpu1,gpu2"
    )
    assert json.loads(text)["model"] == "tiny"
    assert text.isascii()
    assert "\n" not in text
    assert "'" not in text


def test_comment_of_the_longest_names_fits_slurm() -> None:
    """The comment, with all that the job adds, stays below Slurm's 1,024 bytes."""
    name = ReplicaName(fleet="f" * 40, model="m" * 40, revision="0" * 8, ordinal=999_999)
    base = submit_comment(
        name,
        gpus=1_000_000,
        commit="0" * 12,
        succeeds=(2**26, 2**33),
        protect=True,
        keys=("0" * 8,) * MOST_KEYS,
        placement="0" * 8,
        avoids=["node1", *(f"node{at:059}" for at in range(2, 99))],
    )
    comment = parse_comment(base)
    assert comment is not None
    assert comment.avoids.startswith("node1,node")  # of many the first ones: each of them whole
    assert {len(node) for node in comment.avoids.split(",")} == {5, 63}
    run = '"run":{"node":"%s","restarts":9999,"address":"255.255.255.255:65535"' % ("n" * 255)
    assert len(base) + len(run) + 100 < 1024


def test_comment_of_a_running_job_is_read() -> None:
    """What the job publishes of itself is read, field by field."""
    run = Run(
        node="node7",
        restarts=2,
        address="10.1.2.3:20017",
        trap_ready=True,
        ready_at=None,
        draining=True,
    )
    text = comment_text(
        gpus=3, node="node7", restarts=2, address="10.1.2.3:20017", ready=None, draining=True
    )
    assert parse_comment(text) == Comment(gpus=3, commit=None, run=run)


@pytest.mark.parametrize(
    "text",
    [
        *("", "null", "[]", "1", '"v"', "{}", "(null)", "hello", "{", "\0", "[" * 100_000),
        *('{"v":2,"gpus":1,"commit":null}', '{"v":1,"commit":null}', '["v"]'),
        *('{"v":1,"gpus":-1,"commit":null}', '{"v":1,"gpus":true,"commit":null}'),
        *('{"v":1,"gpus":"1","commit":null}', '{"v":1,"gpus":1.0,"commit":null}'),
        *('{"v":1,"gpus":1,"commit":{}}', '{"v":1,"gpus":1,"commit":null,"run":null}'),
        *('{"v":1,"gpus":1,"commit":null,"run":[]}', '{"v":1,"gpus":1,"commit":null,"run":{}}'),
        '{"v":1,"commit":null,"gpus":' + "9" * 5000 + "}",
    ],
)
def test_R37_comment_that_was_vandalised_is_unreadable_and_no_error(text: str) -> None:
    """A job's owner may write anything into its comment: it is then unknown, never a crash."""
    assert parse_comment(text) is None


@pytest.mark.parametrize(
    "changed",
    [
        *({"restarts": -1}, {"restarts": "0"}, {"restarts": True}, {"restarts": None}),
        *({"ready": "soon"}, {"ready": -1}, {"ready": True}, {"ready": 1.5}),
    ],
)
def test_comment_with_a_wrong_field_is_unreadable(changed: dict[str, Any]) -> None:
    """One wrong field makes all that the job says of itself unknown."""
    assert parse_comment(comment_text(**changed)) is None


@pytest.mark.parametrize(
    "address",
    [
        *("", ":", "10.0.0.1", "10.0.0.1:", ":80", "10.0.0.1:0", "10.0.0.1:65536"),
        *("10.0.0.1:080", "10.0.0.1:+80", "10.0.0.1: 80", "10.0.0.1:80 ", "10.0.0.1:80\n"),
        *("10.0.0.1:8\u0660", "\u0661.0.0.1:80", "010.0.0.1:80", "10.0.0:80", "256.0.0.1:80"),
        *("localhost:80", "evil.example.org:80", "[::1]:80", "::1:80", "unix:/tmp/s", "0x7f.1:80"),
        *("10.0.0.1:80;", "10.0.0.1:80; } server { listen 1", "10.0.0.1:80/path", "a@10.0.0.1:80"),
        *("10.0.0.1:80 backup", "10.0.0.1:80#", "10.0.0.1%lo:80", "10.0.0.1:999999", "$host:80"),
    ],
)
def test_R37_address_that_is_not_ipv4_and_port_does_not_pass(address: str) -> None:
    """Only a plain IPv4 address and port can reach NGINX's configuration."""
    assert parse_comment(comment_text(address=address)) is None


@pytest.mark.parametrize("address", ["10.0.0.1:1", "255.255.255.254:65535"])
def test_address_that_is_ipv4_and_port_passes(address: str) -> None:
    """An address in its one canonical form is taken as it is."""
    comment = parse_comment(comment_text(address=address))
    assert comment is not None
    assert comment.run is not None
    assert comment.run.address == address
