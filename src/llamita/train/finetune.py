"""Stages of training, each begun with what the one before left; what is finished is kept for a next run."""

import copy
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, LlamaForCausalLM, PrinterCallback

from llamita.errors import InputError
from llamita.methods.setup import Calibration, Setup
from llamita.models.checkpoint import Checkpoint
from llamita.numerics.scheme import QuantScheme, make_scheme
from llamita.system import collectives, processes
from llamita.system.kept_work import write_whole
from llamita.system.progress import Progress
from llamita.train.batches import as_dataset, collate
from llamita.train.examples import Windows
from llamita.train.fake_quant import Switch
from llamita.train.preference_trainer import PairTrainer, as_pairs
from llamita.train.preferences import Pair
from llamita.train.prepare import prepare
from llamita.train.recipe import Recipe, Stage
from llamita.train.save import writing
from llamita.train.sharding import keep, restore, take_whole
from llamita.train.start import start
from llamita.train.trainer import Begin, Patience, RowTrainer, Tell, check_reporter, config_of, preference_config

_DONE = "stage-{}.safetensors"  # what a finished stage leaves in the work directory


@dataclass
class Job:
    """What is trained, on what.

    Attributes:
        source: the float model.
        rows, held_out: packed examples that are learned, and that are only measured.
        pairs, held_out_pairs: preferences, likewise, for stages that learn from them.
        teacher: the float model whose answers a distilling stage learns; the source by default.
        calibration: what the methods measure that round the model where a quantized stage begins.
        work: a directory where checkpoints are kept.
        report_to: as transformers takes it: none, tensorboard, …
        logs: where TensorBoard's files go.
        shard: whether each process holds only its part of what is trained.
    """

    source: Checkpoint
    recipe: Recipe
    rows: Windows
    held_out: Windows
    work: Path
    seed: int = 0
    teacher: Path | None = None
    calibration: Calibration | None = None
    report_to: str = "none"
    logs: Path | None = None
    pairs: Sequence[Pair] = ()
    held_out_pairs: Sequence[Pair] = ()
    progress: Progress = None
    shard: bool = False


@dataclass
class Trained:
    """What training gave.

    Attributes:
        model: transformers' model, fake-quantized layers in it where the last stage had them; PEFT's around
            it where it has adapters.
        history: what was logged, in order: "stage", "step", "loss", "eval_loss", ….
        tokens, seconds: of training on rows by this run, pads included.
    """

    model: Any
    recipe: Recipe
    history: list[dict[str, Any]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    @property
    def held_out_losses(self) -> list[float]:
        """Nats a learned token, before the first stage and after each."""
        return [row["eval_loss"] for row in self.history if "eval_loss" in row and row.get("is_end")]

    @property
    def tokens_per_second(self) -> float:
        """0 where this run had nothing left to train."""
        return self.tokens / self.seconds if self.seconds else 0.0


def scheme_of(recipe: Recipe) -> QuantScheme:
    """The scheme of a recipe's quantized stages."""
    return make_scheme(recipe.preset, recipe.group_size)


def train(job: Job) -> Trained:
    """Run every stage of the recipe that the work directory has not.

    Raises:
        InputError: nothing to learn from, or a model that training cannot have.
    """
    if not len(job.rows.ids):
        raise InputError("--data", "something to learn", "nothing", "see what was left out above")
    job.recipe.check_steps(len(job.rows.ids), len(job.pairs))
    check_reporter(job.report_to)
    if job.logs is not None:
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(job.logs))
    with quiet(), writing(job.work):
        trained = Trained(load_float(job.source.path), job.recipe)
        switch: Switch | None = None
        for number, stage in enumerate(job.recipe.stages, 1):
            if stage.quantized and switch is None:
                switch = _quantize(trained.model, job)
            if stage.train != "weights" and not isinstance(trained.model, PeftModel):
                trained.model = _with_adapters(trained.model, stage, job.seed)
            _run_stage(trained, job, number, stage, switch)
    collectives.wait()  # for those that still read what the work directory keeps
    return trained


def load_float(path: Path) -> Any:
    """transformers' model in float32, on the CPU."""
    return LlamaForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)


def _quantize(model: Any, job: Job) -> Switch:
    """Round the model as it is now, and let it compute so from here on."""
    setup = Setup(job.calibration, job.seed, progress=job.progress)
    with _as_checkpoint(model, job) as source:
        scheme, place = scheme_of(job.recipe), job.work / "start"
        begun = start(source, job.source, scheme, job.recipe.start, setup, place)
        return prepare(model, begun.rounded, begun.floats)


