"""The files that make a base a host: a tree per host below ``<state>/files``."""

import secrets
import shutil
import string
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.lab.base import CHECKOUT, FILES

GATEWAY = "var/lib/modelfleet/gateway"
# The role's file, as a site gets it.
GATEWAY_CONF = CHECKOUT / "playbooks/roles/gateway/files/nginx.conf"

SSHD = "PermitRootLogin prohibit-password\nPasswordAuthentication no\nUsePAM no\n"
GRES = "AutoDetect=off\nName=gpu File=/dev/nvidia[0-3]\n"


def write_files(
    state: Path,
    addresses: Mapping[str, str],
    gateways: tuple[str, ...],
    nodes: tuple[str, ...],
    release: str,
    *,
    bare: bool = False,
) -> None:
    """Write ``files/all`` and, for the hosts that differ, ``files/<host>``.

    Hosts of a bare lab get what a site has before it is provisioned.
    """
    every = state / "files/all"
    put(every / "etc/hosts", hosts_file(addresses))
    put(every / "etc/resolv.conf", "")
    put(every / "etc/slurm/slurm.conf", slurm_conf(nodes))
    # 22.05 knows no `disabled`, but never opens the v1 tree that it is told of.
    plugin = "cgroup/v1" if release == "bookworm" else "disabled"
    put(every / "etc/slurm/cgroup.conf", f"CgroupPlugin={plugin}\n")
    put(every / "etc/slurm/gres.conf", GRES)
    put(every / "etc/munge/munge.key", secrets.token_hex(64), mode=0o400)
    put(every / "etc/ssh/sshd_config.d/lab.conf", SSHD)
    _ssh(state, addresses, () if bare else gateways)
    if bare:
        return
    put(every / "usr/local/sbin/lab-daemon", (FILES / "daemon.sh").read_text(), mode=0o755)
    for gateway in gateways:
        gateway_folder(state / "files" / gateway / GATEWAY)


def slurm_conf(nodes: tuple[str, ...]) -> str:
    template = string.Template((FILES / "slurm.conf").read_text())
    return template.substitute(nodes=",".join(nodes))


def hosts_file(addresses: Mapping[str, str]) -> str:
    lines = [f"{address} {host}" for host, address in addresses.items()]
    return "\n".join(["127.0.0.1 localhost", *lines, ""])


def put(path: Path, text: str, *, mode: int = 0o644) -> None:
    """Write a file whatever the caller's umask; its folders are made for everyone to read."""
    missing = [folder for folder in path.parents if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir()
        folder.chmod(0o755)
    path.write_text(text)
    path.chmod(mode)


def _ssh(state: Path, addresses: Mapping[str, str], gateways: tuple[str, ...]) -> None:
    """Three keys: the hosts' own, the real machine's root to all, and fleet's to `gateways`."""
    every = state / "files/all"
    host_key = _keygen(every / "etc/ssh/ssh_host_ed25519_key")
    root_key = _keygen(state / "ssh_key")
    known = f"{','.join([*addresses, *addresses.values()])} {host_key}\n"
    put(state / "ssh_known_hosts", known)
    if gateways:
        put(every / "etc/ssh/ssh_known_hosts", known)
        fleet_key = _keygen(state / "files/login/home/fleet/.ssh/id_ed25519")
    for gateway in gateways:
        put(state / "files" / gateway / "home/fleet/.ssh/authorized_keys", f"{fleet_key}\n")
    put(every / "root/.ssh/authorized_keys", f"{root_key}\n")
    for folder in (every / "root/.ssh", every / "root"):
        folder.chmod(0o700)
    put(state / "ssh_config", _ssh_config(state, addresses))


def _ssh_config(state: Path, addresses: Mapping[str, str]) -> str:
    """For ``ssh -F <state>/ssh_config gateway`` on the real machine."""
    hosts = [f"Host {host}\n  HostName {address}\n" for host, address in addresses.items()]
    return (
        "".join(hosts) + f'Host *\n  User root\n  IdentityFile "{state}/ssh_key"\n'
        f'  IdentitiesOnly yes\n  UserKnownHostsFile "{state}/ssh_known_hosts"\n  BatchMode yes\n'
    )


def _keygen(path: Path) -> str:
    """Make a key pair and return the public half, without a comment that names this machine."""
    put(path, "")
    path.unlink()
    argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", str(path)]
    subprocess.run(argv, check=True)
    return path.with_name(f"{path.name}.pub").read_text().strip().strip()


def gateway_folder(folder: Path) -> None:
    """The gateway's folder before its first generation."""
    put(folder / "base.conf", GATEWAY_CONF.read_text())
    put(folder / "gen-empty/fleet.conf", (FILES / "fleet.conf").read_text())
    (folder / "gen-empty/nginx.conf").symlink_to("../base.conf")
    (folder / "current").symlink_to("gen-empty")


def readable_checkout(state: Path) -> Path:
    """The checkout if every user may read it, else a copy that every user may read."""
    if all(map(_readable, _walk(CHECKOUT))):
        return CHECKOUT
    copy = state / "checkout"
    shutil.copytree(CHECKOUT, copy, ignore=shutil.ignore_patterns(".*"), symlinks=True)
    subprocess.run(["chmod", "-R", "a+rX", str(copy)], check=True)
    return copy


def _walk(folder: Path) -> Iterator[Path]:
    """The folder and all in it but what is hidden or a link."""
    yield folder
    for path in folder.iterdir():
        if path.name.startswith((".", "__pycache__")) or path.is_symlink():
            continue
        yield from _walk(path) if path.is_dir() else (path,)


def _readable(path: Path) -> bool:
    needed = 0o005 if path.is_dir() else 0o004
    return path.stat().st_mode & needed == needed
