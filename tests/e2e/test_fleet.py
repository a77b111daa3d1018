"""The whole system on the lab with stand-in engines: real Slurm, real NGINX, real ssh."""

import asyncio
import json
import subprocess
from collections.abc import Callable

import httpx
import openai
import pytest

from tests.e2e.checks import assert_settled, lost, running, under_load
from tests.lab import Lab
from tests.lab.fleet import Fleet, gateway_log
from tests.lab.load import Load, in_flight
from tests.lab.wait import wait_for

STANDIN = "/opt/modelfleet/src/tests/lab/standin.py"
LIVE = ("PENDING", "RUNNING", "COMPLETING")


def _applied(fleet: Fleet) -> Fleet:
    fleet.run("apply", "--wait", "--timeout", "90s")
    return fleet


def _live_jobs(fleet: Fleet) -> list[list[str]]:
    return [job for job in fleet.jobs() if job[2] in LIVE]


def _during(fleet: Fleet, change: Callable[[], object], *, tokens: int = 80) -> Load:
    """Make a change while 6 streams and 6 plain requests are in flight; return how they ended."""

    async def go() -> Load:
        async with in_flight(fleet.url, "tiny", plain=6, streams=6, tokens=tokens) as load:
            await asyncio.to_thread(change)
        return load

    return asyncio.run(go())


def _lost(load: Load) -> list[str]:
    return [f"{r.id}: {r.status} {r.finish} {r.error}" for r in load.requests if not r.succeeded]


def test_apply_from_nothing_serves_by_every_name(fleet: Fleet) -> None:
    """A spec becomes two routed replicas on two nodes, and both names answer."""
    _applied(fleet)
    replicas = fleet.replicas()
    assert [replica["status"] for replica in replicas] == ["ready", "ready"]
    assert len({replica["node"] for replica in replicas}) == 2
    client = openai.OpenAI(base_url=f"{fleet.url}/v1", api_key="none", max_retries=0)
    with client:
        assert {model.id for model in client.models.list()} == {"tiny", "demo/tiny-llama"}
        for name in ("tiny", "demo/tiny-llama"):
            answer = client.chat.completions.create(
                model=name, messages=[{"role": "user", "content": "Hello"}], max_tokens=5
            )
            assert answer.choices[0].message.content
        with pytest.raises(openai.NotFoundError, match="No such model"):
            client.completions.create(model="huge", prompt="x")


def test_plan_changes_nothing_and_tells_by_its_exit_code(fleet: Fleet) -> None:
    """`plan` is 2 when there is something to do, 0 when not; it submits nothing itself."""
    login = fleet.lab
    before = login.run("login", fleet.command("plan", "--detailed-exitcode"), check=False)
    assert (before.returncode, _live_jobs(fleet)) == (2, [])
    _applied(fleet)
    after = login.run("login", fleet.command("plan", "--detailed-exitcode"), check=False)
    assert after.returncode == 0
    assert "nothing to do" in after.stdout


@pytest.mark.soak
def test_edit_of_the_slurm_block_moves_what_waits(fleet: Fleet) -> None:
    """A partition of half an hour starts no job of four hours, ever: the next edit has it moved."""
    fleet.edit("partition: gpu", "partition: debug")
    fleet.run("apply")
    wait_for("both to be told so", lambda: fleet.run("plan").count("PartitionTimeLimit") == 2)
    before = {job[0] for job in _live_jobs(fleet)}
    assert "waiting will not help" in fleet.run("plan")
    assert "nothing to do" in fleet.run("plan")
    fleet.edit("partition: debug", "partition: gpu")
    _applied(fleet)
    assert before.isdisjoint(job[0] for job in _live_jobs(fleet))
    assert [replica["status"] for replica in fleet.replicas()] == ["ready", "ready"]


@pytest.mark.soak
def test_a_new_revision_rolls_without_a_lost_request(fleet: Fleet) -> None:
    """New replicas are ready before old ones drain, and every request in flight ends whole."""
    _applied(fleet)
    old = {replica["name"]["revision"] for replica in fleet.replicas()}
    fleet.edit("max-num-seqs: 16", "max-num-seqs: 32")
    load = _during(fleet, lambda: _applied(fleet))
    assert _lost(load) == []
    new = {replica["name"]["revision"] for replica in fleet.replicas()}
    assert len(new) == 1
    assert new != old


