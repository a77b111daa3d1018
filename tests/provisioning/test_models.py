"""Weights from a folder, a mirror and the hub: complete and verified, or not there."""

import hashlib
import json
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.lab.base import base, cache, download, python_of
from tests.lab.wait import run_aloud, wait_for
from tests.provisioning.site import HUB, MIRROR, SOURCE, TOKEN, Site

ROLE = f"{SOURCE}/playbooks/roles/models/files"
SCRIPT = f"{ROLE}/weights.py"
CUT = MIRROR.replace("8000", "8001")
CUT_PORTS = (8001, 8000)
COMMIT = "c0ffee" * 6 + "cafe"
LARGE = 3 << 20
FILES = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * (LARGE // 256)}


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A name for what one test fetches, and where from."""
    return f"m{hashlib.sha256(request.node.name.encode()).hexdigest()[:8]}"


@pytest.fixture
def folder(site: Site, name: str) -> Path:
    """Where one test's weights will be, here; the host has it at `/shared/NAME`."""
    return site.shared / name


def offered(site: Site, name: str, files: Mapping[str, bytes] = FILES) -> str:
    """Put files on the mirror beside a SHA256SUMS; return the pin."""
    lines = []
    for path, data in files.items():
        target = site.shared / "mirror" / name / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        lines.append(f"{hashlib.sha256(data).hexdigest()}  {path}\n")
    return summed(site, name, "".join(lines))


def summed(site: Site, name: str, text: str) -> str:
    (site.shared / "mirror" / name / "SHA256SUMS").write_text(text)
    return hashlib.sha256(text.encode()).hexdigest()


def provide(site: Site, folder: str, **request: Any) -> "subprocess.CompletedProcess[str]":
    """Run the script that the role runs; it may fail."""
    stdin = json.dumps({"folder": folder, "name": "tiny", **request})
    return site.run(["python3", SCRIPT, "provide"], stdin=stdin, check=False)


def refused(site: Site, folder: str, **request: Any) -> str:
    """Fail to provide weights; return the one line that says why. None are there."""
    done = provide(site, folder, **request)
    assert done.returncode == 1, done.stdout
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert site.run(["find", folder, "-name", "tiny-*"], check=False).stdout == ""
    return done.stderr


def contents(weights: Path) -> dict[str, bytes]:
    found = [path for path in weights.rglob("*") if path.is_file() and path.name != "SHA256SUMS"]
    return {path.relative_to(weights).as_posix(): path.read_bytes() for path in found}


def answers(site: Site, name: str) -> list[str]:
    """Return method, path and status of each request of the mirror for a test's files."""
    lines = site.run(["cat", "/srv/mirror.log"]).stdout.splitlines()
    requests = [line.split('"') for line in lines if f"/{name}/" in line]
    return [f"{part[1].rsplit(' ', 1)[0]} {part[2].split()[0]}" for part in requests]


@pytest.mark.soak
def test_weights_of_a_mirror_are_published_whole_and_once(
    site: Site, folder: Path, name: str
) -> None:
    """A check changes nothing, nor does a second run; another pin is another folder."""
    pin = offered(site, name, {**FILES, "sub/vocab.txt": b"words"})

    def play(pin: str, *options: str) -> str:
        wanted = {"name": "tiny", "url": f"{MIRROR}/{name}", "sha256": pin}
        variables = {"fleet_user": "fleet", "models_dir": f"/shared/{name}"}
        return site.play("models.yml", {**variables, "models_list": [wanted]}, *options).stdout

    play(pin, "--check", "--diff")
    assert not folder.exists()
    assert f"weights: /shared/{name}/tiny-{pin[:12]}" in play(pin)
    weights = folder / f"tiny-{pin[:12]}"
    assert contents(weights) == {**FILES, "sub/vocab.txt": b"words"}
    assert {path.stat().st_mode & 0o777 for path in weights.glob("*.*")} == {0o444}
    site.run(["sh", "-c", f"cd /shared/{name}/tiny-* && sha256sum --check --strict SHA256SUMS"])
    assert "changed=0" in play(pin)
    other = offered(site, name, {"config.json": b"{1}"})
    assert "changed=1" in play(other, "--check")
    play(other)
    assert sorted(path.name for path in folder.glob("tiny-*")) == sorted(
        f"tiny-{one[:12]}" for one in (pin, other)
    )
    assert not [*folder.glob(".*.part"), *folder.glob(".*.progress")]


def test_weights_of_a_folder_are_copied_and_verified(site: Site, folder: Path, name: str) -> None:
    """As a mirror's are; the names may be those of `sha256sum ./*`."""
    offered(site, name)
    sums = [f"{hashlib.sha256(data).hexdigest()} *./{path}\n" for path, data in FILES.items()]
    pin = summed(site, name, "".join(sums))
    done = provide(site, f"/shared/{name}", path=f"/shared/mirror/{name}", sha256=pin)
    assert json.loads(done.stdout)["provided"]
    assert contents(folder / f"tiny-{pin[:12]}") == FILES


@pytest.mark.soak
def test_connection_that_breaks_is_gone_on_with(site: Site, folder: Path, name: str) -> None:
    """Each time from where it was, within one run."""
    pin = offered(site, name)
    with site.cut(*CUT_PORTS, LARGE // 3):
        done = provide(site, f"/shared/{name}", url=f"{CUT}/{name}", sha256=pin)
    assert done.returncode == 0, done.stderr
    assert contents(folder / f"tiny-{pin[:12]}") == FILES
    path = f"/{name}/model.safetensors"
    assert answers(site, name).count(f"GET {path} 200") == 1
    assert answers(site, name).count(f"GET {path} 206") >= 2


def test_run_that_was_killed_is_gone_on_with_by_the_next(
    site: Site, folder: Path, name: str
) -> None:
    """While it is at work another is told so, and what has come is shown beside the weights."""
    pin = offered(site, name)
    asked = {"folder": f"/shared/{name}", "name": "tiny", "sha256": pin}
    part = folder / f".tiny-{pin[:12]}.part"
    with (
        site.cut(*CUT_PORTS, LARGE // 2, "hold"),
        site.popen(["python3", SCRIPT, "provide"], stdin=subprocess.PIPE) as first,
    ):
        assert first.stdin is not None
        first.stdin.write(json.dumps({**asked, "url": f"{CUT}/{name}"}))
        first.stdin.close()
        progress = part.with_suffix(".progress")
        wait_for("its progress", lambda: progress.exists() and "of 0.00 GB" in progress.read_text())
        large = part / "model.safetensors"
        wait_for("a part of a file", lambda: large.exists() and large.stat().st_size > 0)
        said = refused(site, f"/shared/{name}", url=f"{MIRROR}/{name}", sha256=pin)
        [pid] = re.findall(r"is being fetched by process (\d+)", said)
        first.kill()
        alive = ["kill", "-0", pid]
        wait_for("its end", lambda: site.run(alive, check=False).returncode != 0)
    before = part.stat().st_ino
    done = provide(site, f"/shared/{name}", url=f"{MIRROR}/{name}", sha256=pin)
    assert done.returncode == 0, done.stderr
    weights = folder / f"tiny-{pin[:12]}"
    assert weights.stat().st_ino == before
    assert contents(weights) == FILES
    assert answers(site, name)[-1] == f"GET /{name}/model.safetensors 206"


def test_run_that_was_killed_in_its_last_step_is_ended_by_the_next(
    site: Site, folder: Path, name: str
) -> None:
    """All is there and read-only, but for the name."""
    pin = offered(site, name)
    asked = {"folder": f"/shared/{name}", "name": "tiny", "path": f"/shared/mirror/{name}"}
    stdin = json.dumps({**asked, "sha256": pin})
    site.run(["python3", SCRIPT, "provide"], user="fleet", stdin=stdin)
    weights = folder / f"tiny-{pin[:12]}"
    weights.rename(folder / f".{weights.name}.part")
    site.run(["python3", SCRIPT, "provide"], user="fleet", stdin=stdin)
    assert contents(weights) == FILES


def test_wrong_checksum_publishes_nothing(site: Site, folder: Path, name: str) -> None:
    """The file goes, and it alone is fetched again once the mirror has the right one."""
    pin = offered(site, name)
    wrong = site.shared / "mirror" / name / "model.safetensors"
    wrong.write_bytes(FILES["model.safetensors"][::-1])
    source = {"url": f"{MIRROR}/{name}", "sha256": pin}
    said = refused(site, f"/shared/{name}", **source)
    assert "model.safetensors has not the checksum that it should have" in said
    offered(site, name)
    assert provide(site, f"/shared/{name}", **source).returncode == 0
    assert contents(folder / f"tiny-{pin[:12]}") == FILES
    assert answers(site, name).count(f"GET /{name}/config.json 200") == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{'0' * 64}  ../up\n", "'../up' is no name that a file of weights may have"),
        (f"{'0' * 64}  /etc/passwd\n", "'/etc/passwd' is no name"),
        (f"{'0' * 64}  SHA256SUMS\n", "'SHA256SUMS' is no name"),
        (f"{'0' * 64}  absent\n", "HTTP Error 404"),
        ("", "its SHA256SUMS is not what sha256sum writes"),
        ("<html>", "its SHA256SUMS is not what sha256sum writes"),
    ],
)
def test_sums_that_can_not_be_used_are_refused(site: Site, name: str, text: str, said: str) -> None:
    """Before anything is fetched."""
    offered(site, name)
    pin = summed(site, name, text)
    assert said in refused(site, f"/shared/{name}", url=f"{MIRROR}/{name}", sha256=pin)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({}, "give one of hub, url and path"),
        ({"url": "x", "path": "/x"}, "give one of hub, url and path"),
        ({"hub": "a/b", "commit": "main"}, "need their commit (40 hex digits), not a branch"),
        (
            {"path": "/x", "sha256": "0" * 64, "folder": ""},
            "models_dir is not set: name the folder",
        ),
        ({"url": MIRROR}, "give the sha256 of SHA256SUMS"),
        ({"url": "file:///etc", "sha256": "0" * 64}, "is no http:// or https:// address"),
        ({"path": "/nowhere", "sha256": "0" * 64}, "/nowhere/SHA256SUMS is not there"),
        ({"url": f"{MIRROR}/none", "sha256": "0" * 64}, "HTTP Error 404"),
        ({"url": "http://mirror.test:1", "sha256": "0" * 64}, "Connection refused"),
        ({"name": "../up", "path": "/x"}, 'the name "../up" has more than small letters'),
        ({"hub": "a/b", "commit": COMMIT}, "has no huggingface_hub"),
    ],
)
def test_request_that_can_not_be_met_is_one_line(
    site: Site, name: str, request_: dict[str, str], said: str
) -> None:
    """It says what to write, or what is not there."""
    assert said in refused(site, **{"folder": f"/shared/{name}", **request_})


