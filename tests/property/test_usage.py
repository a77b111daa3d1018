"""A log read in any pieces adds up to the same, and no bytes stop the reading."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from reconciler.usage import Tally, report, tally, traffic
from tests.unit.test_usage import NOON, line

_ODD_VALUES: st.SearchStrategy[object] = st.sampled_from(
    [None, True, -1, 10**30, 1.5, float("nan"), "", "x" * 999, [], {}]
)
_KEYS = st.sampled_from([*json.loads(line()), "more"])
_LINES = st.builds(
    lambda keys: line(**keys),
    st.fixed_dictionaries(
        {},
        optional={
            "at": st.floats(NOON - 90_000, NOON),
            "tenant": st.sampled_from(["", "a", "b"]),
            "model": st.sampled_from(["", "x", "y"]),
            "status": st.sampled_from(["200", "404", "499", "502", "503"]),
            "finish": st.sampled_from(["length", "cut", "left", "whole"]),
            "first_byte": st.none() | st.floats(0, 4000),
            "prompt_tokens": st.none() | st.integers(0, 10**6),
        },
    ),
)
_SPOILT = st.builds(lambda keys: line(**keys), st.dictionaries(_KEYS, _ODD_VALUES, max_size=3))
_ODD = st.binary(max_size=60).map(lambda text: text.replace(b"\n", b"") + b"\n")
_LOG = st.lists(_LINES | _SPOILT | _ODD, max_size=12)


@given(st.binary())
def test_no_bytes_stop_the_reading(text: bytes) -> None:
    """Each line is counted or odd; nothing raises."""
    found = tally(text)
    lines = [one for one in text.split(b"\n") if one]
    assert found.odd_lines + sum(sums.requests for sums in found.days.values()) == len(lines)


@given(_LOG, st.data())
def test_log_read_in_any_pieces_adds_up_to_the_same(
    lines: list[bytes], data: st.DataObject
) -> None:
    """Cut at any bytes, whole lines at a time, in any grouping."""
    text = b"".join(lines)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    parts, begin = [], 0
    for cut in [*cuts, len(text)]:
        end = text.rfind(b"\n", begin, cut) + 1 or begin
        parts.append(tally(text[begin:end]))
        begin = end
    whole = tally(text)
    assert _summed(part.days for part in parts) == whole.days
    assert _summed(part.minutes for part in parts) == whole.minutes
    assert sum(part.odd_lines for part in parts) == whole.odd_lines
    assert begin == len(text)


def _summed(parts: Iterable[Mapping[Any, Tally]]) -> dict[Any, Tally]:
    """What the store does: adds each part to what is there."""
    sums: dict[Any, Tally] = {}
    for part in parts:
        for key, one in part.items():
            sums[key] = Tally.total([one, sums.get(key, Tally())])
    return sums


@given(_LOG)
def test_report_and_traffic_hold_every_request(lines: list[bytes]) -> None:
    """The total is the sum of the rows; what is refused is an error, what is an error a request."""
    found = tally(b"".join(lines))
    record = report(found.days)
    for name in ("requests", "errors", "prompt_tokens", "completion_tokens"):
        assert record["total"][name] == sum(row[name] for row in record["rows"])
    for one in traffic(found.minutes, NOON).values():
        assert 0 <= one.refused <= one.errors <= one.requests
