"""`llamita quantize`: a checkpoint in, a packed directory out."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from llamita import console
from llamita.calibration import load_calibration
from llamita.checkpoint import Checkpoint, resolve
from llamita.errors import InputError
from llamita.files import has
from llamita.methods.chain import METHODS, TRANSFORMS, TUNINGS, Chain, parse_chain
from llamita.methods.setup import Setup
from llamita.needs import estimate
from llamita.packed import METADATA
from llamita.plan import describe
from llamita.quantize import Plan, Summary, make_plan, quantize
from llamita.scheme import PRESETS, SCALE_RULES, QuantScheme, make_scheme
from llamita.staging import check_target
from llamita.threads import use_threads
from llamita.tokenizer import Tokenizer

_PRESETS = ", ".join(PRESETS)
_METHODS = ", ".join([*METHODS, *TRANSFORMS, *TUNINGS])


# The options, each with what `--help` says of it.
_Src = Annotated[
    str, typer.Argument(metavar="SRC", help="A Hugging Face directory, a hub name, or 'embedded'.")
]
_Out = Annotated[Path | None, typer.Option("--out", "-o", help="The directory to make.")]
_Preset = Annotated[str, typer.Option(help=f"The scheme: {_PRESETS}.")]
_GroupSize = Annotated[int | None, typer.Option(help="Weights that share a scale: 32, 64, 128 or 256.")]
_Method = Annotated[str, typer.Option(help=f"How weights are rounded: {_METHODS}; or several joined by +.")]
_Scales = Annotated[str | None, typer.Option(help=f"How scales are chosen: {', '.join(SCALE_RULES)}.")]
_Text = Annotated[
    str, typer.Option(metavar="TEXT", help="For methods that look at activations: a text file, or 'self'.")
]
_Samples = Annotated[int, typer.Option(min=1, help="Pieces of calibration text.")]
_Length = Annotated[int, typer.Option(min=2, help="Tokens of each.")]
_Seed = Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan and write nothing.")]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if llamita made it.")]
_Threads = Annotated[int | None, typer.Option(help="Threads to use; all cores by default.", min=1)]
_Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


def command(
    src: _Src,
    out: _Out = None,
    preset: _Preset = "llamita",
    group_size: _GroupSize = None,
    method: _Method = "rtn",
    scales: _Scales = None,
    calibration: _Text = "self",
    samples: _Samples = 128,
    length: _Length = 512,
    seed: _Seed = 0,
    dry_run: _DryRun = False,
    overwrite: _Overwrite = False,
    threads: _Threads = None,
    json: _Json = False,
) -> None:
    """Turn a Llama checkpoint into a 4-bit model: rounded, packed, verified by hashes, licence included.

    Example: llamita quantize meta-llama/Llama-3.2-1B-Instruct -o llama-1b-4bit --preset llama3.2
    """
    scheme = make_scheme(preset, group_size, scales)
    chain = parse_chain(method)
    use_threads(threads)
    if dry_run:
        _dry_run(src, scheme, chain, (samples, length), json)
        return
    if out is None:
        raise InputError("--out: expected the directory to make, got none; try -o NAME, or --dry-run")
    path = resolve(src)
    if has(path, METADATA):
        raise InputError(f"{src}: expected a float model, got one that llamita has quantized; try its source")
    check_target(out, overwrite, path)  # before a text is written
    source = Checkpoint(path)
    with console.progress(quiet=json) as progress:
        setup = _setup(source, chain, (calibration, samples, length), seed)
        _announce(source, scheme, chain, setup)
        summary = quantize(source, src, out, scheme, method, setup, overwrite=overwrite, progress=progress)
    source.close()
    if json:
        console.print_json(_summary_values(summary, scheme))
    else:
        _print_summary(summary, scheme)


def _setup(source: Checkpoint, chain: Chain, text: tuple[str, int, int], seed: int) -> Setup:
    """What the chain needs; `text` is the calibration's name, samples and length."""
    if not chain.needs_calibration:
        return Setup(seed=seed)
    name, samples, length = text
    if length > source.config.context:
        raise InputError(f"--length: expected at most {source.config.context} tokens, got {length}")
    tokenizer = Tokenizer(source.path, source.config)
    return Setup(load_calibration(name, source, tokenizer, samples, length, seed), seed)


def _announce(source: Checkpoint, scheme: QuantScheme, chain: Chain, setup: Setup) -> None:
    """What will be needed, where it is more than moments and little memory."""
    if chain.is_blockwise and setup.calibration is not None:
        plan = make_plan(source.config, scheme, lambda name: source.info(name).dtype)
        samples, length = setup.calibration.tokens.shape
        seconds, memory = estimate(plan, scheme, source.config, chain, setup, samples, length)
        console.note(f"{chain}: about {seconds:,.0f} s and {console.megabytes(memory)} of memory to expect")


def _dry_run(src: str, scheme: QuantScheme, chain: Chain, text: tuple[int, int], json: bool) -> None:
    """`text` is the calibration's samples and length."""
    model = describe(src)
    if model.scheme is not None:
        raise InputError(f"{src}: expected a float model, got one that llamita has quantized; try its source")
    plan = make_plan(model.config, scheme, model.float_dtype)
    seconds, memory = estimate(plan, scheme, model.config, chain, Setup(), *text)
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
            ["time", f"{summary.seconds:,.1f} s"],
            *([["memory", console.megabytes(summary.memory)]] if summary.memory else [])]  # fmt: skip
    console.print_table(f"{summary.out}", ["what", "figure"], rows)
    console.note(f"try: llamita chat {summary.out}")


def _summary_values(summary: Summary, scheme: QuantScheme) -> dict[str, Any]:
    return {
        "out": str(summary.out),
        "scheme": scheme.to_dict(),
        **asdict(summary.plan),
        "ratio": summary.plan.ratio,
        "seconds": summary.seconds,
        "memory_bytes": summary.memory,
        "mean_squared_error": summary.mean_squared_error,
        "relative_error": summary.relative_error,
        "worst_layers": dict(summary.worst()),
    }
