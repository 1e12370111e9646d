"""A browser, the stand-in for the server and the page, for the tests of the page.

The browser ends with each file: while it runs, its thread has an event loop, in which others cannot start theirs.
"""

from collections.abc import Iterator
from typing import Any

import pytest
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