@contextmanager
def _as_checkpoint(model: Any, job: Job) -> Iterator[Checkpoint]:
    """The model as it stands, on disk: the methods that quantize read files."""
    if job.recipe.stages[0].quantized:  # nothing was trained yet
        yield job.source
        return
    folder = job.work / "before-rounding"
    if processes.rank() == 0:
        model.save_pretrained(folder)
    collectives.wait()
    source = Checkpoint(folder)
    try:
        yield source
    finally:
        source.close()


def _with_adapters(model: Any, stage: Stage, seed: int) -> Any:
    torch.manual_seed(seed)  # of the adapters' first values
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    config = LoraConfig(
        r=stage.rank, lora_alpha=stage.alpha, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM",
        target_modules=list(stage.targets),
    )  # fmt: skip
    return get_peft_model(model, config)


def _run_stage(trained: Trained, job: Job, number: int, stage: Stage, switch: Switch | None) -> None:
    done = job.work / _DONE.format(number)
    if collectives.agreed(done.exists()):
        restore(trained.model, done)
        trained.history += json.loads(done.with_suffix(".json").read_text("utf-8"))
        return
    model, turned = copy.deepcopy((trained.model, switch)) if job.shard else (trained.model, switch)
    trainer = _make_trainer(model, job, number, stage, turned)
    history = _measure(trainer, 0) if number == 1 else []
    if stage.prefers:
        history += _prefer(trained.model, job, number, stage)
    else:
        trainer.train(resume_from_checkpoint=_last_checkpoint(job.work / f"stage-{number}"))
        tokens = trainer.trained_tokens
        history += [*trainer.state.log_history, {"trained_tokens": tokens}]
        trained.tokens += tokens
        trained.seconds += sum(row.get("train_runtime", 0.0) for row in history)
    for one in (switch, turned):
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


def _prefer(model: Any, job: Job, number: int, stage: Stage) -> list[dict[str, Any]]:
    """Train adapters on pairs; what was logged."""
    folder = job.work / f"stage-{number}"
    trainer = PairTrainer(
        model, args=preference_config(job.recipe, stage, len(job.pairs), job.seed, folder, job.report_to),
        train_dataset=as_pairs(job.pairs), eval_dataset=as_pairs(job.held_out_pairs) or None,
        processing_class=_tokenizer(job), callbacks=[_tell(job, stage)],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=_last_checkpoint(folder))
    if job.held_out_pairs:
        trainer.evaluate()
    trainer.release()
    return trainer.state.log_history


def _tell(job: Job, stage: Stage) -> Tell:
    return Tell(job.progress, 0 if stage.prefers else stage.batch * job.recipe.length)


def _last_checkpoint(folder: Path) -> str | None:
    """The newest one that is whole; those that a kill has cut short go. Their state is written last."""
    newest = 0
    if processes.rank() == 0:
        for path in folder.glob("checkpoint-*"):
            if _is_whole(path / "trainer_state.json"):
                newest = max(newest, int(path.name.split("-")[1]))
            else:
                shutil.rmtree(path, ignore_errors=True)
    newest = collectives.agreed(newest)
    return str(folder / f"checkpoint-{newest}") if newest else None


def _is_whole(state: Path) -> bool:
    try:
        json.loads(state.read_bytes())
    except (OSError, ValueError):
        return False
    return True


def _tokenizer(job: Job) -> Any:
    """transformers' own, which trainers want to know what pads; where nothing does, any token can."""
    tokenizer = AutoTokenizer.from_pretrained(job.source.path, local_files_only=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def _make_trainer(model: Any, job: Job, number: int, stage: Stage, switch: Switch | None) -> RowTrainer:
    folder = job.work / f"stage-{number}"
    folder.mkdir(exist_ok=True)
    config = config_of(job.recipe, stage, len(job.rows.ids), job.seed, folder, job.report_to)
    callbacks: list[Any] = [_tell(job, stage)]
    if switch is not None and stage.quantized:
        callbacks.append(Begin(switch, stage.fake_quant_after))
    if job.recipe.patience is not None:
        callbacks.append(Patience(job.recipe.patience))
    teacher = load_float(job.teacher or job.source.path).eval() if stage.distill else None
    trainer = RowTrainer(
        model=model, args=config, train_dataset=as_dataset(job.rows), eval_dataset=as_dataset(job.held_out),
        data_collator=collate, processing_class=_tokenizer(job), callbacks=callbacks,
        batch=stage.batch, teacher=teacher, distill=stage.distill, shards=job.shard,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def _measure(trainer: RowTrainer, number: int) -> list[dict[str, Any]]:
    """The held-out loss where a stage ends, or training begins."""
    if not trainer.has_held_out:
        return []
    return [{"step": trainer.state.global_step, "is_end": 1, "after": number, **trainer.evaluate()}]


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own bars and remarks, which would break into ours."""
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # that accelerate's options of Torch's DDP age
            yield
    finally:
        transformers.utils.logging.set_verbosity(before)
        transformers.utils.logging.enable_progress_bar()
