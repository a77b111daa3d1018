"""gateway.sh with an NGINX that only pretends: what is tested, swapped, checked and put back.

The programs on PATH stand for nginx, curl, pgrep and sleep; files beside them say what NGINX runs
and how it behaves. The same steps on a real NGINX are in tests/e2e.
"""

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from reconciler.adapters.nginx import NginxGateways
from reconciler.errors import GatewayFailed
from reconciler.routes import KEY_FILE, GatewayFiles
from tests.unit.build import fleet, job, rendered, revision, target

FLEET = fleet()
ONE, TWO = job(revision(FLEET), id=1), job(revision(FLEET), id=2, ordinal=1)

PROGRAMS = {
    # -t reads the staged files, -s reload makes the linked ones run.
    "nginx": """
echo "$*" >>"$HERE/nginx.log"
case $* in
  *-t*) [ ! -e "$HERE/refuses" ] || { echo 'nginx: [emerg] broken' >&2; exit 1; } ;;
  *reload*) [ -e "$HERE/deaf" ] || sed -n 's/.*return 200 \\([0-9a-f]*\\);.*/\\1/p' \
    "$HERE/gateway/current/fleet.conf" >"$HERE/runs" ;;
esac
""",
    "curl": 'cat "$HERE/runs" 2>/dev/null',
    "pgrep": 'cat "$HERE/old" 2>/dev/null || { echo 0; exit 1; }',
    "sleep": ":",
}


class Gateway:
    """A gateway's folder, its pretended NGINX and the adapter in front."""

    def __init__(self, here: Path) -> None:
        self.here = here
        self.folder = here / "gateway"
        record = {"directory": str(self.folder), "hosts": [{"name": "gateway"}]}
        self.adapter = NginxGateways(fleet(gateway=record).gateway, "demo")

    @property
    def log(self) -> list[str]:
        path = self.here / "nginx.log"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def linked(self) -> str:
        return str((self.folder / "current").readlink())

    def litter(self) -> list[str]:
        return [path.name for path in self.folder.iterdir() if "part" in path.name]


