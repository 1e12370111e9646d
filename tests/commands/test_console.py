"""Nothing that is printed is read as markup, and JSON can be written in every encoding."""

import io
import json
import sys

import pytest
from rich.console import Console

from llamita.commands import console

NAMES = ["hf[/x]", "q[v2]", r"a\[/b]", ":smile:", "[bold]"]


@pytest.mark.parametrize("name", NAMES)
def test_tables_show_names_as_they_are(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    console.print_table(f"title {name}", ["", f"column {name}"], [[f"cell {name}", f"figure {name}"]])
    shown = capsys.readouterr().out
    for what in ("title", "column", "cell", "figure"):
        assert f"{what} {name}" in shown


def test_a_table_without_names_of_columns_has_no_empty_line_for_them(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_table("title", ["", ""], [["cell", "figure"]])
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [["title"], [], ["cell", "figure"], []]


@pytest.mark.parametrize("name", NAMES)
def test_errors_and_notes_show_names_as_they_are(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    console.print_error(f"{name}: expected\n a model")
    console.note(name)
    assert capsys.readouterr().err == f"error: {name}: expected a model\n{name}\n"


@pytest.mark.parametrize("name", NAMES)
def test_progress_shows_names_as_they_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    shown = io.StringIO()
    monkeypatch.setattr(console, "err", Console(**console._RAW, file=shown, force_terminal=True))
    with console.progress() as report:
        assert report is not None
        report(name, 1, 2)
    assert name in shown.getvalue()


def test_progress_leaves_nothing_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress() as report:
        assert report is not None
        report("x", 1, 2)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "UTF8"])
def test_json_in_every_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", stdout)
    console.print_json({"text": "Łódź é 🙂"})
    written = stdout.buffer.getvalue()  # type: ignore[attr-defined]
    assert json.loads(written) == {"text": "Łódź é 🙂"}
    assert written.isascii() == (encoding == "ascii" or "latin" in encoding)


def test_tables_in_an_encoding_that_lacks_a_character(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    console.print_table("Łódź", ["é"], [["🙂"]])
    stdout.flush()
    assert b"?" in stdout.buffer.getvalue()  # type: ignore[attr-defined]
