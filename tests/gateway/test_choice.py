"""Which replica of a model gets a request: sessions that stay, weights, a canary's share."""

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from reconciler.state import Target
from reconciler.usage import tally, trials
from tests.gateway.conftest import RELEASES
from tests.gateway.front import CHAT, KEYS, Front, tenants
from tests.gateway.nginx import free_port, running
from tests.gateway.recorder import recording
from tests.lab.wait import wait_for
from tests.unit.build import fleet, model_record

REVISION = "0123abcd"
SESSIONS = [f"session {at}" for at in range(40)]
SHARED = {"replicas": 1, "args": {"seed": 2}, "share": 25}


@dataclass(slots=True)
class Crowd(Front):
    """A gateway of one model with three replicas: a, b and c."""

    asked: list[Mapping[str, str]] = field(default_factory=list)  # the headers of each request

    def targets(self, **changes: Mapping[str, Any]) -> list[Target]:
        """The replicas' targets, with changes by name."""
        return [
            replace(target, model="tiny", **changes.get(target.model, {}))
            for target in self.replicas.targets()
        ]

    def route(self, *targets: Target, hosts: int = 1, **model: Any) -> None:
        """Change the model's keys, and to whom it is routed."""
        record = {"hosts": [{"name": f"g{at}"} for at in range(hosts)], "listen": self.port}
        wanted = fleet(model_record(**model), gateway=record, tenants=tenants())
        self.nginx.change(wanted, targets or self.targets())

    def who(self, key: str = KEYS["alice"], **headers: str) -> str:
        """Return which replica answers a request."""
        self.asked.append(headers)
        answer = self.ask("POST", CHAT, {"model": "tiny"}, key=key, **headers)
        assert answer.status == 200, answer
        return str(answer.body["model"])

    def sessions(self) -> dict[str, str]:
        """Return who answers each session."""
        return {session: self.who(X_Session_Id=session) for session in SESSIONS}

    def logged(self, since: int = 0) -> list[str]:
        """Return the log's lines but for the first, once all that was asked is there.

        Workers write what they have now and then, old ones even later.
        """

        def lines() -> list[str]:
            return self.nginx.read("access.log").splitlines()

        wait_for(f"{len(self.asked)} lines of the log", lambda: len(lines()) >= len(self.asked))
        return lines()[since:]


@pytest.fixture(scope="module", params=RELEASES)
def crowd(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Crowd]:
    """The crowd on one release, shared by the tests of this file; it ends without a fault."""
    folder = tmp_path_factory.mktemp("gateway")
    with recording(["a", "b", "c"]) as replicas, running(request.param, folder) as nginx:
        yield Crowd(nginx, replicas)
        assert nginx.unharmed, nginx.faults


def nobody() -> str:
    """An address at which nothing listens."""
    return f"127.0.0.1:{free_port()}"


def test_session_stays_with_its_replica(crowd: Crowd) -> None:
    """Equal values of the header go to one replica, different ones to all of them."""
    crowd.route(affinity="X-Session-Id")
    first = crowd.sessions()
    assert set(first.values()) == {"a", "b", "c"}
    assert crowd.sessions() == first
    crowd.route(affinity="X-Session-Id", replicas=3)
    assert crowd.sessions() == first  # over a reload too


def test_replica_that_is_away_moves_its_own_sessions_only(crowd: Crowd) -> None:
    """Dead and still routed, or routed no more: no request fails, and all others stay."""
    crowd.route(affinity="X-Session-Id")
    first = crowd.sessions()
    crowd.route(*crowd.targets(b={"address": nobody()})[::2], affinity="X-Session-Id")
    without = crowd.sessions()
    assert "b" not in without.values()
    assert {s: who for s, who in without.items() if first[s] != "b"} == {
        s: who for s, who in first.items() if who != "b"
    }


def test_session_of_a_dead_replica_that_is_still_routed_is_answered(crowd: Crowd) -> None:
    """Until the next cycle takes it away others step in, for each of its requests."""
    crowd.route(*crowd.targets(b={"address": nobody()}), affinity="X-Session-Id")
    assert set(crowd.sessions().values()) == {"a", "c"}


def test_request_without_a_session_is_anybodys(crowd: Crowd) -> None:
    """Without the header, or with an empty one, the least busy replica is taken."""
    crowd.route(affinity="X-Session-Id")
    assert {crowd.who() for _ in range(30)} == {"a", "b", "c"}
    assert {crowd.who(X_Session_Id="") for _ in range(30)} == {"a", "b", "c"}


WORDS = {
    "accent": "é",
    "bytes": "\x80\xff",
    "long": "x" * 12_000,
    "code": '"; } $uri',
    "comma": "a, b",
    "inherited": "constructor",
}


@pytest.mark.parametrize("word", WORDS.values(), ids=WORDS.keys())
def test_any_session_is_a_session(crowd: Crowd, word: str) -> None:
    """It is hashed, and nothing else is done with it."""
    crowd.route(affinity="X-Session-Id", canary=SHARED)
    assert crowd.who(X_Session_Id=word) == crowd.who(X_Session_Id=word)


def test_tenant_stays_with_its_replica(crowd: Crowd) -> None:
    """Whatever key it shows, and whatever headers it sends."""
    crowd.route(affinity="tenant")
    assert len({crowd.who(X_Session_Id=session) for session in SESSIONS[:10]}) == 1