def test_R09_fewer_replicas_drain_without_a_lost_request(fleet: Fleet) -> None:
    """Scaling down really ends a job, and what it was serving ends whole."""
    _applied(fleet)
    fleet.edit("replicas: 2", "replicas: 1")
    load = _during(fleet, lambda: _applied(fleet))
    assert _lost(load) == []
    assert len(_live_jobs(fleet)) == 1
    assert httpx.post(f"{fleet.url}/v1/completions", json=_body(), timeout=30).status_code == 200


def _body(tokens: int = 3) -> dict[str, object]:
    return {"model": "tiny", "prompt": "a", "max_tokens": tokens}


def test_drain_by_usr1_lets_a_stream_end(fleet: Fleet) -> None:
    """USR1 to the batch shell alone: the stream runs to [DONE], then the job ends by itself."""
    fleet.edit("replicas: 2", "replicas: 1")
    _applied(fleet)
    (replica,) = fleet.replicas()

    async def go() -> Load:
        async with in_flight(fleet.url, "tiny", plain=0, streams=3, tokens=60) as load:
            usr1 = ["scancel", "--batch", "--signal=USR1", str(replica["job_id"])]
            await asyncio.to_thread(fleet.lab.run, "login", usr1)
        return load

    load = asyncio.run(go())
    assert _lost(load) == []
    assert {request.finish for request in load.requests} == {"length"}
    wait_for("the job to end by itself", lambda: not _live_jobs(fleet))


def test_a_draining_job_says_so_and_is_never_routed_again(fleet: Fleet) -> None:
    """`draining` in the comment survives lost memory: no route, no capacity, a replacement."""
    _applied(fleet)
    victim = fleet.replicas()[0]

    async def go() -> None:
        # As the gateway shares them out, the victim has some of them.
        async with in_flight(fleet.url, "tiny", plain=0, streams=4, tokens=120):
            usr1 = ["scancel", "--batch", "--signal=USR1", str(victim["job_id"])]
            await asyncio.to_thread(fleet.lab.run, "login", usr1)
            await asyncio.to_thread(wait_for, "its word", lambda: _status(fleet, victim["job_id"]))
            await asyncio.to_thread(fleet.run, "apply", "--state-dir", "/tmp/another-memory")
            assert victim["job_id"] not in [
                replica["job_id"] for replica in fleet.replicas() if replica["routed"]
            ]

    asyncio.run(go())
    _applied(fleet)
    assert victim["job_id"] not in [replica["job_id"] for replica in fleet.replicas()]


def _status(fleet: Fleet, job_id: int) -> bool:
    return any(r["job_id"] == job_id and r["status"] == "draining" for r in fleet.replicas())


@pytest.mark.soak
def test_a_power_cut_leads_to_a_replacement_elsewhere(fleet: Fleet) -> None:
    """Plain requests survive by NGINX's retry; only streams begun on the dead node end."""
    _applied(fleet)
    victim = fleet.replicas()[0]
    node = str(victim["node"])
    with fleet.lab.popen("login", fleet.command("run", "--interval", "2")) as service:
        load = _during(fleet, lambda: fleet.lab.power_cut(node))
        fleet.wait_until_healed(without=node, timeout_s=120)
        service.kill()
    assert [r.id for r in load.of(stream=False) if not r.succeeded] == []
    tried = gateway_log(fleet.lab)
    cut = [request for request in load.of(stream=True) if not request.succeeded]
    assert {tried[request.id][-1] for request in cut} <= {victim["address"]}


def test_slurmctld_down_for_30_s_leads_to_no_action(fleet: Fleet) -> None:
    """R01: nothing is submitted, cancelled or re-routed, requests go on, and then work resumes."""
    _applied(fleet)
    before = [job[:3] for job in _live_jobs(fleet)]
    generation = _generation(fleet.lab)
    with fleet.lab.popen("login", fleet.command("run", "--interval", "2")) as service:
        fleet.lab.stop_daemon("login", "slurmctld")
        blind = fleet.lab.run("login", fleet.command("plan"), check=False, timeout=90)
        assert (blind.returncode, "nothing is submitted or cancelled" in blind.stdout) == (4, True)
        # The time is what is tested: a controller that is away for half a minute.
        load = _during(fleet, lambda: None, tokens=160)
        while _down_s(fleet) < 30:
            load.requests += _during(fleet, lambda: None, tokens=100).requests
        assert _lost(load) == []
        assert _generation(fleet.lab) == generation
        fleet.lab.start_daemon("login", "slurmctld")
        wait_for("slurmctld to answer", lambda: _listed(fleet))
        assert [job[:3] for job in _live_jobs(fleet)] == before
        fleet.edit("replicas: 2", "replicas: 3")
        wait_for("a third replica", lambda: _routed(fleet) == 3, timeout_s=60)
        service.kill()


