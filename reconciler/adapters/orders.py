"""What people say outside of git (`fleet pause`, `--allow-destroy`): a file that they can read.

It is no part of memory: it must outlive a damaged database, and it is written while another process
holds the fleet's lock. Each change replaces the file as a whole.
"""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from reconciler.errors import StateFailed
from reconciler.state import Orders, Pause

FILE = "orders.json"
_ORDERS = TypeAdapter(Orders)


def read_orders(folder: Path) -> Orders:
    """Return what holds. A file that can't be read pauses everything: it may have said so."""
    try:
        return _read(folder)
    except StateFailed as error:
        return Orders(pauses=(Pause(model=None, reason=str(error), by="fleet itself"),))


def change_orders(folder: Path, edit: Callable[[Orders], Orders]) -> Orders:
    """Replace the orders by what `edit` makes of them, one writer at a time. Raises StateFailed."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (folder / f"{FILE}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            orders = edit(_read(folder))
            _replace(folder / FILE, _ORDERS.dump_json(orders, indent=2))
    except OSError as error:
        raise StateFailed(f"{folder / FILE} can't be written: {error.strerror}") from error
    return orders


def _read(folder: Path) -> Orders:
    file = folder / FILE
    try:
        return _ORDERS.validate_json(file.read_bytes())
    except FileNotFoundError:
        return Orders()
    except (OSError, ValidationError) as error:
        why = error.strerror if isinstance(error, OSError) else "it holds something else"
        raise StateFailed(f"{file} can't be read ({why}): mend it or remove it") from None


def _replace(file: Path, content: bytes) -> None:
    part = file.with_suffix(".part")
    with part.open("wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    part.rename(file)
