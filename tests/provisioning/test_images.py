"""Images from a real registry: pinned, whole or not at all, and never taken from who uses them."""

import hashlib
import json
import random
import string
import subprocess
from pathlib import Path
from typing import Any

import pytest

from reconciler.adapters.images import ImageFolder
from reconciler.adapters.ports import ImagePin
from tests.lab.wait import wait_for
from tests.provisioning.site import PASSWORD, REGISTRY, SOURCE, USERNAME, Site
from tests.unit.build import fleet

SCRIPT = f"{SOURCE}/playbooks/roles/images/files/images.py"
# Another port of the registry, where the connection is cut or held.
CUT = REGISTRY.replace("5000", "5001")
CUT_PORTS = (5001, 5000)
ABSENT = f"docker://{REGISTRY}/engine/a@sha256:{'0' * 64}"


@pytest.fixture
def folder(site: Site, request: pytest.FixtureRequest) -> Path:
    """Where one test's images will be, here; the host has them at `inside(folder)`."""
    digest = hashlib.sha256(request.node.name.encode()).hexdigest()
    return site.shared / f"images-{digest[:8]}"


def inside(folder: Path) -> str:
    return f"/shared/{folder.name}"


def noise(size: int) -> str:
    """Text that hardly gets smaller by compression."""
    return "".join(random.Random(7).choices(string.ascii_letters + string.digits, k=size))


def request_of(folder: str, image: dict[str, str], **keys: Any) -> str:
    asked = {"folder": folder, "scratch": "/var/tmp", "username": USERNAME, "password": PASSWORD}
    return json.dumps({**asked, "image": {"name": "engine", **image}, **keys})


def provide(
    site: Site, folder: Path, image: dict[str, str], **keys: Any
) -> "subprocess.CompletedProcess[str]":
    """Run the script that the role runs; it may fail."""
    folder.mkdir(exist_ok=True)
    stdin = request_of(inside(folder), image, **keys)
    return site.run(["python3", SCRIPT, "provide"], stdin=stdin, check=False)


def provided(site: Site, folder: Path, image: dict[str, str], **keys: Any) -> dict[str, Any]:
    """Provide an image that can be had; return its manifest."""
    done = provide(site, folder, image, **keys)
    assert done.returncode == 0, done.stderr
    manifest: dict[str, Any] = json.loads((folder / "engine.json").read_text())
    return manifest


def refused(site: Site, folder: Path, image: dict[str, str], **keys: Any) -> str:
    """Fail to provide an image; return the one line that says why. What was there still is."""
    before = seen(folder)
    done = provide(site, folder, image, **keys)
    assert done.returncode == 1, done.stdout
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert seen(folder) == before
    assert site.run(["sh", "-c", "ls /var/tmp"]).stdout == ""
    return done.stderr


def clean(site: Site, folder: Path, keep: int, *in_use: str) -> list[str]:
    stdin = json.dumps({"folder": inside(folder), "keep": keep, "in_use": in_use})
    done = site.run(["python3", SCRIPT, "clean"], stdin=stdin)
    removed: list[str] = json.loads(done.stdout)["removed"]
    return removed