def _down_s(fleet: Fleet) -> float:
    """Return how long slurmctld has been down: since it last wrote its log."""
    argv = ["sh", "-c", "echo $(($(date +%s) - $(stat -c %Y /var/log/slurm/slurmctld.log)))"]
    return float(fleet.lab.run("login", argv, user="root").stdout)


def _listed(fleet: Fleet) -> bool:
    return fleet.lab.run("login", ["squeue"], check=False).returncode == 0


def _routed(fleet: Fleet) -> int:
    return sum(1 for replica in fleet.replicas() if replica["routed"])


def _generation(lab: Lab) -> str:
    return lab.run("gateway", ["curl", "-s", "http://127.0.0.1:8091/generation"]).stdout


@pytest.mark.parametrize("when", ["before", "after"])
def test_R05_kill_9_at_a_submission_leaves_no_orphan(fleet: Fleet, when: str) -> None:
    """Killed right before or right after sbatch: the next run adopts what there is."""
    shims = fleet.lab.shared / "shims"
    shims.mkdir()
    kill = "kill -9 $PPID"
    steps = [kill, '/usr/bin/sbatch "$@"'] if when == "before" else ['/usr/bin/sbatch "$@"', kill]
    (shims / "sbatch").write_text("\n".join(["#!/bin/sh", *steps, ""]))
    (shims / "sbatch").chmod(0o755)
    path = {"PATH": "/shared/shims:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"}
    killed = fleet.lab.run("login", fleet.command("apply"), env=path, check=False)
    assert killed.returncode != 0
    _applied(fleet)
    names = [job[1] for job in _live_jobs(fleet)]
    assert len(names) == len(set(names)) == 2
    events = json.loads(fleet.run("events", "--json"))["events"]
    killed_at = events[0]["at"]
    assert (events[0]["kind"], events[0]["result"]) == ("submit", "unknown")
    assert {event["result"] for event in events if event["at"] > killed_at} == {"done"}


def test_R27_foreign_jobs_live_through_everything(fleet: Fleet) -> None:
    """Another user's jobs, even by our own names, and ours by names that nearly parse."""
    _applied(fleet)
    ours = [job[1] for job in _live_jobs(fleet)]
    revision = ours[0].split(".")[2]
    nearly = (
        *("demo.tiny", "demo.tiny.run7", f"demo.tiny.{revision}", f"demo.tiny.{revision}.00"),
        *(
            f"demo-old.tiny.{revision}.0",
            f"democracy.tiny.{revision}.0",
            f"demo.tiny.{revision}.0.1",
        ),
    )
    foreign = {
        _foreign_job(fleet, user, name): name
        for user, names in (("mallory", [*ours, f"demo.tiny.{revision}.2"]), ("fleet", nearly))
        for name in names
    }
    assert len(foreign) == 10
    fleet.edit("max-num-seqs: 16", "max-num-seqs: 32")
    _applied(fleet)
    for more, fewer in ((2, 1), (1, 0)):
        fleet.edit(f"replicas: {more}", f"replicas: {fewer}")
        _applied(fleet)
    jobs = fleet.jobs("fleet") + fleet.jobs("mallory")
    left = {job[0]: job[1] for job in jobs if job[2] in LIVE}
    assert left == foreign
    assert {job[2] for job in jobs if job[0] in foreign} == {"RUNNING"}


def _foreign_job(fleet: Fleet, user: str, name: str) -> str:
    """Submit a job that is not the fleet's, and return its id."""
    script = f"#!/bin/sh\n#SBATCH --mem=100M --output=/dev/null --job-name={name}\nsleep 600\n"
    return fleet.lab.run("login", ["sbatch", "--parsable"], user=user, input=script).stdout.strip()


@pytest.mark.parametrize("surge", [0, pytest.param(1, marks=pytest.mark.soak)])
def test_a_rolling_update_without_room_for_surge_stays_within_the_budget(
    fleet: Fleet, surge: int
) -> None:
    """One old replica leaves before each new one comes; nothing is lost, no GPU too many held."""
    fleet.edit("budget: {gpus: 4}", "budget: {gpus: 2}")
    rollout = f"rollout: {{max_surge: {surge}, max_unavailable: 1}}"
    fleet.edit("drain_timeout_s: 60", f"drain_timeout_s: 60, {rollout}")
    _applied(fleet)
    old = {job[0] for job in _live_jobs(fleet)}
    held = []

    def updated() -> bool:
        held.append(len(_live_jobs(fleet)))
        return _routed(fleet) == 2 and old.isdisjoint(job[0] for job in _live_jobs(fleet))

    def update() -> None:
        fleet.edit("max-num-seqs: 16", "max-num-seqs: 32")
        wait_for("the update", updated, timeout_s=90)

    with running(fleet):
        assert lost(under_load(fleet, update)) == []
    assert max(held) == 2
    assert_settled(fleet, replicas=2)


