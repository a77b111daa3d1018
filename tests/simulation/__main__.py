"""Run the simulator by hand.

python -m tests.simulation SEED [--cycles N] [-v] [--shrink]   one seed; what failed, as a script
python -m tests.simulation --script FILE [-v]                  a script or a named case
python -m tests.simulation --soak SEEDS [--cycles N]           many, with a table of what occurred
"""

import argparse
import subprocess
import sys
from pathlib import Path

from tests.simulation.run import simulate
from tests.simulation.script import Script, read_script, script_of, shrink
from tests.simulation.soak import soak


def main() -> int:
    """Return the exit code: 1 if anything failed."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.simulation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("seed", type=int, nargs="?")
    parser.add_argument("--script", type=Path)
    parser.add_argument("--soak", type=int)
    parser.add_argument("--first", type=int, default=0, help="the soak's first seed")
    parser.add_argument("--cycles", type=int, default=200)
    parser.add_argument("--processes", type=int, help="of the soak (default: one a processor)")
    parser.add_argument("--summary", type=Path, help="write what the soak has shown as Markdown")
    parser.add_argument("--shrink", action="store_true", help="drop events that it fails without")
    parser.add_argument("-v", "--verbose", action="store_true", help="say what happens")
    options = parser.parse_args()
    if options.soak is not None:
        return _soak(range(options.first, options.first + options.soak), options)
    script = None if options.script is None else read_script(options.script.read_text())
    if script is None and options.seed is None:
        parser.error("give a seed, --script or --soak")
    return _one(script, options)


def _soak(seeds: range, options: argparse.Namespace) -> int:
    # Asked before: what runs is what was there at the start.
    commit = _commit() if options.summary is not None else ""
    totals = soak(
        seeds,
        options.cycles,
        processes=options.processes,
        say=lambda text: print(text, flush=True),
    )
    print(totals.table())
    if commit:
        options.summary.write_text(totals.markdown(seeds, options.cycles, commit), encoding="utf-8")
    for text in totals.missing():
        print(f"too seldom: {text}")
    for result in totals.failed[:1]:
        print(f"the first that failed:\n{script_of(result)}")
    return 1 if totals.failed or totals.missing() else 0


def _commit() -> str:
    """Return the commit that is checked out, and whether the files differ from it."""
    argv = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()


def _one(script: Script | None, options: argparse.Namespace) -> int:
    say = print if options.verbose else None
    if script is None:
        result = simulate(options.seed, options.cycles, say=say)
    else:
        result = simulate(script.seed, script.cycles, script.events, say=say)
    if result.violation is None:
        print(f"holds; settled {result.settled_after_s:.0f} s after the last fault")
        return 0
    print(result.violation)
    script = script_of(result)
    if options.shrink:
        script = shrink(script, result.violation.number)
    print(f"to see it again: python -m tests.simulation --script FILE, with FILE holding\n{script}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
