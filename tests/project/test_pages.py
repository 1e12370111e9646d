"""The pages: every command in them parses, every link leads somewhere, the README fits on a screen."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from places import ROOT
from typer.core import TyperGroup

from llamita import cli


def commands_in(text: str) -> Iterator[list[str]]:
    """The `llamita ...` lines of a page's code blocks, as arguments."""
    for block in re.findall(r"```[a-z]*\n(.*?)```", text, flags=re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True) if line.startswith(("llamita ", "$ llamita ", "make ")) else []
            if words:
                yield words[1:] if words[0] == "$" else words


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_the_pages_exist(page: Path) -> None:
    """Names and options, as the parsers see them; nothing is run."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), flags=re.M))
    for words in commands_in(page.read_text("utf-8")):
        if words[0] == "make":
            assert words[1] in targets, words
        else:
            group = typer.main.get_command(cli._make_app(words[1:]))
            assert isinstance(group, TyperGroup)
            command = group.get_command(group.make_context("llamita", words[1:]), words[1])
            assert command is not None, words
            command.make_context(words[1], words[2:])


def test_the_readme_shows_the_commands_that_matter() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    shown = {words[1] for words in commands_in(text)}
    assert {"demo", "test", "quantize", "chat", "evaluate"} <= shown
    assert len(text.splitlines()) <= 60  # one screen


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text("utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


LONGEST_LINE, LONGEST_ON_README = 200, 120  # characters of a sentence, which has a line of its own


def prose_of(page: Path) -> list[str]:
    """Return the lines of a page outside code blocks and tables, the targets of links left out."""
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.S)
    lines = [re.sub(r"\]\([^)]*\)", "]", line) for line in text.splitlines()]
    return [line for line in lines if not line.startswith("|")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_sentences_are_short_and_on_lines_of_their_own(page: Path) -> None:
    longest = LONGEST_ON_README if page.name == "README.md" else LONGEST_LINE
    assert not [line for line in prose_of(page) if len(line) > longest]
