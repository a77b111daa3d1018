"""The bench of the gateway: what its figures follow from, without measuring anything."""

import json
import re

import pytest

from bench.gateway.figures import (
    MOST_BUSY,
    Goal,
    Run,
    added,
    parse_wrk,
    row,
    share,
    turns,
    void,
)
from bench.gateway.text import lines, verdict
from bench.gateway.ways import CONF, chat, chat_stream, spec
from reconciler.routes import render_gateway
from reconciler.spec import Fleet

WRK = """\
Running 1s test @ http://127.0.0.1:8102/v1/chat/completions
  1 threads and 1 connections
  8151 requests in 1.00s, 8.58MB read
Requests/sec:   8151.20
{"seconds":1.000000,"requests":8151,"p50_us":116,"p99_us":252,"failed":0}
"""


def run(p50_ms: float, per_s: float = 100.0, *, busy: float = 0.1, failed: int = 0) -> Run:
    return Run(p50_ms=p50_ms, p99_ms=9.0, per_s=per_s, busy=busy, failed=failed)


def test_figures_of_wrk_are_read_from_its_last_line() -> None:
    """Milliseconds and requests a second, whatever wrk's own report says above."""
    assert parse_wrk(WRK) == Run(p50_ms=0.116, p99_ms=0.252, per_s=8151.0)


@pytest.mark.parametrize(
    "text",
    [
        *("", "\n", "unable to connect to 127.0.0.1:8102 Connection refused", "[]", "null", "{}"),
        '{"seconds":1,"requests":"many","p50_us":1,"p99_us":1,"failed":0}',
        '{"seconds":0,"requests":0,"p50_us":0,"p99_us":0,"failed":7}',
    ],
)
def test_wrk_without_an_answered_request_is_an_error(text: str) -> None:
    """A way that answers nothing has no latency of 0 ms."""
    with pytest.raises(ValueError, match=r"wrk said|no request"):
        parse_wrk(text)


def test_every_way_comes_first_and_last() -> None:
    """What drifts while the machine is measured hits all ways alike."""
    assert [name for _, name in turns(["a", "b", "c"], 2)] == ["a", "b", "c", "c", "b", "a"]


def test_only_runs_of_one_round_are_compared() -> None:
    """A round that a way lacks counts for nobody: its neighbour was measured at another time."""
    runs = {
        "direct": {0: run(1.0), 1: run(5.0), 2: run(1.0)},
        "ours": {0: run(1.5), 1: run(5.1), 3: run(9.0)},
    }
    found = added(runs, "ours", "direct", Goal(limit=0.3))
    assert found is not None
    assert (found.spread.median, found.spread.low) == pytest.approx((0.3, 0.1))
    assert found.spread.high == pytest.approx(0.5)
    assert added({"direct": {0: run(1)}, "ours": {1: run(1)}}, "ours", "direct") is None
    assert added(runs, "direct", "direct") is None
    assert added(runs, "ours", "litellm") is None


def test_share_is_of_each_rounds_reference() -> None:
    """The median of the ratios, not the ratio of the medians."""
    runs = {
        "nginx": {0: run(1, 100), 1: run(1, 10), 2: run(1, 1000)},
        "ours": {0: run(1, 50), 1: run(1, 9), 2: run(1, 300)},
    }
    found = share(runs, "ours", "nginx", Goal(limit=0.4, at_least=True))
    assert found is not None
    assert found.spread.median == pytest.approx(0.5)
    assert found.met
    assert share(runs, "ours", "nginx", Goal(limit=0.6, at_least=True)).met is False  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("one", "why"),
    [
        (run(1, busy=MOST_BUSY), ""),
        (run(1, busy=MOST_BUSY + 0.01), "71% busy"),
        (run(1, failed=3), "3 requests failed"),
    ],
)
def test_run_on_a_busy_machine_is_void(one: Run, why: str) -> None:
    """Above 70 % of all processors it is the machine that is measured; and a failure is no time."""
    assert why in void(one)
    assert bool(void(one)) == bool(why)


def test_void_row_shows_why_and_no_figure() -> None:
    """Nobody can take a void run for a result."""
    made = row(
        {},
        lambda one: one.p50_ms,
        where=("HTTP", "requests of 1 s", "100 at once"),
        way="ours",
        unit="ms",
        comparisons=[None],
        why="the processors were 83% busy",
    )
    assert list(lines(made)) == [f"  {'ours':34}  void: the processors were 83% busy"]
    assert "83% busy" in verdict([made])
    assert "0 of 0" in verdict([made])


def test_missed_goal_is_named() -> None:
    """The last line says which figure fell short, in which stage."""
    runs = {"direct": {0: run(1.0)}, "ours": {0: run(1.5)}}
    made = row(
        runs["ours"],
        lambda one: one.p50_ms,
        where=("HTTP", "1 connection", "1 KiB"),
        way="ours",
        unit="ms",
        comparisons=[added(runs, "ours", "direct", Goal(limit=0.3))],
    )
    assert "goal at most 0.3: MISSED" in "\n".join(lines(made))
    assert verdict([made]).startswith(
        "Goals met: 0 of 1.\n  HTTP, 1 connection, 1 KiB: ours +0.500"
    )


@pytest.mark.parametrize("kib", [1, 32, 256])
def test_body_has_its_size(kib: int) -> None:
    """The whole JSON, not only its message, is so many KiB."""
    assert len(chat(kib)) == 1024 * kib
    assert json.loads(chat(kib))["stream"] is False


def test_only_a_stream_is_asked_for_in_a_short_body() -> None:
    """The stand-in tells a stream by its request's length, also where a router adds some bytes."""
    conf = (CONF / "backend.conf").read_text()
    [short] = re.findall(r'\$content_length ~ "(.+?)"', conf)
    assert json.loads(chat_stream())["stream"] is True
    for more in (0, 200):
        assert re.search(short, str(len(chat_stream()) + more))
        assert not re.search(short, str(len(chat(1)) - more))
    assert not re.search(short, "")


@pytest.mark.parametrize("tls", [False, True])
def test_ours_is_rendered_from_a_valid_spec(tls: bool) -> None:
    """What is measured is what `fleet` writes for a spec that it accepts."""
    assert render_gateway(Fleet.model_validate(spec(tls=tls)), []).generation
