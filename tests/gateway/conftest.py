"""A gateway of each Debian release, with replicas that record what reaches them."""

from collections.abc import Iterator

import pytest

from tests.gateway.front import Front
from tests.gateway.nginx import running
from tests.gateway.recorder import recording

RELEASES = ("bookworm", "trixie")


@pytest.fixture(scope="module", params=RELEASES)
def front(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Front]:
    """The front of `front.FLEET`, shared by the tests of one file; it ends without a fault."""
    folder = tmp_path_factory.mktemp("gateway")
    with recording(["tiny", "big"]) as replicas, running(request.param, folder) as nginx:
        made = Front(nginx, replicas)
        made.change()
        yield made
        assert nginx.unharmed, nginx.faults
