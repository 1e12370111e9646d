"""`llamita quantize`: a float model in, a packed model out."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from llamita.commands import console
from llamita.commands.options import (
    CalibrationText,
    FitGroups,
    GroupSize,
    Json,
    Length,
    Out,
    Overwrite,
    Revision,
    Samples,
    Seed,
    Threads,
    model_argument,
)
from llamita.commands.selection import parse_goal, print_selection, selection_values
from llamita.commands.sources import describe_source
from llamita.errors import InputError
from llamita.methods.chain import METHODS, check_sizes
from llamita.methods.setup import Setup, parse_settings
from llamita.models.config import ModelConfig
from llamita.models.layer_kinds import describe_kinds
from llamita.models.sizes import Plan
from llamita.numerics.scheme import PRESETS, SCALE_RULES, QuantScheme, make_scheme
from llamita.quantize.calibration import CalibrationSpec
from llamita.quantize.cost import estimate, plan_chain
from llamita.quantize.pipeline import QuantizeJob, Summary, run
from llamita.system import processes
from llamita.system.threads import use_threads
from llamita.text.printable import megabytes

_Src = Annotated[str, model_argument("SRC", "A float model, or 'embedded'")]
_Preset = Annotated[
    str,
    typer.Option(
        help=f"Scheme and method: {', '.join(PRESETS)} (closest to the float model; calibrates, needs Torch)."
    ),
]
_Method = Annotated[
    str | None, typer.Option(help=f"Method in place of the preset's: {', '.join(METHODS)}; join several with +.")
]
_Scales = Annotated[str | None, typer.Option(help=f"How scales are chosen: {', '.join(SCALE_RULES)}.")]
_KeepFloat = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Leave these layers in float, such as '*.down_proj'; repeatable."),
]
_MaxSize = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Choose layer by layer: least loss in 700MB of weights.")
]
_MaxLoss = Annotated[
    float | None, typer.Option(metavar="KL", help="Choose layer by layer: least size with at most this loss.")
]
_Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Set a method's setting, such as spinquant.steps=0; repeatable."),
]
_NoRuntimeRotation = Annotated[
    bool,
    typer.Option(
        "--no-runtime-rotation",
        "--no-online",
        help="Rotate nothing at run time (R4, see docs/reference/glossary.md); R1 then gives the head a table.",
    ),
]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan and write nothing.")]


def command(
    src: _Src,
    out: Out = None,
    revision: Revision = None,
    preset: _Preset = "llama3.2",
    group_size: GroupSize = None,
    fit_groups: FitGroups = False,
    method: _Method = None,
    scales: _Scales = None,
    calibration: CalibrationText = None,
    samples: Samples = 128,
    length: Length = 512,
    seed: Seed = 0,
    keep_float: _KeepFloat = None,
    max_size: _MaxSize = None,
    max_loss: _MaxLoss = None,
    settings: _Set = None,
    no_runtime_rotation: _NoRuntimeRotation = False,
    dry_run: _DryRun = False,
    overwrite: Overwrite = False,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Turn a Llama checkpoint into a 4-bit model: rounded, packed, verified by hashes, with its licence.

    Example: llamita quantize meta-llama/Llama-3.2-1B-Instruct -o llama-1b-4bit --preset llamita
    """
    job = QuantizeJob(
        src, out or Path(), preset, make_scheme(preset, group_size, scales), method, parse_settings(settings or []),
        not no_runtime_rotation, CalibrationSpec(calibration, samples, length, seed), tuple(keep_float or ()),
        parse_goal(max_size, max_loss, dry_run), overwrite, fit_groups,
    )  # fmt: skip
    use_threads(processes.fair_threads(threads))
    if dry_run:
        return _dry_run(job, json)
    if out is None:
        raise InputError("--out", "the directory to make", "none", "try -o NAME, or --dry-run")
    with console.progress(quiet=json or processes.rank() > 0) as progress:
        summary = run(job, progress, console.note)
    if summary is None:  # another process than the first
        return
    if json:
        console.print_json(_summary_values(summary) | selection_values(summary.selection))
    else:
        print_selection(summary.config, summary.selection)
        _print_summary(job, summary)


