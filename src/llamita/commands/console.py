"""Print tables, progress and JSON. Answers go to stdout, everything else to stderr.

Names and messages come from files and users, so nothing is read as Rich's markup.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from llamita.system.progress import Progress

_FILE_WIDTH = 120  # columns of a table that goes to a file or a pipe

_RAW: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False, "soft_wrap": True}

out = Console(**_RAW, width=None if sys.stdout.isatty() else _FILE_WIDTH)
err = Console(**_RAW, stderr=True)


def print_json(value: Any, indent: int | None = 2) -> None:
    """Write one JSON document to stdout; refuse NaN and infinity."""
    is_utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"  # other encodings get escapes
    text = json.dumps(value, indent=indent, ensure_ascii=not is_utf8, allow_nan=False)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def print_table(title: str, columns: list[str], rows: list[list[str]], figures: bool = True) -> None:
    """Print a table: the first column is text, the others are figures, or text that wraps if not `figures`."""
    table = Table(title=Text(title), title_justify="left", header_style="bold", box=box.SIMPLE_HEAD,
                  show_header=any(columns))  # fmt: skip
    for i, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if i == 0 or not figures else "right", no_wrap=i == 0)
    for row in rows:
        table.add_row(*map(Text, row))
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows "?" for what it lacks
    out.print(table, soft_wrap=False)


def print_line(text: str) -> None:
    """Print a line of the answer on stdout."""
    out.print(text)


def print_error(message: str) -> None:
    """Print an error as one line on stderr."""
    line = " ".join(message.split())
    err.print(Text.assemble(("error:", "bold red"), " ", line))


def note(message: str | None) -> None:
    """Print a remark on stderr, if there is one."""
    if message is not None:
        err.print(message)


@contextmanager
def progress(quiet: bool = False) -> Iterator[Progress]:
    """Yield the callback of a progress bar on stderr, as library functions take it, or None if quiet."""
    if quiet or not err.is_terminal:  # in a file, a bar would leave only an empty line
        yield None if quiet else lambda _what, _done, _total: None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=err, transient=True) as bar:
        task = bar.add_task("", total=None)

        def report(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield report
