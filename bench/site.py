"""How long a run of site.yml takes that changes nothing, against as many `stat` tasks.

python -m bench.site: provisions a bare lab of six hosts, then runs each in turn three times.
"""

import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from tests.lab.site import Site

ROUNDS = 3
# A run that changes nothing may cost this many times as many `stat` tasks.
MOST = 1.3

# One task: on which hosts a module ran, and how often on each (items of a loop).
Task = tuple[frozenset[str], int]


def tasks(said: str) -> Iterator[Task]:
    """Yield the tasks of a run that reached a host, in their order."""
    for block in said.split("\nTASK [")[1:]:
        ran = re.findall(r"^(?:ok|changed): \[(\w+)", block, re.MULTILINE)
        if ran:
            yield frozenset(ran), max(map(ran.count, ran))


def stats(wanted: list[Task]) -> str:
    """Return the playbook that does a `stat` where the other did what it does."""
    plays = []
    for hosts, run in groupby(wanted, key=lambda task: task[0]):
        number = sum(times for _, times in run)
        task = "    - ansible.builtin.stat: {path: /etc/hostname}\n"
        head = f"- hosts: {':'.join(sorted(hosts))}\n  gather_facts: false\n  tasks:\n"
        plays.append(head + task * number)
    return "".join(plays)


def seconds(argv: list[str], site: Site) -> float:
    began = time.monotonic()
    subprocess.run(argv, check=True, capture_output=True, **site.surroundings)
    return time.monotonic() - began


def main() -> None:
    """Print both times and their ratio."""
    with Site("bench-site") as site, tempfile.TemporaryDirectory() as folder:
        site.play("site.yml").worked()
        ran = list(tasks(site.play("site.yml").worked().said))
        reference = Path(folder, "stats.yml")
        reference.write_text(stats(ran))
        ours, theirs = site.argv("site.yml"), site.argv("site.yml")
        theirs[theirs.index("playbooks/site.yml")] = str(reference)
        times = [(seconds(ours, site), seconds(theirs, site)) for _ in range(ROUNDS)]
    run, stat = (statistics.median(column) for column in zip(*times, strict=True))
    print(f"{len(ran)} tasks, {sum(len(hosts) * n for hosts, n in ran)} task-hosts on 6 hosts")
    print(f"site.yml, nothing to change  {run:6.1f} s")
    print(f"as many stat tasks           {stat:6.1f} s")
    print(f"ratio                        {run / stat:6.2f}   (at most {MOST})")


if __name__ == "__main__":
    main()
