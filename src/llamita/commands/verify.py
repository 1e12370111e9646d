"""`llamita verify`: check that a packed model, or an export, is as it was written."""

import sys
from typing import Annotated

from llamita.commands import console
from llamita.commands.options import Json, Revision, model_argument
from llamita.errors import InputError
from llamita.imports.detect import detect_format
from llamita.imports.open import fetch, resolve
from llamita.models.verify import verify
from llamita.system.files import exists_in
from llamita.system.staging import EXPORTED_MARK
from llamita.text.printable import megabytes

_Directory = Annotated[str, model_argument("DIR", "A packed model, or an export of one", takes_gguf=False)]


def command(directory: _Directory, revision: Revision = None, json: Json = False) -> None:
    """Check every file of a packed model, or of an export, against its recorded hash.

    The exit code is 1 if any file differs.

    Example: llamita verify my-model
    """
    path = fetch(directory)
    if not exists_in(path, EXPORTED_MARK):  # an export is checked as it is, never converted first
        if detect_format(path) is not None:
            raise InputError(
                f"{directory}",
                "a directory that llamita made",
                "another tool's model, which records no hashes",
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
