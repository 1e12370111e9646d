"""The command line as a user meets it: help, versions, one-line errors, exit codes."""

import subprocess
import sys

import pytest

from llamita.cli import COMMANDS


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llamita.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_help_names_every_command() -> None:
    result = run("--help")
    assert result.returncode == 0
    for name in COMMANDS:
        assert name in result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name: str) -> None:
    result = run(name, "--help")
    assert result.returncode == 0, result.stderr
    assert f"llamita {name}" in result.stdout
    assert "--json" in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("quantize",),
        ("quantize", "embedded", "-o", "x", "--preset", "nope"),
        ("quantize", "embedded", "-o", "x", "--group-size", "100"),
        ("generate", "/nonexistent/model", "--prompt", "x"),
        ("generate", "", "--prompt", "x"),
        ("inspect", "/nonexistent/model"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not result.stdout
