"""The lab is a site: these are the facts about it on which every other test rests."""

import contextlib
import http.client
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.lab import Lab, LabError, in_base, wait_for

# A node that lost its power is DOWN after SlurmdTimeout (10 s) and the ping before it.
DOWN_WITHIN_S = 40
# Everything of a lab ends with one process; the kernel collects the last link a moment later.
GONE_WITHIN_S = 30


@pytest.fixture
def powered(lab: Lab) -> Iterator[Lab]:
    """The lab, with every host's power and link back and its nodes idle afterwards."""
    yield lab
    for host in lab.hosts:
        if not lab.is_on(host):
            lab.power_on(host)
        lab.mend_link(host)
    wait_for("all nodes to be idle", lambda: set(states(lab).values()) == {"idle"})


def states(lab: Lab) -> dict[str, str]:
    sinfo = ["sinfo", "--noheader", "--Node", "--partition=gpu", "--format=%N %T"]
    lines = lab.run("login", sinfo).stdout.splitlines()
    return dict(line.split() for line in lines)


def submit(lab: Lab, script: str, *options: str, user: str = "fleet") -> str:
    """Submit a script and return the job's id."""
    argv = ["sbatch", "--parsable", "--mem=100", "--output=/shared/%j.out", *options]
    text = f"#!/bin/sh\n{script}\n"
    return lab.run("login", argv, user=user, input=text).stdout.strip()


def job(lab: Lab, job_id: str) -> dict[str, str]:
    """The fields that ``scontrol show job`` has for a job."""
    text = lab.run("login", ["scontrol", "--oneliner", "show", "job", job_id]).stdout
    return dict(word.partition("=")[::2] for word in text.split())


def output(lab: Lab, job_id: str) -> str:
    wait_for(f"job {job_id} to end", lambda: job(lab, job_id)["JobState"] == "COMPLETED")
    return (lab.shared / f"{job_id}.out").read_text()


def test_start_returns_nodes_idle_and_hosts_named(lab: Lab) -> None:
    """When ``start`` returns, every node is idle and every host knows its name."""
    assert set(states(lab)) == set(lab.nodes)
    assert set(states(lab).values()) == {"idle"}
    for host in lab.hosts:
        assert lab.run(host, ["hostname"]).stdout == f"{host}\n"


def test_ssh_from_the_real_machine_reaches_root_on_each_host(lab: Lab) -> None:
    """Ansible comes this way: no prompt, and the host key is known."""
    for host in lab.hosts:
        argv = ["ssh", "-F", str(lab.state / "ssh_config"), host, "id -un; hostname"]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=20)
        assert (done.stdout, done.stderr) == (f"root\n{host}\n", "")


def test_ssh_from_login_reaches_fleet_on_the_gateway_only(lab: Lab) -> None:
    """The reconciler comes this way; to a node it has no key."""
    ssh = ["ssh", "-o", "BatchMode=yes"]
    assert lab.run("login", [*ssh, "gateway", "id -un"]).stdout == "fleet\n"
    assert lab.run("login", [*ssh, lab.nodes[0], "true"], check=False).returncode == 255


def test_gateway_without_routes_answers_503_and_runs_as_fleet(lab: Lab) -> None:
    """Before the first generation the gateway says so itself, and nothing of it is root's."""
    gateway = http.client.HTTPConnection(lab.address("gateway"), 8080, timeout=5)
    with contextlib.closing(gateway):
        gateway.request("GET", "/v1/models")
        assert gateway.getresponse().status == 503
    owners = lab.run("gateway", ["ps", "-C", "nginx", "-o", "user="]).stdout.split()
    assert set(owners) == {"fleet"}


def test_hosts_reach_each_other_and_nothing_else(lab: Lab) -> None:
    """A lab host has no way out: what works here needs no internet."""
    lab.run("login", ["ping", "-c1", "-W2", lab.nodes[-1]])
    assert lab.run("login", ["ip", "route", "get", "192.0.2.1"], check=False).returncode != 0


def test_fleet_reads_the_checkout_and_cannot_write_it(lab: Lab) -> None:
    """The product under test is the checkout itself."""
    lab.run("login", ["/opt/modelfleet/venv/bin/python", "-c", "import reconciler"])
    write = ["touch", "/opt/modelfleet/src/written"]
    assert lab.run("login", write, user="root", check=False).returncode != 0


