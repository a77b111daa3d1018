"""Look for texts, given as lines on stdin, in all that this user may read on this host.

    seek.py processes                 command lines and environments
    seek.py files FOLDER...           every file below these folders
    seek.py output COMMAND...         what a shell makes of this command

Prints where one was found, and exits with 1 then.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

_BEGINNING = 4 << 20  # of a file that is larger


def processes() -> Iterator[tuple[str, bytes]]:
    for process in Path("/proc").glob("[0-9]*"):
        for part in ("cmdline", "environ"):
            yield from _file(process / part)


def files(*folders: str) -> Iterator[tuple[str, bytes]]:
    for folder in folders:
        for place, _, names in os.walk(folder):
            for path in (Path(place, name) for name in names):
                if path.is_file() and not path.is_symlink():
                    yield from _file(path)


def output(command: str) -> Iterator[tuple[str, bytes]]:
    done = subprocess.run(["sh", "-c", command], capture_output=True)
    yield command, done.stdout + done.stderr


def _file(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with path.open("rb") as file:
            yield str(path), file.read(_BEGINNING)
    except OSError:
        return  # not for this user, or a process that has ended


def main(what: str, *words: str) -> int:
    texts = sys.stdin.buffer.read().split()
    kinds: dict[str, Callable[..., Iterator[tuple[str, bytes]]]]
    kinds = {"processes": processes, "files": files, "output": output}
    places = kinds[what](*words)
    found = [place for place, content in places if any(text in content for text in texts)]
    print(*found, sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
