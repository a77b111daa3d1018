"""The host that is provisioned."""

from collections.abc import Iterator

import pytest

from tests.provisioning.site import Site, running


@pytest.fixture(scope="session")
def site() -> Iterator[Site]:
    """One bare host for all tests; each has folders of its own on it."""
    with running() as host:
        yield host
