"""Engines in images on the lab, each node with copies of its own: a rebuilt one rolls the fleet.

What a job names stays.
"""

import hashlib
import json
import shutil

import pytest

from tests.e2e.checks import assert_settled, lost, under_load
from tests.lab import Lab, in_base
from tests.lab.base import CHECKOUT
from tests.lab.fleet import Fleet

ANSIBLE = "/opt/modelfleet/venv/bin/ansible-playbook"
PLAYBOOK = "/opt/modelfleet/src/playbooks/images.yml"
HOSTS = "[login]\nlogin1 ansible_connection=local ansible_python_interpreter=/usr/bin/python3\n"
FOLDER, COPY = "/shared/images", "/shared/incoming/standin.sif"
CACHE = "/home/fleet/images"
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
    fleet.edit("images:\n", f"image_dir: {FOLDER}\nimage_cache: {CACHE}\nimages:\n")
    return fleet


def provided(fleet: Fleet, image: dict[str, str]) -> str:
    """Provide an image by the playbook, and remove what nobody needs; return its file's path."""
    variables = {
        "ansible_become": False,
        "images_dir": FOLDER,
        "images_list": [{"name": "standin", **image}],
        "images_keep": 0,
        "images_user": "",
        "images_script": "/home/fleet/images.py",
        "images_fleets": [{"spec": fleet.spec, "user": ""}],
    }
    shared = fleet.lab.shared
    (shared / "site.json").write_text(json.dumps(variables))
    (shared / "hosts").write_text(HOSTS)
    argv = [ANSIBLE, "-i", "/shared/hosts", "-e", "@/shared/site.json", PLAYBOOK]
    said = fleet.lab.run("login", argv, timeout=BUILD_TIMEOUT_S).stdout
    assert "Nothing is removed" not in said
    manifest = json.loads((shared / "images/standin.json").read_text())
    return f"{FOLDER}/{manifest['sif']}"


def named(fleet: Fleet) -> dict[str, list[str]]:
    found: dict[str, list[str]] = json.loads(fleet.run("images", "--json"))["images"]
    return found


def files(fleet: Fleet) -> set[str]:
    return {f"{FOLDER}/{path.name}" for path in (fleet.lab.shared / "images").glob("*.sif")}


@pytest.mark.soak
def test_rebuilt_image_rolls_the_fleet_with_no_failed_request(
    fleet: Fleet, standin: dict[str, str]
) -> None:
    """The former one stays while a job names it, and goes after."""
    old = provided(fleet, standin)
    fleet.run("apply", "--wait", "--timeout", "90s")
    before = {replica["job_id"] for replica in fleet.replicas()}
    definition = {"definition": "/shared/rebuilt.def"}
    (fleet.lab.shared / "rebuilt.def").write_text(REBUILT)
    new = provided(fleet, definition)
    assert new != old
    assert named(fleet)[old] == ["what served tiny last", *(f"job {one}" for one in sorted(before))]
    assert files(fleet) == {old, new}
    apply = ("apply", "--wait", "--timeout", "120s")
    requests = under_load(fleet, lambda: fleet.run(*apply))
    assert lost(requests) == []
    assert_settled(fleet, replicas=2)
    after = fleet.replicas()
    assert not before & {replica["job_id"] for replica in after}
    for replica in after:
        script = ["scontrol", "write", "batch_script", str(replica["job_id"]), "-"]
        assert f"program={new}" in fleet.lab.run("login", script).stdout
        assert new.rpartition("/")[2] in fleet.lab.run(replica["node"], ["ls", CACHE]).stdout
    assert provided(fleet, definition) == new
    assert files(fleet) == {new}
