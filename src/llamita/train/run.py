"""`llamita finetune` behind its options: trains, then puts on the disk what the recipe's last stage makes."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llamita import __version__
from llamita.loading import load
from llamita.models.checkpoint import Checkpoint
from llamita.numerics.scheme import QuantScheme
from llamita.quantize.pipeline import source_record
from llamita.system import collectives, processes
from llamita.system.files import write_bytes
from llamita.system.kept_work import shared_work
from llamita.system.progress import Progress
from llamita.system.staging import TRAINED_MARK, check_space, staged
from llamita.system.torch_processes import told_when_lost
from llamita.train.finetune import Job, Trained, quiet, scheme_of, train
from llamita.train.history import courses
from llamita.train.loss_plot import loss_plot
from llamita.train.measures import score
from llamita.train.order import Order
from llamita.train.recipe import adapter_place
from llamita.train.save import save_adapters, save_float, save_packed, writing

PLOT = "loss.svg"
_CALIBRATION_ROWS = 128
_PATIENCE = 1800.0  # seconds that a process waits for another, which may write a checkpoint meanwhile


def run(order: Order, progress: Progress) -> dict[str, Any]:
    """Train, save, and compare with what was there before.

    Returns:
        "kind", "losses" (held out: before, and after each stage), "tokens_per_second", "try" (what next), and
        "scores": of the base, of it rounded as the result is, of the result: [name, loss, measures] each.
        Nothing in any process but the first, which alone saves and compares.

    Raises:
        InputError: the data, the model or a setting is not for training.
        RunError: the disk is full, another run is at work there, or another process has ended.
    """
    base = asdict(source_record(order.source, order.name, progress))
    taught = source_record(Checkpoint(order.teacher), "", progress).files if order.teacher else None
    kept = {"llamita": __version__, "base": base["files"], "teacher": taught, "data": order.data.sha256,
            "seed": order.seed, "recipe": order.recipe.to_dict()}  # fmt: skip
    collectives.join(_PATIENCE)
    with (
        shared_work(order.out, kept, may_discard=order.overwrite) as work,
        told_when_lost("the same command goes on from what is kept"),
    ):
        made = _make(order, base, work, progress)
    if not made:
        return made
    return made | {"scores": _scores(order, progress), "measured": len(order.data.measured)}


def _make(order: Order, base: dict[str, Any], work: Path, progress: Progress) -> dict[str, Any]:
    data, recipe = order.data, order.recipe
    check_space(order.out, _disk_bytes(order))
    trained = train(Job(
        order.source, recipe, data.rows, data.held_out, work, seed=order.seed, teacher=order.teacher,
        calibration=data.calibration(order.data_name, _CALIBRATION_ROWS),
        pairs=data.pairs, held_out_pairs=data.held_out_pairs, report_to=order.report_to,
        logs=order.out.with_name(f"{order.out.name}-logs"), progress=progress,
        shard=order.shard,
    ))  # fmt: skip
    if processes.rank() > 0:
        return {}
    losses = trained.held_out_losses
    record = {
        "llamita": __version__, "base": base, "data": {"name": order.data_name, "sha256": data.sha256},
        "recipe": recipe.to_dict(), "seed": order.seed, "losses": losses, "history": trained.history,
    }  # fmt: skip
    with quiet(), writing(order.out):
        kind, hint = _save(trained, order, work, record)
    stages = [course.to_dict() for course in courses(trained.history)]
    return {"kind": kind, "try": hint, "losses": losses, "stages": stages,
            "tokens_per_second": trained.tokens_per_second}  # fmt: skip


def _disk_bytes(order: Order) -> int:
    """What training may write at most: in float32, three checkpoints of weights and Adam's two moments."""
    weights = sum(4 * math.prod(info.shape) for file in order.source.files.values() for info in file.tensors.values())
    trains_all = any(stage.train == "weights" for stage in order.recipe.stages)
    return weights * 10 if trains_all else weights


def _scores(order: Order, progress: Progress) -> list[list[Any]]:
    """Before and after, on the engine: what the held-out examples cost, and how well their task is done."""
    if not order.data.measured:
        return []
    recipe, base, out = order.recipe, order.source.path, order.out
    preset = scheme_of(recipe) if recipe.is_quantized else None
    models: dict[str, tuple[Path, QuantScheme | None, Path | None]] = {"base": (base, None, None)}
    if preset is not None:
        models["base, rounded to nearest"] = (base, preset, None)
        beside = adapter_place(out) if recipe.has_adapters else None
        models["tuned, 4-bit"] = (out, None, beside)
    elif recipe.has_adapters:
        models["tuned"] = (base, None, out)
    else:
        models["tuned"] = (out, None, None)
    found = []
    for name, (path, scheme, adapter) in models.items():
        llm = load(path, preset=scheme, adapters={} if adapter is None else {name: adapter})
        scores = score(llm, order.task, order.data.measured, adapter and name, progress=progress)
        found.append([name, scores.loss, scores.measures])
    return found


def _save(trained: Trained, order: Order, work: Path, record: dict[str, Any]) -> tuple[str, str]:
    """What was made, in words, and what to do with it."""
    recipe, out = order.recipe, order.out
    if not recipe.is_quantized:
        with staged(out, order.overwrite, order.source.path) as directory:
            return _save_float(trained, order, record, directory)
    if not recipe.has_adapters:
        _save_packed(trained.model, order, work, record)
        return "a 4-bit model", f"llamita generate {out} --prompt TEXT"
    beside = adapter_place(out)
    with staged(beside, order.overwrite, order.source.path) as directory:
        _write_record(directory, record)
        save_adapters(trained.model, str(out), directory)
        _save_packed(trained.model.unload(), order, work, record)  # the other follows at once
    return (f"a 4-bit model and, in {beside}, adapters", f"llamita generate {out} --prompt TEXT --adapter {beside}")


def _save_float(trained: Trained, order: Order, record: dict[str, Any], directory: Path) -> tuple[str, str]:
    _write_record(directory, record)
    if order.recipe.has_adapters:
        save_adapters(trained.model, order.name, directory)
        return ("adapters, in PEFT's form", f"llamita generate {order.name} --prompt TEXT --adapter {order.out}")
    save_float(trained.model, order.source, directory)
    return "a float checkpoint", f"llamita quantize {order.out} -o {order.out}-4bit"


def _save_packed(model: Any, order: Order, work: Path, record: dict[str, Any]) -> None:
    settings = {key: value for key, value in record.items() if key != "history"}
    save_packed(model, order.source, order.name, order.out, scheme_of(order.recipe), work, settings,
                order.overwrite, _plot(record))  # fmt: skip


def _write_record(directory: Path, record: dict[str, Any]) -> None:
    """What was done, and a picture of it."""
    write_bytes(directory / TRAINED_MARK, json.dumps(record, indent=1).encode())
    for name, data in _plot(record).items():
        write_bytes(directory / name, data)


def _plot(record: dict[str, Any]) -> dict[str, bytes]:
    """The plot of the losses by its file's name; none where nothing was logged."""
    drawn = loss_plot(record["history"])
    return {PLOT: drawn.encode()} if drawn else {}
