"""`python -m tests.scenarios [--write]`: show the plans that differ, or write them all anew.

What it writes is to be read line by line: a wrong plan is a bug to mend, not a text to keep.
"""

import difflib
import sys

from tests.scenarios.loader import Scenario, folders, load


def difference(scenario: Scenario) -> str:
    """Return how the plan differs from its text, nothing if it does not."""
    expected = scenario.expected.read_text(encoding="utf-8") if scenario.expected.exists() else ""
    lines = difflib.unified_diff(
        expected.splitlines(keepends=True),
        scenario.text().splitlines(keepends=True),
        fromfile=f"{scenario.folder.name}/plan.txt",
        tofile="now",
    )
    return "".join(lines)


def main() -> int:
    """Return 1 if a plan differs and was not written."""
    write = sys.argv[1:] == ["--write"]
    differ = 0
    for scenario in map(load, folders()):
        changed = difference(scenario)
        if changed:
            differ += 1
            print(changed, end="")
        if changed and write:
            scenario.expected.write_text(scenario.text(), encoding="utf-8")
    print(f"{differ} plans {'written' if write else 'differ'}")
    return 1 if differ and not write else 0


if __name__ == "__main__":
    sys.exit(main())
