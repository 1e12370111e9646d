"""Fine-tune a model on data into a checkpoint, adapters or a 4-bit model: `llamita finetune`."""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from llamita.commands import console
from llamita.commands.options import FitGroups, GroupSize, Json, Out, Overwrite, Revision, Seed, Threads, model_argument
from llamita.commands.sources import convert_first
from llamita.errors import InputError, shown
from llamita.imports.open import open_float, resolve
from llamita.models.checkpoint import Checkpoint
from llamita.models.config import ModelConfig
from llamita.models.metadata import METADATA
from llamita.models.weights import places_of
from llamita.numerics.scheme import GROUP_SIZES, PRESETS
from llamita.system import processes
from llamita.system.extras import load_optional
from llamita.system.kept_work import has_kept_work
from llamita.system.machine import MemoryWatch
from llamita.system.staging import check_target
from llamita.system.threads import use_threads
from llamita.text.printable import counted
from llamita.train.data import Data, load_data, with_preferences
from llamita.train.job import FinetuneJob
from llamita.train.memory import expected_memory
from llamita.train.recipe import METHODS, Recipe, adapter_place, change, read_recipe
from llamita.train.start import parse_start
from llamita.train.tasks import TASKS

RUN = "llamita.train.run:run"
_DEFAULT = "lora"  # of METHODS
_FEW_STEPS = 20  # fewer steps than this give a note
_SMALL_BATCH = 4  # rows
_LACKING = (
    "finetune: expected the package {package}, found none; try pip install 'llamita[torch]' (in a checkout '.[torch]')"
)

_Base = Annotated[str, model_argument("BASE", "A float model, or 'embedded'")]
_Data = Annotated[str, typer.Option(metavar="DATA", help="A file (JSONL, JSON, TSV, text) or a hub data set.")]
_Preferences = Annotated[
    str | None,
    typer.Option(metavar="DATA", help="Pairs (prompt, chosen, rejected) for the stage that learns preferences (DPO)."),
]
_Task = Annotated[str | None, typer.Option(help=f"The kind of records: {', '.join(TASKS)}; by columns by default.")]
_Method = Annotated[str | None, typer.Option(help=f"What to train: {', '.join(METHODS)}; {_DEFAULT} by default.")]
_Recipe = Annotated[str | None, typer.Option(metavar="NAME|FILE", help="Every setting, in YAML, in place of --method.")]
_Preset = Annotated[
    str | None, typer.Option(help=f"The scheme of a 4-bit result: {', '.join(PRESETS)}; the recipe's by default.")
]
_Teacher = Annotated[
    str | None, typer.Option(metavar="SRC", help="The float model that distilling stages learn from; BASE by default.")
]
_Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Change a setting of the recipe: learning_rate=1e-4; repeatable."),
]
_Limit = Annotated[int | None, typer.Option(min=1, help="Read at most this many records.")]
_SkipBadRows = Annotated[
    bool, typer.Option("--skip-bad-rows", help="Leave out rows that cannot be used, such as those with an empty cell.")
]
_ReportTo = Annotated[str, typer.Option(help="Where transformers reports to: none, tensorboard, wandb, ….")]
_Shard = Annotated[
    bool, typer.Option("--shard", help="Under torchrun: each process holds its part of the weights (Torch's FSDP2).")
]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Read the data, show the plan, and train nothing.")]


