"""Names, comments and Slurm's durations come back as they went."""

import json
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from reconciler.batch import slurm_time
from reconciler.naming import (
    Comment,
    ReplicaName,
    Run,
    parse_comment,
    parse_name,
    submit_comment,
)
from reconciler.spec import parse_duration

SETTINGS = settings.get_profile("property")

LABELS = st.from_regex(r"[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?", fullmatch=True)
NAMES = st.builds(
    ReplicaName,
    fleet=LABELS,
    model=LABELS,
    revision=st.from_regex(r"[0-9a-f]{8}", fullmatch=True),
    ordinal=st.integers(0, 999_999),
)
COMMITS = st.none() | st.from_regex(r"[0-9a-f]{12}", fullmatch=True)
KEYS = st.none() | st.tuples(st.integers(0, 2**40), st.integers(0, 2**40))
ADDRESSES = st.tuples(st.ip_addresses(v=4), st.integers(1, 65535)).map(
    lambda pair: f"{pair[0]}:{pair[1]}"
)
RUNS = st.builds(
    Run,
    node=st.text(max_size=20),
    restarts=st.integers(0, 9),
    address=ADDRESSES,
    trap_ready=st.booleans(),
    ready_at=st.none() | st.integers(0, 2**40),
    draining=st.booleans(),
)


@SETTINGS
@given(NAMES)
def test_name_comes_back(name: ReplicaName) -> None:
    """The job's name is the replica's identity, nothing of it is lost."""
    assert parse_name(str(name)) == name


@SETTINGS
@given(st.text() | st.text(alphabet="ab.-0159f\n "))
@example("demo.tiny.00000000.01")
@example("demo.tiny.00000000.0\n")
def test_R27_text_that_is_no_name_is_foreign(text: str) -> None:
    """Only what we would write ourselves is ours."""
    name = parse_name(text)
    assert name is None or str(name) == text


@SETTINGS
@given(NAMES, st.integers(0, 64), COMMITS, KEYS, st.booleans(), st.none() | RUNS)
def test_comment_comes_back(
    name: ReplicaName,
    gpus: int,
    commit: str | None,
    succeeds: tuple[int, int] | None,
    protect: bool,
    run: Run | None,
) -> None:
    """What the submission wrote and what the job added are both read again."""
    text = submit_comment(name, gpus=gpus, commit=commit, succeeds=succeeds, protect=protect)
    assert "'" not in text
    if run is not None:
        text = f'{text.removesuffix("}")},"run":{json.dumps(published(run))}}}'
    assert parse_comment(text) == Comment(
        gpus=gpus, commit=commit, run=run, succeeds=succeeds, protect=protect
    )


def published(run: Run) -> dict[str, Any]:
    """What the job script writes of its run."""
    return {
        "node": run.node,
        "restarts": run.restarts,
        "address": run.address,
        "trap_ready": run.trap_ready,
        "ready": run.ready_at,
        "draining": run.draining,
    }


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(("run", "gpus", "v", "node")), inner, max_size=3)
    ),
    max_leaves=8,
)
FIELDS = ("v", "gpus", "commit", "run", "succeeds", "protect")


@SETTINGS
@given(st.text() | st.dictionaries(st.sampled_from(FIELDS), VALUES).map(json.dumps))
def test_R37_comment_of_any_content_is_read_or_nothing(text: str) -> None:
    """A vandalised comment costs its own job only: no text raises."""
    comment = parse_comment(text)
    assert comment is None or comment.gpus >= 0


@SETTINGS
@given(st.integers(0, 10**8))
def test_duration_comes_back(seconds: int) -> None:
    """What is written on an #SBATCH line is what was meant."""
    assert parse_duration(slurm_time(seconds)) == seconds
