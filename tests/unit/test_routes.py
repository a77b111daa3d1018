"""The generated NGINX files: a golden file, a stable order, and names that stay data."""

import json
import re
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from reconciler.routes import GENERATION_MARK, parse_targets, render_gateway
from reconciler.spec import Fleet
from reconciler.state import Target
from tests.unit.build import fleet, model_record

GOLDEN = Path(__file__).parent / "golden"

NAMES = [
    *("org/Tiny-8B", 'a"b', "a'b", "a\\b", "\\", "$uri", "${x}", "`id`", "</script>", "a;b", "}"),
    *("*/", "//", "é", "日本語", "🙂", "__proto__", "constructor", "hasOwnProperty", "a b"),
    *(GENERATION_MARK, "@LISTEN@", "%s", "{0}", "\\u0000", "\\n", "null"),
]


def targets() -> list[Target]:
    return [
        Target(model="tiny", job_id=9, submitted_at=1, address="10.0.0.9:20001"),
        Target(model="tiny", job_id=10, submitted_at=2, address="10.0.0.1:20000"),
        Target(model="big", job_id=11, submitted_at=3, address="10.0.0.1:20002"),
    ]


TENANTS: list[dict[str, Any]] = [
    {"name": "alice", "key_sha256": ["a" * 64, "b" * 64], "requests_per_second": 5},
    {"name": "bob", "key_sha256": ["c" * 64], "models": ["tiny"], "concurrency": 8},
    {"name": "carol", "key_sha256": ["d" * 64], "requests_per_second": 5, "concurrency": 8},
    {"name": "dave", "key_sha256": ["e" * 64], "requests_per_second": 0.5, "burst": 0},
]


def three(**keys: Any) -> Fleet:
    """A fleet of a ready, a starting and a stopped model, with tenants, TLS to its clients."""
    gateway = {
        "listen": 8443,
        "server_name": "llm.example.org",
        "tls": {"certificate": "/etc/ssl/llm.pem", "key": "/etc/ssl/private/llm.key"},
        "hosts": [{"name": "gateway"}],
    }
    return fleet(
        model_record(served_names=["org/Tiny"]),
        model_record(name="big", replicas=1),
        model_record(name="starting", replicas=1),
        model_record(name="stopped", replicas=0),
        **{"gateway": gateway, "tenants": TENANTS, **keys},
    )


def known(text: str) -> dict[str, Any]:
    """What the njs module knows of the fleet, as JavaScript reads it."""
    literal = text.split("\n", 1)[0].removeprefix("const FLEET = JSON.parse(").removesuffix(");")
    record: dict[str, Any] = json.loads(json.loads(literal))
    return record


@pytest.mark.parametrize("name", ["fleet.conf", "fleet.js", "targets.json"])
def test_file_of_a_gateway_is_as_reviewed(name: str) -> None:
    """Every generated line was read by a person; a change shows in the golden file's diff."""
    files = render_gateway(three(), targets())
    golden = (GOLDEN / name).read_text(encoding="utf-8")
    assert files.files[name].replace(files.generation, "GENERATION") == golden


def test_files_are_stable_in_any_order_of_targets() -> None:
    """The same replicas are the same text: no reload without a real difference."""
    made = {json.dumps(render_gateway(three(), order).files) for order in permutations(targets())}
    assert len(made) == 1
    doubled = render_gateway(three(), [*targets(), *targets()])
    assert doubled == render_gateway(three(), targets())


def test_generation_changes_with_the_content_only() -> None:
    """What a gateway runs is named by its content: budget or timeouts are not in it."""
    base = render_gateway(three(), targets()).generation
    same = [
        render_gateway(three(budget={"gpus": 99}), targets()),
        render_gateway(three(defaults={"drain_timeout_s": 9}), targets()),
        render_gateway(three(tenants=[{**one, "tokens_per_day": 9} for one in TENANTS]), targets()),
    ]
    assert {made.generation for made in same} == {base}
    alice, *others = TENANTS
    moved = [replace(targets()[0], address="10.0.0.9:20002"), *targets()[1:]]
    resubmitted = [replace(targets()[0], submitted_at=99), *targets()[1:]]
    other = [
        render_gateway(three(), targets()[:2]),
        render_gateway(three(), moved),
        render_gateway(three(), resubmitted),
        render_gateway(fleet(*[model_record()]), targets()),
        render_gateway(three(tenants=[{**alice, "key_sha256": ["b" * 64]}, *others]), targets()),
        render_gateway(three(tenants=[{**alice, "burst": 9}, *others]), targets()),
        render_gateway(three(), targets(), exhausted=["alice"]),
    ]
    assert len({base, *(made.generation for made in other)}) == 8
    assert re.fullmatch(r"[0-9a-f]{12}", base)


def test_generation_is_answered_and_no_mark_is_left() -> None:
    """The running configuration says which one it is; the files are complete."""
    files = render_gateway(three(), targets())
    assert f"return 200 {files.generation};" in files.files["fleet.conf"]
    assert parse_targets(files.files["targets.json"]) == (
        files.generation,
        tuple(sorted(targets())),
    )
    assert not [text for text in files.files.values() if re.search(r"@[A-Z_]+@", text)]