def test_a_rolling_update_that_nothing_may_begin_says_so(fleet: Fleet) -> None:
    """No GPU for a new replica, no old one to spare: it waits, and the plan says what for."""
    fleet.edit("budget: {gpus: 4}", "budget: {gpus: 2}")
    _applied(fleet)
    before = _live_jobs(fleet)
    fleet.edit("max-num-seqs: 16", "max-num-seqs: 32")
    fleet.run("apply", "--wait", "--timeout", "6s", check=False)
    said = fleet.run("plan")
    assert "needs 1 GPU; 2 of the budget's 2 are held" in said
    assert _live_jobs(fleet) == before


def test_R29_a_configuration_that_nginx_refuses_changes_nothing(fleet: Fleet) -> None:
    """`nginx -t` fails: the old configuration serves on, and the error is one line."""
    _applied(fleet)
    generation = _generation(fleet.lab)
    base = "/var/lib/modelfleet/gateway/base.conf"
    fleet.lab.run("gateway", ["sed", "-i", "s/^http {/http { nonsense;/", base])
    fleet.edit("replicas: 2", "replicas: 3")
    said = fleet.run("apply", "--wait", "--timeout", "10s", check=False)
    assert 'unknown directive "nonsense"' in said
    assert "Traceback" not in said
    assert _generation(fleet.lab) == generation
    assert httpx.post(f"{fleet.url}/v1/completions", json=_body(), timeout=30).status_code == 200
    fleet.lab.run("gateway", ["sed", "-i", "s/http { nonsense;/http {/", base])
    _applied(fleet)
    assert _routed(fleet) == 3


@pytest.mark.soak
def test_an_unreachable_gateway_blocks_drains_and_says_so(fleet: Fleet) -> None:
    """It may still route: no replica is told to end until every gateway has confirmed."""
    _applied(fleet)
    fleet.edit("replicas: 2", "replicas: 1")
    fleet.lab.cut_link("gateway")
    done = fleet.lab.run("login", fleet.command("apply"), check=False, timeout=90)
    assert done.returncode == 4
    assert "gateway gateway may still route to it" in done.stdout
    fleet.lab.mend_link("gateway")
    assert len(_live_jobs(fleet)) == 2
    _applied(fleet)
    assert len(_live_jobs(fleet)) == 1


def test_R26_replicas_on_one_node_share_no_port(fleet: Fleet) -> None:
    """Two replicas that start together on one node publish and serve on two ports."""
    fleet.edit("partition: gpu", "partition: debug")
    fleet.edit('walltime: "4:00:00"', 'walltime: "29:00"')
    _applied(fleet)
    replicas = fleet.replicas()
    assert {replica["node"] for replica in replicas} == {"gpu1"}
    assert len({replica["address"] for replica in replicas}) == 2


def test_a_port_lost_to_a_thief_is_replaced_by_another(fleet: Fleet) -> None:
    """The job survives a port that someone takes between its choice and the engine's bind."""
    thief = fleet.lab.shared / "thief.sh"
    thief.write_text(THIEF)
    thief.chmod(0o755)
    fleet.edit(STANDIN, "/shared/thief.sh")
    fleet.edit("replicas: 2", "replicas: 1")
    _applied(fleet)
    (replica,) = fleet.replicas()
    stolen = (fleet.lab.shared / "stolen").read_text().split()
    assert len(stolen) == 1
    assert stolen[0] != replica["address"].rpartition(":")[2]


# The first start takes the port itself, then starts the engine, which can't bind it.
THIEF = """#!/bin/bash
port=$(sed 's/.*--port \\([0-9]*\\).*/\\1/' <<< "$*")
if [[ $* != *--headless* && ! -e /shared/stolen ]]; then
  echo "$port" > /shared/stolen
  setsid /opt/modelfleet/venv/bin/python -c "
import socket, signal
s = socket.socket(); s.bind(('', $port)); s.listen(); print('taken', flush=True); signal.pause()
" > /shared/taken 2>&1 &
  until grep -q taken /shared/taken; do :; done
fi
exec /opt/modelfleet/src/tests/lab/standin.py "$@"
"""


