"""What commands print: tables, progress, JSON. Answers go to stdout, everything else to stderr."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

ProgressCallback = Callable[[str, int, int], None]  # what is being worked on, done, total

_FILE_WIDTH = 120  # columns of a table that goes to a file or a pipe

out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else _FILE_WIDTH)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """One JSON document on stdout, for machines; NaN and infinity are refused, not written."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table: the first column is text, the others are figures."""
    table = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=i == 0)
    for row in rows:
        table.add_row(*row)
    out.print(table, soft_wrap=False)


def print_error(message: str) -> None:
    """One line on stderr."""
    line = " ".join(message.split())
    err.print(f"[bold red]error:[/] {_plain(line)}")


def note(message: str) -> None:
    """A remark beside the answer, on stderr."""
    err.print(_plain(message))


@contextmanager
def progress(quiet: bool = False) -> Iterator[ProgressCallback | None]:
    """A progress bar on stderr, as the callback that library functions take; None when quiet."""
    if quiet:
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("", total=None)

        def report(what: str, done: int, total: int) -> None:
            bar.update(task, description=_plain(what), completed=done, total=total)

        yield report


def megabytes(count: float) -> str:
    """Bytes as MB (10^6 bytes), with three figures or more."""
    return f"{count / 1e6:,.1f} MB" if count < 1e8 else f"{count / 1e6:,.0f} MB"


def _plain(text: str) -> str:
    return text.replace("[", r"\[")
