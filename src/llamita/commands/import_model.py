"""`llamita import`: convert another tool's model to a packed model or a float checkpoint."""

import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from llamita import __version__
from llamita.commands import console
from llamita.commands.options import Json, Out, Overwrite, Revision, model_argument
from llamita.errors import InputError
from llamita.imports.convert import convert
from llamita.imports.detect import files_of, has_adapters
from llamita.imports.import_codes import Imported
from llamita.imports.open import fetch
from llamita.models.checkpoint import Checkpoint
from llamita.models.peft import write_adapter
from llamita.system.files import exists_in, write_json
from llamita.system.staging import IMPORTED_MARK, TRAINED_MARK, check_target, staged

_Source = Annotated[str, model_argument("SRC", "A model of Meta's, compressed-tensors, GPTQ, AWQ, torchao or in GGUF")]


def command(
    src: _Source, out: Out = None, revision: Revision = None, overwrite: Overwrite = False, json: Json = False
) -> None:
    """Convert another tool's model: Meta's own, GGUF, compressed-tensors, GPTQ, torchao.

    Symmetric int4 weights are kept as they are; all others become a float checkpoint. Every command that takes a
    model reads these formats, too, and keeps the result for the next time.

    Example: llamita import Llama3.2-1B-Instruct -o llama-1b
    """
    if out is None:
        raise InputError("--out", "the directory to make", "none", "try -o NAME")
    check_target(out, overwrite)
    source = fetch(src)
    check_target(out, overwrite, source)
    adapter_out = _adapter_out(out, overwrite, source)
    began = time.perf_counter()
    with ExitStack() as stack:  # the directory that is entered last is moved into its place first
        progress = stack.enter_context(console.progress(quiet=json))
        other = None if adapter_out is None else stack.enter_context(staged(adapter_out, overwrite, source))
        directory = stack.enter_context(staged(out, overwrite, source))
        imported = convert(source, directory, progress)
        if imported.codes is None:
            files = {path.name: path.stat().st_size for path in files_of(source)}
            mark = {"llamita": __version__, "source": src, "files": files}
            write_json(directory / IMPORTED_MARK, mark)
            Checkpoint(directory).close()  # checks what was written
        if other is not None:
            assert imported.adapter is not None, "a release with lora_args has adapters, or is refused"
            write_adapter(imported.adapter, out.name, imported.layers, other)
            write_json(other / IMPORTED_MARK, {"llamita": __version__, "source": src})
    seconds, codes = time.perf_counter() - began, imported.codes
    if json:
        record = None if codes is None else {**asdict(codes), "scheme": codes.scheme.to_dict()}
        adapter = None if adapter_out is None else str(adapter_out)
        return console.print_json({"out": str(out), "seconds": seconds, "taken": record, "adapter": adapter})
    _print(out, adapter_out, imported, seconds)


def _adapter_out(out: Path, overwrite: bool, source: Path) -> Path | None:
    """Return the directory for the adapters of a release, None where it has none.

    Raises:
        InputError: the directory exists and was not made by `import`; `finetune` may have left it.
    """
    if not has_adapters(source):
        return None
    adapter_out = out.with_name(f"{out.name}-adapter")
    if adapter_out.exists() and (not exists_in(adapter_out, IMPORTED_MARK) or exists_in(adapter_out, TRAINED_MARK)):
        where = f"--out: {adapter_out}, the place of this release's adapters, holds something else"
        raise InputError(where, hint="try another name")
    check_target(adapter_out, overwrite, source)
    return adapter_out


def _print(out: Path, adapter_out: Path | None, imported: Imported, seconds: float) -> None:
    codes = imported.codes
    what = "a float checkpoint" if codes is None else "a packed model, codes and scales as they are"
    console.print_line(f"{out}: {what}, {seconds:,.0f} s")
    console.note(imported.note)
    if codes is None:
        return console.note(f"try: llamita quantize {out} -o {out}-4bit")
    if codes.changed:
        console.note(f"{codes.changed:,} groups are zeros or have changed their signs: the same weights")
    if codes.float_layers:
        (name, why), *others = codes.float_layers.items()
        more = f" and {len(others)} more" if others else ""
        console.note(f"in float: {name}{more}: {why}")
    if codes.activations:
        console.note(f"made for {codes.activations}; here int8 per token: measure it (llamita evaluate)")
    if adapter_out is not None:
        console.print_line(f"{adapter_out}: its adapters, without which it is not the model that was trained")
    adapter = "" if adapter_out is None else f" --adapter {adapter_out}"
    return console.note(f"try: llamita generate {out}{adapter} --prompt TEXT")