def test_sums_other_than_the_pinned_ones_are_refused(site: Site, name: str) -> None:
    """Whoever owns the mirror can't change the weights."""
    pin = offered(site, name)
    summed(site, name, "others")
    said = refused(site, f"/shared/{name}", url=f"{MIRROR}/{name}", sha256=pin)
    assert "its SHA256SUMS is not the pinned one" in said


def test_disk_that_is_too_small_is_said_before_the_fetch(site: Site, name: str) -> None:
    """And one that becomes full during it is said too; with space, the next run ends it."""
    pin = offered(site, name)
    source = {"url": f"{MIRROR}/{name}", "sha256": pin}
    small = f"/shared/{name}-small"
    site.run(["sh", "-c", f"mkdir {small} && mount -t tmpfs -o size=1m tmpfs {small}"])
    assert f"no space left in {small}: 0.00 GB to come" in refused(site, small, **source)
    assert not [line for line in answers(site, name) if "GET" in line and "SUMS" not in line]
    site.run(["mount", "-o", "remount,size=8m", small])
    assert provide(site, small, **source).returncode == 0
    site.run(["umount", small])


def test_compute_node_fetches_nothing(site: Site, folder: Path, name: str) -> None:
    """Weights are staged by login hosts."""
    pin = offered(site, name)
    wanted = [{"name": "tiny", "url": f"{MIRROR}/{name}", "sha256": pin}]
    variables = {"fleet_user": "fleet", "models_dir": f"/shared/{name}", "models_list": wanted}
    done = site.play("models.yml", variables, nodes=["login1"], check=False)
    assert "login1 is a compute node: weights are fetched on a login host" in done.stdout
    assert not folder.exists()