def seen(folder: Path) -> dict[str, str]:
    """Return the images and manifests of a folder, by name with their contents' hash."""
    found = [path for path in folder.glob("*") if path.suffix in (".sif", ".json", ".part")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def pin(folder: Path) -> ImagePin:
    """Return what the reconciler takes the image for."""
    images = {"engine": {"name": "engine"}}
    pins, errors = ImageFolder().pins(fleet(image_dir=str(folder), images=images))
    assert errors == {}
    return pins["engine"]


def hello(site: Site, folder: Path) -> str:
    """Run the current image, as a job does."""
    sif = f"{inside(folder)}/{Path(pin(folder).program).name}"
    return site.run(["apptainer", "exec", sif, "/bin/busybox", "cat", "/etc/hello"]).stdout


def pushed(site: Site, hello: str, **files: str) -> dict[str, str]:
    return {"source": site.push("engine/a", {"etc/hello": hello, **files})}


def by_playbook(folder: Path, image: dict[str, str]) -> dict[str, Any]:
    return {
        "fleet_user": "fleet",
        "images_dir": inside(folder),
        "images_list": [{"name": "engine", **image}],
        "images_registry_username": USERNAME,
        "images_registry_password": PASSWORD,
    }


@pytest.mark.soak
def test_image_is_pulled_by_its_digest_and_published_once(site: Site, folder: Path) -> None:
    """A check changes nothing, nor does a second run; a new pin is another image to the fleet."""
    first, second = pushed(site, "one"), pushed(site, "two")
    site.play("images.yml", by_playbook(folder, first), "--check", "--diff")
    assert not folder.exists()
    site.play("images.yml", by_playbook(folder, first))
    before = pin(folder)
    sif = Path(before.program)
    assert hashlib.sha256(sif.read_bytes()).hexdigest() == before.digest
    assert sif.stat().st_mode & 0o777 == 0o444
    assert hello(site, folder) == "one"
    state = seen(folder)
    assert "changed=0" in site.play("images.yml", by_playbook(folder, first)).stdout
    assert "changed=1" in site.play("images.yml", by_playbook(folder, second), "--check").stdout
    assert seen(folder) == state
    assert "changed=1" in site.play("images.yml", by_playbook(folder, second)).stdout
    assert pin(folder).digest != before.digest
    assert hello(site, folder) == "two"
    assert seen(folder).items() >= {sif.name: state[sif.name]}.items()


@pytest.mark.soak
def test_R36_provisioning_of_an_image_prints_no_secret(site: Site, folder: Path) -> None:
    """Neither when it works nor when it fails, however much is asked to be printed."""
    signing = {"images_sign_key": "the-private-key"}
    pulled = site.play("images.yml", by_playbook(folder, pushed(site, "one")), "-vvv")
    failed = site.play("images.yml", by_playbook(folder, {"source": ABSENT}), "-vvv", check=False)
    unsigned = by_playbook(folder, pushed(site, "two")) | signing
    refused = site.play("images.yml", unsigned, "-vvv", check=False)
    assert (pulled.returncode, failed.returncode, refused.returncode) == (0, 2, 2)
    for done in (pulled, failed, refused):
        for secret in (PASSWORD, "the-private-key"):
            assert secret not in done.stdout + done.stderr
    logs = [path.read_text() for path in folder.glob("*.log")]
    assert logs
    assert not any(PASSWORD in log for log in logs)


@pytest.mark.soak
def test_digest_that_the_registry_has_not_is_one_clear_line(site: Site, folder: Path) -> None:
    """The playbook shows it; the image that was there serves on."""
    site.play("images.yml", by_playbook(folder, pushed(site, "one")))
    before = seen(folder)
    done = site.play("images.yml", by_playbook(folder, {"source": ABSENT}), check=False)
    assert done.returncode == 2
    assert "images: engine: apptainer build: FATAL" in done.stdout
    assert "manifest unknown" in done.stdout
    assert seen(folder) == before
    assert hello(site, folder) == "one"


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ({"source": "docker://registry.test:5000/engine/a:latest"}, "is no pin: write docker://"),
        ({"source": ABSENT, "file": "/x"}, "give one of source, definition and file"),
        ({}, "give one of source, definition and file"),
        ({"name": "../up", "source": ABSENT}, 'the image name "../up" is no DNS label'),
        ({"file": "/bin/busybox"}, "a file needs its sha256"),
        ({"file": "/bin/busybox", "sha256": "0" * 64}, "has not the sha256 of its pin"),
        ({"file": "/nowhere", "sha256": "0" * 64}, "/nowhere is not there"),
        ({"definition": "Bootstrap: docker\nFrom: debian:13"}, "From: debian:13; pin it by"),
    ],
)
def test_what_is_no_pin_is_refused(
    site: Site, folder: Path, image: dict[str, str], said: str
) -> None:
    """One line says what to write instead."""
    assert said in refused(site, folder, image)


def test_folder_that_is_not_set_is_refused(site: Site) -> None:
    """Or images would lie wherever the script happens to run."""
    stdin = request_of("", {"source": ABSENT})
    done = site.run(["python3", SCRIPT, "provide"], stdin=stdin, check=False)
    assert "images_dir is not set: name the folder" in done.stderr


def test_wrong_password_is_one_clear_line(site: Site, folder: Path) -> None:
    """The registry's own word, without the password."""
    said = refused(site, folder, pushed(site, "one"), password="another")
    assert "authentication required" in said
    assert "another" not in said


def test_connection_cut_during_a_pull_leaves_the_old_image(site: Site, folder: Path) -> None:
    """Half a layer is no image; the next run, uncut, has it."""
    provided(site, folder, pushed(site, "one"))
    large = pushed(site, "two", noise=noise(4 << 20))
    cut = {"source": large["source"].replace(REGISTRY, CUT)}
    with site.cut(*CUT_PORTS, 2 << 20):
        assert "FATAL" in refused(site, folder, cut)
    assert hello(site, folder) == "one"
    with site.cut(*CUT_PORTS, 1 << 30):
        provided(site, folder, cut)
    assert hello(site, folder) == "two"


