"""`llamita quantize`: a checkpoint in, a packed directory out."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from llamita import console
from llamita.checkpoint import Checkpoint, resolve
from llamita.errors import InputError
from llamita.files import has
from llamita.packed import METADATA
from llamita.plan import describe
from llamita.quantize import METHODS, Plan, Summary, estimate, make_plan, quantize
from llamita.scheme import PRESETS, SCALE_RULES, QuantScheme, make_scheme
from llamita.threads import use_threads

_PRESETS = ", ".join(PRESETS)


def command(
    src: Annotated[
        str, typer.Argument(metavar="SRC", help="A Hugging Face directory, a hub name, or 'embedded'.")
    ],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The directory to make.")] = None,
    preset: Annotated[str, typer.Option(help=f"The scheme: {_PRESETS}.")] = "llamita",
    group_size: Annotated[
        int | None, typer.Option(help="Weights that share a scale: 32, 64, 128 or 256.")
    ] = None,
    method: Annotated[str, typer.Option(help=f"How weights are rounded: {', '.join(METHODS)}.")] = "rtn",
    scales: Annotated[
        str | None, typer.Option(help=f"How scales are chosen: {', '.join(SCALE_RULES)}.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if llamita made it.")] = False,
    threads: Annotated[int | None, typer.Option(help="Threads to use; all cores by default.", min=1)] = None,
    json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Turn a Llama checkpoint into a 4-bit model: rounded, packed, verified by hashes, licence included.

    Example: llamita quantize meta-llama/Llama-3.2-1B-Instruct -o llama-1b-4bit --preset llama3.2
    """
    scheme = make_scheme(preset, group_size, scales)
    if method not in METHODS:
        raise InputError(f"--method: expected one of {', '.join(METHODS)}, got {method!r}")
    use_threads(threads)
    if dry_run:
        _dry_run(src, scheme, json)
        return
    if out is None:
        raise InputError("--out: expected the directory to make, got none; try -o NAME, or --dry-run")
    path = resolve(src)
    if has(path, METADATA):
        raise InputError(f"{src}: expected a float model, got one that llamita has quantized; try its source")
    source = Checkpoint(path)
    with console.progress(quiet=json) as progress:
        summary = quantize(source, src, out, scheme, method, overwrite=overwrite, progress=progress)
    source.close()
    if json:
        console.print_json(_summary_values(summary, scheme))
    else:
        _print_summary(summary, scheme)


def _dry_run(src: str, scheme: QuantScheme, json: bool) -> None:
    model = describe(src)
    if model.scheme is not None:
        raise InputError(f"{src}: expected a float model, got one that llamita has quantized; try its source")
    plan = make_plan(model.config, scheme, model.float_dtype)
    seconds, memory = estimate(plan, scheme)
    if json:
        expected = {"seconds_estimate": seconds, "memory_bytes_estimate": memory}
        console.print_json({"dry_run": True, "scheme": scheme.to_dict(), **asdict(plan), **expected})
        return
    rows = [*_plan_rows(plan, scheme), ["time to quantize, about", f"{seconds:,.0f} s"],
            ["memory to quantize, about", console.megabytes(memory)]]  # fmt: skip
    console.print_table(f"plan for {src} (nothing is written)", ["what", "figure"], rows)


def _plan_rows(plan: Plan, scheme: QuantScheme) -> list[list[str]]:
    tables = "int8 per channel" if scheme.table_bits else "float"
    return [
        ["scheme", f"{scheme.name}: int4, groups of {scheme.group_size}"],
        ["scales", f"{scheme.scale_rule}, {scheme.scale_dtype}"],
        ["linear layers", f"{plan.linear_layers}"],
        ["embedding and head", tables],
        ["size before", console.megabytes(plan.source_bytes)],
        ["size after", f"{console.megabytes(plan.tensor_bytes)} ({plan.ratio:.1%})"],
        ["weight files", f"{len(plan.files)}, {console.megabytes(plan.file_bytes)}"],
    ]


def _print_summary(summary: Summary, scheme: QuantScheme) -> None:
    rows = [*_plan_rows(summary.plan, scheme), ["mean squared error", f"{summary.mean_squared_error:.3e}"],
            ["relative squared error", f"{summary.relative_error:.3e}"],
            *([f"  worst: {name}", f"{error:.3e}"] for name, error in summary.worst()),
            ["time", f"{summary.seconds:,.1f} s"]]  # fmt: skip
    console.print_table(f"{summary.out}", ["what", "figure"], rows)
    console.note(f"try: llamita chat {summary.out}")


def _summary_values(summary: Summary, scheme: QuantScheme) -> dict[str, Any]:
    return {
        "out": str(summary.out),
        "scheme": scheme.to_dict(),
        **asdict(summary.plan),
        "ratio": summary.plan.ratio,
        "seconds": summary.seconds,
        "mean_squared_error": summary.mean_squared_error,
        "relative_error": summary.relative_error,
        "worst_layers": dict(summary.worst()),
    }
