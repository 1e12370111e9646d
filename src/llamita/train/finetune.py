"""Train the stages of a recipe one after the other; keep each finished stage, so that a later run can resume."""

import copy
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, PrinterCallback

from llamita.errors import InputError
from llamita.imports.open import open_float
from llamita.methods.setup import Setup
from llamita.models.checkpoint import Checkpoint
from llamita.models.config import ModelConfig
from llamita.models.layer_kinds import fit_groups
from llamita.numerics.scheme import QuantScheme, make_scheme
from llamita.system import collectives, processes
from llamita.system.kept_work import write_whole
from llamita.train.batches import as_dataset, collate
from llamita.train.fake_quant import Switch
from llamita.train.job import FinetuneJob
from llamita.train.load import load_float
from llamita.train.preference_trainer import PairTrainer, as_pairs
from llamita.train.prepare import prepare
from llamita.train.recipe import Recipe, Stage
from llamita.train.save import writing
from llamita.train.sharding import keep, restore, take_whole
from llamita.train.start import start
from llamita.train.trainer import (
    Patience,
    ProgressReporter,
    RoundingStart,
    RowTrainer,
    answer_config,
    check_reporter,
    preference_config,
)

_DONE = "stage-{}.safetensors"  # in the work directory, after a stage is finished


@dataclass
class Trained:
    """The trained model and the record of its training.

    Attributes:
        model: transformers' model, with fake-quantized layers if the last stage had them, and inside PEFT's model if
            it has adapters.
        history: what was logged, in order: "stage", "step", "loss", "eval_loss", ….
        tokens, seconds: of training on rows in this run; tokens include padding.
    """

    model: Any
    history: list[dict[str, Any]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    @property
    def held_out_losses(self) -> list[float]:
        """Return the nats a learned token, before the first stage and after each."""
        return [row["eval_loss"] for row in self.history if "eval_loss" in row and row.get("is_end")]

    @property
    def tokens_per_second(self) -> float:
        """Return the speed of this run; 0 if nothing was left to train."""
        return self.tokens / self.seconds if self.seconds else 0.0


def scheme_of(recipe: Recipe, config: ModelConfig) -> QuantScheme:
    """Return the scheme of a recipe's quantized stages for this model."""
    scheme = make_scheme(recipe.preset, recipe.group_size)
    return fit_groups(config, scheme) if recipe.fit_groups else scheme


def train(job: FinetuneJob, work: Path) -> Trained:
    """Run every stage of the recipe that is not finished in the directory `work`.

    Raises:
        InputError: there is nothing to learn from, or the model cannot be trained.
    """
    rows = len(job.data.rows.ids)
    if not rows:
        raise InputError("--data", "something to learn", "nothing", "see what was left out above")
    job.recipe.check_steps(rows, len(job.data.pairs))
    check_reporter(job.report_to)
    if job.report_to != "none":
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(job.out.with_name(f"{job.out.name}-logs")))
    with quiet(), writing(work):
        trained = Trained(load_float(job.source))
        switch: Switch | None = None
        for number, stage in enumerate(job.recipe.stages, 1):
            if stage.quantized and switch is None:
                switch = _quantize(trained.model, job, work)
            if stage.train != "weights" and not isinstance(trained.model, PeftModel):
                trained.model = _with_adapters(trained.model, stage, job.seed)
            _run_stage(trained, job, work, number, switch)
    collectives.wait()  # other processes may still read the work directory, which the first one removes
    return trained


def _quantize(model: Any, job: FinetuneJob, work: Path) -> Switch:
    """Round the model as it is now; from here on it computes with rounded weights."""
    setup = Setup(job.calibration(), job.seed, progress=job.progress)
    with _as_checkpoint(model, job, work) as source:
        scheme, place = scheme_of(job.recipe, source.config), work / "start"
        begun = start(source, job.source, scheme, job.recipe.start, setup, place)
        return prepare(model, begun.rounded, begun.floats)


@contextmanager
def _as_checkpoint(model: Any, job: FinetuneJob, work: Path) -> Iterator[Checkpoint]:
    """Save the model as it is now, because the methods that quantize read files."""
    if job.recipe.stages[0].quantized:  # nothing was trained yet
        yield job.source
        return
    folder = work / "before-rounding"
    if processes.rank() == 0:
        model.save_pretrained(folder)
    collectives.wait()
    source = Checkpoint(folder)
    try:
        yield source
    finally:
        source.close()


def _with_adapters(model: Any, stage: Stage, seed: int) -> Any:
    torch.manual_seed(seed)  # PEFT draws the adapters' first values
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    config = LoraConfig(
        r=stage.rank, lora_alpha=stage.alpha, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM",
        target_modules=list(stage.targets),
    )  # fmt: skip
    return get_peft_model(model, config)


