"""What commands print: tables, progress, JSON. Answers go to stdout, everything else to stderr.

Names and messages come from files and users: nothing is read as Rich's markup.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

ProgressCallback = Callable[[str, int, int], None]  # what is being worked on, done, total

_FILE_WIDTH = 120  # columns of a table that goes to a file or a pipe

_RAW: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False, "soft_wrap": True}

out = Console(**_RAW, width=None if sys.stdout.isatty() else _FILE_WIDTH)
err = Console(**_RAW, stderr=True)


def print_json(value: Any, indent: int | None = 2) -> None:
    """One JSON document on stdout, for machines; NaN and infinity are refused, not written."""
    is_utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"  # elsewhere all is escaped
    text = json.dumps(value, indent=indent, ensure_ascii=not is_utf8, allow_nan=False)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def print_table(title: str, columns: list[str], rows: list[list[str]], figures: bool = True) -> None:
    """A table: the first column is text, the others are figures, or else text that wraps."""
    table = Table(title=Text(title), title_justify="left", header_style="bold", box=box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if i == 0 or not figures else "right", no_wrap=i == 0)
    for row in rows:
        table.add_row(*map(Text, row))
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows "?" for what it lacks
    out.print(table, soft_wrap=False)


def print_line(text: str) -> None:
    """A line of the answer that is no table, on stdout."""
    out.print(text)


def print_error(message: str) -> None:
    """One line on stderr."""
    line = " ".join(message.split())
    err.print(Text.assemble(("error:", "bold red"), " ", line))


def note(message: str | None) -> None:
    """A remark beside the answer, on stderr, if there is one."""
    if message is not None:
        err.print(message)


@contextmanager
def progress(quiet: bool = False) -> Iterator[ProgressCallback | None]:
    """A progress bar on stderr, as the callback that library functions take; None when quiet."""
    if quiet:
        yield None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    disable = not err.is_terminal  # in a file it would leave an empty line, and nothing else
    with Progress(*columns, console=err, transient=True, disable=disable) as bar:
        task = bar.add_task("", total=None)

        def report(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield report
