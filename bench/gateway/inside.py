"""What `python -m bench.gateway` runs inside the layer: the table on stderr, JSON on stdout."""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict

from bench.gateway import text
from bench.gateway.figures import Row
from bench.gateway.stages import FULL, QUICK, STAGES, Stage
from bench.gateway.ways import OTHERS, WAYS, has_limits, has_tls, running
from reconciler.errors import GatewayFailed
from tests.lab.wait import LabError


def measured(options: argparse.Namespace) -> Iterator[Row]:
    """Yield the rows of every stage, first without TLS, where all ways stand, then with it."""
    for mode, tls in [("HTTP", False), ("TLS", True)][: 1 + has_tls()]:
        names = [name for name in options.ways if not (tls and name in OTHERS)]
        # A crowd meets the production configuration alone.
        stages = [name for name in options.only if tls or name != "crowds" or not has_tls()]
        if not stages:
            continue
        say(f"{mode}: starting {', '.join(names)}")
        with running(names, tls=tls) as ways:
            stage = Stage(mode=mode, ways=ways, pace=QUICK if options.quick else FULL)
            for name in stages:
                yield from STAGES[name](stage)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add what may be asked for."""
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    parser.add_argument("--quick", action="store_true", help="under a minute, and less sure")
    return parser


def main() -> int:
    """Measure and print."""
    options = arguments(argparse.ArgumentParser()).parse_args()
    if options.quick:
        options.ways = [name for name in options.ways if name != "litellm"]
    for what, there in (("keys and limits", has_limits()), ("TLS", has_tls())):
        if not there:
            say(f"This checkout's gateway has no {what} yet: measured without, for all.")
    rows: list[Row] = []
    for row in measured(options):
        if not rows or rows[-1].load_of != row.load_of:
            say(text.head(row))
        rows.append(row)
        for line in text.lines(row):
            say(line)
    say(f"\n{text.verdict(rows)}")
    json.dump([asdict(row) for row in rows], sys.stdout, indent=1)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (LabError, GatewayFailed, ValueError) as error:
        say(f"error: {error}")
        sys.exit(1)
