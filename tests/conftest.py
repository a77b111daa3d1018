"""The labs that tests run on, and the rule that no test is ever skipped."""

import os
from collections.abc import Iterator

import pytest

from tests.lab import Lab
from tests.lab.fleet import Fleet

_skipped: list[str] = []


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """One running lab of four nodes for tests that leave it as they found it."""
    with Lab.start(f"test-{os.getpid()}") as running:
        yield running


@pytest.fixture
def own_lab() -> Iterator[Lab]:
    """A lab of its own, for tests that cut cables, stop daemons or fill the gateway."""
    with Lab.start(f"own-{os.getpid()}") as running:
        yield running


@pytest.fixture
def fleet(own_lab: Lab) -> Fleet:
    """A fleet of two stand-in replicas, specified and not yet applied."""
    return Fleet(own_lab)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes long runs in `make soak`. Tests that share a lab or its name stay on one worker.

    First, because pytest-xdist reads the marks in a hook of the same name.
    """
    if not os.environ.get("SOAK"):
        late = [item for item in items if item.get_closest_marker("soak")]
        config.hook.pytest_deselected(items=late)
        items[:] = [item for item in items if item not in late]
    for item in items:
        # Of these each file has a gateway, or a host, of its own.
        file = item.path.stem
        shared = {
            "contract": "contract",
            "engine": "engine",
            "test_demo": "demo",
            "test_site": "site",
            "test_user_site": "user-site",
            "gateway": f"gateway-{file}",
            "provisioning": f"provisioning-{file}",
        }
        group = shared.get(item.path.parent.name) or shared.get(item.path.stem)
        if group is not None:
            item.add_marker(pytest.mark.xdist_group(group))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped:
        _skipped.append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    # A skip would hide a missing tool: what a test needs, the project installs.
    if _skipped:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for nodeid in _skipped:
        terminalreporter.write_line(f"skipped, which counts as a failure: {nodeid}")