def test_job_sees_its_gpus_and_sets_its_own_comment(lab: Lab) -> None:
    """GPUs are Slurm's to give, and a job's owner may write its comment from inside."""
    script = 'echo "$CUDA_VISIBLE_DEVICES"; scontrol update jobid=$SLURM_JOB_ID comment=from-inside'
    job_id = submit(lab, script, "--gpus=2")
    assert len(output(lab, job_id).strip().split(",")) == 2
    assert job(lab, job_id)["Comment"] == "from-inside"


def test_job_of_mallory_is_hers(lab: Lab) -> None:
    """There is a second user, whose jobs are not to be touched."""
    job_id = submit(lab, "true", "--output=/dev/null", user="mallory")
    assert job(lab, job_id)["UserId"].startswith("mallory(")
    cancel = lab.run("login", ["scontrol", "hold", job_id], check=False)
    assert cancel.returncode != 0


def test_apptainer_image_runs_in_a_job(lab: Lab, tmp_path: Path) -> None:
    """An image built in the base runs as an unprivileged user, on a node, in a job."""
    build = """
        mkdir -p /tmp/root/bin && cp /usr/bin/tini-static /tmp/root/bin/tini
        printf 'Bootstrap: localimage\\nFrom: /tmp/root\\n' > /tmp/tiny.def
        apptainer --silent build /out/tiny.sif /tmp/tiny.def"""
    in_base(["sh", "-euc", build], binds={tmp_path: "/out"}, capture=True)
    image = lab.shared / "images/tiny.sif"
    image.write_bytes((tmp_path / "tiny.sif").read_bytes())
    run = "apptainer --silent exec --containall --no-mount home /shared/images/tiny.sif"
    assert "tini version" in output(lab, submit(lab, f"{run} tini --version", "--gpus=1"))


def test_daemon_killed_and_started_serves_again(powered: Lab) -> None:
    """slurmctld can die at any moment and come back."""
    powered.stop_daemon("login", "slurmctld", kill=True)
    assert powered.run("login", ["squeue"], check=False).returncode != 0
    powered.start_daemon("login", "slurmctld")
    wait_for(
        "an answer of slurmctld",
        lambda: powered.run("login", ["squeue"], check=False).returncode == 0,
    )


def test_power_cut_says_no_goodbye_and_power_on_brings_the_node_back(powered: Lab) -> None:
    """A dead node closes nothing; Slurm finds it DOWN; with power it serves again by itself."""
    node = powered.nodes[-1]
    listen = "import socket; s = socket.create_server(('', 9000)); s.accept()[0].recv(1)"
    connect = f"import socket; socket.create_connection(('{node}', 9000)).recv(1)"
    server = powered.popen(node, ["python3", "-c", listen])
    listening = ["sh", "-c", "ss -Hltn sport = :9000 | grep -q ."]
    wait_for("a listener", lambda: powered.run(node, listening, check=False).returncode == 0)
    client = powered.popen("login", ["python3", "-c", connect])
    established = ["ss", "-Htn", "state", "established", "dport", "=", ":9000"]
    wait_for("a connection", lambda: powered.run("login", established).stdout)
    powered.run(node, ["sh", "-c", "echo kept > ~/kept"])

    powered.power_cut(node)
    server.wait(5)
    with pytest.raises(LabError, match="is off"):
        powered.run(node, ["true"])
    wait_for(
        f"{node} to be down",
        lambda: states(powered)[node].startswith("down"),
        timeout_s=DOWN_WITHIN_S,
    )
    assert client.poll() is None, "the connection was closed: the node said goodbye"
    client.kill()
    client.wait(5)

    powered.power_on(node)
    wait_for(f"{node} to be idle", lambda: states(powered)[node] == "idle")
    assert powered.run(node, ["cat", "kept"]).stdout == "kept\n"


def test_cut_link_host_lives_but_cannot_be_reached(powered: Lab) -> None:
    """A pulled cable: the host goes on, and nobody hears of it until it is plugged in again."""
    node = powered.nodes[-1]
    ping = ["ping", "-c1", "-W1", node]
    powered.cut_link(node)
    assert powered.run("login", ping, check=False).returncode != 0
    assert powered.run(node, ["pgrep", "slurmd"]).returncode == 0
    powered.mend_link(node)
    wait_for("the node's answer", lambda: powered.run("login", ping, check=False).returncode == 0)


