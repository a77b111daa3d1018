"""The README's first command, with the stand-in engine: it must stay true."""

import re
import signal
import subprocess
import sys

from tests.lab import running
from tests.lab.base import CHECKOUT

DEMO = [sys.executable, "-u", "-m", "tests.lab.demo", "--engine", "standin"]


def test_demo_shows_the_main_job_and_leaves_nothing() -> None:
    """It ends with 0, loses no plain request, says so in numbers, and takes its lab down."""
    done = subprocess.run(DEMO, cwd=CHECKOUT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "plain requests: 12 of 12 succeeded" in done.stdout
    in_flight = re.search(r"killed; (\d+) in flight", done.stdout)
    assert in_flight is not None
    assert int(in_flight[1]) >= 20
    assert re.search(r"healed [\d.]+ s later", done.stdout)
    assert "demo" not in running()


def test_demo_interrupted_takes_its_lab_down() -> None:
    """Ctrl-C in the middle: one line, no traceback, and no lab is left."""
    # Tests that a shell runs in its background ignore the signal, and their children would too.
    argv = ["env", "--default-signal=INT", *DEMO]
    with subprocess.Popen(
        argv, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if "submitted" in line:
                demo.send_signal(signal.SIGINT)
                break
        rest = demo.stdout.read()
    assert demo.returncode == 130
    assert "interrupted; the lab is down" in rest
    assert "Traceback" not in rest
    assert "demo" not in running()
