"""One bare host, with a registry and a mirror of files beside it on a loopback of its own.

The registry is Debian's, over TLS and with a password; the mirror is NGINX with a folder. Playbooks
run on the host itself, by the Ansible of the lab's base.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.lab.base import CHECKOUT, cache, clean_env, enter
from tests.lab.wait import wait_for
from tests.provisioning.layer import lower

REGISTRY = "registry.test:5000"
USERNAME, PASSWORD = "puller", "the-registry-password"
MIRROR = "http://mirror.test:8000"
HUB, TOKEN = "http://hub.test:9000", "hf_the-hub-token"
SOURCE = "/opt/modelfleet/src"
ANSIBLE = "/opt/modelfleet/venv/bin/ansible-playbook"
# The bare host's own Python, not the one that has Ansible.
_INVENTORY = """[login]
login1 ansible_connection=local ansible_python_interpreter=/usr/bin/python3
"""


class Site:
    """The running host. What it has as /shared is `shared` here."""

    def __init__(self, shared: Path, process: "subprocess.Popen[bytes]") -> None:
        self.shared = shared
        self._process = process

    def argv(self, argv: Sequence[str], user: str = "root") -> list[str]:
        """Return the command line that runs a command on the host."""
        first = _children(self._process.pid)[0]
        enter_it = ["nsenter", "-t", str(first), "--mount", "--pid", "--net", "--"]
        home = "/root" if user == "root" else f"/home/{user}"
        who = [] if user == "root" else ["setpriv", f"--reuid={user}", f"--regid={user}"]
        groups = [] if user == "root" else ["--init-groups", "--"]
        return [*enter_it, *clean_env(user, home, "/tmp", {}), *who, *groups, *argv]

    def run(
        self,
        argv: Sequence[str],
        *,
        user: str = "root",
        stdin: str = "",
        check: bool = True,
        timeout: float = 300,
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command on the host; a failure that is not expected shows what it said."""
        done = subprocess.run(
            self.argv(argv, user),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert not check or done.returncode == 0, f"{argv}: {done.stdout}\n{done.stderr}"
        return done

    def popen(self, argv: Sequence[str], **keys: Any) -> "subprocess.Popen[str]":
        """Start a command on the host, which ends when what is returned is killed."""
        tied = ["setpriv", "--pdeathsig=KILL", "--", *argv]
        return subprocess.Popen(self.argv(tied), text=True, **keys)

    @contextmanager
    def cut(self, port: int, target: int, size: int, *hold: str) -> Iterator[None]:
        """Have a port that passes on to another so many bytes of each connection's answer."""
        with self.listening("cut.py", str(port), str(target), str(size), *hold):
            yield

    @contextmanager
    def hub(self, folder: str) -> Iterator[None]:
        """Have a hub of the repositories in a folder of the host."""
        with self.listening("hub.py", HUB.rpartition(":")[2], folder, TOKEN):
            yield

    @contextmanager
    def listening(self, script: str, *words: str) -> Iterator[None]:
        argv = ["python3", f"{SOURCE}/tests/provisioning/{script}", *words]
        with self.popen(argv, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            try:
                assert process.stdout.readline() == "listening\n"
                yield
            finally:
                process.kill()

    def push(self, name: str, files: Mapping[str, str]) -> str:
        """Push an image of these files; return its pin."""
        push = f"{SOURCE}/tests/provisioning/push.py"
        argv = ["python3", push, f"{REGISTRY}/{name}", USERNAME, PASSWORD]
        digest = self.run(argv, stdin=json.dumps(files)).stdout.strip()
        return f"docker://{REGISTRY}/{name}@{digest}"

    def play(
        self,
        playbook: str,
        variables: Mapping[str, Any],
        *options: str,
        nodes: Sequence[str] = (),
        user: str = "root",
        check: bool = True,
    ) -> "subprocess.CompletedProcess[str]":
        """Run a playbook of ours on the host, as its administrator would."""
        with tempfile.TemporaryDirectory(dir=self.shared, prefix="play-") as folder:
            (Path(folder) / "hosts").write_text("\n".join([_INVENTORY, "[nodes]", *nodes, ""]))
            (Path(folder) / "vault.json").write_text(json.dumps(variables))
            inside = f"/shared/{Path(folder).name}"
            argv = [ANSIBLE, "-i", f"{inside}/hosts", "-e", f"@{inside}/vault.json", *options]
            self.run(["chown", "-R", user, inside])
            return self.run([*argv, f"{SOURCE}/playbooks/{playbook}"], user=user, check=check)


@contextmanager
def running() -> Iterator[Site]:
    """Start the host; nothing of it is left at the end."""
    with tempfile.TemporaryDirectory(dir=cache(), prefix=f"in-base-{os.getpid()}-") as folder:
        upper, shared = Path(folder, "root"), Path(folder, "shared")
        shared.mkdir()
        shared.chmod(0o1777)
        argv = enter(
            lower(),
            ["unshare", "--net", "sh", "-eu", f"{SOURCE}/tests/provisioning/boot.sh"],
            upper=upper,
            binds={CHECKOUT: SOURCE, shared: "/shared", cache() / "wheels": "/srv/wheels"},
            env={"PYTHONDONTWRITEBYTECODE": "1"},
        )
        process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
        site = Site(shared, process)
        try:
            wait_for("the registry", lambda: process.poll() is None and _answers(site))
            yield site
        finally:
            process.kill()
            process.wait()


def _answers(site: Site) -> bool:
    if not _children(site._process.pid):
        return False
    done = site.run(["curl", "-s", "-o", "/dev/null", f"https://{REGISTRY}/v2/"], check=False)
    mirror = site.run(["curl", "-s", "-o", "/dev/null", MIRROR], check=False)
    return done.returncode == mirror.returncode == 0


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
