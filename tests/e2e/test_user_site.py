"""A research group without root: `inventory/user` on a bare lab, as an ordinary account by ssh.

The tests build on each other in their order: the fleet is provisioned once.
"""

import os
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.e2e.checks import lost, mixed, under
from tests.lab.site import GroupSite
from tests.lab.wait import wait_for

pytestmark = pytest.mark.soak

# cron and Slurm's own begin each minute.
MINUTE_S = 150


@pytest.fixture(scope="module")
def site() -> Iterator[GroupSite]:
    with GroupSite(f"group-{os.getpid()}") as provisioned:
        yield provisioned


def mine(site: GroupSite, script: str, host: str = "login", *, check: bool = True) -> str:
    done = site.lab.run(host, ["sh", "-c", script], user=site.USER, check=check)
    return (done.stdout + done.stderr).strip()


def completes(site: GroupSite) -> bool:
    body = {"model": "tiny", "prompt": "Hello", "max_tokens": 1}
    url = f"http://{site.lab.address('login')}:18080/v1/completions"
    try:
        return httpx.post(url, json=body, timeout=30).status_code == 200
    except httpx.TransportError:
        return False


def test_a_group_without_root_gets_a_fleet(site: GroupSite) -> None:
    """From nothing to a completion; a check before changes nothing, nor does a second run."""
    mine(site, "printf '7 7 * * * true\\n' | crontab -")
    site.play("site.yml", "--check", "--diff").worked()
    assert mine(site, f"ls -A {site.FOLDER}") == "specs"
    play = site.play("site.yml").worked()
    assert "tiny answers at http://localhost:18080" in play.said
    assert completes(site)
    assert set(site.play("site.yml").worked().changed.values()) == {0}


def test_all_of_it_is_the_accounts(site: GroupSite) -> None:
    """No file and no process of the fleet is anybody else's; its own table keeps what was there."""
    find = f"find {site.FOLDER} {site.LOCAL} ! -user {site.USER}"
    assert site.lab.run("login", ["sh", "-c", find], user="root").stdout == ""
    assert mine(site, "ps -o user= -C nginx | sort -u") == site.USER
    table = mine(site, "crontab -l")
    assert "7 7 * * * true" in table
    assert "modelfleet-cycle" in table
    assert mine(site, "squeue --noheader --format=%u | sort -u") == site.USER


def test_cron_runs_the_reconciler_and_starts_nginx_again(site: GroupSite) -> None:
    """Each minute, as the account."""
    log = f"{site.LOCAL}/state/cycle.log"
    mine(site, f"rm -f {log}; kill -KILL $(pgrep nginx)")
    wait_for("NGINX", lambda: completes(site), timeout_s=MINUTE_S)
    said = f"cat {log} 2> /dev/null"
    cycled = "fleet demo: nothing to do"
    wait_for("a cycle", lambda: cycled in mine(site, said, check=False), timeout_s=MINUTE_S)


def test_scrontab_runs_the_reconciler_as_a_job(site: GroupSite) -> None:
    """The former way ends; what of the account's own stands in Slurm's table stays."""
    site.reconciler_on("gpu1")
    mine(site, "printf '8 8 * * * true\\n' | scrontab -")
    ways = {
        "controller_runs": "scrontab",
        "controller_scron_options": ["--nodelist=gpu1"],
    }
    site.play("controller.yml", "--check", variables=ways).worked()
    assert "modelfleet" not in mine(site, "scrontab -l")
    site.play("controller.yml", variables=ways).worked()
    assert set(site.play("controller.yml", variables=ways).worked().changed.values()) == {0}
    assert "modelfleet-cycle" not in mine(site, "crontab -l")
    log = f"cat {site.LOCAL}/state/cycle.log"
    cycled = "fleet demo: nothing to do"
    wait_for("a cycle", lambda: cycled in mine(site, log, "gpu1", check=False), timeout_s=MINUTE_S)
    site.play("controller.yml", variables={"controller_runs": "not at all"}).worked()
    assert mine(site, "scrontab -l").splitlines()[-1] == "8 8 * * * true"
    site.reconciler_on("login")
    assert completes(site)


def test_a_newer_base_configuration_is_read(site: GroupSite) -> None:
    """Tested by the group's own NGINX first, and without a restart."""
    base, pid = f"{site.LOCAL}/gateway/base.conf", f"cat {site.LOCAL}/gateway/nginx.pid"
    before = mine(site, pid)
    mine(site, f"echo '# an earlier one' >> {base}")
    play = site.play("gateway.yml").worked()
    assert "TASK [gateway : Have NGINX read it]" in play.said
    assert mine(site, pid) == before
    assert completes(site)


@pytest.fixture(scope="module")
def image(site: GroupSite) -> dict[str, Any]:
    """The variables with which NGINX is an image's."""
    return site.nginx_image()


def test_an_upgrade_goes_over_to_the_nginx_of_an_image(
    site: GroupSite, image: dict[str, Any]
) -> None:
    """What is under way is finished; only who comes while neither listens is refused."""
    own = "cat {0}/gateway/nginx.pid; readlink /proc/$(cat {0}/gateway/nginx.pid)/ns/mnt"
    before = mine(site, own.format(site.LOCAL)).splitlines()
    url = f"http://{site.lab.address('login')}:18080"

    def upgrade() -> None:
        site.play("images.yml", variables=image).worked()
        site.play("upgrade.yml", variables=image).worked()

    requests = under(mixed(url, streams=3, tokens=50), upgrade)
    assert len(requests) > len(lost(requests))
    assert {request.status for request in requests if not request.succeeded} <= {0}
    assert not [request for request in requests if request.chunks and not request.done]
    after = mine(site, own.format(site.LOCAL)).splitlines()
    assert [one == other for one, other in zip(before, after, strict=True)] == [False, False]
    assert mine(site, f"test ! -e /proc/{before[0]} && echo ended") == "ended"
    assert set(site.play("site.yml", variables=image).worked().changed.values()) == {0}


def test_cron_starts_the_nginx_of_an_image_again(site: GroupSite, image: dict[str, Any]) -> None:
    """Whoever ended it."""
    assert image["gateway_image"]
    mine(site, "kill -KILL $(pgrep nginx)")
    wait_for("NGINX", lambda: completes(site), timeout_s=MINUTE_S)


def test_a_removal_drains_and_leaves_what_the_group_had(
    site: GroupSite, image: dict[str, Any]
) -> None:
    """No job, process or line in a table; spec, secrets and logs stay. A second run is nothing."""
    wrong = site.play("remove.yml", variables={**image, "remove_fleet": "another"})
    assert "The fleet here is demo, not another: nothing is removed" in wrong.said
    assert completes(site)
    variables = {**image, "remove_fleet": "demo"}
    site.play("remove.yml", variables=variables).worked()
    # What stands in Slurm's own table is a job, too.
    assert set(mine(site, "squeue --noheader --format=%j").split()) <= {"true"}
    assert mine(site, "pgrep -u $(id -u) nginx", check=False) == ""
    assert mine(site, "crontab -l").splitlines()[-1] == "7 7 * * * true"
    assert mine(site, f"ls {site.FOLDER}").split() == [
        *("bin", "images", "libexec", "logs", "models", "secrets", "specs")
    ]
    assert mine(site, f"find {site.FOLDER}/bin {site.FOLDER}/libexec -type f") == ""
    assert mine(site, f"ls {site.LOCAL}").split() == ["gateway", "state"]
    assert set(site.play("remove.yml", variables=variables).worked().changed.values()) == {0}
