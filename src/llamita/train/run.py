"""`llamita finetune` behind its options: trains, then puts on the disk what the recipe's last stage makes."""

import json
from pathlib import Path
from typing import Any

from llamita import __version__
from llamita.checkpoint import Checkpoint
from llamita.engine.llm import load
from llamita.packed_writer import write_bytes
from llamita.scheme import QuantScheme
from llamita.staging import TRAINED_MARK, staged
from llamita.train.data import Data
from llamita.train.finetune import Job, Progress, Trained, quiet, scheme_of, train
from llamita.train.measures import score
from llamita.train.recipe import Recipe, adaptor_place
from llamita.train.save import save_adaptors, save_float, save_packed

_CALIBRATION_ROWS = 128


def run(
    name: str, source: Checkpoint, data: Data, data_name: str, task: str | None, recipe: Recipe,
    teacher: Path | None, out: Path, work: Path, seed: int, report_to: str, overwrite: bool,
    progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Train and save.

    Args:
        name, data_name: what the user called the model and the data.
        task: a key of `tasks.TASKS`, by whose measure the result is judged, where it has one.
        teacher: a float model whose answers distilling stages learn; the source by default.
        work: what is finished is kept here.

    Returns:
        "kind", "losses" (held out: before, and after each stage), "tokens_per_second", "try" (what next), and
        "scores": of the base, of it rounded as the result is, of the result: [name, loss, measures] each.
    """
    job = Job(
        source, recipe, data.rows, data.held_out, work, seed=seed, teacher=teacher,
        calibration=data.calibration(data_name, _CALIBRATION_ROWS), report_to=report_to, progress=progress,
    )  # fmt: skip
    trained = train(job)
    record = {
        "llamita": __version__, "base": name, "data": {"name": data_name, "sha256": data.sha256},
        "recipe": recipe.to_dict(), "seed": seed, "losses": trained.held_out_losses,
        "history": trained.history,
    }  # fmt: skip
    with quiet():
        kind, hint = _save(trained, job, name, out, record, overwrite)
    return {"kind": kind, "try": hint, "losses": trained.held_out_losses,
            "tokens_per_second": trained.tokens_per_second,
            "scores": _scores(job, task, data, out, progress)}  # fmt: skip


def _scores(job: Job, task: str | None, data: Data, out: Path, progress: Progress) -> list[list[Any]]:
    """Before and after, on the engine: what the held-out examples cost, and how well their task is done."""
    if not data.measured:
        return []
    recipe, base = job.recipe, job.source.path
    preset = scheme_of(recipe) if recipe.is_quantized else None
    models: dict[str, tuple[Path, QuantScheme | None, Path | None]] = {"base": (base, None, None)}
    if preset is not None:
        models["base, rounded to nearest"] = (base, preset, None)
        beside = adaptor_place(out) if recipe.has_adaptors else None
        models["tuned, 4-bit"] = (out, None, beside)
    elif recipe.has_adaptors:
        models["tuned"] = (base, None, out)
    else:
        models["tuned"] = (out, None, None)
    found = []
    for name, (path, scheme, adaptor) in models.items():
        llm = load(path, preset=scheme, adaptors={} if adaptor is None else {name: adaptor})
        scores = score(llm, task, data.measured, adaptor and name, progress=progress)
        found.append([name, scores.loss, scores.measures])
    return found


def _save(
    trained: Trained, job: Job, name: str, out: Path, record: dict[str, Any], overwrite: bool
) -> tuple[str, str]:
    recipe, source = job.recipe, job.source
    if not recipe.is_quantized:
        return _save_float(trained, job, out, record, overwrite)
    model = trained.model
    settings = {key: value for key, value in record.items() if key != "history"}
    kind, hint = "a 4-bit model", f"llamita generate {out} --prompt TEXT"
    if recipe.has_adaptors:
        beside = adaptor_place(out)
        with staged(beside, overwrite, source.path) as directory:
            write_bytes(directory / TRAINED_MARK, json.dumps(record, indent=1).encode())
            save_adaptors(model, directory)
        model = model.unload()
        kind, hint = f"a 4-bit model and, in {beside}, adaptors", f"{hint} --adaptor {beside}"
    save_packed(model, source, name, out, scheme_of(recipe), job.work, settings, overwrite)
    return kind, hint


def _save_float(
    trained: Trained, job: Job, out: Path, record: dict[str, Any], overwrite: bool
) -> tuple[str, str]:
    with staged(out, overwrite, job.source.path) as directory:
        write_bytes(directory / TRAINED_MARK, json.dumps(record, indent=1).encode())
        if job.recipe.has_adaptors:
            save_adaptors(trained.model, directory)
            return "adaptors, in PEFT's form", f"llamita generate BASE --prompt TEXT --adaptor {out}"
        save_float(trained.model, job.source, directory)
    return "a float checkpoint", f"llamita quantize {out} -o {out}-4bit"
