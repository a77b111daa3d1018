"""The identity of a replica: its Slurm job name, and the line of JSON in its job's comment.

The name is `<fleet>.<model>.<revision>.<ordinal>`; fleet and model are DNS labels, so a dot can't
occur inside a part and names round-trip. A job whose name does not parse is foreign.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from itertools import accumulate
from typing import Any

LABEL = r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?"
REVISION = "[0-9a-f]{8}"
_KEY_ID = re.compile(r"[0-9a-f]{8}")
# Slurm keeps 1,024 bytes of a job name; NGINX and people want it far shorter.
LABEL_MAX = 40
_NAME = re.compile(rf"({LABEL})\.({LABEL})\.({REVISION})\.(0|[1-9][0-9]{{0,5}})")

COMMENT_VERSION = 1
# Slurm keeps 1,024 bytes of a comment too, and the job itself writes there as well.
_MOST_AVOIDED = 150
# A job's log by sbatch's own words: its name and its id.
LOG_NAME = "%x.%j.log"


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class ReplicaName:
    """Who a replica is, within its cluster."""

    fleet: str
    model: str
    revision: str
    ordinal: int

    def __str__(self) -> str:
        return f"{self.fleet}.{self.model}.{self.revision}.{self.ordinal}"


def parse_name(text: str) -> ReplicaName | None:
    """Return the replica that a Slurm job name denotes, or None: that job is foreign."""
    match = _NAME.fullmatch(text)
    if match is None:
        return None
    fleet, model, revision, ordinal = match.groups()
    return ReplicaName(fleet=fleet, model=model, revision=revision, ordinal=int(ordinal))


def tls_name(fleet: str, model: str) -> str:
    """Return the name that the certificate of a model's replicas is made out to."""
    return f"{model}.{fleet}.modelfleet.internal"


def parse_log_name(text: str) -> tuple[ReplicaName, int] | None:
    """Return the replica and the job id of a log file's name, as LOG_NAME makes it, or None."""
    name, _, job_id = text.removesuffix(".log").rpartition(".")
    replica = parse_name(name)
    if replica is None or not text.endswith(".log") or not re.fullmatch("[0-9]{1,15}", job_id):
        return None
    return replica, int(job_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What the job says of itself once it runs. Void when node or restarts differ from Slurm's."""

    node: str
    restarts: int
    address: str
    trap_ready: bool
    ready_at: int | None
    draining: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Comment:
    """A job's comment: the first fields are set at submission, `run` by the job itself."""

    gpus: int
    commit: str | None
    run: Run | None
    succeeds: tuple[int, int] | None = None  # the job (id, submit time) that it is to replace
    protect: bool = False  # not ended for being gone from the spec
    keys: tuple[str, ...] = ()  # ids of those that it takes, oldest first; without any it is open
    placement: str | None = None  # see spec.Slurm; None: submitted before there was such a field
    avoids: str = ""  # nodes that it was told to avoid, as sbatch takes them


def submit_comment(
    name: ReplicaName,
    *,
    gpus: int,
    commit: str | None,
    succeeds: tuple[int, int] | None = None,
    protect: bool = False,
    keys: Sequence[str] = (),
    placement: str | None = None,
    avoids: Sequence[str] = (),
) -> str:
    """Return the comment that a job is submitted with: public, one line, ASCII, no quote marks.

    Of very many nodes to avoid it has room for the first ones.
    """
    record: dict[str, object] = {
        "v": COMMENT_VERSION,
        "fleet": name.fleet,
        "model": name.model,
        "revision": name.revision,
        "commit": commit,
        "gpus": gpus,
    }
    if succeeds is not None:
        record["succeeds"] = succeeds
    if protect:
        record["protect"] = True
    if keys:
        record["keys"] = list(keys)
    if placement is not None:
        record["placement"] = placement
    if avoids:
        ends = accumulate(len(node) + 1 for node in avoids)
        record["avoids"] = ",".join(
            node for node, end in zip(avoids, ends, strict=True) if end <= _MOST_AVOIDED
        )
    return json.dumps(record, separators=(",", ":"))


def parse_comment(text: str) -> Comment | None:
    """Return what a comment says, or None if it is not one of ours (its owner may overwrite it)."""
    try:
        record = json.loads(text)
        if record["v"] != COMMENT_VERSION:
            return None
        return Comment(
            gpus=_count(record["gpus"]),
            commit=_parse_text(record.get("commit")),
            run=_parse_run(record["run"]) if "run" in record else None,
            succeeds=_parse_key(record["succeeds"]) if "succeeds" in record else None,
            protect=record.get("protect") is True,
            keys=tuple(map(checked_key_id, record.get("keys", ()))),
            placement=_parse_text(record.get("placement")),
            avoids=_parse_text(record.get("avoids")) or "",
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _parse_text(text: object) -> str | None:
    if not isinstance(text, str | None):
        raise TypeError(f"not a text: {text!r}")
    return text


def _parse_key(record: Any) -> tuple[int, int]:
    job_id, submitted_at = record
    return _count(job_id), _count(submitted_at)


def _parse_run(record: dict[str, Any]) -> Run:
    ready = record["ready"]
    return Run(
        node=str(record["node"]),
        restarts=_count(record["restarts"]),
        address=checked_address(str(record["address"])),
        trap_ready=record["trap_ready"] is True,
        ready_at=None if ready is None else _count(ready),
        draining=record["draining"] is True,
    )


def checked_address(text: str) -> str:
    """Return `IPv4:port` in its one canonical form. Raises ValueError for anything else.

    Nothing else may reach NGINX's configuration.
    """
    host, _, port = text.partition(":")
    if not re.fullmatch(r"[1-9][0-9]{0,4}", port, re.ASCII) or int(port) > 65535:
        raise ValueError(f"not a port: {port!r}")
    return f"{IPv4Address(host)}:{port}"


def checked_key_id(text: object) -> str:
    """Return a backend key's id: the first 8 hex digits of its sha256. Raises ValueError."""
    if not isinstance(text, str) or not _KEY_ID.fullmatch(text):
        raise ValueError(f"not a key's id: {text!r}")
    return text


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"not a count: {value!r}")
    return value
