"""Playbooks on a bare lab over real ssh: from hosts with Slurm to a completion.

The tests build on each other in their order: a site is provisioned once.
"""

import json
import os
import random
import re
import secrets
import subprocess
from collections.abc import Iterator

import httpx
import pytest

from tests.e2e.checks import lost, mixed, under
from tests.lab.site import Site
from tests.lab.wait import wait_for

pytestmark = pytest.mark.soak

# How many runs are killed before one may finish.
KILLS = 10

PARTS = [
    ("validate", "all"),
    ("apptainer", "nodes"),
    ("images", "login"),
    ("models", "login"),
    ("gateway", "gateway"),
    ("controller", "login"),
    ("smoke", "login"),
]
GATEWAY = "modelfleet-gateway"
# All that a provisioned site could differ in from a bare one.
FOLDERS = ("/etc", "/home", "/opt", "/usr/bin", "/usr/local", "/usr/sbin", "/var/lib/modelfleet")


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Site(f"site-{os.getpid()}") as provisioned:
        yield provisioned


def root(site: Site, host: str, script: str, *, check: bool = True) -> str:
    done = site.lab.run(host, ["sh", "-c", script], user="root", check=check)
    return (done.stdout + done.stderr).strip()


def files(site: Site) -> set[str]:
    """Return every folder of each host, and every file with its size and time."""
    each = r"-type d -printf '%p\n' -o -printf '%p %s %T@\n'"
    find = f"find {' '.join(FOLDERS)} -xdev {each} 2> /dev/null"
    # Not all of them are there.
    found = {host: root(site, host, find, check=False) for host in site.lab.hosts}
    return {f"{host}:{line}" for host, text in found.items() for line in text.splitlines()}


def completes(site: Site) -> bool:
    body = {"model": "tiny", "prompt": "Hello", "max_tokens": 1}
    url = f"http://{site.lab.address('gateway')}:8080/v1/completions"
    return httpx.post(url, json=body, timeout=30).status_code == 200


def test_a_check_of_bare_hosts_works_and_changes_nothing(site: Site) -> None:
    """`--check --diff` shows what would be done, before anything is there."""
    before = files(site)
    play = site.play("site.yml", "--check", "--diff").worked()
    assert "+ExecStart=/usr/local/bin/fleet run" in play.said
    assert all(play.changed.values())
    assert files(site) ^ before == set()


def test_a_site_without_the_account_is_refused_before_anything_is_touched(site: Site) -> None:
    """The message says where and what to do."""
    play = site.play("site.yml", variables={"fleet_user": "nobody-here"})
    assert play.status != 0
    assert "gpu1 knows no account nobody-here: make it where the cluster's" in play.said
    assert "PLAY [Provide" not in play.said


def test_runs_that_are_killed_are_mended_by_the_next_one(site: Site) -> None:
    """Whatever the task at which a run ended, the next one goes on to a completion."""
    for kill in range(KILLS):
        # The tasks of the last parts are reached only when the first ones have gone through.
        at = random.Random(kill).randint(20, 70)
        said = kill_at_task(site, at)
        print(f"killed at task {at}: {said}")
    play = site.play("site.yml").worked()
    assert "tiny answers at http://gateway:8080" in play.said
    assert completes(site)
    # Only with all that a job's script needs of its node.
    wait_for("the jobs to say that they are ready", lambda: all(map(is_ready, jobs(site))))


def jobs(site: Site) -> list[str]:
    return root(site, "login", "squeue --noheader --states=RUNNING --format=%k").splitlines()


def is_ready(comment: str) -> bool:
    return "run" in (said := json.loads(comment)) and bool(said["run"]["ready"])


def kill_at_task(site: Site, task: int) -> str:
    """Start a run, kill it and all its children when it begins its nth task; return that task."""
    seen, line = 0, ""
    # In a PID namespace of its own, whose first process takes all others with it.
    argv = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", *site.argv("site.yml")]
    with subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, **site.surroundings
    ) as run:
        assert run.stdout is not None
        for line in run.stdout:
            seen += line.startswith("TASK [")
            if seen == task:
                break
        run.kill()
    return line.strip()


def test_a_second_run_changes_nothing(site: Site) -> None:
    """Not on any host; and NGINX and reconciler go on as they were."""
    pids = "systemctl show --property MainPID modelfleet modelfleet-gateway"
    before = [root(site, host, pids) for host in ("login", "gateway")]
    play = site.play("site.yml").worked()
    assert set(play.changed.values()) == {0}
    assert [root(site, host, pids) for host in ("login", "gateway")] == before


