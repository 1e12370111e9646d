"""`llamita verify`: is a packed directory as it was written?"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from llamita.commands import console
from llamita.errors import InputError
from llamita.imports.detect import detect_format
from llamita.imports.open import resolve
from llamita.models.verify import verify
from llamita.system.files import exists_in
from llamita.system.staging import EXPORTED_MARK
from llamita.text.printable import megabytes


def command(
    directory: Annotated[
        str, typer.Argument(metavar="DIR", help="A packed directory, its hub name, or what export made.")
    ],
    json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Check every file of a packed directory, or of an export, against its recorded hash; exit code 1 if any
    differs.

    Example: llamita verify my-model
    """
    path = Path(directory)
    if not exists_in(path, EXPORTED_MARK):  # what is exported is checked as it is, never converted first
        if detect_format(path) is not None:
            raise InputError(
                f"{directory}",
                "a directory that llamita made",
                "another tool's model, which says nothing of what was written",
                "try llamita inspect",
            )
        path = resolve(directory)
    with console.progress(quiet=json) as progress:
        report = verify(path, progress)
    if json:
        console.print_json({"ok": not report.problems, "files": report.files, "bytes": report.bytes,
                            "problems": report.problems})  # fmt: skip
    elif not report.problems:
        console.out.print(f"{report.files} files, {megabytes(report.bytes)}: all as they were written")
    else:
        for problem in report.problems:
            console.print_error(problem)
    if report.problems:
        sys.exit(1)