# --- the hub ---


@pytest.fixture(scope="session")
def wheels() -> str:
    """The wheels of the hub's library, as the host sees them."""
    lock = Path(__file__).parents[2] / "playbooks/roles/models/files/huggingface.lock"
    log = cache() / "provisioning-wheels.log"
    run_aloud("wheels", download(lock, python_of(base()), cache() / "wheels"), log, print)
    return "/srv/wheels"


def hub_play(
    site: Site, name: str, wheels: str, *options: str, **keys: Any
) -> "subprocess.CompletedProcess[str]":
    variables = {
        "fleet_user": "fleet",
        "models_dir": f"/shared/{name}",
        "models_list": [
            {"name": "tiny", "hub": "org/tiny", "commit": COMMIT, "leave_out": ["original/*"]}
        ],
        "models_hub_url": HUB,
        "models_hub_token": TOKEN,
        "models_pip_arguments": ["--no-index", "--find-links", wheels],
    }
    with site.hub(f"/shared/{name}-hub"):
        return site.play("models.yml", {**variables, **keys}, *options, check=False)


def in_repository(site: Site, name: str, files: Mapping[str, bytes]) -> None:
    for path, data in files.items():
        target = site.shared / f"{name}-hub/org/tiny" / COMMIT / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)


@pytest.mark.soak
def test_R36_weights_of_the_hub_are_those_of_the_commit(
    site: Site, folder: Path, name: str, wheels: str
) -> None:
    """By the hub's own library and a token, which is printed nowhere, nor when it is refused."""
    in_repository(site, name, {**FILES, "original/model.pth": b"twice", "sub/a.txt": b"a"})
    refused = hub_play(site, name, wheels, "-vvv", models_hub_token="hf_another")
    assert refused.returncode == 2
    assert "weights: org/tiny at c0ffee" in refused.stdout
    assert not [*folder.glob("tiny-*")]
    fetched = hub_play(site, name, wheels, "-vvv")
    assert fetched.returncode == 0, fetched.stdout
    assert contents(folder / f"tiny-{COMMIT[:12]}") == {**FILES, "sub/a.txt": b"a"}
    assert "changed=0" in hub_play(site, name, wheels).stdout
    for done in (refused, fetched):
        assert TOKEN not in done.stdout + done.stderr
        assert "hf_another" not in done.stdout + done.stderr


@pytest.mark.soak
@pytest.mark.parametrize("path", FILES)
def test_file_of_the_hub_with_other_bytes_is_refused(
    site: Site, folder: Path, name: str, wheels: str, path: str
) -> None:
    """Be it git's own or in large file storage; once the hub has the right one, it is fetched."""
    in_repository(site, name, {**FILES, f"{path}.spoilt": FILES[path][::-1]})
    done = hub_play(site, name, wheels, models_list=_without_spoilt())
    assert f"{path} has not the checksum that it should have" in done.stdout
    assert not [*folder.glob("tiny-*")]
    (site.shared / f"{name}-hub/org/tiny" / COMMIT / f"{path}.spoilt").unlink()
    assert hub_play(site, name, wheels, models_list=_without_spoilt()).returncode == 0
    assert contents(folder / f"tiny-{COMMIT[:12]}") == FILES


def _without_spoilt() -> list[dict[str, Any]]:
    return [{"name": "tiny", "hub": "org/tiny", "commit": COMMIT, "leave_out": ["*.spoilt"]}]