def test_layer_with_other_bytes_than_its_digest_is_refused(site: Site, folder: Path) -> None:
    """A registry whose disk, or owner, changed a layer."""
    provided(site, folder, pushed(site, "one"))
    altered = pushed(site, "two", noise=noise(1 << 20))
    blobs = "find /srv/registry -name data -size +500k -printf '%T@ %p\\n'"
    spoil = 'dd of="$1" bs=1 seek=900000 conv=notrunc'
    latest = site.run(["sh", "-c", f"{blobs} | sort -n | tail -1"]).stdout.split()[1]
    site.run(["sh", "-c", spoil, "sh", latest], stdin="other bytes")
    assert "FATAL" in refused(site, folder, altered)
    assert hello(site, folder) == "one"


@pytest.mark.parametrize("full", ["folder", "scratch"])
def test_full_disk_is_named_and_leaves_the_old_image(site: Site, folder: Path, full: str) -> None:
    """Wherever space runs out; once there is some, the same run succeeds."""
    small, roomy = f"{inside(folder)}-small", {"folder": inside(folder), "scratch": "/var/tmp"}
    mount = f"mkdir -p {small} && mount -t tmpfs -o size=6m tmpfs {small}"
    site.run(["sh", "-c", mount])
    folder.mkdir()
    where = {**roomy, full: small}

    def ask(image: dict[str, str]) -> "subprocess.CompletedProcess[str]":
        stdin = json.dumps({**json.loads(request_of("", image)), **where})
        return site.run(["python3", SCRIPT, "provide"], stdin=stdin, check=False)

    assert ask(pushed(site, "one")).returncode == 0
    listing = ["find", where["folder"], "-name", "*engine*", "!", "-name", "*.log"]
    before = site.run(listing).stdout
    large = pushed(site, "two", noise=noise(8 << 20))
    done = ask(large)
    assert done.returncode == 1
    assert f"no space left: {where['folder']} has" in done.stderr
    assert done.stderr.count("\n") == 1
    assert site.run(listing).stdout == before
    site.run(["mount", "-o", "remount,size=64m", small])
    assert ask(large).returncode == 0
    site.run(["umount", small])


def test_second_run_at_once_is_told_who_is_at_work(site: Site, folder: Path) -> None:
    """It changes nothing; nor does one whose script was killed while its Apptainer still writes."""
    provided(site, folder, pushed(site, "one"))
    before = seen(folder)
    large = pushed(site, "two", noise=noise(4 << 20))
    held = request_of(inside(folder), {"source": large["source"].replace(REGISTRY, CUT)})
    with site.cut(*CUT_PORTS, 2 << 20, "hold"):
        log = folder / "engine.log"
        log.unlink()
        with site.popen(
            ["python3", SCRIPT, "provide"], stdin=subprocess.PIPE, stderr=subprocess.PIPE
        ) as first:
            assert first.stdin is not None
            first.stdin.write(held)
            first.stdin.close()
            wait_for("the pull", lambda: log.exists() and "Fetching" in log.read_text())
            assert "is in use by process " in refused_by_lock(site, folder, large)
            first.kill()
        assert "is in use by process " in refused_by_lock(site, folder, large)
    # Its connection is gone, so Apptainer fails and lets go.
    wait_for("Apptainer's end", lambda: provide(site, folder, large).returncode == 0)
    assert hello(site, folder) == "two"
    assert seen(folder).items() >= (before.items() - {("engine.json", before["engine.json"])})
    assert site.run(["ls", "/var/tmp"]).stdout == ""


def refused_by_lock(site: Site, folder: Path, image: dict[str, str]) -> str:
    done = provide(site, folder, image)
    assert done.returncode == 1, done.stdout
    return done.stderr


@pytest.mark.soak
def test_earlier_pin_comes_back_without_a_pull(site: Site, folder: Path) -> None:
    """Its file is still there; were its bytes others now, it would be pulled again."""
    first, second = pushed(site, "one"), pushed(site, "two")
    old = provided(site, folder, first)
    provided(site, folder, second)
    again = provided(site, folder, first)
    assert (again["sif"], again["built_at"]) == (old["sif"], old["built_at"])
    assert hello(site, folder) == "one"
    provided(site, folder, second)
    damaged = folder / old["sif"]
    damaged.chmod(0o644)
    with damaged.open("r+b") as file:
        file.seek(40_000)
        file.write(b"damage")
    assert provided(site, folder, first)["built_at"] != old["built_at"]
    assert hello(site, folder) == "one"