def test_cut_between_two_hosts_concerns_no_other(lab: Lab) -> None:
    """Both live and the rest reach them; what they send each other is lost until mended."""
    node, other = lab.nodes[:2]

    def reaches(host: str, to: str) -> bool:
        return lab.run(host, ["ping", "-c1", "-W1", to], check=False).returncode == 0

    lab.cut_between("gateway", node)
    assert not reaches("gateway", node)
    assert not reaches(node, "gateway")
    assert reaches("login", node)
    assert reaches(node, "login")
    assert reaches("gateway", other)
    lab.mend_between("gateway", node)
    assert reaches("gateway", node)
    assert reaches(node, "gateway")


def test_two_labs_at_once_do_not_meet(lab: Lab) -> None:
    """Each has its own number, addresses, shared folder and Slurm."""
    with Lab.start("second", nodes=1) as second:
        assert second.number != lab.number
        assert second.shared != lab.shared
        assert second.run("login", ["squeue", "--noheader"]).stdout == ""
        ping = ["ping", "-c1", "-W1", second.address("login")]
        assert lab.run("login", ping, check=False).returncode != 0
        with pytest.raises(LabError, match="already running"):
            Lab.start("second", nodes=1)


def test_stop_leaves_nothing_behind() -> None:
    """No process, namespace, mount, link or file; and a second stop is no error."""
    lab = Lab.start("passing", nodes=1)
    own = namespaces_of(lab)
    lab.stop()
    lab.stop()
    wait_for("its traces to go", lambda: not traces(lab, own), timeout_s=GONE_WITHIN_S)
    assert not lab.state.exists()
    assert not lab.shared.exists()


def test_owner_killed_takes_the_lab_along() -> None:
    """kill -9 of whoever started it ends the lab; the next start removes its files."""
    code = "from tests.lab import *; Lab.start('orphaned', nodes=1); import signal; signal.pause()"
    with subprocess.Popen(
        [sys.executable, "-uc", code], stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        next(line for line in owner.stdout if "up in" in line)
        lab = Lab.attach("orphaned")
        own = namespaces_of(lab)
        owner.kill()
    wait_for("its traces to go", lambda: not traces(lab, own), timeout_s=GONE_WITHIN_S)
    with Lab.start("orphaned", nodes=1) as again:
        assert states(again) == {"gpu1": "idle"}


def test_a_bare_lab_is_a_site_before_it_is_provisioned() -> None:
    """Slurm and sshd by systemd, the account where Slurm is, nothing of ours; it leaves nothing."""
    name = f"bare-{os.getpid()}"
    with Lab.start(name, nodes=1, bare=True) as lab:
        for host in lab.hosts:
            up = ["systemctl", "is-system-running", "--wait"]
            assert lab.run(host, up, user="root", check=False).stdout.strip() == "running"
            ours = lab.run(
                host,
                [
                    "find",
                    "/usr/sbin/nginx",
                    "/usr/bin/apptainer",
                    "/usr/local/bin",
                    "/opt",
                    "-type",
                    "f",
                ],
                user="root",
                check=False,
            )
            assert ours.stdout == ""
        job = lab.run("login", ["srun", "id", "-un"]).stdout
        assert job == "fleet\n"
        assert lab.run("gateway", ["id", "fleet"], user="root", check=False).returncode != 0
    assert not list(Path("/sys/fs/cgroup").glob(f"**/modelfleet-lab-{name}"))


def namespaces_of(lab: Lab) -> set[str]:
    """The lab's own namespaces, its hosts' among them (``net:[4026532000]``), and its link."""
    record = json.loads((lab.state / "lab.json").read_text())
    hosts = [int(file.read_text()) for file in (lab.state / "hosts").iterdir()]
    return namespaces([record["pid"], *hosts]) - namespaces([os.getpid()]) | {link_of(lab)}


def link_of(lab: Lab) -> str:
    """The lab's link; by its index, as another lab may take its name once it is gone."""
    try:
        return "link " + Path(f"/sys/class/net/modelfleet{lab.number}/ifindex").read_text().strip()
    except OSError:
        return "no link"


def namespaces(pids: Iterable[int]) -> set[str]:
    """The namespaces that these processes are in; a process that has ended is in none."""
    found = set()
    for pid, kind in itertools.product(pids, ("mnt", "net", "pid", "uts", "ipc")):
        with contextlib.suppress(OSError):
            found.add(str(Path(f"/proc/{pid}/ns/{kind}").readlink()))
    return found


def traces(lab: Lab, own: set[str]) -> list[str]:
    """What of a lab is still in the kernel: processes in its namespaces, mounts, its link."""
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    link = link_of(lab)
    return [
        *(f"process {pid}" for pid in pids if namespaces([pid]) & own),
        *(line for line in mounts if str(lab.state) in line),
        *([link] if link in own else []),
    ]
