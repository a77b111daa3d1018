"""Slurm's lists of hosts: every form that `scontrol show hostnames` expands."""

import pytest

from reconciler.hostlist import expand


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", ()),
        ("gpu1", ("gpu1",)),
        ("gpu1,login", ("gpu1", "login")),
        ("gpu[1-3]", ("gpu1", "gpu2", "gpu3")),
        ("gpu[2]", ("gpu2",)),
        ("gpu[1,3-4,9]", ("gpu1", "gpu3", "gpu4", "gpu9")),
        ("gpu[08-11]", ("gpu08", "gpu09", "gpu10", "gpu11")),
        ("gpu[098-101]", ("gpu098", "gpu099", "gpu100", "gpu101")),
        ("a[1-2],b,c[3,05]", ("a1", "a2", "b", "c3", "c05")),
        ("r[1-2]n[3-4]", ("r1n3", "r1n4", "r2n3", "r2n4")),
        ("r[1-2]-gpu", ("r1-gpu", "r2-gpu")),
        ("node-7.site", ("node-7.site",)),
    ],
)
def test_list_of_hosts_stands_for_its_names(text: str, names: tuple[str, ...]) -> None:
    """Ranges, leading zeros, several entries and several brackets, in Slurm's order."""
    assert expand(text) == names


@pytest.mark.parametrize(
    "text", ["gpu[", "gpu[]", "gpu[1-]", "gpu[a-b]", "gpu[3-1]", "gpu]1[", "gpu[1-999999999]"]
)
def test_text_that_is_no_list_stands_for_itself(text: str) -> None:
    """Nothing is made up of what can't be read, and nothing is dropped: it is one unknown name."""
    assert expand(text) == (text,)


def test_list_of_a_whole_cluster_is_bounded() -> None:
    """A product of ranges ends where Slurm's own limit does."""
    assert len(expand("r[1-999]n[1-999]")) == 65_536
