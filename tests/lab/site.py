"""A site on a bare lab: what its administrator has before and does with the playbooks."""

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from tests.lab.base import CHECKOUT, Say, base, cache
from tests.lab.lab import Lab

_BIN = CHECKOUT / ".venv/bin"
# The site's own program that serves models: the stand-in engine, with Python packages of its own.
_ENGINE = "/opt/engine"
_WRAPPER = f"""#!/bin/sh
exec {_ENGINE}/venv/bin/python {_ENGINE}/tests/lab/standin.py "$@"
"""
_FLEET = 2000  # the account, on login and nodes


class Site:
    """A bare lab with a spec of two stand-in replicas on its shared path."""

    def __init__(self, name: str, say: Say = print) -> None:
        whole = base(say=say)
        binds = {
            cache() / "wheels": "/srv/wheels",
            whole / "opt/modelfleet/venv": f"{_ENGINE}/venv",
            CHECKOUT / "tests/lab/standin.py": f"{_ENGINE}/tests/lab/standin.py",
            CHECKOUT / "tests/fixtures": f"{_ENGINE}/tests/fixtures",
        }
        self.lab = Lab.start(name, bare=True, binds=binds, say=say)
        self._specify()
        self._variables = {"lab_name": name, **self._incoming()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.lab.stop()

    def play(
        self, playbook: str, *options: str, variables: Mapping[str, Any] | None = None
    ) -> "Play":
        """Run a playbook on the site, as its administrator would."""
        done = subprocess.run(
            self.argv(playbook, *options, variables=variables),
            capture_output=True,
            text=True,
            timeout=900,
            **self.surroundings,
        )
        return Play(done)

    @property
    def surroundings(self) -> dict[str, Any]:
        """Where a playbook's command runs: for subprocess."""
        return {"cwd": CHECKOUT, "env": _environment(), "stdin": subprocess.DEVNULL}

    def argv(
        self, playbook: str, *options: str, variables: Mapping[str, Any] | None = None
    ) -> list[str]:
        """The command line of a playbook."""
        values = json.dumps({**self._variables, **(variables or {})})
        where = ["-i", "inventory/lab", f"playbooks/{playbook}", "--extra-vars", values]
        return [str(_BIN / "ansible-playbook"), *where, *options]

    def _specify(self) -> None:
        folder = self.lab.shared / "specs/demo"
        shutil.copytree(CHECKOUT / "specs/demo-standin", folder)
        spec = folder / "fleet.yaml"
        standin = "/opt/modelfleet/src/tests/lab/standin.py"
        spec.write_text(spec.read_text().replace(standin, "/shared/engine"))
        engine = self.lab.shared / "engine"
        engine.write_text(_WRAPPER)
        engine.chmod(0o755)
        for path in (folder, spec):
            shutil.chown(path, _FLEET, _FLEET)

    def _incoming(self) -> dict[str, Any]:
        """What is to be provided, already on the shared path; no job runs it."""
        folder = self.lab.shared / "incoming"
        (folder / "weights").mkdir(parents=True)
        weights = folder / "weights/SHA256SUMS"
        (folder / "image.sif").write_text("an image")
        (folder / "weights/config.json").write_text("{}")
        weights.write_text(f"{_sha256(folder / 'weights/config.json')}  config.json\n")
        image = {"file": "/shared/incoming/image.sif", "sha256": _sha256(folder / "image.sif")}
        model = {"path": "/shared/incoming/weights", "sha256": _sha256(weights)}
        return {
            "images_list": [{"name": "another", **image}],
            "models_list": [{"name": "another", **model}],
        }


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Play:
    """How a playbook ended."""

    def __init__(self, done: "subprocess.CompletedProcess[str]") -> None:
        self.status = done.returncode
        self.said = done.stdout + done.stderr

    @property
    def changed(self) -> dict[str, int]:
        """How many tasks changed something, by host."""
        recap = re.findall(r"^(\S+) +: ok=\d+ +changed=(\d+)", self.said, re.MULTILINE)
        return {host: int(changed) for host, changed in recap}

    def worked(self) -> "Play":
        """Return itself; what went wrong is the error's message."""
        assert self.status == 0, self.said[-6000:]
        return self


def _environment() -> dict[str, str]:
    """The administrator's, without what would colour or cut what is said."""
    mine = {key: value for key, value in os.environ.items() if not key.startswith("ANSIBLE_")}
    return {**mine, "ANSIBLE_NOCOLOR": "1", "ANSIBLE_CONFIG": str(CHECKOUT / "ansible.cfg")}