def test_a_drain_past_its_timeout_ends_the_job_from_inside(fleet: Fleet) -> None:
    """An engine that ignores TERM does not hold its GPUs for ever, even with no reconciler."""
    deaf = fleet.lab.shared / "deaf.sh"
    deaf.write_text(f"#!/bin/bash\ntrap '' TERM\n{STANDIN} \"$@\" &\nwait\nsleep 600\n")
    deaf.chmod(0o755)
    fleet.edit(STANDIN, "/shared/deaf.sh")
    fleet.edit("replicas: 2", "replicas: 1")
    fleet.edit("drain_timeout_s: 60", "drain_timeout_s: 2")
    _applied(fleet)
    (replica,) = fleet.replicas()
    fleet.lab.run("login", ["scancel", "--batch", "--signal=USR1", str(replica["job_id"])])
    wait_for("the job to end by itself", lambda: not _live_jobs(fleet))


def test_environment_of_the_spec_reaches_the_engine_and_not_the_script(fleet: Fleet) -> None:
    """Names that the job script uses itself are the engine's affair alone."""
    names = 'node: nowhere, port: "1", names: x, SLURM_JOB_ID: "99", engine: "1", ready: "7"'
    fleet.edit('STANDIN_TOKENS_PER_S: "20"', names)
    _applied(fleet)
    (job, *_) = _live_jobs(fleet)
    argv = ["pgrep", "-f", "standin.py serve.*tiny@" + job[0]]
    pid = fleet.lab.run(job[3], argv).stdout.split()[0]
    environment = fleet.lab.run(job[3], ["cat", f"/proc/{pid}/environ"]).stdout
    assert {"node=nowhere", "SLURM_JOB_ID=99"} <= set(environment.split("\0"))


def test_missing_weights_end_the_job_with_their_own_status(fleet: Fleet) -> None:
    """What the node lacks is told apart from what the engine dislikes, and said in the log."""
    fleet.edit("weights: /shared/models", "weights: /shared/no-such-model")
    fleet.run("apply")
    wait_for("both jobs to fail", lambda: [j[2] for j in fleet.jobs()] == ["FAILED"] * 2)
    shown = fleet.lab.run("login", ["scontrol", "show", "job", "1"]).stdout
    assert "ExitCode=66:0" in shown
    logs = [log.read_text() for log in (fleet.lab.shared / "logs").iterdir()]
    assert all("/shared/no-such-model is not on this node: provision" in log for log in logs)
    shown = fleet.run("logs", "tiny", "--lines", "1")
    assert "demo.tiny." in shown
    assert "/shared/no-such-model is not on this node: provision" in shown


def test_R25_a_job_that_crashes_fast_backs_off_visibly(fleet: Fleet) -> None:
    """A revision whose jobs fail is not submitted again and again; the plan says until when."""
    fleet.edit('STANDIN_TOKENS_PER_S: "20"', 'STANDIN_EXIT_CODE: "3"')
    fleet.run("apply")
    wait_for("both jobs to fail", lambda: [j[2] for j in fleet.jobs()] == ["FAILED"] * 2)
    said = fleet.run("apply")
    assert "held: 2 failures on revision" in said
    assert "until" in said
    assert _live_jobs(fleet) == []


def test_an_impostor_gets_no_request(fleet: Fleet) -> None:
    """An engine that does not prove to be its job is never routed, and the plan says why."""
    fleet.edit('STANDIN_TOKENS_PER_S: "20"', 'STANDIN_IMPOSTOR: "llama-70b"')
    fleet.run("apply", "--wait", "--timeout", "6s", check=False)
    status = fleet.status()
    statuses = {replica["status"] for replica in status["replicas"]}
    assert statuses <= {"impostor", "leaving", "pending", "starting"}
    assert _routed(fleet) == 0
    answer = httpx.post(f"{fleet.url}/v1/completions", json=_body(), timeout=30)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "15")


def test_R34_a_second_reconciler_is_told_who_is_at_work(fleet: Fleet) -> None:
    """One works, the other names the holder and ends with 1."""
    argv = fleet.command("run")
    with fleet.lab.popen("login", argv, stdout=subprocess.PIPE) as service:
        assert service.stdout is not None
        assert "submitted" in service.stdout.readline()
        second = fleet.lab.run("login", fleet.command("apply"), check=False)
        service.kill()
    assert second.returncode == 1
    assert "is held by process" in second.stderr
    assert "on login" in second.stderr


def test_status_json_and_text_agree(fleet: Fleet) -> None:
    """The text is made from the JSON: every replica of the one is in the other."""
    _applied(fleet)
    text, record = fleet.run("status"), fleet.status()
    for replica in record["replicas"]:
        assert replica["address"] in text
    assert json.dumps(record)