@pytest.mark.soak
def test_cleaning_spares_what_is_current_in_use_and_recent(site: Site, folder: Path) -> None:
    """By the time of publishing; files that are none of ours stay too, as do other names'."""
    words = ("one", "two", "three", "four", "five")
    sifs = [str(provided(site, folder, pushed(site, word))["sif"]) for word in words]
    foreign = folder / "engine-0123456789ab.sif"
    foreign.touch()
    assert clean(site, folder, 9) == []
    assert clean(site, folder, 1, f"/another/way/to/{sifs[1]}") == [sifs[2], sifs[0]]
    left = {sifs[1], sifs[3], sifs[4]}
    assert {name for name in seen(folder) if name.endswith(".sif")} == left | {foreign.name}
    assert hello(site, folder) == "five"
    (folder / "engine.json").unlink()
    assert clean(site, folder, 0) == []


@pytest.mark.soak
def test_fleet_that_can_not_say_what_it_needs_keeps_everything(site: Site, folder: Path) -> None:
    """Unknown is never absent: the playbook says so, and removes nothing."""
    for word in ("one", "two"):
        variables = by_playbook(folder, pushed(site, word))
        site.play("images.yml", variables)
    fleets = {"images_fleets": [{"spec": "/nowhere", "user": "fleet"}], "images_keep": 0}
    before = seen(folder)
    done = site.play("images.yml", {**variables, **fleets})
    assert "Nothing is removed: /nowhere" in done.stdout
    site.run(["mv", "/usr/local/bin/fleet", "/root/fleet"])
    done = site.play("images.yml", {**variables, **fleets})
    site.run(["mv", "/root/fleet", "/usr/local/bin/fleet"])
    assert "Nothing is removed: " in done.stdout
    assert seen(folder) == before


@pytest.mark.soak
def test_definition_is_built_by_a_user_without_root(site: Site, folder: Path) -> None:
    """From a pinned base; another text of it is another image."""
    base = pushed(site, "base")["source"].removeprefix("docker://")
    text = (
        f"Bootstrap: docker\nFrom: {base}\n%post\n    /bin/busybox env; echo built > /etc/hello\n"
    )
    folder.mkdir()
    site.run(["chown", "fleet", inside(folder)])
    stdin = request_of(inside(folder), {"definition": text})
    site.run(["python3", SCRIPT, "provide"], user="fleet", stdin=stdin)
    assert hello(site, folder) == "built\n"
    assert PASSWORD not in (folder / "engine.log").read_text()
    assert site.run(["ls", "/var/tmp"]).stdout == ""
    before = pin(folder)
    stdin = request_of(inside(folder), {"definition": text.replace("built", "again")})
    site.run(["python3", SCRIPT, "provide"], user="fleet", stdin=stdin)
    assert pin(folder).digest != before.digest


@pytest.mark.soak
def test_playbook_needs_no_root(site: Site, folder: Path) -> None:
    """A research group's own account provides images for itself."""
    own = {
        "ansible_become": False,
        "images_user": "",
        "images_script": "~/.local/libexec/modelfleet-images",
        "images_fleets": [{"spec": "/nowhere", "user": ""}],
    }
    wanted = by_playbook(folder, pushed(site, "one")) | own
    site.play("images.yml", wanted, user="fleet")
    assert hello(site, folder) == "one"
    assert Path(pin(folder).program).stat().st_uid != 0
    again = site.play("images.yml", wanted, user="fleet")
    assert "changed=0" in again.stdout
    assert "Nothing is removed: /nowhere" in again.stdout


@pytest.mark.soak
def test_image_is_signed_and_verified_before_it_is_published(site: Site, folder: Path) -> None:
    """With a key that it is not signed for there is no new image."""
    mine, other = (_keys(site) for _ in range(2))
    image = pushed(site, "one")
    signed = provided(site, folder, image, sign_key=mine[0], verify_key=mine[1])
    path = f"{inside(folder)}/{signed['sif']}"
    site.run(
        ["sh", "-c", f"cat > /tmp/key.pem; apptainer verify --key /tmp/key.pem {path}"],
        stdin=mine[1],
    )
    again = provide(site, folder, image, sign_key=mine[0], verify_key=mine[1])
    assert json.loads(again.stdout) == {"provided": False}
    for sign_key in (None, mine[0]):
        said = refused(site, folder, image, sign_key=sign_key, verify_key=other[1])
        assert "engine: apptainer verify: " in said


def _keys(site: Site) -> tuple[str, str]:
    make = "openssl genpkey -algorithm ec -pkeyopt ec_paramgen_curve:P-256"
    private = site.run(["sh", "-c", make]).stdout
    return private, site.run(["openssl", "pkey", "-pubout"], stdin=private).stdout
