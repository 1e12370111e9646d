"""Train on packed rows with TRL's SFTTrainer and our loss; TRL's own loss would bypass the rounding of the head."""

import math
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from llamita.errors import InputError
from llamita.system import collectives
from llamita.system.machine import anonymous_bytes
from llamita.system.progress import Progress
from llamita.train.batches import StepLoader, StepRows, collate, count_parts, count_rows, own_parts
from llamita.train.examples import IGNORED
from llamita.train.fake_quant import Switch
from llamita.train.objective import loss_sum
from llamita.train.recipe import Recipe, Stage
from llamita.train.sharding import keep, optimizer_state, reshard, restore, restore_optimizer, shard, whole

_TRAINED = "trained.safetensors"  # in a checkpoint


class RowTrainer(SFTTrainer):
    """Trains on rows of packed examples; evaluates by the mean over all learned tokens, not over batches.

    Several processes share the `batch` rows of each step; with `shards`, also the weights.
    """

    def __init__(
        self, *args: Any, batch: int, teacher: Any = None, distill: float = 0.0, shards: bool = False, **kwargs: Any
    ) -> None:
        self._batch, self._teacher, self._distill, self._shards = batch, teacher, distill, shards
        self._trained_tokens = 0  # by this process
        super().__init__(*args, **kwargs)
        if shards:
            self.is_distributed_loading_by_transformers = True  # keeps accelerate from wrapping the model
            shard(self.model, self.args.device)
        if teacher is not None:  # BF16 is enough on a GPU, as the teacher is never trained
            teacher.to(self.args.device, torch.float32 if self.args.use_cpu else torch.bfloat16)
            if shards:
                shard(teacher, self.args.device)

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of a micro-batch: its share of the step's mean over learned tokens."""
        labels = inputs["labels"]
        outputs = _forward(model, inputs)
        total, _ = loss_sum(outputs.logits, labels, self._teacher_logits(inputs), self._distill)
        count = (labels[:, 1:] != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        self._trained_tokens += labels.numel() if model.training else 0
        loss = total / torch.as_tensor(count, device=total.device).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over processes
        return (loss, outputs) if return_outputs else loss

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return a loader of this process's part of every step."""
        rows, micro_batch = count_rows(self.train_dataset), self.args.per_device_train_batch_size
        steps = StepRows(rows, self._batch, micro_batch, self.args.seed)
        dataset: Any = self.train_dataset
        return StepLoader(dataset, batch_sampler=steps, collate_fn=collate)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Return a loader of this process's part of the held-out rows; only one process reads each row."""
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        rows = count_rows(dataset)
        own = own_parts(range(rows), self.args.per_device_eval_batch_size, rows)
        return DataLoader(dataset, batch_sampler=own, collate_fn=collate)

    def _teacher_logits(self, inputs: dict[str, Tensor]) -> Tensor | None:
        if self._teacher is None or self._distill == 0:
            return None
        with torch.no_grad():
            return _forward(self._teacher, inputs).logits

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return the data's cross-entropy per learned token."""
        del ignore_keys
        model: Any = self.model
        model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for batch in self.get_eval_dataloader(eval_dataset):
            inputs: Any = self._prepare_inputs(batch)
            labels = inputs["labels"]
            with torch.no_grad(), self.compute_loss_context_manager():
                _, crossed = loss_sum(_forward(model, inputs).logits, labels, None, 0.0)
            sums += torch.stack([crossed.double(), (labels[:, 1:] != IGNORED).sum().double()]).to(sums)
        reshard(model)
        sums = self.accelerator.reduce(sums, "sum")
        metrics = {f"{metric_key_prefix}_loss": float(sums[0] / sums[1].clamp(min=1))}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the parameters that training can have changed, gathered from all processes."""
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(exist_ok=True)
        keep(self.model, folder / _TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        restore(model or self.model, Path(resume_from_checkpoint) / _TRAINED)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        state, schedule = optimizer_state(self.optimizer), _schedule(self)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(schedule.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
            restore_optimizer(self.optimizer, state)
            schedule = torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True)
            _schedule(self).load_state_dict(schedule)

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        if not self._shards:  # `shard` has moved the parts already
            super()._move_model_to_device(model, device)

    def _defer_fsdp_gradient_reduction(self) -> Any:
        return nullcontext()  # reduces gradients after each micro-batch, so that no process holds all of them

    def _clip_grad_norm(self, model: Any) -> Any:
        norm: Any = super()._clip_grad_norm(model)
        return whole(norm)

    @property
    def has_held_out(self) -> bool:
        """Whether there are held-out rows."""
        return count_rows(self.eval_dataset) > 0

    @property
    def trained_tokens(self) -> int:
        """Count the tokens that all processes have trained on, with padding."""
        return int(collectives.all_sum(np.array([self._trained_tokens]))[0])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log what transformers logs, without TRL's metrics of its own loss, which is not used."""
        self._metrics["train"].clear()
        self._metrics["eval"].clear()
        super().log(logs, start_time)


def _schedule(trainer: Any) -> Any:
    return trainer.lr_scheduler


def _forward(model: Any, inputs: dict[str, Tensor]) -> Any:
    """Run the model; attention keeps the examples of a row apart by their positions alone."""
    return model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False)


