"""`llamita quantize`: a checkpoint in, a packed directory out."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from llamita import __version__
from llamita.bench.plan import describe
from llamita.commands import console
from llamita.commands.options import CalibrationText, GroupSize, Json, Length, Out, Overwrite, Samples, Seed, Threads
from llamita.commands.selection import check_goal, choose, parse_goal, print_selection, selection_values
from llamita.commands.sources import convert_first
from llamita.errors import InputError
from llamita.imports.open import open_source, resolve
from llamita.methods.chain import (
    METHODS,
    OFFLINE_METHODS,
    PRESET_METHODS,
    TRANSFORMS,
    TUNINGS,
    Chain,
    check,
    check_sizes,
    parse_chain,
)
from llamita.methods.settings import check as check_settings
from llamita.methods.settings import settable
from llamita.methods.setup import Calibration, Setup, parse_settings
from llamita.models import layer_kinds
from llamita.models.checkpoint import Checkpoint
from llamita.models.config import ModelConfig
from llamita.models.metadata import METADATA
from llamita.models.sizes import Plan
from llamita.numerics.scheme import PRESETS, SCALE_RULES, QuantScheme, make_scheme
from llamita.quantize.calibration import SELF, SELF_FAST, load_calibration
from llamita.quantize.chain_sizes import plan_chain
from llamita.quantize.cost import estimate
from llamita.quantize.layer_choice import Selection, finished_loss
from llamita.quantize.pipeline import Summary, quantize, take_part
from llamita.system import processes
from llamita.system.files import exists_in
from llamita.system.kept_work import has_kept_work, kept_work
from llamita.system.progress import Progress
from llamita.system.staging import check_target
from llamita.system.threads import use_threads
from llamita.text.printable import megabytes

_PRESETS = ", ".join(PRESETS)
_METHODS = ", ".join([*METHODS, *TRANSFORMS, *TUNINGS])


# The options, each with what `--help` says of it.
_Src = Annotated[str, typer.Argument(metavar="SRC", help="A model directory, a .gguf, a hub name, or 'embedded'.")]
_Preset = Annotated[str, typer.Option(help=f"The scheme: {_PRESETS} (the closest; calibrates, needs Torch).")]
_Method = Annotated[
    str | None,
    typer.Option(help=f"How weights are rounded: {_METHODS}; or several joined by +. The preset's by default."),
]
_Scales = Annotated[str | None, typer.Option(help=f"How scales are chosen: {', '.join(SCALE_RULES)}.")]
_KeepFloat = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Layers to leave in float, such as '*.down_proj'; repeatable."),
]
_MaxSize = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Choose layer by layer: least loss in 700MB of weights.")
]
_MaxLoss = Annotated[
    float | None, typer.Option(metavar="KL", help="Choose layer by layer: least size with at most this loss.")
]
_Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="A method's setting, as spinquant.steps=0; repeatable."),
]
_NoOnline = Annotated[bool, typer.Option("--no-online", help="A plain Llama: no R4; tables untied where R1 is used.")]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan and write nothing.")]


def command(
    src: _Src,
    out: Out = None,
    preset: _Preset = "llama3.2",
    group_size: GroupSize = None,
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
    no_online: _NoOnline = False,
    dry_run: _DryRun = False,
    overwrite: Overwrite = False,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Turn a Llama checkpoint into a 4-bit model: rounded, packed, verified by hashes, licence included.

    Example: llamita quantize meta-llama/Llama-3.2-1B-Instruct -o llama-1b-4bit --preset llamita
    """
    scheme = make_scheme(preset, group_size, scales)
    chain, chosen = _chain(preset, method, settings or [], no_online)
    goal = parse_goal(max_size, max_loss, dry_run)
    use_threads(processes.fair_threads(threads))
    if dry_run:
        return _dry_run(src, scheme, chain, Setup(settings=chosen), (samples, length), keep_float or [], json)
    if out is None:
        raise InputError("--out", "the directory to make", "none", "try -o NAME, or --dry-run")
    source, is_first = _open(src, out, overwrite), processes.rank() == 0
    check(chain, chosen, source.config)
    text = _text_choice(chain, chosen, goal is not None, calibration, (samples, length, seed))
    scheme = layer_kinds.keep_float(source.config, scheme, keep_float or [])
    check_goal(source, scheme, goal, chain, chosen)
    with console.progress(quiet=json or not is_first) as progress, _kept_text(source, out, text) as work:
        setup = Setup(_text(source, text, progress, work), seed, settings=chosen)
        scheme, setup, selection = choose(source, scheme, goal, chain, setup, progress)
        if not is_first:
            return take_part(source, scheme, str(chain), setup)
        _announce(source, scheme, chain, setup)
        with _going_on(out, chain, chosen):
            summary = quantize(source, src, out, scheme, str(chain), setup, overwrite, progress=progress)
    selection = _judged(selection, source, out, chain, setup.calibration)
    source.close()
    _print_result(summary, source.config, scheme, chain, selection, json)