def _run_stage(trained: Trained, job: FinetuneJob, work: Path, number: int, switch: Switch | None) -> None:
    """Train one stage and keep what it made, or read that back if an earlier run has finished the stage."""
    done, folder = work / _DONE.format(number), work / f"stage-{number}"
    if collectives.agreed(done.exists()):
        restore(trained.model, done)
        trained.history += json.loads(done.with_suffix(".json").read_text("utf-8"))
        return
    stage = job.recipe.stages[number - 1]
    model, own_switch = copy.deepcopy((trained.model, switch)) if job.shard else (trained.model, switch)
    trainer = _make_trainer(model, job, stage, folder, own_switch)
    history = _measure(trainer, 0) if number == 1 else []
    if stage.prefers:
        history += _train_on_pairs(trained.model, job, stage, folder)
    else:
        trainer.train(resume_from_checkpoint=_last_checkpoint(folder))
        tokens = trainer.trained_tokens
        history += [*trainer.state.log_history, {"trained_tokens": tokens}]
        trained.tokens += tokens
        trained.seconds += sum(row.get("train_runtime", 0.0) for row in history)
    for one in (switch, own_switch):
        if one is not None:
            one.on = True
    history += _measure(trainer, number)
    logged = [{"stage": number, **row} for row in history]
    if job.shard:
        take_whole(trained.model, trainer.model)
    if processes.rank() == 0:
        write_whole(done.with_suffix(".json"), lambda file: file.write(json.dumps(logged).encode()))
        keep(trained.model, done)
    trained.history += logged


def _train_on_pairs(model: Any, job: FinetuneJob, stage: Stage, folder: Path) -> list[dict[str, Any]]:
    """Train adapters on pairs of answers; return what was logged."""
    pairs, held_out = job.data.pairs, job.data.held_out_pairs
    trainer = PairTrainer(
        model, args=preference_config(job.recipe, stage, len(pairs), job.seed, folder, job.report_to),
        train_dataset=as_pairs(pairs), eval_dataset=as_pairs(held_out) or None,
        processing_class=_tokenizer(job), callbacks=[ProgressReporter(job.progress, 0)],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=_last_checkpoint(folder))
    if held_out:
        trainer.evaluate()
    trainer.release()
    return trainer.state.log_history


def _last_checkpoint(folder: Path) -> str | None:
    """Return the newest complete checkpoint; remove those that a kill cut short: their state is written last."""
    newest = 0
    if processes.rank() == 0:
        for path in folder.glob("checkpoint-*"):
            if _is_complete(path / "trainer_state.json"):
                newest = max(newest, int(path.name.split("-")[1]))
            else:
                shutil.rmtree(path, ignore_errors=True)
    newest = collectives.agreed(newest)
    return str(folder / f"checkpoint-{newest}") if newest else None


def _is_complete(state: Path) -> bool:
    try:
        json.loads(state.read_bytes())
    except (OSError, ValueError):
        return False
    return True


def _tokenizer(job: FinetuneJob) -> Any:
    """Return transformers' tokenizer, of which trainers need the pad token; any token can pad if none is set."""
    tokenizer = AutoTokenizer.from_pretrained(job.source.path, local_files_only=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def _make_trainer(model: Any, job: FinetuneJob, stage: Stage, folder: Path, switch: Switch | None) -> RowTrainer:
    folder.mkdir(exist_ok=True)
    rows, held_out = job.data.rows, job.data.held_out
    config = answer_config(job.recipe, stage, len(rows.ids), job.seed, folder, job.report_to)
    callbacks: list[Any] = [ProgressReporter(job.progress, stage.batch * job.recipe.length)]
    if switch is not None and stage.quantized:
        callbacks.append(RoundingStart(switch, stage.fake_quant_after))
    if job.recipe.patience is not None:
        callbacks.append(Patience(job.recipe.patience))
    teacher = load_float(open_float(job.teacher) if job.teacher else job.source) if stage.distill else None
    trainer = RowTrainer(
        model=model, args=config, train_dataset=as_dataset(rows), eval_dataset=as_dataset(held_out),
        data_collator=collate, processing_class=_tokenizer(job), callbacks=callbacks,
        batch=stage.batch, teacher=teacher, distill=stage.distill, shards=job.shard,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def _measure(trainer: RowTrainer, number: int) -> list[dict[str, Any]]:
    """Return the held-out loss at the end of a stage, or before training (0), as rows of the history."""
    if not trainer.has_held_out:
        return []
    return [{"step": trainer.state.global_step, "is_end": 1, "after": number, **trainer.evaluate()}]


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' bars and remarks, which would break into ours."""
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # accelerate uses options of Torch's DDP that are deprecated
            yield
    finally:
        transformers.utils.logging.set_verbosity(before)
        transformers.utils.logging.enable_progress_bar()
