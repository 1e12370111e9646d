"""A browser, the stand-in for the server and the page, for the tests of the page.

The browser ends with each file: while it runs, its thread has an event loop, in which others cannot start theirs.
"""

import warnings
from collections.abc import Iterator
from typing import Any, cast

import pytest
from _pytest.runner import runtestprotocol
from browser import chromium, watched_page


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture
def stand_in() -> Iterator[Any]:
    # Not at the top: without llamita[serve] its import skips, which a conftest may not.
    from page_server import serving

    with serving() as server:
        yield server


@pytest.fixture
def page(browser: Any, stand_in: Any) -> Iterator[Any]:
    """The page in a fresh profile. Whatever the test does, it loads nothing foreign and breaks no policy."""
    with watched_page(browser, stand_in.address) as watched:
        yield watched.page
        assert not watched.faults()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Try a test with a browser once more if it fails, and say so.

    The browser draws without a GPU, and shares two cores with the rest of the suite: a wait may run out once. What is
    wrong fails twice. But an error of a script, which teardown finds, counts the first time.
    """
    if "browser" not in getattr(item, "fixturenames", ()):
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    reports = runtestprotocol(item, nextitem=nextitem, log=False)
    failed = [report for report in reports if report.failed]
    if failed and all(report.when != "teardown" for report in failed):
        _say(item, f"{item.name} failed once: {failed[0].longrepr}")
        cast(Any, item)._initrequest()  # its fixtures are made anew
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _say(item: pytest.Item, text: str) -> None:
    """Show a text in the summary of warnings, from a worker of xdist, too. No filter can make it an error."""
    path, line, _ = item.location
    warning = warnings.WarningMessage(pytest.PytestWarning(text), pytest.PytestWarning, path, line or 0)
    details = {"warning_message": warning, "when": "runtest", "nodeid": item.nodeid, "location": None}
    item.ihook.pytest_warning_recorded.call_historic(kwargs=details)
