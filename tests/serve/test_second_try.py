"""The second try of tests with a browser: what it forgives, what it does not, and that it is said."""

from pathlib import Path

import pytest

pytest_plugins = "pytester"
HELPERS = Path(__file__).parents[1] / "helpers"
TESTS = """
import pytest

tries = []

@pytest.fixture
def browser():
    tries.append(None)
    assert "setup" not in {fails} or len(tries) > 1, "no luck in setup"
    yield
    assert "teardown" not in {fails} or len(tries) > 1, "no luck in teardown"

def test_page(browser):
    assert "call" not in {fails} or len(tries) > 1, "no luck in call"
"""


@pytest.mark.parametrize(
    ("fails", "counts", "said"),
    [
        (["setup"], {"passed": 1, "warnings": 1}, "test_page failed once"),
        (["call"], {"passed": 1, "warnings": 1}, "test_page failed once"),
        (["teardown"], {"passed": 1, "errors": 1}, "no luck in teardown"),
        (["call", "teardown"], {"failed": 1, "errors": 1}, "no luck in teardown"),
    ],
)
def test_what_fails_once(pytester: pytest.Pytester, fails: list[str], counts: dict[str, int], said: str) -> None:
    pytester.makeconftest((Path(__file__).parent / "conftest.py").read_text())
    pytester.makepyfile(TESTS.format(fails=fails))
    result = pytester.runpytest_subprocess("-W", "error", "-o", f"pythonpath={HELPERS}")
    assert result.parseoutcomes() == counts
    assert said in result.stdout.str()
