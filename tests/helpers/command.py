"""The command line as tests call it, in their own process."""

from pathlib import Path

import pytest

from llamita import cli


def run(*arguments: object) -> int:
    """Exit code of the command line, in this process."""
    try:
        cli.main([str(a) for a in arguments])
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The single line that was printed, on stderr."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1, captured.err
    assert "Traceback" not in captured.err
    return captured.err


def assert_nothing_is_left(directory: Path, *expected: str) -> None:
    assert sorted(path.name for path in directory.iterdir()) == sorted(expected)