def _chain(preset: str, method: str | None, settings: list[str], no_online: bool) -> tuple[Chain, dict[str, Any]]:
    """The chain that was asked for, or the preset's with what that sets, and its settings."""
    if no_online and not method and preset in OFFLINE_METHODS:
        methods, no_online = OFFLINE_METHODS, False
    else:
        methods = PRESET_METHODS
    named, chosen = (method, {}) if method else methods.get(preset, ("rtn", {}))
    chain = parse_chain(named)
    chosen = chosen | parse_settings(settings, settable(chain.names))
    if no_online:
        if "spinquant" not in chain.names:
            raise InputError("--no-online", "a method with spinquant", f"{chain}", "try without --no-online")
        chosen["spinquant.online"] = False
    check_settings(chain.names, chosen)
    return chain, chosen


def _open(src: str, out: Path, overwrite: bool) -> Checkpoint:
    """The float model, once it is known that OUT can be made: before a text is written."""
    convert_first(src)
    path = resolve(src)
    if exists_in(path, METADATA):
        raise InputError(f"{src}", "a float model", "one that llamita has quantized", "try its source")
    if processes.rank() == 0:
        check_target(out, overwrite, path)
    return Checkpoint(path)


_TextChoice = tuple[str, int, int, int] | None  # calibration's name, samples, length, seed


def _text_choice(
    chain: Chain, settings: dict[str, Any], has_goal: bool, name: str | None, rest: tuple[int, int, int]
) -> _TextChoice:
    """What to calibrate on, if anything does: name, then samples, length and seed."""
    is_needed = has_goal or chain.needs_calibration(settings)
    if not is_needed and name is not None:
        raise InputError("--calibration", "a method that looks at activations", f"{chain}", "try gptq")
    return (name or SELF, *rest) if is_needed else None


def _text(source: Checkpoint, text: _TextChoice, progress: Progress, work: Path | None) -> Calibration | None:
    if text is None:
        return None
    name, samples, length, seed = text
    return load_calibration(name, source, samples, length, seed, progress, work)


def _kept_text(source: Checkpoint, out: Path, text: _TextChoice) -> AbstractContextManager[Path | None]:
    """Where text that the model writes is kept until OUT is there."""
    if text is None or text[0] not in (SELF, SELF_FAST) or processes.world() > 1:
        return nullcontext()
    stats = [(path.name, path.stat()) for path in sorted(source.path.iterdir())]  # weights, config, tokenizer
    files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    known = {"llamita": __version__, "source": str(source.path.resolve()), "files": files, "text": text}
    return kept_work(out.with_name(f"{out.name}.text"), known)


def _announce(source: Checkpoint, scheme: QuantScheme, chain: Chain, setup: Setup) -> None:
    """What will be needed, where it is more than moments and little memory."""
    if setup.calibration is not None and chain.needs_calibration(setup.settings):
        plan = plan_chain(source.config, scheme, lambda name: source.info(name).dtype, chain, setup.settings)
        samples, length = setup.calibration.tokens.shape
        seconds, memory = estimate(plan, scheme, source.config, chain, setup, samples, length)
        console.note(f"{chain}: about {seconds:,.0f} s and {megabytes(memory)} of memory to expect")


