"""`llamita verify`: is a packed directory as it was written?"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from llamita import console
from llamita.checkpoint import resolve
from llamita.verify import verify


def command(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A packed directory, or its hub name.")],
    json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Check every file of a packed directory against its recorded hash; exit code 1 if any differs.

    Example: llamita verify my-model
    """
    path: Path = resolve(directory)
    with console.progress(quiet=json) as progress:
        report = verify(path, progress)
    if json:
        console.print_json({"ok": not report.problems, "files": report.files, "bytes": report.bytes,
                            "problems": report.problems})  # fmt: skip
    elif not report.problems:
        console.out.print(
            f"{report.files} files, {console.megabytes(report.bytes)}: all as they were written"
        )
    else:
        for problem in report.problems:
            console.print_error(problem)
    if report.problems:
        sys.exit(1)