def test_R37_served_names_reach_njs_as_data() -> None:
    """Quotes, dollars, backslashes, unicode: each name is a JSON key, and no part of it is code."""
    ours = [target for target in targets() if target.model == "tiny"]
    wanted = fleet(model_record(served_names=NAMES))
    files = render_gateway(wanted, ours).files
    found = known(files["fleet.js"])
    assert found["names"] == dict.fromkeys(["tiny", *NAMES], "tiny")
    assert found["listed"] == ["tiny", *NAMES]
    assert files["fleet.js"].isascii()
    plain = render_gateway(fleet(), ours).files
    generation = r"\b[0-9a-f]{12}\b"
    assert re.sub(generation, "", files["fleet.conf"]) == re.sub(
        generation, "", plain["fleet.conf"]
    )
    code = [text.split("\n", 1)[1] for text in (files["fleet.js"], plain["fleet.js"])]
    assert code[0] == code[1]


def test_model_without_a_replica_has_no_upstream() -> None:
    """An upstream without servers would not load; its names answer 503 and are listed."""
    files = render_gateway(three(), targets()).files
    assert re.findall(r"^upstream (\S+)", files["fleet.conf"], re.MULTILINE) == [
        "model.tiny",
        "model.big",
    ]
    states = known(files["fleet.js"])["states"]
    assert states == {"tiny": "ready", "big": "ready", "starting": "starting", "stopped": "stopped"}


def test_target_of_a_model_that_left_the_spec_is_served_by_its_name() -> None:
    """Who is guarded goes on serving; the planner alone decides who gets requests."""
    stray = Target(model="gone", job_id=1, submitted_at=1, address="10.0.0.1:1")
    files = render_gateway(fleet(), [stray]).files
    assert "upstream model.gone {" in files["fleet.conf"]
    found = known(files["fleet.js"])
    assert (found["names"]["gone"], found["states"]["gone"]) == ("gone", "ready")


ENTRY = {"model": "tiny", "job_id": 9, "submitted_at": 1, "address": "10.0.0.9:20001"}


CHANGES: list[dict[str, Any]] = [
    *({"address": "evil.example.org:80"}, {"address": "10.0.0.1:80; } server {"}, {"address": []}),
    *({"address": None}, {"job_id": "x"}, {"job_id": None}, {"submitted_at": []}, {"more": 1}),
    *({"model": "a b"}, {"model": ["x"]}),
]
BROKEN = [
    *("", "{", "[]", "null", "{}", '{"generation": "x"}', "[" * 100_000),
    *(f'{{"generation": "x", "targets": {text}}}' for text in ("1", "[1]", "[{}]")),
    *(json.dumps({"generation": "x", "targets": [{**ENTRY, **changed}]}) for changed in CHANGES),
]


@pytest.mark.parametrize("text", BROKEN)
def test_R37_targets_file_that_was_changed_is_refused(text: str) -> None:
    """What comes back from a gateway's disk may be routed again: it is checked like a comment."""
    with pytest.raises(ValueError):  # noqa: PT011 - of any kind: the adapter's answer is the same
        parse_targets(text)


def test_tries_of_a_request_are_bounded() -> None:
    """A request tries more than one replica and never all of a hundred."""
    many = [replace(targets()[0], job_id=n, address=f"10.0.1.{n}:1") for n in range(1, 100)]
    for made, tries in ((targets()[:1], 2), (targets(), 2), (many[:3], 3), (many, 5)):
        text = render_gateway(fleet(), made).files["fleet.conf"]
        assert f"proxy_next_upstream_tries {tries};" in text


def test_limit_is_one_zone_for_each_value() -> None:
    """Who has the same limit shares its zone, and each is counted alone in it."""
    text = render_gateway(three(), targets()).files["fleet.conf"]
    assert re.findall(r"zone=(\S+):\S+ rate=(\S+);", text) == [
        ("fleet_rate_30_0", "30r/m"),
        ("fleet_rate_300_5", "300r/m"),
    ]
    assert re.findall(r"limit_(?:req|conn) .*;", text) == [
        "limit_req zone=fleet_rate_30_0;",
        "limit_req zone=fleet_rate_300_5 burst=5 nodelay;",
        "limit_conn fleet_concurrency_8 8;",
    ]
    tenants = known(render_gateway(three(), targets()).files["fleet.js"])["tenants"]
    assert tenants["carol"] == {"models": None, "rate": "300_5", "concurrency": "8"}
    assert tenants["bob"] == {"models": ["tiny"], "rate": None, "concurrency": "8"}


def test_fleet_without_tenants_refuses_nobody_and_counts_nobody() -> None:
    """No tenants at all: open, with no zone; with one, whoever has no key is refused."""
    opened = render_gateway(three(tenants=[]), targets()).files
    assert known(opened["fleet.js"])["keys"] is None
    assert not re.search(r"limit_(req|conn)(_zone)? ", opened["fleet.conf"])
    assert '    "" "";' in opened["fleet.conf"]
    closed = render_gateway(three(tenants=TENANTS[:1]), targets()).files
    assert known(closed["fleet.js"])["keys"] == {"a" * 64: "alice", "b" * 64: "alice"}
    assert '    "" 1;' in closed["fleet.conf"]


def test_gateways_of_which_there_are_several_do_not_all_choose_the_same_replica() -> None:
    """Each counts its own connections: one alone takes the least busy, several the less of two."""
    hosts = [{"name": "gateway"}, {"name": "other"}]
    texts = [
        render_gateway(fleet(gateway={"hosts": hosts[:count]}), targets()).files["fleet.conf"]
        for count in (1, 2)
    ]
    assert ["random two least_conn;" in text for text in texts] == [False, True]
