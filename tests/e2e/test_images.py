"""Engines in images on the lab: a rebuilt one rolls the fleet, and what a job names stays."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.checks import assert_settled, lost, under_load
from tests.lab import Lab, in_base
from tests.lab.base import CHECKOUT
from tests.lab.fleet import Fleet

SCRIPT = "/opt/modelfleet/src/playbooks/roles/images/files/images.py"
FOLDER, COPY = "/shared/images", "/shared/incoming/standin.sif"
REBUILT = f"Bootstrap: localimage\nFrom: {COPY}\n%post\n    echo rebuilt > /etc/rebuilt\n"
BUILD_TIMEOUT_S = 300.0


@pytest.fixture
def standin(own_lab: Lab) -> dict[str, str]:
    """The stand-in engine's image, built on the spot, as a pin."""
    incoming = own_lab.shared / "incoming"
    incoming.mkdir()
    binds = {
        incoming: "/mnt/out",
        CHECKOUT / "tests": "/mnt/tests",
    }
    build = ["sh", "/mnt/tests/lab/files/standin-sif.sh", "/mnt/out/standin.sif"]
    in_base(build, binds=binds, capture=True)
    digest = hashlib.sha256((incoming / "standin.sif").read_bytes()).hexdigest()
    return {"file": COPY, "sha256": digest}


@pytest.fixture
def fleet(own_lab: Lab) -> Fleet:
    """A fleet of two stand-ins in containers."""
    fleet = Fleet(own_lab)
    images = own_lab.shared / "images"
    images.mkdir(exist_ok=True)
    shutil.chown(images, 2000, 2000)
    path = "runtime: none, path: /opt/modelfleet/src/tests/lab/standin.py"
    fleet.edit(path, "name: standin")
    fleet.edit("images:\n", f"image_dir: {FOLDER}\nimages:\n")
    return fleet


def asked(fleet: Fleet, verb: str, **request: Any) -> Any:
    stdin = json.dumps({"folder": FOLDER, "scratch": "/var/tmp", **request})
    argv = ["python3", SCRIPT, verb]
    return json.loads(fleet.lab.run("login", argv, input=stdin, timeout=BUILD_TIMEOUT_S).stdout)


def provided(fleet: Fleet, image: dict[str, str]) -> str:
    """Provide an image; return its file's path."""
    assert asked(fleet, "provide", image={"name": "standin", **image}) == {"provided": True}
    manifest = json.loads((fleet.lab.shared / "images/standin.json").read_text())
    return f"{FOLDER}/{manifest['sif']}"


def named(fleet: Fleet) -> dict[str, list[str]]:
    found: dict[str, list[str]] = json.loads(fleet.run("images", "--json"))["images"]
    return found


def cleaned(fleet: Fleet) -> list[str]:
    """Remove what is in use by nobody; return what was."""
    removed: list[str] = asked(fleet, "clean", keep=0, in_use=list(named(fleet)))["removed"]
    return removed


def test_rebuilt_image_rolls_the_fleet_with_no_failed_request(
    fleet: Fleet, standin: dict[str, str]
) -> None:
    """The former one stays while a job names it, and goes after."""
    old = provided(fleet, standin)
    fleet.run("apply", "--wait", "--timeout", "90s")
    before = {replica["job_id"] for replica in fleet.replicas()}
    new = provided(fleet, {"definition": REBUILT})
    assert new != old
    assert named(fleet)[old] == ["what served tiny last", *(f"job {one}" for one in sorted(before))]
    assert cleaned(fleet) == []
    apply = ("apply", "--wait", "--timeout", "120s")
    requests = under_load(fleet, lambda: fleet.run(*apply))
    assert lost(requests) == []
    assert_settled(fleet, replicas=2)
    after = fleet.replicas()
    assert not before & {replica["job_id"] for replica in after}
    for replica in after:
        script = ["scontrol", "write", "batch_script", str(replica["job_id"]), "-"]
        assert f"program={new}" in fleet.lab.run("login", script).stdout
    assert cleaned(fleet) == [Path(old).name]
