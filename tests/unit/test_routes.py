"""The generated NGINX files: a golden file, a stable order, and names that stay data."""

import json
import re
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from reconciler.routes import (
    AUTHORITY_FILE,
    GENERATION_MARK,
    KEY_FILE,
    key_file,
    key_in_use,
    parse_targets,
    render_gateway,
)
from reconciler.spec import Fleet
from reconciler.state import Target, Trust
from tests.unit.build import KEYS, fleet, model_record, rendered

GOLDEN = Path(__file__).parent / "golden"

NAMES = [
    *("org/Tiny-8B", 'a"b', "a'b", "a\\b", "\\", "$uri", "${x}", "`id`", "</script>", "a;b", "}"),
    *("*/", "//", "é", "日本語", "🙂", "__proto__", "constructor", "hasOwnProperty", "a b"),
    *(GENERATION_MARK, "@LISTEN@", "%s", "{0}", "\\u0000", "\\n", "null"),
]


def targets() -> list[Target]:
    return [
        Target(model="tiny", job_id=9, submitted_at=1, address="10.0.0.9:20001", keys=KEYS),
        Target(model="tiny", job_id=10, submitted_at=2, address="10.0.0.1:20000", keys=KEYS),
        Target(model="big", job_id=11, submitted_at=3, address="10.0.0.1:20002", keys=KEYS),
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
    """What the gateway knows of the fleet."""
    record: dict[str, Any] = json.loads(text)
    return record


@pytest.mark.parametrize("name", ["fleet.conf", "fleet.json", "targets.json"])
def test_file_of_a_gateway_is_as_reviewed(name: str) -> None:
    """Every generated line was read by a person; a change shows in the golden file's diff."""
    files = rendered(three(), targets())
    golden = (GOLDEN / name).read_text(encoding="utf-8")
    assert files.files[name].replace(files.generation, "GENERATION") == golden


def test_files_are_stable_in_any_order_of_targets() -> None:
    """The same replicas are the same text: no reload without a real difference."""
    made = {json.dumps(rendered(three(), order).files) for order in permutations(targets())}
    assert len(made) == 1
    doubled = rendered(three(), [*targets(), *targets()])
    assert doubled == rendered(three(), targets())


def test_generation_changes_with_the_content_only() -> None:
    """What a gateway runs is named by its content: budget or timeouts are not in it."""
    base = rendered(three(), targets()).generation
    same = [
        rendered(three(budget={"gpus": 99}), targets()),
        rendered(three(defaults={"drain_timeout_s": 9}), targets()),
        rendered(three(tenants=[{**one, "tokens_per_day": 9} for one in TENANTS]), targets()),
    ]
    assert {made.generation for made in same} == {base}
    alice, *others = TENANTS
    moved = [replace(targets()[0], address="10.0.0.9:20002"), *targets()[1:]]
    resubmitted = [replace(targets()[0], submitted_at=99), *targets()[1:]]
    other = [
        rendered(three(), targets()[:2]),
        rendered(three(), moved),
        rendered(three(), resubmitted),
        rendered(fleet(*[model_record()]), targets()),
        rendered(three(tenants=[{**alice, "key_sha256": ["b" * 64]}, *others]), targets()),
        rendered(three(tenants=[{**alice, "burst": 9}, *others]), targets()),
        rendered(three(), targets(), exhausted=["alice"]),
    ]
    assert len({base, *(made.generation for made in other)}) == 8
    assert re.fullmatch(r"[0-9a-f]{12}", base)


def test_generation_is_answered_and_no_mark_is_left() -> None:
    """The running configuration says which one it is; the files are complete."""
    files = rendered(three(), targets())
    assert f"return 200 {files.generation};" in files.files["fleet.conf"]
    assert parse_targets(files.files["targets.json"]) == (
        files.generation,
        tuple(sorted(targets())),
    )
    assert not [text for text in files.files.values() if re.search(r"@[A-Z_]+@", text)]


def test_R37_served_names_reach_lua_as_data() -> None:
    """Quotes, dollars, backslashes, unicode: each name is a JSON key, and no part of it is code."""
    ours = [target for target in targets() if target.model == "tiny"]
    wanted = fleet(model_record(served_names=NAMES))
    files = rendered(wanted, ours).files
    found = known(files["fleet.json"])
    assert found["names"] == dict.fromkeys(["tiny", *NAMES], "tiny")
    assert found["listed"] == ["tiny", *NAMES]
    assert files["fleet.json"].isascii()
    plain = rendered(fleet(), ours).files
    generation = r"\b[0-9a-f]{12}\b"
    assert re.sub(generation, "", files["fleet.conf"]) == re.sub(
        generation, "", plain["fleet.conf"]
    )
    assert files["gateway.lua"] == plain["gateway.lua"]


def test_model_without_a_replica_has_no_upstream() -> None:
    """An upstream without servers would not load; its names answer 503 and are listed."""
    files = rendered(three(), targets()).files
    assert re.findall(r"^upstream (\S+)", files["fleet.conf"], re.MULTILINE) == [
        "model.tiny",
        "model.tiny.any",
        "model.big",
    ]
    states = known(files["fleet.json"])["states"]
    assert states == {"tiny": "ready", "big": "ready", "starting": "starting", "stopped": "stopped"}


def test_model_of_a_canary_alone_is_not_called_stopped() -> None:
    """Somebody waits for it, and it is on its way."""
    canary = {"args": {"seed": 1}, "replicas": 1}
    for replicas, state in ((1, "starting"), (0, "stopped")):
        wanted = fleet(model_record(replicas=0, canary={**canary, "replicas": replicas}))
        assert known(rendered(wanted, []).files["fleet.json"])["states"] == {"tiny": state}


def test_target_of_a_model_that_left_the_spec_is_served_by_its_name() -> None:
    """Who is guarded goes on serving; the planner alone decides who gets requests."""
    stray = Target(model="gone", job_id=1, submitted_at=1, address="10.0.0.1:1", keys=KEYS)
    files = rendered(fleet(), [stray]).files
    assert "upstream model.gone {" in files["fleet.conf"]
    found = known(files["fleet.json"])
    assert (found["names"]["gone"], found["states"]["gone"]) == ("gone", "ready")


ENTRY = {"model": "tiny", "job_id": 9, "submitted_at": 1, "address": "10.0.0.9:20001"}


CHANGES: list[dict[str, Any]] = [
    *({"weight": 0}, {"weight": "x"}, {"weight": None}, {"canary": "x; }"}, {"canary": ["a"]}),
    *({"address": "evil.example.org:80"}, {"address": "10.0.0.1:80; } server {"}, {"address": []}),
    *({"address": None}, {"job_id": "x"}, {"job_id": None}, {"submitted_at": []}, {"more": 1}),
    *({"model": "a b"}, {"model": ["x"]}),
    *({"keys": 1}, {"keys": None}, {"keys": ["x"]}, {"keys": [["aaaaaaaa"]]}),
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
    for made, tries in ((targets()[:1], 2), (targets(), 2), (many[:3], 3), (many, 3)):
        text = rendered(fleet(), made).files["fleet.conf"]
        assert f"proxy_next_upstream_tries {tries};" in text


def test_limit_is_one_zone_for_each_value() -> None:
    """Who has the same limit shares its zone, and each is counted alone in it."""
    text = rendered(three(), targets()).files["fleet.conf"]
    assert re.findall(r"zone=(\S+):\S+ rate=(\S+);", text) == [
        ("fleet_rate_30_0", "30r/m"),
        ("fleet_rate_300_5", "300r/m"),
    ]
    assert re.findall(r"limit_(?:req|conn) .*;", text) == [
        "limit_req zone=fleet_rate_30_0;",
        "limit_req zone=fleet_rate_300_5 burst=5 nodelay;",
        "limit_conn fleet_concurrency_8 8;",
    ]
    tenants = known(rendered(three(), targets()).files["fleet.json"])["tenants"]
    assert tenants["carol"] == {"models": None, "rate": "300_5", "concurrency": "8"}
    assert tenants["bob"] == {"models": ["tiny"], "rate": None, "concurrency": "8"}


def test_fleet_without_tenants_refuses_nobody_and_counts_nobody() -> None:
    """No tenants at all: open, with no zone; with one, whoever has no key is refused."""
    opened = rendered(three(tenants=[]), targets()).files
    assert known(opened["fleet.json"])["keys"] is None
    assert not re.search(r"limit_(req|conn)(_zone)? ", opened["fleet.conf"])
    closed = rendered(three(tenants=TENANTS[:1]), targets()).files
    assert known(closed["fleet.json"])["keys"] == {"a" * 64: "alice", "b" * 64: "alice"}


def test_gateways_of_which_there_are_several_do_not_all_choose_the_same_replica() -> None:
    """Each counts its own connections: one alone takes the least busy, several the less of two."""
    hosts = [{"name": "gateway"}, {"name": "other"}]
    texts = [
        rendered(fleet(gateway={"hosts": hosts[:count]}), targets()).files["fleet.conf"]
        for count in (1, 2)
    ]
    assert ["random two least_conn;" in text for text in texts] == [False, True]


def test_upstreams_of_open_and_protected_replicas_are_apart() -> None:
    """While a fleet changes over a model has both: only the protected ones get TLS and the key."""
    mixed = [replace(targets()[0], keys=()), targets()[1]]
    files = rendered(fleet(), mixed).files
    conf, found = files["fleet.conf"], known(files["fleet.json"])
    assert "upstream open.tiny {" in conf
    assert "upstream model.tiny {" in conf
    assert found["open"] == {"tiny": 0.5}


REVISION = "0123abcd"
TRIED = {"share": 10, "args": {"seed": 2}}


def tried(**changes: Any) -> list[Target]:
    """Two replicas of a model and its canary."""
    first, second, _ = targets()
    return [first, second, replace(first, job_id=12, address="10.0.0.2:1", **changes)]


def upstreams(text: str) -> dict[str, list[str]]:
    """Each upstream of a configuration, with its servers."""
    found = re.findall(r"^upstream (\S+) \{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL)
    return {name: re.findall(r"server (.*);", inside) for name, inside in found}


def test_options_of_a_target_come_back_from_a_gateways_disk() -> None:
    """What a gateway routes is read there; without options the file is as it always was."""
    made = tried(canary=REVISION, weight=7)
    files = rendered(fleet(model_record(canary=TRIED)), made)
    assert parse_targets(files.files["targets.json"])[1] == tuple(sorted(made))
    assert "canary" not in rendered(fleet(), targets()).files["targets.json"]


def test_canary_with_a_share_is_an_upstream_of_its_own() -> None:
    """The others step in for it, and it for nobody; what has no share is one of them."""
    made = tried(canary=REVISION)
    split = rendered(fleet(model_record(canary=TRIED)), made).files
    ends = "max_fails=1 fail_timeout=5s"
    rest = [f"10.0.0.9:20001 {ends}", f"10.0.0.1:20000 {ends}"]
    places = ("10.0.0.9:20001", "10.0.0.1:20000", "10.0.0.2:1")
    everyone = [f"{address} max_fails=0" for address in places]
    assert upstreams(split["fleet.conf"]) == {
        "model.tiny.any": everyone,
        "model.tiny": rest,
        "model.tiny.canary": [f"10.0.0.2:1 {ends}", *(f"{one} backup" for one in rest)],
    }
    canary = {"share": 10, "revision": REVISION, "open": 0.0}
    assert known(split["fleet.json"])["canaries"] == {"tiny": canary}
    whole = rendered(fleet(), made).files
    assert upstreams(whole["fleet.conf"]) == {
        "model.tiny.any": everyone,
        "model.tiny": [*rest, f"10.0.0.2:1 {ends}"],
    }
    alone = rendered(fleet(model_record(canary=TRIED)), made[2:]).files
    assert upstreams(alone["fleet.conf"]) == {"model.tiny": [f"10.0.0.2:1 {ends}"]}


@pytest.mark.parametrize("hosts", [1, 2])
def test_backup_and_stickiness_stand_where_nginx_takes_them(hosts: int) -> None:
    """`backup` not beside `random` or `hash`: NGINX would refuse the configuration."""
    gateway = {"hosts": [{"name": f"g{at}"} for at in range(hosts)]}
    wanted = fleet(model_record(canary=TRIED, affinity="X-Session-Id"), gateway=gateway)
    text = rendered(wanted, tried(canary=REVISION)).files["fleet.conf"]
    for upstream in re.findall(r"^upstream .*?^\}", text, re.MULTILINE | re.DOTALL):
        assert not (" backup;" in upstream and re.search("random|hash", upstream))
    kinds = ("", ".sticky", ".canary", ".any")
    assert upstreams(text).keys() == {f"model.tiny{kind}" for kind in kinds}


def test_sides_of_a_fleet_that_changes_over_are_apart_too() -> None:
    """Who is open is a backup of who is open: a key goes to protected ones alone."""
    first, second, canary = tried(canary=REVISION)
    made = [replace(first, keys=()), second, replace(canary, keys=())]
    files = rendered(fleet(model_record(canary=TRIED)), made).files
    servers = upstreams(files["fleet.conf"])
    assert servers.keys() == {"model.tiny", "open.tiny", "open.tiny.canary", "open.tiny.any"}
    assert ["backup" in one for one in servers["open.tiny.canary"]] == [False, True]
    found = known(files["fleet.json"])
    assert (found["open"]["tiny"], found["canaries"]["tiny"]["open"]) == (0.5, 1.0)


AWAY = {"url": "https://api.example.org:8443/v1", "model": 'a"b', "key_file": "/etc/key"}
OUTSIDE = {"hosts": [{"name": "g"}], "external": {"resolvers": ["10.0.0.53", "10.0.0.54:53"]}}


def test_fallback_is_asked_only_with_its_key() -> None:
    """Its key's id is in the generation, its text nowhere; without one nobody is sent there."""
    wanted = fleet(model_record(fallback=AWAY), gateway=OUTSIDE)
    files = rendered(wanted, [], external={"tiny": "01234567"}).files
    conf = files["fleet.conf"]
    assert "resolver 10.0.0.53 10.0.0.54:53 ipv6=off;" in conf
    assert f"include {KEY_FILE};" in conf
    away = {"url": "api.example.org:8443/v1", "model": 'a"b'}
    assert known(files["fleet.json"])["external"] == {"tiny": away}
    without = rendered(wanted, []).files
    assert "@external {" not in without["fleet.conf"]
    assert KEY_FILE not in without["fleet.conf"]
    assert known(without["fleet.json"])["external"] == {}


def test_option_that_changes_is_another_generation() -> None:
    """Else it would never reach a gateway."""
    made = tried(canary=REVISION)
    models: list[dict[str, Any]] = [
        *({}, {"affinity": "tenant"}, {"affinity": "X-Session-Id"}, {"canary": TRIED}),
        {"canary": {**TRIED, "share": 11}},
        *({"fallback": AWAY}, {"fallback": {**AWAY, "model": "other"}}),
    ]
    found = {
        rendered(
            fleet(model_record(**keys), gateway=OUTSIDE), made, external={"tiny": id}
        ).generation
        for keys in models
        for id in ("00000000", "11111111")
    }
    assert len(found) == 2 * len(models)


def test_key_file_has_a_line_for_each_upstream_that_is_shown_one() -> None:
    """A replica's key goes to no fallback, and no fallback's to another's model."""
    lines = key_file("aa", {"tiny": "bb", "tiny-2": "cc"}).splitlines()
    assert lines == [
        "map $fleet_upstream $fleet_authorization {",
        '    default "";',
        '    ~^model\\. "Bearer aa";',
        '    ~^external\\.tiny$ "Bearer bb";',
        '    ~^external\\.tiny-2$ "Bearer cc";',
        "}",
    ]
    assert "model" not in key_file(None, {"tiny": "bb"})


def test_fleet_without_protected_replicas_needs_no_key() -> None:
    """Neither file that only a protected one needs is asked for."""
    conf = rendered(fleet(), [replace(targets()[0], keys=())]).files["fleet.conf"]
    assert KEY_FILE not in conf
    assert AUTHORITY_FILE not in conf
    assert 'proxy_set_header Authorization "";' in conf


@pytest.mark.parametrize("change", [{"key": "aaaaaaaa"}, {"authority": "0" * 12}])
def test_another_key_or_authority_is_another_generation(change: dict[str, str]) -> None:
    """Else a rotation would never reach a gateway."""
    trust = Trust(key="bbbbbbbb", authority="0123456789ab")
    made = [render_gateway(three(), targets(), one) for one in (trust, replace(trust, **change))]
    assert made[0].generation != made[1].generation
    assert made[0].files["fleet.json"] == made[1].files["fleet.json"]


A, B, C = "aaaaaaaa", "bbbbbbbb", "cccccccc"
IN_USE = {
    "none": ((), None),
    "only-open-ones": (((), ()), None),
    "newest-of-all": (((A, B, C), (A, B, C)), C),
    "not-known-to-one": (((A, B), (A, B, C)), B),
    "beside-an-open-one": (((A, B), ()), B),
    "of-revoked-ones": ((("dddddddd", A), ("dddddddd", A, B)), A),
    "none-in-common": (((A,), (B, C), (B, C)), C),
    "none-that-there-is": ((("dddddddd",),), None),
}


@pytest.mark.parametrize(("takes", "expected"), IN_USE.values(), ids=IN_USE.keys())
def test_key_in_use_is_the_newest_that_all_take(
    takes: tuple[tuple[str, ...], ...], expected: str | None
) -> None:
    """A gateway goes over to a newer key when nobody is left who does not take it."""
    made = [replace(targets()[0], job_id=at, keys=keys) for at, keys in enumerate(takes)]
    assert key_in_use((A, B, C), made) == expected
