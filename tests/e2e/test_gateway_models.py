"""Many requests of several tenants to several models, each answered by whom it was meant for."""

from collections.abc import Mapping

import pytest
import yaml

from tests.e2e.checks import lost, routed, running, under
from tests.lab.fleet import Fleet
from tests.lab.load import Client
from tests.lab.wait import wait_for

REQUESTS = 50_000
MODELS = {"tiny": "demo/tiny-llama", "small": "demo/small", "other": "other"}
TENANTS = ("astro", "bio", "chem", "geo", "math")


def _with_three_models(fleet: Fleet) -> None:
    """One replica each, so quick that the machine's cores are the limit."""
    spec = yaml.safe_load(fleet.spec_file.read_text())
    [tiny] = spec["models"]
    tiny |= {"replicas": 1, "env": {"STANDIN_TOKENS_PER_S": "1000"}}
    spec["models"] = [
        {**tiny, "name": name, "served_names": [] if called == name else [called]}
        for name, called in MODELS.items()
    ]
    fleet.spec_file.write_text(yaml.safe_dump(spec))


def _clients(fleet: Fleet, keys: Mapping[str, str]) -> list[Client]:
    """Each tenant asks each model, by either of its names and in one of four ways."""
    ways = [("raw", False), ("raw", False), ("openai", True), ("http", False)]
    pairs = [(tenant, names) for tenant in TENANTS for names in MODELS.items()]
    return [
        Client(
            url=fleet.url,
            how=ways[at % 4][0],
            stream=ways[at % 4][1],
            model=names[at % 2],
            tokens=3,
            key=keys[tenant],
        )
        for at, (tenant, names) in enumerate(pairs)
    ]


@pytest.mark.soak
def test_every_answer_is_of_the_model_that_was_asked(fleet: Fleet) -> None:
    """Also while one of them gets another revision: addresses and upstreams change."""
    _with_three_models(fleet)
    keys = {tenant: fleet.add_tenant(tenant) for tenant in TENANTS}
    fleet.run("apply", "--wait", "--timeout", "90s")
    before = set(routed(fleet))

    def update() -> None:
        fleet.edit("max-num-seqs: 16", "max-num-seqs: 17")
        with running(fleet):
            wait_for("the update", lambda: _replaced(fleet, before), timeout_s=90)

    requests = under(_clients(fleet, keys), update, at_least=REQUESTS)
    assert lost(requests) == []
    asked = {called: name for name, called in MODELS.items()} | {name: name for name in MODELS}
    wrong = [r.id for r in requests if r.replica.partition("@")[0] != asked[r.model]]
    assert wrong == []
    assert {r.replica.partition("@")[0] for r in requests} == set(MODELS)


def _replaced(fleet: Fleet, before: set[str]) -> bool:
    now = set(routed(fleet))
    return len(now) == len(MODELS) and before.isdisjoint(now)
