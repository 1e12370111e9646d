"""Train a job, save what the last stage of its recipe makes, and measure it: `llamita finetune` without options."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llamita import __version__
from llamita.imports.open import open_float
from llamita.loading import load
from llamita.numerics.scheme import QuantScheme
from llamita.quantize.records import source_record
from llamita.system import collectives, processes
from llamita.system.files import write_bytes
from llamita.system.kept_work import shared_work
from llamita.system.staging import TRAINED_MARK, check_space, staged
from llamita.system.torch_processes import advise_when_lost
from llamita.train.finetune import Trained, quiet, scheme_of, train
from llamita.train.history import stage_results
from llamita.train.job import FinetuneJob
from llamita.train.loss_plot import loss_plot
from llamita.train.measures import score
from llamita.train.recipe import adapter_place
from llamita.train.save import save_adapters, save_float, save_packed, writing

PLOT = "loss.svg"
_PATIENCE = 1800.0  # seconds that a process waits for another one, which may be writing a checkpoint


def run(job: FinetuneJob) -> dict[str, Any]:
    """Train, save, and compare the result with the base.

    Returns:
        "kind", "losses" (held out: before, and after each stage), "stages", "tokens_per_second", "try" (what to do
        next), "measured" (examples), and "scores": [name, loss, measures] of the base, of the base rounded as the
        result is, and of the result. Empty in every process but the first, which alone saves and compares.

    Raises:
        InputError: the data, the model or a setting cannot be trained with.
        RunError: the disk is full, another run works in the same place, or another process has ended.
    """
    base = asdict(source_record(job.source, job.name, job.progress))
    teacher = source_record(open_float(job.teacher), "", job.progress).files if job.teacher else None
    kept = {"llamita": __version__, "base": base["files"], "teacher": teacher, "data": job.data.sha256,
            "seed": job.seed, "recipe": job.recipe.to_dict()}  # fmt: skip
    collectives.join(_PATIENCE)
    with (
        shared_work(job.out, kept, may_discard=job.overwrite) as work,
        advise_when_lost("run the same command again to resume"),
    ):
        made = _make(job, base, work)
    if not made:
        return made
    return made | {"scores": _scores(job), "measured": len(job.data.measured)}


def _make(job: FinetuneJob, base: dict[str, Any], work: Path) -> dict[str, Any]:
    check_space(job.out, _disk_bytes(job))
    trained = train(job, work)
    if processes.rank() > 0:
        return {}
    losses = trained.held_out_losses
    record = {
        "llamita": __version__, "base": base, "data": {"name": job.data_name, "sha256": job.data.sha256},
        "recipe": job.recipe.to_dict(), "seed": job.seed, "losses": losses, "history": trained.history,
    }  # fmt: skip
    with quiet(), writing(job.out):
        kind, hint = _save(trained, job, work, record)
    stages = [asdict(result) for result in stage_results(trained.history)]
    return {"kind": kind, "try": hint, "losses": losses, "stages": stages,
            "tokens_per_second": trained.tokens_per_second}  # fmt: skip


def _disk_bytes(job: FinetuneJob) -> int:
    """Return what training may write at most: in float32, three checkpoints of weights and Adam's two moments."""
    weights = sum(4 * math.prod(info.shape) for file in job.source.files.values() for info in file.tensors.values())
    trains_all = any(stage.train == "weights" for stage in job.recipe.stages)
    return weights * 10 if trains_all else weights


def _scores(job: FinetuneJob) -> list[list[Any]]:
    """Measure the base and the result on the held-out examples, both in the engine."""
    if not job.data.measured:
        return []
    recipe, base, out = job.recipe, job.source.path, job.out
    models: dict[str, tuple[Path, QuantScheme | None, Path | None]] = {"base": (base, None, None)}
    if recipe.is_quantized:
        models["base, rounded to nearest"] = (base, scheme_of(recipe, job.source.config), None)
        models["tuned, 4-bit"] = (out, None, adapter_place(out) if recipe.has_adapters else None)
    else:
        models["tuned"] = (base, None, out) if recipe.has_adapters else (out, None, None)
    found = []
    for name, (path, scheme, adapter) in models.items():
        llm = load(path, scheme=scheme, adapters={} if adapter is None else {name: adapter})
        scores = score(llm, job.task, job.data.measured, adapter and name, progress=job.progress)
        found.append([name, scores.loss, scores.measures])
    return found


def _save(trained: Trained, job: FinetuneJob, work: Path, record: dict[str, Any]) -> tuple[str, str]:
    """Write OUT; return what it is, in words, and what to try next."""
    recipe, out = job.recipe, job.out
    if not recipe.is_quantized:
        with staged(out, job.overwrite, job.source.path) as directory:
            _write_record(directory, record)
            if recipe.has_adapters:
                save_adapters(trained.model, job.name, directory, job.source.config.query_factor)
                return "adapters in PEFT's format", f"llamita generate {job.name} --prompt TEXT --adapter {out}"
            save_float(trained.model, job.source, directory)
            return "a float checkpoint", f"llamita quantize {out} -o {out}-4bit"
    if not recipe.has_adapters:
        _save_packed(trained.model, job, work, record)
        return "a 4-bit model", f"llamita generate {out} --prompt TEXT"
    adapters = adapter_place(out)
    with staged(adapters, job.overwrite, job.source.path) as directory:
        _write_record(directory, record)
        save_adapters(trained.model, str(out), directory, job.source.config.query_factor)
        _save_packed(trained.model.unload(), job, work, record)  # both directories appear one right after the other
    return f"a 4-bit model and, in {adapters}, adapters", f"llamita generate {out} --prompt TEXT --adapter {adapters}"


def _save_packed(model: Any, job: FinetuneJob, work: Path, record: dict[str, Any]) -> None:
    settings = {key: value for key, value in record.items() if key != "history"}
    scheme = scheme_of(job.recipe, job.source.config)
    save_packed(model, job.source, job.name, job.out, scheme, work, settings, job.overwrite, _plot(record))


def _write_record(directory: Path, record: dict[str, Any]) -> None:
    write_bytes(directory / TRAINED_MARK, json.dumps(record, indent=1).encode())
    for name, data in _plot(record).items():
        write_bytes(directory / name, data)


def _plot(record: dict[str, Any]) -> dict[str, bytes]:
    """Return the plot of the losses by its file name; empty if nothing was logged."""
    drawn = loss_plot(record["history"])
    return {PLOT: drawn.encode()} if drawn else {}
