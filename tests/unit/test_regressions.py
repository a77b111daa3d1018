"""Failures that real systems have shipped, where no other file is about them; by their number."""

import json
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest

from reconciler.batch import batch_script
from reconciler.cycle import cycle
from reconciler.errors import SpecError
from reconciler.memory import learn, remember
from reconciler.naming import parse_comment
from reconciler.plan import Submit, to_json
from reconciler.planner import plan
from reconciler.render import plan_text, status_text
from reconciler.routes import parse_targets
from reconciler.spec import load_fleet
from reconciler.state import Health, Job, Memory, Probe, Recipe
from tests.unit.build import (
    AT,
    comment_text,
    ended,
    fleet,
    job,
    leaving,
    model_record,
    observation,
    rendered,
    revision,
    routed_ids,
    spec_record,
    submits,
    target,
    view,
)
from tests.unit.test_cycle import world
from tests.unit.test_execute import FakeWorld

FLEET = fleet()
REV = revision(FLEET)
NOTHING = Memory()


def pair() -> tuple[Job, Job]:
    """The two replicas that the fleet wants, ready."""
    return job(REV, id=1), job(REV, id=2, ordinal=1)


def function(name: str) -> str:
    """The text of one function of the job script."""
    script = files("reconciler").joinpath("replica.sh").read_text(encoding="utf-8")
    found = re.search(rf"^{name}\(\) \{{.*?^\}}", script, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[0]


def test_R12_port_range_that_is_used_up_ends_with_a_clear_error(tmp_path: Path) -> None:
    """Each port is tried once; then the job says so and gives up, it does not look for ever."""
    assert shutil.which("flock")
    script = "\n".join(
        [
            'say() { echo "$*"; }',
            "listens() { return 0; }",  # whatever the port, somebody is there
            "first_port=20000 last_port=20049 tried=0 SLURM_JOB_ID=7 SLURMD_NODENAME=node1",
            function("choose_port"),
            "choose_port",
        ]
    )
    environment = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        ["bash", "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout == "no free port between 20000 and 20049 on node1\n"


def test_R26_port_that_is_reserved_is_not_chosen_again(tmp_path: Path) -> None:
    """Before an engine listens its port is its own already, whatever the other's job id."""
    script = "\n".join(
        [
            "listens() { return 1; }",
            "first_port=20000 last_port=20049 tried=0 SLURM_JOB_ID=7",
            function("choose_port"),
            'choose_port && echo "$port"',
            'SLURM_JOB_ID=57; choose_port && echo "$port"',
        ]
    )
    environment = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path)}
    chosen = subprocess.check_output(["bash", "-c", script], env=environment, text=True)
    assert chosen.split() == ["20049", "20000"]


@pytest.mark.parametrize("contained", ["false", "true"])
def test_R15_names_in_an_environment_do_not_change_the_job_script(contained: str) -> None:
    """A spec may call its variables as the script calls its own."""
    given = ["prefix=zz", "command=x", "node_count=7", "engine=y", "HF_HOME=/a b"]
    script = "\n".join(
        [
            f"contained={contained} node_count=1 node=10.0.0.1",
            f"launch=(/usr/bin/env -0) arguments=() environment=({shlex.join(given)})",
            function("set_environment"),
            function("start_rank"),
            'start_rank; wait "$engine"',
        ]
    )
    environment = {"PATH": os.environ["PATH"]}
    said = subprocess.check_output(["bash", "-c", script], env=environment, text=True)
    before = "APPTAINERENV_" if contained == "true" else ""
    assert {f"{before}{line}" for line in given} <= set(said.split("\0"))


@pytest.mark.parametrize("words", ["Traceback", "CUDA error: out of memory", "FATAL ERROR failed"])
def test_R13_frightening_words_of_a_replica_that_answers_mean_nothing(words: str) -> None:
    """What counts is the answer to the probe; no text of a log or a message is evidence."""
    both = pair()
    seen = observation(*both, gateways=[view(FLEET, *both)])
    probes = {one.key: Probe(health=Health.READY, ongoing=0, detail=words) for one in both}
    decided = plan(FLEET, replace(seen, probes=probes), NOTHING)
    assert (decided.actions, decided.converged) == ((), True)


@pytest.mark.parametrize("node", ["v1", "gpu-v1", "v1.cluster:8000", "node1-http", "10"])
def test_R14_names_that_look_like_parts_of_an_address_change_no_address(node: str) -> None:
    """Addresses come from the job whole and go to the gateway whole; no text is cut from a URL."""
    named = fleet(model_record(name="v1", served_names=["http://v1:8000/v1"], replicas=1))
    replica = job(revision(named, "v1"), id=1, model="v1", node=node)
    decided = plan(named, observation(replica, gateways=[view(named)]), NOTHING)
    assert routed_ids(decided) == [1]
    files_ = rendered(named, [target(replica)]).files
    assert parse_targets(files_["targets.json"])[1] == (target(replica),)
    assert "server 10.0.0.1:20000 " in files_["fleet.conf"]
    # A node whose name begins with another's is another node.
    moved = replace(replica, nodes=f"{node}0")
    assert moved.run is None


