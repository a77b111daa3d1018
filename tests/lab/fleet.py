"""A fleet on a running lab: its spec in the shared folder, and `fleet` on the login host."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from images.build import image
from tests.lab import Lab, in_base
from tests.lab.base import CHECKOUT, Say, cache
from tests.lab.wait import wait_for

SPECS = {"vllm": "demo", "standin": "demo-standin"}
# Where every host sees the engine's image and the tiny model.
IMAGES = "/opt/modelfleet/images"
MODEL = "/opt/modelfleet/models/tiny"
_USER = 2000  # fleet, on every host


def engine_binds(engine: str, say: Say = print) -> Mapping[Path, str]:
    """Make what an engine needs, if it is not cached; return what the hosts must mount of it."""
    if engine == "standin":
        return {}
    sif = image("vllm-cpu", say)
    return {sif.parent: IMAGES, _tiny_model(sif, say): MODEL}


def _tiny_model(sif: Path, say: Say) -> Path:
    """Return the tiny model's folder, made by the image's own transformers."""
    maker = Path(__file__).with_name("tiny_model.py")
    models = cache() / "models"
    key = hashlib.sha256(maker.read_bytes() + sif.name.encode()).hexdigest()[:12]
    folder = models / f"tiny-{key}"
    if not (folder / ".made").exists():
        say("model: making the tiny model in the image (about ten seconds)")
        models.mkdir(exist_ok=True)
        binds = {sif: "/mnt/image.sif", maker: "/mnt/tiny_model.py", models: "/mnt/models"}
        inside = ["python", "/mnt/tiny_model.py", f"/mnt/models/{folder.name}"]
        mounts = ["--bind", "/mnt/models", "--bind", "/mnt/tiny_model.py"]
        argv = ["apptainer", "exec", "--cleanenv", "--containall", "--no-mount", "home", *mounts]
        in_base([*argv, "/mnt/image.sif", *inside], binds=binds, capture=True)
    return folder


class Fleet:
    """One fleet spec on one lab. The spec is a copy, so that a test may edit it."""

    def __init__(self, lab: Lab, engine: str = "standin", *, name: str = "demo") -> None:
        self.lab = lab
        self.name = name
        self.spec = f"/shared/specs/{name}"
        folder = lab.shared / "specs" / name
        shutil.copytree(CHECKOUT / "specs" / SPECS[engine], folder)
        self.spec_file = folder / "fleet.yaml"
        shutil.chown(folder, _USER, _USER)
        self.edit("fleet: demo", f"fleet: {name}")
        hosts = [f"- {{name: {gateway}, ssh: {gateway}}}" for gateway in lab.gateways]
        self.edit(hosts[0], "\n    ".join(hosts))
        logs = lab.shared / "logs"
        logs.mkdir(exist_ok=True)
        shutil.chown(logs, _USER, _USER)

    @property
    def url(self) -> str:
        return self.urls[0]

    @property
    def urls(self) -> list[str]:
        """Where each gateway serves."""
        return [f"http://{self.lab.address(gateway)}:8080" for gateway in self.lab.gateways]

    def command(self, verb: str, *options: str) -> list[str]:
        return ["fleet", verb, self.spec, *options]

    def run(self, verb: str, *options: str, check: bool = True) -> str:
        """Run `fleet VERB` on the login host and return what it printed."""
        done = self.lab.run("login", self.command(verb, *options), check=check, timeout=300)
        return done.stdout + done.stderr

    def add_tenant(self, name: str) -> str:
        """Give the spec a tenant as a person would; return its key."""
        return self.tenant("add", name)

    def tenant(self, verb: str, *words: str) -> str:
        """Run `fleet tenant VERB` on the login host; return what it printed, as a new key."""
        return self.lab.run("login", ["fleet", "tenant", verb, self.spec, *words]).stdout.strip()

    def edit(self, old: str, new: str) -> None:
        """Replace text in the spec, as a commit would; the text must be there."""
        text = self.spec_file.read_text()
        if old not in text:
            raise ValueError(f"{old!r} is not in {self.spec_file}")
        part = self.spec_file.with_suffix(".part")
        part.write_text(text.replace(old, new))
        part.rename(self.spec_file)

    def status(self) -> dict[str, Any]:
        """Return `fleet status --json`."""
        done = self.lab.run("login", self.command("status", "--json"), check=False, timeout=120)
        record: dict[str, Any] = json.loads(done.stdout)
        return record

    def replicas(self) -> list[dict[str, Any]]:
        return list(self.status()["replicas"])

    def jobs(self, user: str = "fleet") -> list[list[str]]:
        """Return [id, name, state, node, comment] of every job Slurm lists for a user."""
        form = "--format=%i\t%j\t%T\t%N\t%k"
        argv = ["squeue", f"--user={user}", "--states=all", "--noheader", form]
        lines = self.lab.run("login", argv).stdout.splitlines()
        return [line.split("\t") for line in lines if line.count("\t") >= 4]

    def wait_until_healed(
        self, *, without: str, say: Callable[[str], None] | None = None, timeout_s: float
    ) -> None:
        """Wait until as many replicas as wanted are routed, none of them on the node `without`."""
        wait_for(
            f"every replica to be routed again, none on {without}",
            lambda: self._healed(without),
            timeout_s=timeout_s,
            say=say,
        )

    def _healed(self, without: str) -> bool:
        status = self.status()
        routed = [r for r in status["replicas"] if r["routed"] and r["status"] == "ready"]
        wanted = sum(model["wanted"] for model in status["models"])
        return len(routed) == wanted and all(r["node"] != without for r in routed)


def gateway_log(lab: Lab) -> dict[str, list[str]]:
    """Return the addresses that a gateway tried for each request id, in order."""
    log = "/var/lib/modelfleet/gateway/access.log"
    texts = [lab.run(gateway, ["cat", log]).stdout for gateway in lab.gateways]
    records = [json.loads(line) for text in texts for line in text.splitlines()]
    return {record["id"]: record["upstream"].split(", ") for record in records}