@pytest.fixture
def gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gateway:
    """A provisioned gateway whose NGINX runs without a generated configuration."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in PROGRAMS.items():
        path = programs / name
        path.write_text(f"#!/bin/sh\nHERE={tmp_path}\n{body}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    (tmp_path / "gateway").mkdir()
    (tmp_path / "gateway" / "base.conf").touch()
    # Any process that lives stands for NGINX's master.
    (tmp_path / "gateway" / "nginx.pid").write_text(f"{os.getpid()}\n")
    return Gateway(tmp_path)


def to(*jobs: object) -> GatewayFiles:
    return rendered(FLEET, [target(one) for one in (ONE, TWO) if one in jobs])


def test_gateway_without_a_configuration_runs_no_routes(gateway: Gateway) -> None:
    """A fresh gateway is known to route nowhere."""
    [view] = gateway.adapter.look()
    assert (view.generation, view.targets, view.error) == (None, (), None)


def test_nginx_of_the_gateways_own_folder_is_the_one_that_is_told(gateway: Gateway) -> None:
    """Without root it is on no PATH."""
    (gateway.folder / "bin").mkdir()
    (gateway.here / "bin/nginx").rename(gateway.folder / "bin/nginx")
    gateway.adapter.change("gateway", to(ONE))
    assert len(gateway.log) == 2


def test_change_is_tested_then_swapped_then_checked(gateway: Gateway) -> None:
    """NGINX tests the staged files before anything is replaced, and then says what it runs."""
    files = to(ONE)
    gateway.adapter.change("gateway", files)
    test, reload = gateway.log
    assert test.startswith("-t -q -e stderr -c ")
    assert "/part." in test
    assert reload == f"-s reload -c {gateway.folder}/current/nginx.conf"
    assert gateway.linked == f"gen-{files.generation}"
    assert gateway.litter() == []
    [view] = gateway.adapter.look()
    assert (view.generation, view.targets) == (files.generation, (target(ONE),))


def test_R29_configuration_that_nginx_refuses_changes_nothing(gateway: Gateway) -> None:
    """The old files stay, the old configuration serves, and the reason is one line."""
    first = to(ONE)
    gateway.adapter.change("gateway", first)
    (gateway.here / "refuses").touch()
    with pytest.raises(GatewayFailed) as caught:
        gateway.adapter.change("gateway", to(ONE, TWO))
    assert str(caught.value) == "gateway gateway: nginx: [emerg] broken"
    assert gateway.linked == f"gen-{first.generation}"
    assert gateway.litter() == []
    assert [line.split()[0] for line in gateway.log] == ["-t", "-s", "-t"]
    [view] = gateway.adapter.look()
    assert (view.generation, view.targets) == (first.generation, (target(ONE),))


def test_R29_reload_that_does_not_take_is_put_back(gateway: Gateway) -> None:
    """What runs and what a restart would read stay the same, and the failure is told."""
    first, second = to(ONE), to(TWO)
    gateway.adapter.change("gateway", first)
    (gateway.here / "deaf").touch()
    with pytest.raises(GatewayFailed, match=f"it runs {first.generation} after the reload"):
        gateway.adapter.change("gateway", second)
    assert gateway.linked == f"gen-{first.generation}"
    assert gateway.litter() == []


def test_old_worker_that_answers_once_more_undoes_no_change(gateway: Gateway) -> None:
    """Old and new workers take connections side by side for a moment: one new answer counts."""
    first, second = to(ONE), to(TWO)
    gateway.adapter.change("gateway", first)
    runs = gateway.here / "runs"
    forgets = f"#!/bin/sh\ncat {runs}\necho {first.generation} >{runs}\n"
    (gateway.here / "bin" / "curl").write_text(forgets)
    gateway.adapter.change("gateway", second)
    assert gateway.linked == f"gen-{second.generation}"


def test_gateway_that_would_restart_differently_is_behind(gateway: Gateway) -> None:
    """A crash between swap and reload is seen: its generation is unknown, its routes are not."""
    first, second = to(ONE), to(TWO)
    gateway.adapter.change("gateway", first)
    gateway.adapter.change("gateway", second)
    (gateway.folder / "current").unlink()
    (gateway.folder / "current").symlink_to(f"gen-{first.generation}")
    [view] = gateway.adapter.look()
    assert (view.generation, view.targets) == (None, (target(TWO),))


def test_old_workers_are_counted(gateway: Gateway) -> None:
    """Workers that still finish requests hold a drain back."""
    gateway.adapter.change("gateway", to(ONE))
    (gateway.here / "old").write_text("3\n")
    [view] = gateway.adapter.look()
    assert view.old_workers == 3


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("pid", "nginx is not running"),
        ("silent", "nginx does not answer on 127.0.0.1:8091"),
        ("targets", "its files can't be read"),
        ("answer", "gateway gateway:"),
    ],
)
def test_gateway_that_can_not_be_read_is_an_error_and_not_empty(
    spoil: str, message: str, gateway: Gateway
) -> None:
    """Unknown is never absent: such a gateway may still route."""
    files = to(ONE)
    gateway.adapter.change("gateway", files)
    if spoil == "pid":
        (gateway.folder / "nginx.pid").write_text("\n")
    if spoil == "silent":
        (gateway.here / "runs").unlink()
    if spoil == "targets":
        (gateway.folder / f"gen-{files.generation}" / "targets.json").write_text("{")
    if spoil == "answer":
        (gateway.here / "runs").write_text("hello world\n")
    [view] = gateway.adapter.look()
    assert view.error is not None
    assert message in view.error
    assert view.targets == ()


def test_routes_of_another_fleet_are_let_be(gateway: Gateway) -> None:
    """A fleet that was renamed, or two with one folder: neither takes the other's routes away."""
    other = fleet(fleet="other")
    gateway.adapter.change("gateway", rendered(other, [target(job(revision(other)))]))
    [view] = gateway.adapter.look()
    assert view.error is not None
    assert "serves the fleet other" in view.error
    gateway.adapter.change("gateway", rendered(other, []))  # it has ended
    [view] = gateway.adapter.look()
    assert view.error is None


def test_last_generations_are_kept_and_no_more(gateway: Gateway) -> None:
    """The folder does not grow: this generation, the one before, and a few to look at."""
    for number in range(1, 13):
        one = job(revision(FLEET), id=number)
        gateway.adapter.change("gateway", rendered(FLEET, [target(one)]))
    assert len(list(gateway.folder.glob("gen-*"))) == 7


