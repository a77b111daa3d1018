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

from tests.lab.base import CHECKOUT, FILES, Say, base, cache, in_base
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
        where = [f"playbooks/{playbook}", "--extra-vars", values]
        return [str(_BIN / "ansible-playbook"), *self._inventory(), *where, *options]

    def _inventory(self) -> list[str]:
        return ["-i", "inventory/lab"]

    def _specify(self) -> None:
        self._spec("specs/demo", _FLEET, {})

    def _spec(self, folder: str, owner: int, changes: Mapping[str, str]) -> Path:
        """Put the spec on the shared path, with the engine that it names."""
        path = self.lab.shared / folder
        shutil.copytree(CHECKOUT / "specs/demo-standin", path)
        spec, engine = path / "fleet.yaml", self.lab.shared / "engine"
        text = spec.read_text().replace(
            "/opt/modelfleet/src/tests/lab/standin.py", "/shared/engine"
        )
        for old, new in changes.items():
            assert old in text
            text = text.replace(old, new)
        spec.write_text(text)
        engine.write_text(_WRAPPER)
        engine.chmod(0o755)
        for one in (path, spec):
            shutil.chown(one, owner, owner)
        return path

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


class GroupSite(Site):
    """A bare lab whose login host has what any cluster's has, and a group with an account on it."""

    USER, _ID = "mallory", 2001
    FOLDER, LOCAL = "/shared/ours", "/srv/ours"

    def _specify(self) -> None:
        gateway = {
            "- {name: gateway, ssh: gateway}": "- {name: login}",
            "  listen: 8080": f"  listen: 18080\n  directory: {self.LOCAL}/gateway",
            "/shared/secrets": f"{self.FOLDER}/secrets",
            "/shared/logs": f"{self.FOLDER}/logs",
        }
        ours = self._spec("ours/specs/production", self._ID, gateway).parents[1]
        for path in (ours, ours / "specs"):
            shutil.chown(path, self._ID, self._ID)
        script = ["sh", "-s", self.USER, self.LOCAL]
        text = (FILES / "group.sh").read_text()
        self.lab.run("login", script, user="root", input=text, timeout=300)

    def _inventory(self) -> list[str]:
        """The example itself; beside it, how its one host is reached here."""
        host = {"ansible_host": "login", "ansible_user": self.USER}
        ssh = f"-F {self.lab.state}/ssh_config"
        host |= {"ansible_ssh_common_args": ssh}
        host |= {"ansible_control_path_dir": f"{self.lab.state}/connections"}
        path = self.lab.state / "group.json"
        path.write_text(json.dumps({"login": {"hosts": {"login1.example.org": host}}}))
        return ["-i", "inventory/user", "-i", str(path)]

    def _incoming(self) -> dict[str, Any]:
        return super()._incoming() | {
            "fleet_folder": self.FOLDER,
            "fleet_local": self.LOCAL,
            "gateway_image": "",
            "gateway_nginx": f"/home/{self.USER}/nginx",
            "apptainer_minimum_version": "1.4.5",
            "controller_pip_arguments": ["--no-index", "--find-links", "/srv/wheels"],
            # Cron runs a cycle a minute, and the first completion takes three of them.
            "smoke_timeout_s": 300,
        }

    def nginx_image(self) -> dict[str, Any]:
        """The variables of a gateway whose NGINX is an image's, built of its definition."""
        folder = self.lab.shared / "incoming"
        build = ["sh", "/mnt/files/nginx-sif.sh", "/mnt/images/nginx.def", "/mnt/out/nginx.sif"]
        debs = cache() / "debs-trixie"
        binds = {FILES: "/mnt/files", CHECKOUT / "images": "/mnt/images", folder: "/mnt/out"}
        in_base(build, binds={**binds, debs: "/var/cache/apt/archives"}, timeout=600)
        image = {"name": "nginx", "file": "/shared/incoming/nginx.sif"}
        image["sha256"] = _sha256(folder / "nginx.sif")
        return {"images_list": [image], "gateway_image": f"{self.FOLDER}/images/nginx.json"}

    def reconciler_on(self, node: str) -> None:
        """Let a node's reconciler come to the gateway: by a key and a name, as a user would."""
        make = f"install -d -o {self.USER} -g {self.USER} {self.LOCAL} {self.LOCAL}/state"
        self.lab.run(node, ["sh", "-ec", make], user="root")
        key = "cd; mkdir -p -m 0700 .ssh; ssh-keygen -q -t ed25519 -N '' -f .ssh/id_ed25519;"
        show = f"{key} cat > .ssh/known_hosts; cat .ssh/id_ed25519.pub"
        known = (self.lab.state / "ssh_known_hosts").read_text()
        public = self.lab.run(node, ["sh", "-ec", show], user=self.USER, input=known).stdout
        allow = ["sh", "-c", "cat >> ~/.ssh/authorized_keys"]
        self.lab.run("login", allow, user=self.USER, input=public)
        spec = self.lab.shared / "ours/specs/production/fleet.yaml"
        spec.write_text(spec.read_text().replace("{name: login}", "{name: login, ssh: login}"))


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