def _judged(
    selection: Selection | None, source: Checkpoint, out: Path, chain: Chain, calibration: Calibration | None
) -> Selection | None:
    """With what the finished model loses, where it was not rounded to nearest as the choice assumed."""
    if selection is None or calibration is None or chain.names == ("rtn",):
        return selection
    finished = open_source(out)
    try:
        return replace(selection, finished=finished_loss(source, finished, calibration.tokens))
    finally:
        finished.close()


def _print_result(
    summary: Summary, config: ModelConfig, scheme: QuantScheme, chain: Chain, selection: Any, json: bool
) -> None:
    if json:
        console.print_json(_summary_values(summary, scheme) | selection_values(selection))
    else:
        print_selection(config, selection)
        _print_summary(summary, scheme, chain, is_chosen=selection is not None)


@contextmanager
def _going_on(out: Path, chain: Chain, settings: dict[str, Any]) -> Iterator[None]:
    """Say that a run that was stopped is gone on with, and of one that is being stopped, that it can be."""
    keeps = chain.needs_calibration(settings) and processes.world() == 1
    if keeps and has_kept_work(out):
        console.note(f"{out}: an earlier run left what it had finished; used if that was this very command")
    try:
        yield
    except KeyboardInterrupt:
        if keeps and has_kept_work(out):
            console.note("stopped; the same command goes on from here")
        raise


def _dry_run(
    src: str, scheme: QuantScheme, chain: Chain, setup: Setup, text: tuple[int, int], patterns: list[str], json: bool
) -> None:
    """`text` is the calibration's samples and length."""
    model = describe(src)
    scheme = layer_kinds.keep_float(model.config, scheme, patterns)
    if model.scheme is not None:
        raise InputError(f"{src}", "a float model", "one that llamita has quantized", "try its source")
    check_sizes(chain, setup.settings, model.config)
    plan = plan_chain(model.config, scheme, model.float_dtype, chain, setup.settings)
    seconds, memory = estimate(plan, scheme, model.config, chain, setup, *text)
    if json:
        expected = {"method": str(chain), "seconds_estimate": seconds, "memory_bytes_estimate": memory}
        console.print_json({"dry_run": True, "scheme": scheme.to_dict(), **asdict(plan), **expected})
        return
    rows = [*_plan_rows(plan, scheme), ["method", str(chain)],
            ["time to quantize, about", f"{seconds:,.0f} s"],
            ["memory to quantize, about", megabytes(memory)]]  # fmt: skip
    console.print_table(f"plan for {src} (nothing is written)", ["what", "figure"], rows)


def _plan_rows(plan: Plan, scheme: QuantScheme) -> list[list[str]]:
    tables = "int8 per channel" if scheme.table_bits else "float"
    others = [["layers stored otherwise", f"{len(scheme.layers)}"]] if scheme.layers else []
    return [
        ["scheme", f"{scheme.name}: int4, groups of {scheme.group_size}"],
        *others,
        ["scales", f"{scheme.scale_rule}, {scheme.scale_dtype}"],
        ["linear layers", f"{plan.linear_layers}"],
        ["embedding and head", tables],
        ["size before", megabytes(plan.source_bytes)],
        ["size after", f"{megabytes(plan.tensor_bytes)} ({plan.ratio:.1%})"],
        ["weight files", f"{len(plan.files)}, {megabytes(plan.file_bytes)}"],
    ]


def _print_summary(summary: Summary, scheme: QuantScheme, chain: Chain, is_chosen: bool) -> None:
    worst = [] if chain.is_blockwise else summary.worst()  # weights that moved most are not what lost most
    rows = [*_plan_rows(summary.plan, scheme), ["mean squared error", f"{summary.mean_squared_error:.3e}"],
            ["relative squared error", f"{summary.relative_error:.3e}"],
            *([f"  worst: {name}", f"{error:.3e}"] for name, error in worst),
            ["time", f"{summary.seconds:,.1f} s"],
            *([["memory", megabytes(summary.memory)]] if summary.memory else [])]  # fmt: skip
    console.print_table(f"{summary.out}", ["what", "figure"], rows)
    console.note(f"try: llamita chat {summary.out}")
    if chain.names == ("rtn",) and not is_chosen:
        console.note("closer to the float model: --preset llamita, which calibrates (needs llamita[torch])")


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
