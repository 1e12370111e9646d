"""The command line as a user meets it: help, versions, one-line errors, exit codes."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from command import one_line
from command import run as run_here

from llamita.cli import COMMANDS
from llamita.errors import InputError
from llamita.methods.chain import METHODS


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llamita.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_help_names_every_command() -> None:
    result = run("--help")
    assert result.returncode == 0
    assert "130 stopped by Ctrl-C" in " ".join(result.stdout.split())
    for name in COMMANDS:
        assert name in result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name: str) -> None:
    result = run(name, "--help")
    assert result.returncode == 0, result.stderr
    assert f"llamita {name}" in result.stdout
    assert "--json" in result.stdout or name == "serve"  # which answers over HTTP, in JSON


GENERATE = ("generate", "embedded", "--prompt", "x")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((*GENERATE, "--max-tokens", "0"), "--max-tokens: expected a whole number of at least 1, got 0"),
        ((*GENERATE, "--top-p=2"), "--top-p: expected a number from 0 to 1, got 2.0"),
        ((*GENERATE, "--threads", "0"), "--threads: expected 1 to 1024, got 0"),
        ((*GENERATE, "--threads", "abc"), "--threads: expected a whole number, got 'abc'"),
        ((*GENERATE, "--temperature=abc"), "--temperature: expected a number, got 'abc'"),
        ((*GENERATE, "--context", "0"), "--context: expected at least 1, got '0'"),
        (
            (*GENERATE, "--greedy", "--temperature", "0.5"),
            "--greedy: expected no temperature, because it takes the likeliest token",
        ),
        ((*GENERATE, "--preset", "q4"), "--preset: expected one of arm, llama3.2, llamita, none, got 'q4'"),
        ((*GENERATE, "--scheme", "q4"), "--scheme: expected one of arm, llama3.2, llamita, none, got 'q4'"),
        (
            ("generate", "embeded", "--prompt", "x"),
            "embeded: expected a model directory, a .gguf, 'embedded' or a hub name like owner/model or "
            "owner/model:Q4_K_M, got no such file or directory; did you mean 'embedded'?",
        ),
        (
            ("inspect", "./nowhere.gguf"),
            "./nowhere.gguf: expected a model directory, a .gguf, 'embedded' or a hub name like owner/model or "
            "owner/model:Q4_K_M, got no such file or directory",
        ),
        (("generate", "embedded"), "Missing option '--prompt'; try llamita generate --help"),
        (("nonsense",), "No such command 'nonsense'; try llamita --help"),
        (("quantize", "embedded", "-o", ""), "--out: expected the name of a new directory, got '.' or ''"),
    ],
)
def test_errors_name_what_was_typed(arguments: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here(*arguments) == 2
    assert one_line(capsys) == f"error: {line}\n"


def test_an_option_that_was_not_typed_is_not_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise InputError("threads: expected 1 to 1024, got 0")

    monkeypatch.setattr("llamita.commands.generate.load_with_adapter", refuse)
    assert run_here(*GENERATE) == 2
    assert one_line(capsys) == "error: threads: expected 1 to 1024, got 0\n"


def test_a_missing_target_is_said_to_be_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("export", "small", "-o", "out") == 2
    line = one_line(capsys)
    assert line.startswith("error: --to: expected one of ")
    assert line.endswith(", got none\n")


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


def test_a_missing_package_is_not_blamed_on_an_option_that_was_not_typed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    qronos = replace(METHODS["qronos"], layer_method="no_such_package:layer_method")
    monkeypatch.setitem(METHODS, "qronos", qronos)
    assert run_here("quantize", "embedded", "-o", tmp_path / "out", "--preset", "llamita") == 1
    assert one_line(capsys).startswith("error: method qronos: expected the package no_such_package, found none; try ")
