"""Slurm's lists of hosts, such as `gpu[1-3,07],login1`, to the names that they stand for. Pure.

The syntax is that of scontrol(1), "show hostnames": commas between entries, numbers and ranges in
brackets, as many digits as the range's beginning has, and several brackets in one name.
"""

import functools
import itertools
import re
from collections.abc import Iterator

# Slurm itself knows no more nodes than this (MAX_SLURM_NODES).
_MOST = 65_536
_ENTRY = re.compile(r"(?:[^][,]|\[[0-9,-]+\])+")
_PART = re.compile(r"\[([0-9,-]+)\]|([^][]+)")
_RANGE = re.compile(r"([0-9]{1,15})(?:-([0-9]{1,15}))?")


@functools.lru_cache(maxsize=4096)
def expand(text: str) -> tuple[str, ...]:
    """Return the names in Slurm's order; a text that is no such list stands for itself alone."""
    if "[" not in text:
        return tuple(name for name in text.split(",") if name)
    try:
        return tuple(itertools.islice(_names(text), _MOST))
    except ValueError:
        return (text,)


def _names(text: str) -> Iterator[str]:
    """Yield each name. Raises ValueError for what is no list."""
    entries = _ENTRY.findall(text)
    if ",".join(entries) != text:
        raise ValueError("not a list of hosts")
    for entry in entries:
        parts = [_numbers(inside) if inside else [plain] for inside, plain in _PART.findall(entry)]
        yield from map("".join, itertools.product(*parts))


def _numbers(text: str) -> list[str]:
    """Return the numbers of one bracket, each with the leading zeros that its range has."""
    numbers: list[str] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise ValueError("not a range")
        first, last = match[1], match[2] or match[1]
        count = int(last) - int(first) + 1
        if not 0 < count <= _MOST - len(numbers):
            raise ValueError("not a range")
        numbers += [f"{int(first) + at:0{len(first)}}" for at in range(count)]
    return numbers