def test_R16_misspelled_key_is_refused_with_a_hint(tmp_path: Path) -> None:
    """A key that would be ignored in silence is a mistake with its place."""
    record = spec_record(model_record(replcias=2))
    (tmp_path / "fleet.yaml").write_text(json.dumps(record))
    with pytest.raises(SpecError) as caught:
        load_fleet(tmp_path)
    [problem] = [one for one in caught.value.problems if "replcias" in one.message]
    assert 'did you mean "replicas"' in problem.message


def test_R28_cycle_asks_slurm_three_times_at_most_for_a_thousand_jobs() -> None:
    """One listing to decide; one more to verify, only because jobs are ended; nodes once."""
    wanted = fleet(
        *[model_record(name=f"model-{at}", replicas=5) for at in range(200)],
        budget={"gpus": 2000},
    )
    jobs = [
        job("0" * 8, id=5 * at + ordinal + 1, model=model.name, ordinal=ordinal, state="PENDING")
        for at, model in enumerate(wanted.models)
        for ordinal in range(5)
    ]
    fake = FakeWorld(live=jobs)
    outcome = cycle(wanted, world(fake), at=AT, commit=None, say=lambda _: None)
    assert len(ended(outcome.plan)) == 1000
    asked = [what for what in fake.done if what.startswith("list")]
    assert len(asked) == 2  # and the nodes, of which the fake keeps no account


def test_R31_clock_that_jumps_forward_ends_no_job_and_submits_none() -> None:
    """A day ahead: what is ready stays, and no timer of a healthy fleet runs out."""
    both = pair()
    both = tuple(replace(one, ends_at=None) for one in both)  # type: ignore[assignment]
    memory = NOTHING
    for at in (AT, AT + 86_400, AT + 1, AT - 86_400, AT + 2):
        seen = observation(*both, gateways=[view(FLEET, *both)], at=at)
        memory = learn(memory, seen)
        decided = plan(FLEET, seen, memory)
        assert (decided.actions, leaving(decided)) == ((), {})
        memory = remember(memory, decided)


SECRET = "hf_NobodyMaySeeThis"  # made up here


def test_R36_secret_of_an_environment_is_in_no_plan_text_or_comment() -> None:
    """It reaches the batch script, which sbatch reads from a pipe, and nothing that others read."""
    wanted = fleet(model_record(env={"HF_TOKEN": SECRET}))
    decided = plan(wanted, observation(gateways=[view(wanted)]), NOTHING)
    record = json.loads(to_json(decided))
    assert SECRET not in to_json(decided) + plan_text(record) + status_text(record)
    [submit, _] = submits(decided)
    assert isinstance(submit, Submit)
    recipe = Recipe.of(wanted, wanted.models[0], digest="sha", program="/opt/engine", commit="abc")
    script = batch_script(recipe, submit)
    options = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    assert SECRET in script
    assert not any(SECRET in line for line in options)


def test_R36_secret_in_a_broken_spec_is_in_no_error(tmp_path: Path) -> None:
    """The message names the variable and not what it holds."""
    record = spec_record(model_record(env={"HF_TOKEN": f"{SECRET}\n"}))
    (tmp_path / "fleet.yaml").write_text(json.dumps(record))
    with pytest.raises(SpecError) as caught:
        load_fleet(tmp_path)
    assert "HF_TOKEN" in str(caught.value)
    assert SECRET not in str(caught.value)


def test_R37_address_in_a_vandalised_comment_never_reaches_a_gateway() -> None:
    """What is not an IPv4 address and a port makes the whole comment unreadable."""
    for address in ("10.0.0.1:80; return 200 x", "evil.example:80", "10.0.0.1:80\n}", "::1:80"):
        assert parse_comment(comment_text(address=address)) is None


def test_R27_job_of_another_fleet_is_never_ended_should_it_be_listed() -> None:
    """That adapters leave foreign jobs out is not all that stands between us and them."""
    foreign = job(REV, id=7, fleet="theirs", state="PENDING", model="gone")
    seen = observation(*pair(), foreign, gateways=[view(FLEET, *pair())])
    decided = plan(FLEET, seen, NOTHING, frozenset({"gone", "tiny"}))
    assert (decided.actions, decided.gpus_held) == ((), 2)


def test_R33_drain_that_was_allowed_goes_on_beside_a_guarded_replica() -> None:
    """Nobody has to name the model twice, and nobody ends its other replica by that."""
    both = pair()
    first, second = (job("0" * 8, id=at, model="gone", ordinal=at) for at in (3, 4))
    begun = replace(first, comment=replace(first.comment, run=replace(first.run, draining=True)))  # type: ignore[type-var]
    seen = observation(*both, begun, second, gateways=[view(FLEET, *both, second)])
    decided = plan(FLEET, seen, NOTHING)
    assert leaving(decided) == {3: "not in spec"}
    assert decided.actions == ()


def test_R40_note_says_early_until_when_the_old_replica_serves() -> None:
    """That is the last moment at which it can still drain, not the end of its walltime."""
    wanted = fleet(model_record(replicas=1), budget={"gpus": 1})
    old = job(revision(wanted), started_at=1, ends_at=int(AT) + 500)
    decided = plan(wanted, observation(old, gateways=[view(wanted, old)]), NOTHING)
    [note] = [note for note in decided.notes if note.kind == "expiring"]
    assert note.until == AT + 500 - 60 - 60
    assert [note.kind for note in decided.notes if note.kind == "budget"] == ["budget"]
