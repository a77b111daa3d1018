"""`python -m bench.gateway`: what the gateway adds, against five others in one run.

The same stand-in (an NGINX that answers at once) and the same client (wrk) for all. Runs are taken
in turns and compared round by round; the median counts. `busy` is the share of all processors'
time, `others` that of what is no part of the bench: where it is not small, measure again.
Parts: --only one sixteen streams crowds, --ways direct nginx ours njs vllm-router litellm.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.gateway.inside import arguments
from bench.gateway.layer import lower
from tests.lab.base import CHECKOUT, cache, enter

# As on a site, nothing of the gateway runs as root; its loopback is its own.
_PRELUDE = """
ip link set lo up
install -d -o fleet -g fleet /run/bench /var/lib/modelfleet /var/lib/modelfleet/gateway
exec setpriv --reuid=fleet --regid=fleet --init-groups -- env HOME=/home/fleet "$@"
"""
_PYTHON = "/opt/modelfleet/venv/bin/python"
_SOURCE = "/opt/modelfleet/src"


def main() -> int:
    """Build what is missing, measure inside, write the JSON."""
    parser = arguments(argparse.ArgumentParser(description=__doc__))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    asked = ["--only", *options.only, "--ways", *options.ways, *["--quick"] * options.quick]
    inside = [_PYTHON, "-m", "bench.gateway.inside", *asked]
    lowest = lower()
    with tempfile.TemporaryDirectory(dir=cache(), prefix=f"in-base-{os.getpid()}-") as upper:
        argv = enter(
            lowest,
            ["unshare", "--net", "sh", "-ec", _PRELUDE, "bench", *inside],
            upper=Path(upper),
            binds={CHECKOUT: _SOURCE},
            cwd=_SOURCE,
            env={"PYTHONDONTWRITEBYTECODE": "1"},
        )
        done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=sys.stdout, check=False)
    if options.json is not None and done.returncode == 0:
        options.json.write_bytes(done.stdout)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
