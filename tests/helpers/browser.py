"""Chromium for tests of the page: what it must never do is looked at after each test."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = ["--no-sandbox", "--disable-dev-shm-usage"]
TIMEOUT = 20_000  # milliseconds that anything may take on a busy machine; nothing is measured

# Runs before the page: notes what the security policy forbade.
WATCH = """
window.violations = [];
addEventListener('securitypolicyviolation', e => violations.push(e.violatedDirective + ' ' + e.blockedURI));
"""


def sync_api() -> Any:
    """Return playwright's interface, or skip the test with what is missing."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on PATH (apt-get install chromium)")
    return pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")


@contextmanager
def chromium() -> Iterator[Any]:
    """Run a browser."""
    with sync_api().sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Watched:
    """A page of the browser and what it did that it should not."""

    page: Any
    origin: str
    foreign: list[str] = field(default_factory=list)  # requests that left the origin
    errors: list[str] = field(default_factory=list)  # of the console, and exceptions

    def faults(self) -> dict[str, list[str]]:
        """Return all faults: empty if the page behaved."""
        found = {"foreign": self.foreign, "errors": self.errors, "violations": self.page.evaluate("window.violations")}
        return {kind: lines for kind, lines in found.items() if lines}


@contextmanager
def watched_page(browser: Any, address: str, **options: Any) -> Iterator[Watched]:
    """Open an address in a fresh profile; `options` are playwright's of a context."""
    settings: dict[str, Any] = {"viewport": {"width": 1280, "height": 800}, "reduced_motion": "reduce", **options}
    context = browser.new_context(**settings)
    context.set_default_timeout(TIMEOUT)
    context.add_init_script(WATCH)
    page = context.new_page()
    watched = Watched(page, "{0.scheme}://{0.netloc}".format(urlsplit(address)))
    # An expected refusal of the server is no fault of the page; Chromium writes it into the console all the same.
    page.on(
        "console", lambda m: watched.errors.append(m.text) if m.type == "error" and "status of" not in m.text else None
    )
    page.on("pageerror", lambda error: watched.errors.append(str(error)))
    page.on(
        "request",
        lambda r: None if r.url.startswith((watched.origin, "data:", "blob:")) else watched.foreign.append(r.url),
    )
    try:
        page.goto(address)
        page.wait_for_selector("html[data-ready=yes]")
        yield watched
    finally:
        context.close()


def ask(page: Any, text: str) -> None:
    """Send a message and wait until its answer has ended."""
    answers = page.locator(".message.assistant").count()
    page.fill("#prompt", text)
    page.click("#send")
    page.wait_for_selector(f".message.assistant >> nth={answers}")
    ended(page)


def ended(page: Any) -> None:
    """Wait until no answer is under way."""
    page.wait_for_selector("#messages:not(:has(.running))")


def texts(page: Any) -> list[str]:
    """Return what the messages on the page say."""
    return [body.inner_text().strip() for body in page.locator(".message .body").all()]
