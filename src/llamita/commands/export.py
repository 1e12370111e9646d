"""`llamita export`: write a packed model in another runtime's format, with a proof."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from llamita import __version__
from llamita.commands import console
from llamita.commands.options import Json, Out, Overwrite, Revision, Threads, model_argument
from llamita.commands.sources import convert_first
from llamita.errors import InputError, RunError
from llamita.export.guide import CARD, plain_card
from llamita.export.job import ExportJob
from llamita.export.targets import TARGETS, Target, find_target, writer_of
from llamita.imports.open import open_source
from llamita.models.packed import PackedModel
from llamita.system.files import exists_in, file_table, flush_path, write_bytes
from llamita.system.machine import MemoryWatch
from llamita.system.staging import EXPORTED_MARK, check_target, staged
from llamita.system.threads import use_threads
from llamita.text.printable import megabytes

_FAIL = "FAIL"

_Source = Annotated[str, model_argument("DIR", "A packed model", takes_gguf=False)]
_To = Annotated[str, typer.Option("--to", metavar="TARGET", help=f"One of {', '.join(TARGETS)}.")]
_Context = Annotated[
    int | None, typer.Option(min=1, help="Tokens of a sequence at most, by default 2048 (executorch).")
]
_Backend = Annotated[
    str | None, typer.Option(help="The backend: xnnpack (the default), vulkan, coreml, qnn, mediatek (executorch).")
]
_Embedding = Annotated[
    int | None, typer.Option(help="Bits of the embedding: 8, or 4 to round it further (executorch).")
]
_Flavor = Annotated[
    str | None, typer.Option(help="transformers (the default), vllm-cpu or vllm-gpu (compressed-tensors).")
]
_RoundScales = Annotated[
    bool, typer.Option("--round-scales", help="Round scales to the type of the format, and say by how much.")
]
_Adapter = Annotated[
    Path | None,
    typer.Option(
        "--adapter",
        "--adaptor",
        metavar="ADAPTER",
        help="An adapter in the format of Hugging Face's PEFT to add, unmerged.",
    ),
]


def command(
    source: _Source,
    to: _To = "",
    out: Out = None,
    revision: Revision = None,
    context: _Context = None,
    backend: _Backend = None,
    embedding: _Embedding = None,
    adapter: _Adapter = None,
    round_scales: _RoundScales = False,
    flavor: _Flavor = None,
    overwrite: Overwrite = False,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Write a packed model in another runtime's format; if that runtime is installed, run it and compare.

    Example: llamita export my-model --to executorch -o my-model-pte
    """
    options = {"context": context, "backend": backend, "embedding": embedding, "adapter": adapter,
               "round_scales": round_scales or None, "flavor": flavor}  # fmt: skip
    target = find_target(to)
    _check_options(target, options)
    if out is None:
        raise InputError("--out", "the directory to make", "none", "try -o NAME")
    use_threads(threads)
    convert_first(source, quiet=json)
    packed = open_source(source)
    if not isinstance(packed, PackedModel):
        raise InputError(f"{source}", "a packed model", "a float model", "try llamita quantize")
    check_target(out, overwrite, packed.path)
    write = writer_of(target)  # may import Torch
    began, watch = time.perf_counter(), MemoryWatch()
    with watch, console.progress(quiet=json) as progress, staged(out, overwrite, packed.path) as directory:
        record = write(ExportJob(packed, adapter, options), directory, progress)
        record |= {"options": {name: str(value) for name, value in options.items() if value is not None}}
        _write_record(directory, packed, target, record)
        for path in directory.iterdir():
            flush_path(path)
        if (verdict := _verdict(record)) == _FAIL:
            if not json:
                _print_failure(record)
            raise RunError(f"{out}: FAIL: the result does not compute what the engine does; nothing was written")
    record |= {"out": str(out), "total_seconds": time.perf_counter() - began, "memory_bytes": watch.peak}
    if json:
        return console.print_json(record)
    _print(out, record)
    console.print_line(verdict)
    console.note(f"{'try' if target.is_code else 'next'}: {target.use.format(out=out)}")


def _print_failure(record: dict[str, Any]) -> None:
    """Print what does not hold."""
    if record["proof"] is not None:
        return _print_proof(record["proof"])
    return console.note(f"{record['equal_layers']} of {record['layers']} tensors have the same values")


