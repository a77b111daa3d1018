"""Rows as a table for people."""

from collections.abc import Iterator, Sequence

from bench.gateway.figures import Comparison, Row


def head(row: Row) -> str:
    """Return the line above the rows of one mode, stage and load."""
    title = ", ".join(filter(None, (row.mode, row.stage, row.load)))
    value = "requests/s" if row.unit == "/s" else "p50"
    return f"\n{title:36}  {value:>12}  {'p99':>9}  busy  others"


def lines(row: Row) -> Iterator[str]:
    """Yield a row's lines: one for the values, one for each further comparison."""
    if row.value is None:
        yield f"  {row.way:34}  void: {row.void}"
        return
    value = f"{row.value.median:,.0f}" if row.unit == "/s" else f"{row.value.median:.3f} ms"
    start = f"  {row.way:34}  {value:>12}  {row.p99_ms:6.1f} ms  {row.busy:4.0%}  {row.others:6.0%}"
    said = [_comparison(one) for one in row.comparisons] or [""]
    yield f"{start}  {said[0]}".rstrip()
    for more in said[1:]:
        yield f"{'':{len(start)}}  {more}"


def _comparison(one: Comparison) -> str:
    median, low, high, rounds = (
        one.spread.median,
        one.spread.low,
        one.spread.high,
        one.spread.count,
    )
    if one.unit == "ms":
        text = f"{median:+.3f} ms on {one.reference} ({low:+.3f} to {high:+.3f}, {rounds} rounds)"
    else:
        text = f"x {median:.2f} of {one.reference} ({low:.2f} to {high:.2f}, {rounds} rounds)"
    if one.goal is None:
        return text
    bound = "at least" if one.goal.at_least else "at most"
    return f"{text}; goal {bound} {one.goal.limit:g}: {'met' if one.met else 'MISSED'}"


def verdict(rows: Sequence[Row]) -> str:
    """Return how many goals were met, and name the others; a void row's are none of them."""
    judged = [(row, one) for row in rows for one in row.comparisons if one.met is not None]
    missed = [
        f"\n  {row.mode}, {row.stage}, {row.load}: {row.way} {_comparison(one)}"
        for row, one in judged
        if not one.met
    ]
    void = "".join(
        f"\n  void: {row.mode}, {row.stage}, {row.load}: {row.way}, {row.void}"
        for row in rows
        if row.void and row.way == "ours"
    )
    return f"Goals met: {len(judged) - len(missed)} of {len(judged)}.{''.join(missed)}{void}"
