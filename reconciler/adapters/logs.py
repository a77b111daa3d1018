"""The jobs' own logs, where this host can read the folder that they are written to."""

import os
from dataclasses import dataclass
from pathlib import Path

from reconciler.errors import LogMissing
from reconciler.naming import ReplicaName, parse_log_name

_BLOCK = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """One job's log."""

    name: ReplicaName
    job_id: int
    path: Path


def newest_log(folder: Path, fleet: str, wanted: str) -> Log:
    """Return the log of the newest job (the highest id) of the model or replica `wanted`.

    Raises LogMissing if there is none yet, or if the folder can't be read here.
    """
    try:
        files = [entry.name for entry in os.scandir(folder)]
    except OSError as error:
        raise LogMissing(
            f"{folder} can't be read on this host ({error.strerror}): "
            "run this where the jobs' log_dir is mounted"
        ) from None
    logs = [
        Log(name=name, job_id=job_id, path=folder / file)
        for file in files
        if (parsed := parse_log_name(file)) is not None
        for name, job_id in [parsed]
        if name.fleet == fleet and wanted in (name.model, str(name))
    ]
    if not logs:
        raise LogMissing(
            f"no job of {wanted} has a log in {folder} yet; `fleet explain` says what it waits for"
        )
    return max(logs, key=lambda log: log.job_id)


def last_lines(log: Log, count: int) -> tuple[str, int]:
    """Return the last lines of a log, and where it ended (in bytes). Raises LogMissing."""
    try:
        with log.path.open("rb") as file:
            end = begin = file.seek(0, os.SEEK_END)
            text = b""
            # The end of the last line is one more.
            while begin > 0 and text.count(b"\n") <= count:
                size = min(_BLOCK, begin)
                begin = file.seek(begin - size)
                text = file.read(size) + text
    except OSError as error:
        raise LogMissing(f"{log.path} can't be read: {error.strerror}") from None
    lines = text.splitlines(keepends=True)[-count:]
    return b"".join(lines).decode(errors="replace"), end


def read_on(log: Log, position: int) -> tuple[str, int]:
    """Return the whole lines that came after a position (in bytes), and where they end.

    A log that was cut is read from its beginning. Raises LogMissing.
    """
    try:
        with log.path.open("rb") as file:
            if file.seek(0, os.SEEK_END) < position:
                position = 0
            file.seek(position)
            text = file.read(_BLOCK)
    except OSError as error:
        raise LogMissing(f"{log.path} can't be read: {error.strerror}") from None
    # A line that fills the whole block is shown in parts.
    whole = text[: text.rfind(b"\n") + 1] or (text if len(text) == _BLOCK else b"")
    return whole.decode(errors="replace"), position + len(whole)
