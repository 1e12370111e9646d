"""`llamita import`: a model in another tool's form in; a directory as Hugging Face has it out."""

import time
from pathlib import Path
from typing import Annotated

import typer

from llamita import __version__, console
from llamita.checkpoint import Checkpoint
from llamita.commands.options import Json, Out, Overwrite
from llamita.errors import InputError
from llamita.imports.forms import convert, files_of, is_foreign
from llamita.packed_writer import write_json
from llamita.staging import IMPORTED_MARK, check_target, staged

_Source = Annotated[
    Path,
    typer.Argument(
        metavar="SRC", help="A directory with consolidated.*.pth and params.json, or a .gguf file."
    ),
]


def command(source: _Source, out: Out = None, overwrite: Overwrite = False, json: Json = False) -> None:
    """Convert Meta's own checkpoint, or a GGUF file.

    Every command that takes SRC reads these, too, and keeps what it has converted.

    Example: llamita import Llama3.2-1B-Instruct -o llama-1b
    """
    if out is None:
        raise InputError("--out: expected the directory to make, got none; try -o NAME")
    if not is_foreign(source):
        raise InputError(f"{source}: expected a directory with params.json and consolidated.*.pth, as Meta "
                         "has them, and no config.json; or a .gguf")  # fmt: skip
    check_target(out, overwrite, source)
    began = time.perf_counter()
    with console.progress(quiet=json) as progress, staged(out, overwrite, source) as directory:
        convert(source, directory, progress)
        files = {path.name: path.stat().st_size for path in files_of(source)}
        write_json(directory / IMPORTED_MARK, {"llamita": __version__, "source": str(source), "files": files})
        Checkpoint(directory).close()  # found to be whole
    seconds = time.perf_counter() - began
    if json:
        return console.print_json({"out": str(out), "seconds": seconds})
    console.print_line(f"{out}: a float checkpoint, {seconds:,.0f} s")
    console.note(f"try: llamita quantize {out} -o {out}-4bit")