@pytest.mark.parametrize(("part", "group"), PARTS)
def test_a_part_works_alone(site: Site, part: str, group: str) -> None:
    """`--tags` runs that part's role only, after validation, and `--limit` its hosts only."""
    play = site.play("site.yml", "--tags", part, "--limit", group).worked()
    # What every role does first, whatever the tags.
    said = play.said.replace(" : Validating arguments against", "")
    assert set(re.findall(r"^TASK \[(\w+) :", said, re.MULTILINE)) == {"validate", part}
    assert set(play.changed.values()) == {0}


def test_a_changed_base_configuration_is_read_and_a_wrong_one_never_written(site: Site) -> None:
    """It is tested beside the generation that serves; NGINX reads it without a restart."""
    base = "/var/lib/modelfleet/gateway/base.conf"
    pid = root(site, "gateway", "cat /var/lib/modelfleet/gateway/nginx.pid")
    root(site, "gateway", f"echo '# an earlier one' >> {base}")
    play = site.play("gateway.yml").worked()
    assert "TASK [gateway : Have NGINX read it]" in play.said
    assert root(site, "gateway", f"grep -c 'an earlier one' {base}", check=False) == "0"
    assert root(site, "gateway", "cat /var/lib/modelfleet/gateway/nginx.pid") == pid
    test = f"/usr/local/sbin/modelfleet-test-base fleet {base[: base.rindex('/')]}"
    root(site, "gateway", f"{test} {base}")
    wrong = "echo 'nonsense;' > /root/wrong.conf && "
    said = root(site, "gateway", f"{wrong}{test} /root/wrong.conf", check=False)
    assert 'unknown directive "nonsense"' in said
    assert completes(site)


def test_nginx_and_reconciler_run_as_the_account_and_may_little(site: Site) -> None:
    """No process of ours is root's; systemd's own judgement of the units is "OK"."""
    for host, unit in (("login", "modelfleet"), ("gateway", "modelfleet-gateway")):
        users = f"ps -o user= -p $(systemctl show --property MainPID --value {unit})"
        assert root(site, host, users) == "fleet"
        said = root(site, host, f"systemd-analyze security --no-pager {unit} | tail -n 1")
        print(said)
        assert " OK " in said
    assert root(site, "login", "stat -c '%a %U' /shared/secrets /etc/modelfleet/fleet.env") == (
        "700 fleet\n640 root"
    )


@pytest.mark.parametrize("way", ["timer", "cron", "scrontab", "not at all", "service"])
def test_the_reconciler_runs_in_the_way_that_is_chosen_and_in_no_other(
    site: Site, way: str
) -> None:
    """To choose another way stops the one before."""
    site.play("controller.yml", variables={"controller_runs": way}).worked()
    active = root(site, "login", "systemctl list-units --plain --no-legend 'modelfleet*'")
    units = {line.split()[0] for line in active.splitlines()} - {"modelfleet-cycle.service"}
    wanted = {"timer": {"modelfleet-cycle.timer"}, "service": {"modelfleet.service"}}
    assert units == wanted.get(way, set())
    cron = root(site, "login", "cat /etc/cron.d/modelfleet", check=False)
    assert ("modelfleet-cycle" in cron) == (way == "cron")
    table = root(site, "login", "runuser -u fleet -- scrontab -l", check=False)
    assert ("modelfleet-cycle" in table) == (way == "scrontab")
    if way == "timer":
        log = "journalctl -u modelfleet-cycle --no-pager"
        wait_for("a cycle", lambda: "fleet demo: nothing to do" in root(site, "login", log))
    if way == "cron":
        # cron itself may be at work.
        words = "s/--nonblock //; s/.*fleet flock/flock/p"
        line = f"sed -n '{words}' /etc/cron.d/modelfleet | cut -d'|' -f1"
        said = root(site, "login", f'runuser -u fleet -- sh -c "$({line})"')
        assert "fleet demo: nothing to do" in said
    assert completes(site)


def test_R36_a_site_prints_no_secret(site: Site) -> None:
    """Not even with -vvv, nor by a diff."""
    words = {name: f"{name}-{secrets.token_hex(16)}" for name in ("smoke", "spec", "tls")}
    variables = {
        "smoke_key": words["smoke"],
        "controller_spec_key": words["spec"],
        "controller_spec_repository": "/shared/nothing-here.git",
        "gateway_tls_certificate": "none",
        "gateway_tls_key": words["tls"],
    }
    # From a file, as a vault's variables are: Ansible shows its own command line.
    vault = site.lab.state / "vault.json"
    vault.write_text(json.dumps(variables))
    play = site.play("site.yml", "--extra-vars", f"@{vault}", "--diff", "-vvv", "--check")
    more = site.play("smoke.yml", "--extra-vars", f"@{vault}", "--diff", "-vvv").worked()
    assert not [word for word in words.values() if word in play.worked().said + more.said]