@pytest.mark.parametrize("affinity", [None, "tenant"])
@pytest.mark.parametrize("hosts", [1, 2])
def test_full_queues_take_no_replica_out(crowd: Crowd, hosts: int, affinity: str | None) -> None:
    """Both of two are asked each time, the caller gets their 503, and whoever is next is let in."""
    options = {} if affinity is None else {"affinity": affinity}
    crowd.route(*crowd.targets()[:2], hosts=hosts, **options)
    del crowd.replicas.got[:]
    crowd.replicas.full = True
    crowd.asked += [{}] * 5
    statuses = [crowd.ask("POST", CHAT, {"model": "tiny"}).status for _ in range(5)]
    crowd.replicas.full = False
    assert statuses == [503] * 5
    asked = Counter(got.replica for got in crowd.replicas.got)
    assert min(asked["a"], asked["b"]) >= 5
    assert asked.total() <= 3 * 5
    assert crowd.who() in "ab"


def test_replicas_that_are_all_gone_are_a_502(crowd: Crowd) -> None:
    """Whoever asks first, and those after it, whom nobody was left to be asked for."""
    crowd.route(*crowd.targets(a={"address": nobody()}, b={"address": nobody()})[:2])
    crowd.asked += [{}] * 3
    answers = [crowd.ask("POST", CHAT, {"model": "tiny"}) for _ in range(3)]
    assert {(answer.status, answer.code) for answer in answers} == {(502, "bad_gateway")}


@pytest.mark.parametrize("hosts", [1, 2])
def test_replica_that_weighs_more_gets_more(crowd: Crowd, hosts: int) -> None:
    """Of those that run at once three times as much, whichever way of choosing there is."""
    crowd.route(*crowd.targets(a={"weight": 3}), hosts=hosts)
    del crowd.replicas.got[:]
    crowd.replicas.gate.clear()
    with ThreadPoolExecutor(max_workers=50) as pool:
        try:
            asked = [pool.submit(crowd.who) for _ in range(50)]
            wait_for("all to be there", lambda: len(crowd.replicas.got) == 50)
        finally:
            crowd.replicas.gate.set()
        got = Counter(future.result() for future in asked)
    assert got["a"] > 2 * max(got["b"], got["c"]), got  # 30, 10 and 10
    assert min(got["b"], got["c"]) > 5, got


def test_canary_gets_its_share(crowd: Crowd) -> None:
    """Drawn for each request; the log says which side each one was sent to."""
    crowd.route(*crowd.targets(c={"canary": REVISION}), canary=SHARED)
    before = len(crowd.logged())
    got = Counter(crowd.who() for _ in range(400))
    assert 50 < got["c"] < 150, got  # 100, by chance
    lines = crowd.logged(before)
    records = map(json.loads, lines)
    sides = Counter((record["trial"], record["replica"]) for record in records)
    assert sides == {
        ("rest.0123abcd", "1"): got["a"],
        ("rest.0123abcd", "2"): got["b"],
        ("canary.0123abcd", "3"): got["c"],
    }
    text = "".join(f"{line}\n" for line in lines)
    [trial] = trials(tally(text.encode()).trials, time.time()).values()
    assert (trial.canary.requests, trial.rest.requests) == (got["c"], got["a"] + got["b"])
    assert (trial.canary.errors, trial.rest.errors) == (0, 0)


def test_question_for_usage_is_asked_again_elsewhere(crowd: Crowd) -> None:
    """A body that was added to is whole for each replica that is tried."""
    crowd.route(*crowd.targets(a={"address": nobody()}))
    del crowd.replicas.got[:]
    before = len(crowd.asked)
    for _ in range(6):
        crowd.asked.append({})
        assert crowd.ask("POST", CHAT, {"model": "tiny", "stream": True}).status == 200
    asked = {"model": "tiny", "stream": True, "stream_options": {"include_usage": True}}
    assert [json.loads(got.body) for got in crowd.replicas.got] == [asked] * 6
    assert any('"tries":"502, 200"' in line for line in crowd.logged(before))


@pytest.mark.parametrize("hosts", [1, 2])
def test_canary_that_is_away_costs_no_request(crowd: Crowd, hosts: int) -> None:
    """The model's other replicas step in; the log tells that they had to."""
    dead = nobody()
    targets = crowd.targets(c={"canary": REVISION, "address": dead})
    crowd.route(*targets, canary={**SHARED, "share": 100}, hosts=hosts)
    before = len(crowd.logged())
    assert {crowd.who() for _ in range(30)} == {"a", "b"}
    line = next(line for line in crowd.logged(before) if dead in line)
    first = json.loads(line)
    assert first["trial"] == "canary.0123abcd"
    assert first["upstream"].startswith(dead)
    assert first["tries"] == "502, 200"
    [tried] = tally(f"{line}\n".encode()).trials.values()
    assert tried.errors == 1


@pytest.mark.parametrize("revision", ["", REVISION])
def test_without_two_sides_there_is_no_trial(crowd: Crowd, revision: str) -> None:
    """Nobody is a canary, or everybody is: all serve, and nothing is compared."""
    crowd.route(*crowd.targets(**{n: {"canary": revision} for n in "abc"}), canary=SHARED)
    before = len(crowd.logged())
    assert {crowd.who() for _ in range(30)} == {"a", "b", "c"}
    assert {json.loads(line)["trial"] for line in crowd.logged(before)} == {""}


def test_session_does_not_change_sides(crowd: Crowd) -> None:
    """A canary and the rest of its model share the sessions, not their requests."""
    targets = crowd.targets(c={"canary": REVISION})
    crowd.route(*targets, affinity="X-Session-Id", canary={**SHARED, "share": 50})
    first = crowd.sessions()
    assert set(first.values()) == {"a", "b", "c"}
    assert crowd.sessions() == first


def test_options_raise_no_warning(crowd: Crowd) -> None:
    """NGINX has nothing to say about any of them."""
    targets = crowd.targets(a={"weight": 7}, c={"canary": REVISION})
    crowd.route(*targets, affinity="tenant", canary=SHARED, hosts=2)
    assert "[warn]" not in crowd.nginx.check()