def _dry_run(job: QuantizeJob, json: bool) -> None:
    model, chain = describe_source(str(job.source), quiet=json), job.chain
    scheme, setup = job.scheme_for(model.config), Setup(settings=job.all_settings)
    if model.scheme is not None:
        raise InputError(f"{job.source}", "a float model", "one that llamita has quantized", "try its source")
    check_sizes(chain, setup.settings, model.config)
    plan = plan_chain(model.config, scheme, model.float_dtype, chain, setup.settings, model.source_bytes)
    text = job.calibration
    seconds, memory = estimate(plan, scheme, model.config, chain, setup, text.samples, text.length)
    if json:
        expected = {"method": str(chain), "seconds_estimate": seconds, "memory_bytes_estimate": memory}
        console.print_json({"dry_run": True, "scheme": scheme.to_dict(), **asdict(plan), **expected})
        return
    rows = [*_plan_rows(plan, scheme, model.config), ["method", str(chain)],
            ["time to quantize, about", f"{seconds:,.0f} s"],
            ["memory to quantize, about", megabytes(memory)]]  # fmt: skip
    console.print_table(f"plan for {job.source} (nothing is written)", ["what", "figure"], rows)


def _plan_rows(plan: Plan, scheme: QuantScheme, config: ModelConfig) -> list[list[str]]:
    tables = "int8 per channel" if scheme.table_bits else "float"
    others = [["layers stored otherwise", f"{len(scheme.layers)}"]] if scheme.layers else []
    return [
        ["scheme", f"{scheme.name}: int4, groups of {scheme.group_size}"],
        *others,
        ["scales", f"{scheme.scale_rule}, {scheme.scale_dtype}"],
        ["linear layers", describe_kinds(config, scheme) if scheme.layers else f"{plan.linear_layers}"],
        ["embedding and head", tables],
        ["size before", megabytes(plan.source_bytes)],
        ["size after", f"{megabytes(plan.tensor_bytes)} ({plan.ratio:.1%})"],
        ["weight files, with headers", f"{len(plan.files)}, {megabytes(plan.file_bytes)}"],
    ]


def _print_summary(job: QuantizeJob, summary: Summary) -> None:
    # A blockwise method may move a weight far and lose little, so the largest errors would mislead.
    worst = [] if job.chain.is_blockwise else summary.worst()
    rows = [*_plan_rows(summary.plan, summary.scheme, summary.config),
            ["mean squared error", f"{summary.mean_squared_error:.3e}"],
            ["relative squared error of weights", f"{summary.relative_error:.3e}"],
            *([f"  worst: {name}", f"{error:.3e}"] for name, error in worst),
            ["time", f"{summary.seconds:,.1f} s"],
            *([["memory", megabytes(summary.memory)]] if summary.memory else [])]  # fmt: skip
    console.print_table(f"{summary.out}", ["what", "figure"], rows)
    if job.chain.is_blockwise:
        console.note("the errors are those of weights; calibrated methods lower the errors of layers' outputs instead")
    console.note(f"try: llamita chat {summary.out}")
    if job.chain.names == ("rtn",) and summary.selection is None:
        console.note("closer to the float model: --preset llamita, which calibrates (needs llamita[torch])")


def _summary_values(summary: Summary) -> dict[str, Any]:
    return {
        "out": str(summary.out),
        "scheme": summary.scheme.to_dict(),
        **asdict(summary.plan),
        "ratio": summary.plan.ratio,
        "seconds": summary.seconds,
        "memory_bytes": summary.memory,
        "mean_squared_error": summary.mean_squared_error,
        "relative_error": summary.relative_error,
        "worst_layers": dict(summary.worst()),
    }