def test_a_spec_comes_from_git_when_it_is_signed_and_valid(site: Site) -> None:
    """Another commit leaves the one before in use, and the journal says why."""
    lab = site.lab
    repository = lab.shared / "specs.git"
    work = Repository(site)
    signers = work.signers()
    first = work.commit("the first", sign=True)
    variables = {
        "controller_spec_repository": "/shared/specs.git",
        "controller_spec_signers": signers,
        "fleet_spec": "/var/lib/modelfleet/specs/current/demo",
    }
    vault = site.lab.state / "spec-key.json"
    vault.write_text(json.dumps({"controller_spec_key": f"key-{secrets.token_hex(16)}"}))
    with_key = ("--extra-vars", f"@{vault}", "--diff", "-vvv")
    play = site.play("controller.yml", *with_key, variables=variables).worked()
    assert json.loads(vault.read_text())["controller_spec_key"] not in play.said
    assert root(site, "login", "stat -c '%a %U' /etc/modelfleet/spec_key") == "400 fleet"
    assert repository.exists()
    assert used(site) == first
    pull = "runuser -u fleet -- /usr/local/libexec/modelfleet-pull"
    work.commit("not signed", sign=False)
    assert "signed by nobody who may: not in use" in root(site, "login", pull, check=False)
    work.edit("replicas: 2", "replicas: many")
    work.commit("not valid", sign=True)
    assert "replicas" in root(site, "login", pull, check=False)
    assert used(site) == first
    work.edit("replicas: many", "replicas: 1")
    last = work.commit("valid again", sign=True)
    root(site, "login", pull)
    assert used(site) == last
    log = "runuser -u fleet -- fleet status"
    held = "1 of 4 GPUs held"
    wait_for("one replica less", lambda: held in root(site, "login", log), timeout_s=90)
    assert completes(site)


def test_an_upgrade_loses_no_request(site: Site) -> None:
    """NGINX goes over to a newer module and program with its sockets open."""
    module = "/usr/lib/nginx/modules/ngx_http_lua_module.so"
    pid = "cat /var/lib/modelfleet/gateway/nginx.pid"
    before = root(site, "gateway", pid)
    root(site, "gateway", f"touch {module}")
    url = f"http://{site.lab.address('gateway')}:8080"

    def upgrade() -> None:
        site.play("upgrade.yml").worked()

    assert lost(under(mixed(url, streams=3, tokens=50), upgrade)) == []
    assert root(site, "gateway", pid) != before
    assert root(site, "gateway", f"test ! -e /proc/{before} && systemctl is-active {GATEWAY}")
    assert set(site.play("gateway.yml").worked().changed.values()) == {0}


def test_a_removal_wants_the_name_drains_first_and_leaves_nothing_that_runs(site: Site) -> None:
    """The account's jobs are gone, and what others made is as it was."""
    site.play("controller.yml", variables={"controller_runs": "scrontab"}).worked()
    play = site.play("remove.yml", variables={"remove_fleet": "another"})
    assert play.status != 0
    assert "The fleet here is demo, not another: nothing is removed" in play.said
    variables = {"remove_fleet": "demo"}
    site.play("remove.yml", variables=variables).worked()
    assert root(site, "login", "squeue --noheader") == ""
    assert "modelfleet" not in root(site, "login", "runuser -u fleet -- scrontab -l", check=False)
    for host in ("login", "gateway"):
        assert root(site, host, "systemctl list-units --plain --no-legend 'modelfleet*'") == ""
        assert root(site, host, "find /etc /usr/local -name '*fleet*'; ls /opt") == "engine"
    assert set(site.play("remove.yml", variables=variables).worked().changed.values()) == {0}


def used(site: Site) -> str:
    return root(site, "login", "readlink /var/lib/modelfleet/specs/current")


class Repository:
    """The repository of specs on the shared path, and somebody who signs commits to it."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._do(
            "ssh-keygen -q -t ed25519 -N '' -f ~/signer;"
            "git init -q --bare -b main /shared/specs.git;"
            "git clone -q /shared/specs.git ~/clone; cp -r /shared/specs/demo ~/clone/demo;"
            "cd ~/clone; git symbolic-ref HEAD refs/heads/main;"
            "git config user.name a; git config user.email a@b;"
            "git config gpg.format ssh; git config user.signingkey ~/signer"
        )

    def signers(self) -> str:
        return "a@b " + self._do("cut -d' ' -f1,2 ~/signer.pub") + "\n"

    def edit(self, old: str, new: str) -> None:
        self._do(f"sed -i 's/{old}/{new}/' ~/clone/demo/fleet.yaml")

    def commit(self, message: str, *, sign: bool) -> str:
        how = "-S" if sign else "--no-gpg-sign"
        return self._do(
            f"cd ~/clone; git add -A; git commit -q --allow-empty {how} -m '{message}';"
            "git push -q origin main; git rev-parse HEAD"
        )

    def _do(self, script: str) -> str:
        done = self._site.lab.run("login", ["sh", "-euc", script], user="fleet")
        return done.stdout.strip()