def command(
    base: _Base,
    data: _Data,
    out: Out = None,
    revision: Revision = None,
    preferences: _Preferences = None,
    task: _Task = None,
    method: _Method = None,
    recipe: _Recipe = None,
    preset: _Preset = None,
    group_size: GroupSize = None,
    fit_groups: FitGroups = False,
    teacher: _Teacher = None,
    settings: _Set = None,
    seed: Seed = 0,
    limit: _Limit = None,
    skip_bad_rows: _SkipBadRows = False,
    report_to: _ReportTo = "none",
    shard: _Shard = False,
    dry_run: _DryRun = False,
    overwrite: Overwrite = False,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Fine-tune a model on your data: in float, or with the rounding of the 4-bit model in every step.

    Example: llamita finetune meta-llama/Llama-3.2-1B-Instruct --data chats.jsonl --method qat -o tuned-4bit
    """
    chosen = _recipe(method, recipe, preset, group_size, fit_groups, settings or [], preferences)
    _check_processes(chosen, shard)
    use_threads(processes.fair_threads(threads))
    is_first = processes.rank() == 0
    convert_first(base, teacher, quiet=json)
    source = _open_float(base, "BASE")
    other = _teacher_path(teacher, source, chosen)
    if not dry_run:
        _check_out(out, chosen, overwrite, *places_of(source), other)
    with console.progress(quiet=json or not is_first) as progress:
        found = load_data(data, task, source, chosen, seed, limit, progress, skip_bad_rows)
        if preferences is not None:
            found = with_preferences(found, preferences, source, chosen, seed, limit)
        console.note(found.note if is_first else None)
        if dry_run or out is None:
            return _print_plan(found, chosen, source.config, shard, json) if is_first else None
        job = FinetuneJob(source, chosen, found, out, base, data, task, other, seed, report_to, overwrite, shard,
                          progress)  # fmt: skip
        result = _train(load_optional(RUN, _LACKING), job)
    if is_first:
        _print_result(out, result, found, chosen, json)


def _check_out(out: Path | None, recipe: Recipe, overwrite: bool, *read: Path | None) -> None:
    """Check that OUT replaces nothing that is read, and that no adapters of an earlier OUT would remain."""
    if out is None:
        raise InputError("--out", "the directory to make", "none", "try -o NAME, or --dry-run")
    if not out.name:
        raise InputError("--out", "a directory to make", str(out), "try -o NAME")
    adapters = adapter_place(out)
    has_two = recipe.is_quantized and recipe.has_adapters
    for path in read:
        check_target(out, overwrite, path)
        if has_two:
            check_target(adapters, overwrite, path)
    if out.exists() and adapters.exists() and not has_two:
        problem = f"--out: {adapters} has the adapters of the {out.name} that would be replaced"
        raise InputError(problem, hint="try removing it, or another name")


def _teacher_path(name: str | None, source: Checkpoint, recipe: Recipe) -> Path | None:
    if name is None:
        return None
    if not any(stage.distill for stage in recipe.stages):
        raise InputError("--teacher", "a stage that distils", "none", "try --set distill=0.5")
    teacher = _open_float(name, "--teacher")
    expected, found = source.config.vocab_size, teacher.config.vocab_size
    if found != expected:
        raise InputError("--teacher", f"the {expected:,} tokens of BASE", f"{found:,}")
    return teacher.path


def _recipe(
    method: str | None, name: str | None, preset: str | None, group_size: int | None, fits: bool,
    settings: list[str], preferences: str | None,
) -> Recipe:  # fmt: skip
    if method is not None and method not in METHODS:
        raise InputError("--method", f"one of {', '.join(METHODS)}", shown(method))
    if method is not None and name is not None:
        raise InputError("--recipe", "no --method", "both")
    if preset is not None and preset not in PRESETS:
        raise InputError("--preset", f"one of {', '.join(PRESETS)}", shown(preset))
    if group_size is not None and group_size not in GROUP_SIZES:
        raise InputError("--group-size", ", ".join(map(str, GROUP_SIZES)), str(group_size))
    recipe = _with_or_without(read_recipe(name or METHODS[method or _DEFAULT]), preferences)
    scheme = [f"preset={preset}"] if preset else []
    scheme += [f"group_size={group_size}"] if group_size else []
    scheme += ["fit_groups=true"] if fits else []
    changed = change(recipe, [*scheme, *settings])
    if scheme and not changed.is_quantized:
        expected = "a method that makes a 4-bit model, such as qat"
        raise InputError("--preset, --group-size, --fit-groups", expected, hint="try quantize on the result")
    parse_start(changed.start)
    return changed


def _with_or_without(recipe: Recipe, preferences: str | None) -> Recipe:
    """Return the recipe without the stages that no data was given for."""
    if preferences is not None:
        if not recipe.prefers:
            expected = "a recipe with a stage that learns from them"
            raise InputError("--preferences", expected, hint="try --recipe llama3.2-qat-lora")
        return recipe
    if all(stage.prefers for stage in recipe.stages):
        raise InputError("--preferences", "pairs of answers for this recipe", "none")
    return recipe.without_preferences()


def _check_processes(recipe: Recipe, shard: bool) -> None:
    world, (start, _) = processes.world(), parse_start(recipe.start)
    least = min(stage.batch for stage in recipe.stages)
    if least < world:
        raise InputError("batch", f"a row for each of {world} processes", str(least), "try fewer processes")
    if start.tuning and world > 1:
        hint = f"try --set start={replace(start, tuning=None)}"
        raise InputError("start", f"a single process for {start.tuning}", str(world), hint)
    if recipe.prefers and world > 1:
        raise InputError("--preferences", "a single process", str(world), "try without torchrun")
    if shard and world == 1:
        raise InputError("--shard", "several processes", "one", "try torchrun --nproc-per-node N")
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        if os.environ.get(name, "").lower() == "true":
            raise InputError(name, "accelerate to do nothing but start processes", hint="try --shard")


def _open_float(name: str, option: str) -> Checkpoint:
    path = resolve(name)
    if (path / METADATA).exists():
        raise InputError(option, "a float model", "a packed one", "try the model that it was made from")
    return open_float(path)


def _train(run: Callable[[FinetuneJob], dict[str, Any]], job: FinetuneJob) -> dict[str, Any]:
    """Run the job and measure its time and memory."""
    if processes.rank() == 0 and has_kept_work(job.out):
        condition = " if its settings are the same" if job.overwrite else ""
        console.note(f"{job.out}: resuming an earlier run{condition}")
    began, watch = time.perf_counter(), MemoryWatch()
    with watch:
        result = run(job)
    return result | {"seconds": time.perf_counter() - began, "memory_bytes": watch.peak}


def _print_plan(data: Data, recipe: Recipe, config: ModelConfig, is_sharded: bool, json: bool) -> None:
    shards = processes.world() if is_sharded else 1
    learned, measured = data.learned, len(data.measured)
    rows, length = data.rows.ids.shape
    values = {"examples": learned, "held_out_examples": measured, "rows": rows, "length": length,
              "tokens": rows * length, "learned_tokens": data.learned_tokens,
              "memory_bytes": {"cpu": expected_memory(config, recipe, on_gpu=False, shards=shards),
                               "gpu": expected_memory(config, recipe, on_gpu=True, shards=shards)},
              "recipe": recipe.to_dict()}  # fmt: skip
    if json:
        return console.print_json(values)
    table = [
        ["examples learned, measured", f"{learned:,}, {measured:,}"],
        ["rows of tokens", f"{rows:,} of {length:,}"],
        ["tokens that the loss counts", f"{data.learned_tokens:,} ({data.learned_tokens / (rows * length):.0%})"],
    ]
    table += [
        [
            f"stage {n}: {s.train}{', rounded' if s.quantized else ''}{', preferences' if s.prefers else ''}",
            _schedule(s, len(data.pairs) if s.prefers else rows),
        ]
        for n, s in enumerate(recipe.stages, 1)
    ]
    memory = cast(dict[str, float], values["memory_bytes"])
    table.append(["memory, estimated", f"{memory['cpu'] / 1e9:,.1f} GB; {memory['gpu'] / 1e9:,.1f} GB on a GPU"])
    console.print_table("What would be trained", ["", ""], table)
    _note_few_steps(data, recipe)


def _schedule(stage: Any, rows: int) -> str:
    of = min(stage.batch, rows)
    return f"{counted(stage.count_steps(rows), 'step')} of {of}, learning rate {stage.learning_rate:g}"


def _note_few_steps(data: Data, recipe: Recipe) -> None:
    """Print a note if training will hardly change the model."""
    rows, stages = len(data.rows.ids), [stage for stage in recipe.stages if not stage.prefers]
    steps = max((stage.count_steps(rows) for stage in stages), default=_FEW_STEPS)
    if steps < _FEW_STEPS and all(stage.steps is None for stage in recipe.stages):
        batch = min(stage.batch for stage in stages)
        setting = f"batch={_SMALL_BATCH}" if _SMALL_BATCH < batch <= rows else f"steps={_FEW_STEPS}"
        console.note(f"only {counted(steps, 'step')}: little may be learned; try --set {setting}, more epochs or a "
                     "higher learning_rate")  # fmt: skip


def _stage_line(stage: dict[str, Any]) -> str:
    """Return a line with the losses of a stage, which are those of `StageResult`."""
    rose = "; it rose: try a lower learning_rate" if stage["last"] > stage["first"] else ""
    parts = [f"training loss {stage['first']:.3f} to {stage['last']:.3f}{rose}"]
    if stage["held_out"] is not None:
        parts.append(f"held out {stage['held_out']:.3f}")
    if stage["preferred"] is not None:
        parts.append(f"{stage['preferred']:.0%} of held-out pairs in order")
    return f"stage {stage['stage']}: {', '.join(parts)}"


def _print_result(out: Path, result: dict[str, Any], data: Data, recipe: Recipe, json: bool) -> None:
    _note_few_steps(data, recipe)
    if json:
        return console.print_json({"out": str(out), **result})
    scores = result["scores"]
    measures = list(scores[0][2]) if scores else []
    rows = [[name, f"{loss:.4f}", *(f"{found[m]:.1f}" for m in measures)] for name, loss, found in scores]
    console.print_line(f"{out}: {result['kind']}")
    if rows:
        models = f"model, on {result['measured']:,} examples"
        console.print_table("Held-out examples", [models, "loss", *measures], rows)
    for stage in result["stages"]:
        console.note(_stage_line(stage))
    rate = f"{result['tokens_per_second']:,.0f} tokens/s" if result["tokens_per_second"] else "nothing left to train"
    console.note(f"{rate}, {result['seconds']:,.0f} s, {result['memory_bytes'] / 1e6:,.0f} MB")
    console.note(f"try: {result['try']}")