def test_what_a_killed_change_left_is_swept_and_a_younger_one_is_let_be(gateway: Gateway) -> None:
    """A kill leaves a staged folder or a link; after an hour nobody can still be at work on it."""
    for name in ("part.aaaaaa", "part.bbbbbb"):
        (gateway.folder / name).mkdir()
        (gateway.folder / name / "fleet.conf").touch()
    (gateway.folder / "current.part.4711").symlink_to("gen-0123456789ab")
    for name in ("part.aaaaaa", "current.part.4711"):
        os.utime(gateway.folder / name, (0, 0), follow_symlinks=False)
    gateway.adapter.change("gateway", to(ONE))
    assert gateway.litter() == ["part.bbbbbb"]


def test_same_generation_twice_is_no_failure(gateway: Gateway) -> None:
    """A change repeated after a crash ends in the same place."""
    for _ in range(2):
        gateway.adapter.change("gateway", to(ONE))
    assert gateway.litter() == []
    assert gateway.linked == f"gen-{to(ONE).generation}"


def test_answers_end_their_connections_from_shortly_before_a_reload(gateway: Gateway) -> None:
    """The generation that runs is told first; one that runs again is not told any more."""
    first, second = to(ONE), to(TWO)

    def closing() -> set[str]:
        return {path.parent.name for path in gateway.folder.glob("gen-*/closing")}

    gateway.adapter.change("gateway", first)
    assert closing() == set()
    gateway.adapter.change("gateway", second)
    assert closing() == {f"gen-{first.generation}"}
    gateway.adapter.change("gateway", first)
    assert closing() == {f"gen-{second.generation}"}


def test_answers_keep_their_connections_after_a_reload_that_does_not_take(
    gateway: Gateway,
) -> None:
    """What runs goes on as before."""
    gateway.adapter.change("gateway", to(ONE))
    (gateway.here / "deaf").touch()
    with pytest.raises(GatewayFailed):
        gateway.adapter.change("gateway", to(TWO))
    assert list(gateway.folder.glob("gen-*/closing")) == []


def keyed(key: str, *jobs: object) -> GatewayFiles:
    """The files of a gateway that shows a key, and the one that holds it."""
    return replace(to(*jobs), secrets={KEY_FILE: key})


def test_key_is_its_users_alone_and_only_where_it_is_in_use(gateway: Gateway) -> None:
    """Older generations are kept to look at, and lose their keys."""
    gateway.adapter.change("gateway", keyed("first", ONE))
    gateway.adapter.change("gateway", keyed("second", TWO))
    [file] = gateway.folder.glob(f"gen-*/{KEY_FILE}")
    assert file.parent.name == gateway.linked
    assert file.read_text() == "second"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert len(list(gateway.folder.glob("gen-*"))) == 2


def test_generation_that_comes_back_has_its_key_again(gateway: Gateway) -> None:
    """Its other files are on disk still."""
    for jobs in ((ONE,), (TWO,), (ONE,)):
        gateway.adapter.change("gateway", keyed("the key", *jobs))
    assert gateway.linked == f"gen-{to(ONE).generation}"
    assert (gateway.folder / "current" / KEY_FILE).read_text() == "the key"


def test_change_that_does_not_take_keeps_the_key_that_is_in_use(gateway: Gateway) -> None:
    """A restart of NGINX must find it."""
    gateway.adapter.change("gateway", keyed("first", ONE))
    (gateway.here / "deaf").touch()
    with pytest.raises(GatewayFailed):
        gateway.adapter.change("gateway", keyed("second", TWO))
    assert (gateway.folder / "current" / KEY_FILE).read_text() == "first"


def test_changes_of_two_hosts_at_once_come_one_after_the_other(gateway: Gateway) -> None:
    """Neither undoes the other's, takes its key away or takes its generation for its own."""
    wanted = [keyed("secret", *jobs) for jobs in ((ONE,), (TWO,)) * 8]
    with ThreadPoolExecutor(max_workers=2) as pool:
        list(pool.map(lambda files: gateway.adapter.change("gateway", files), wanted))
    assert (gateway.folder / "current" / KEY_FILE).exists()
    [view] = gateway.adapter.look()
    assert view.generation is not None
