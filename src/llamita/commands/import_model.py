"""`llamita import`: a model in another tool's form in; a packed directory or a float checkpoint out."""

import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from llamita import __version__
from llamita.commands import console
from llamita.commands.options import Json, Out, Overwrite
from llamita.errors import InputError
from llamita.imports.detect import files_of, has_adapters
from llamita.imports.forms import convert
from llamita.imports.take_over import Imported
from llamita.models.checkpoint import Checkpoint
from llamita.models.peft import write_adapter
from llamita.system.files import exists_in, write_json
from llamita.system.staging import IMPORTED_MARK, TRAINED_MARK, check_target, staged

_Source = Annotated[
    Path,
    typer.Argument(
        metavar="SRC", help="A directory as Meta has it, or of compressed-tensors, GPTQ or torchao; a .gguf."
    ),
]


def command(source: _Source, out: Out = None, overwrite: Overwrite = False, json: Json = False) -> None:
    """Convert another tool's model: Meta's own, GGUF, compressed-tensors, GPTQ, torchao.

    Symmetric int4 weights are taken over as they are; all else becomes a float checkpoint. Every command
    that takes a model reads these, too, and keeps what it has converted.

    Example: llamita import Llama3.2-1B-Instruct -o llama-1b
    """
    if out is None:
        raise InputError("--out", "the directory to make", "none", "try -o NAME")
    check_target(out, overwrite, source)
    beside = _beside(out, overwrite, source)
    began = time.perf_counter()
    with ExitStack() as stack:  # the last is moved into its place first
        progress = stack.enter_context(console.progress(quiet=json))
        other = None if beside is None else stack.enter_context(staged(beside, overwrite, source))
        directory = stack.enter_context(staged(out, overwrite, source))
        imported = convert(source, directory, progress)
        if imported.taken is None:
            files = {path.name: path.stat().st_size for path in files_of(source)}
            mark = {"llamita": __version__, "source": str(source), "files": files}
            write_json(directory / IMPORTED_MARK, mark)
            Checkpoint(directory).close()  # found to be whole
        if other is not None:
            assert imported.adapter is not None, "a release with lora_args has adapters, or is refused"
            write_adapter(imported.adapter, out.name, imported.layers, other)
            write_json(other / IMPORTED_MARK, {"llamita": __version__, "source": str(source)})
    seconds, taken = time.perf_counter() - began, imported.taken
    if json:
        told = None if taken is None else {**asdict(taken), "scheme": taken.scheme.to_dict()}
        adapter = None if beside is None else str(beside)
        return console.print_json({"out": str(out), "seconds": seconds, "taken": told, "adapter": adapter})
    _print(out, beside, imported, seconds)


def _beside(out: Path, overwrite: bool, source: Path) -> Path | None:
    """Where the adapters of a release go; None where it has none.

    Raises:
        InputError: something else is there, as adapters that `finetune` has left.
    """
    if not has_adapters(source):
        return None
    beside = out.with_name(f"{out.name}-adapter")
    if beside.exists() and (not exists_in(beside, IMPORTED_MARK) or exists_in(beside, TRAINED_MARK)):
        raise InputError(f"--out: {beside}, where the adapters of this release go, is another; try another name")
    check_target(beside, overwrite, source)
    return beside


def _print(out: Path, beside: Path | None, imported: Imported, seconds: float) -> None:
    taken = imported.taken
    what = "a float checkpoint" if taken is None else "packed, codes and scales as they are"
    console.print_line(f"{out}: {what}, {seconds:,.0f} s")
    console.note(imported.note)
    if taken is None:
        return console.note(f"try: llamita quantize {out} -o {out}-4bit")
    if taken.changed:
        console.note(f"{taken.changed:,} groups of zeros, or turned for a positive scale: the same weights")
    if taken.float_layers:
        (name, why), *others = taken.float_layers.items()
        more = f" and {len(others)} more" if others else ""
        console.note(f"in float: {name}{more}: {why}")
    if taken.activations:
        console.note(f"made for {taken.activations}; here int8 per token: measure it (llamita evaluate)")
    if beside is not None:
        console.print_line(f"{beside}: its adapters, without which it is not the model that was trained")
    adapter = "" if beside is None else f" --adapter {beside}"
    return console.note(f"try: llamita generate {out}{adapter} --prompt TEXT")