class RoundingStart(TrainerCallback):
    """Turns rounding on after a number of steps; a run that resumes later has it on at once."""

    def __init__(self, switch: Switch, after: int) -> None:
        self._switch, self._after = switch, after

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Turn rounding on or off before each step."""
        del args, control, kwargs
        self._switch.on = state.global_step >= self._after


class Patience(TrainerCallback):
    """Ends a stage when `patience` measurements in a row were no better than the best before them."""

    def __init__(self, patience: int) -> None:
        self._patience = patience

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare after each measurement; checkpoints keep the history, so it includes earlier runs."""
        del args, kwargs
        losses = [row["eval_loss"] for row in state.log_history if "eval_loss" in row and row.get("step")]
        if len(losses) > self._patience and min(losses[-self._patience :]) >= min(losses[: -self._patience]):
            control.should_training_stop = True


class ProgressReporter(TrainerCallback):
    """Reports the progress of a run, and ends a run whose loss is not finite."""

    def __init__(self, progress: Progress, tokens: int) -> None:
        self._progress, self._tokens = progress, tokens  # of a step, over all processes; 0 if steps differ
        self._began, self._first = time.perf_counter(), 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock before the first step, which may follow those of an earlier run."""
        del args, control, kwargs
        self._began, self._first = time.perf_counter(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Check the losses of a step or of a measurement."""
        del args, control, kwargs
        for name in ("loss", "eval_loss"):
            found = (logs or {}).get(name, 0.0)
            if not math.isfinite(found):
                where = f"{found} at step {state.global_step}"
                raise InputError("training", "a finite loss", where, "try --set learning_rate= with a smaller one")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report the progress after each step."""
        del args, control, kwargs
        if self._progress:
            rate = self._tokens * (state.global_step - self._first) / (time.perf_counter() - self._began)
            last = next((f", loss {r['loss']:.3f}" for r in reversed(state.log_history) if "loss" in r), "")
            speed = f", {rate:,.0f} tokens/s" if rate else ""
            message = f"training{last}{speed}, {anonymous_bytes() / 1e9:.1f} GB"
            self._progress(message, state.global_step, state.max_steps)


def check_reporter(name: str) -> None:
    """Raise InputError if transformers cannot report to `name`."""
    try:
        for callback in get_reporting_integration_callbacks(name):
            callback()
    except (ValueError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())
        hint = f"try pip install {name}" if "install" in reason else None
        raise InputError("--report-to", "what transformers can report to", f"{name}: {reason}", hint) from None


def answer_config(recipe: Recipe, stage: Stage, rows: int, seed: int, work: Path, report_to: str) -> Any:
    """Return the settings of a stage that learns answers, as transformers and TRL take them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return SFTConfig(
            **_settings(recipe, stage, rows, seed, work, report_to), packing=False,
            dataset_kwargs={"skip_prepare_dataset": True},
        )  # fmt: skip


def preference_config(recipe: Recipe, stage: Stage, pairs: int, seed: int, work: Path, report_to: str) -> Any:
    """Return the settings of a stage that learns from preferences."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return DPOConfig(**_settings(recipe, stage, pairs, seed, work, report_to), beta=stage.beta)


def _settings(recipe: Recipe, stage: Stage, count: int, seed: int, work: Path, report_to: str) -> dict[str, Any]:
    """Return the settings that both kinds of stages share, for `count` rows or pairs."""
    steps = stage.count_steps(count)
    has_gpu = torch.cuda.is_available()
    return {
        "output_dir": str(work), "max_steps": steps, "seed": seed, "data_seed": seed,
        "per_device_train_batch_size": stage.micro_batch, "per_device_eval_batch_size": stage.micro_batch,
        "gradient_accumulation_steps": count_parts(stage.batch, stage.micro_batch),
        "learning_rate": stage.learning_rate, "warmup_steps": _warmup_steps(stage.warmup, steps),
        "lr_scheduler_type": stage.schedule, "weight_decay": stage.weight_decay, "adam_beta2": 0.95,
        "max_grad_norm": 1.0, "logging_steps": 1, "logging_nan_inf_filter": False,
        "save_steps": recipe.save_every, "save_total_limit": 2,
        "eval_strategy": "steps" if recipe.evaluate_every and not stage.prefers else "no",
        "eval_steps": recipe.evaluate_every or None, "load_best_model_at_end": False,
        "report_to": report_to, "disable_tqdm": True, "bf16": has_gpu, "fp16": False,
        "use_cpu": not has_gpu, "gradient_checkpointing": has_gpu, "dataloader_num_workers": 0,
        "remove_unused_columns": False, "max_length": None, "include_num_input_tokens_seen": "no",
        "ddp_find_unused_parameters": False,  # all are used
        "ddp_broadcast_buffers": False,  # none changes
    }  # fmt: skip


def _warmup_steps(share: float, steps: int) -> int:
    """Count the steps of warmup; never only one, because the first has learning rate 0 and would be wasted."""
    count = round(share * steps)
    return count if count > 1 else 0