def _verdict(record: dict[str, Any]) -> str:
    """Say in words whether the result computes what the engine does."""
    proof = record["proof"]
    counts = proof or record
    if counts.get("equal_layers") != counts.get("layers"):
        return _FAIL
    if record["options"].get("embedding") == "4" and proof:
        return "the same integers except for the embedding, rounded to 4 bits, whose cost is above"
    if record.get("other_arithmetic") and proof:
        return "the same integers; another arithmetic, whose cost is above"
    if proof:
        return "PASS" if proof["holds"] else _FAIL
    if "opened_by" in record:
        return "PASS"
    return f"not run: {record['unchecked']}"


def _check_options(target: Target, options: dict[str, Any]) -> None:
    for name, value in options.items():
        if value is not None and name not in target.options:
            raise InputError(f"--{name.replace('_', '-')}: {target.name} takes none", hint="try without")
    if options["embedding"] not in (None, 4, 8):
        raise InputError("--embedding", "4 or 8", f"{options['embedding']}")


def _write_record(directory: Path, packed: PackedModel, target: Target, record: dict[str, Any]) -> None:
    """Write README.md, unless the target has done so, and llamita_export.json with the hash of every file."""
    if record["proof"] is not None or "opened_by" in record:
        record["unchecked"] = None
    if not exists_in(directory, CARD):
        card = plain_card(packed, target.content, target.usage("DIRECTORY"), _verdict(record))
        write_bytes(directory / CARD, card.encode())
    source = asdict(packed.metadata.source)
    if source["name"].startswith("/"):  # paths of this machine stay private
        source["name"] = Path(source["name"]).name
    values = {"llamita": __version__, "target": target.name, "source": source,
              "packed": packed.metadata.files, "files": file_table(directory), **record}  # fmt: skip
    write_bytes(directory / EXPORTED_MARK, json.dumps(values, indent=1).encode())


def _print(out: Path, record: dict[str, Any]) -> None:
    proof, scales = record["proof"], record.get("scales")
    seconds = record["total_seconds"]
    console.print_line(f"{out}: {megabytes(record['bytes'])}, {seconds:,.{int(seconds < 10)}f} s, "
                       f"{megabytes(record['memory_bytes'])} of memory")  # fmt: skip
    if scales and scales["off"]:
        console.note(f"{scales['off']:,} of {scales['total']:,} scales rounded, by {scales['largest']:.2%} at most")
    if scales and scales["zeros"]:
        console.note(f"{scales['zeros']:,} groups are zeros; their scale is 1")
    if scales and scales["subnormal"]:
        console.note(f"{scales['subnormal']:,} scales are subnormal in f16, and exact")
    if record.get("cut_context"):
        console.note(f"texts of at most {record['cut_context']:,} tokens: llama.cpp has no window here")
    if record.get("untied_bytes"):
        console.note(f"the head has a table of its own: {record['untied_bytes'] / 1e6:,.1f} MB more")
    if record.get("rounded_to_bf16"):
        console.note(f"weights rounded to bf16 where they are floats, by {record['rounded_to_bf16']:.2%} at most")
    if "equal_layers" in record:
        rounded = ", on their rounded scales" if scales and scales["off"] else ""
        same = f"{record['equal_layers']} of {record['layers']}"
        by = record.get("opened_by", "llamita")
        console.note(f"read back by {by}: {same} tensors have the same values{rounded}")
    if proof is not None:
        _print_proof(proof)


def _print_proof(proof: dict[str, Any]) -> None:
    gap = "" if proof["gap"] is None else f"; then a gap of {proof['gap']:.1f} deviations of the noise"
    rows = [
        ["matrices that it has to the bit", f"{proof['equal_layers']} of {proof['layers']}"],
        ["KL divergence from the engine, nats a token", f"{proof['kl']:.5f}; at most {proof['largest_kl']:.5f}"],
        ["same likeliest token", f"{proof['top_1']:.1%} of {proof['tokens']}"],
        ["noise of logits, of their spread", f"{proof['noise']:.2%}; the engine's own: {proof['own_noise']:.2%}"],
        ["greedy text, same tokens", f"{proof['same_greedy']} of {proof['greedy']}{gap}"],
        ["a token, in that runtime", f"{proof['milliseconds']:.2f} ms"],
    ]
    if proof["prefill"] is not None:
        rows.insert(-2, ["the same behind one pass over a prompt", f"{proof['prefill']:.2%}"])
    console.print_table("Against llamita's engine", ["", ""], rows)
