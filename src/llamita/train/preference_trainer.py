"""Train adapters by direct preference optimization (DPO, Rafailov et al. 2023, arXiv 2305.18290), with TRL."""

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional
from trl.trainer.dpo_trainer import DPOTrainer

from llamita.train.examples import IGNORED
from llamita.train.preferences import Pair


class PairTrainer(DPOTrainer):
    """Trains PEFT's adapters on tokenized pairs; the reference is the model with its adapters before this stage.

    TRL multiplies hidden states by the head's float weights. That would bypass the rounding of the head, so the
    forward pass here calls the head.
    """

    def __init__(self, model: Any, **kwargs: Any) -> None:
        super().__init__(model=model, **kwargs)
        self._base: Any = model.get_base_model()
        self._base.forward = MethodType(_forward, self._base)

    def release(self) -> None:
        """Undo all changes to the model, except to the adapters' weights."""
        del self._base.forward
        model: Any = self.model
        model.delete_adapter("ref")

    def _prepare_dataset(self, dataset: Any, *arguments: Any, **kwargs: Any) -> Any:
        del arguments, kwargs
        return dataset  # it is tokenized already


def as_pairs(pairs: Sequence[Pair]) -> Dataset:
    """Return pairs as the trainer takes them."""
    return Dataset.from_dict(
        {
            "prompt_ids": [pair.prompt for pair in pairs],
            "chosen_ids": [pair.chosen for pair in pairs],
            "rejected_ids": [pair.rejected for pair in pairs],
        }
    )


class LabelScores(dict[str, Tensor]):
    """The values that TRL reads for each label, by name: (rows, length - 1) each."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def _forward(model: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
    """Run transformers' forward pass; with `fused_lm_head` return scores of the labels in place of logits."""
    outputs: Any = type(model).forward(model, *args, **kwargs)
    return label_scores(outputs.logits, labels) if fused_lm_head else outputs


def label_scores(logits: Tensor, labels: Tensor) -> LabelScores:
    """Return how likely each label is, in float32; 0 where there is none.

    Args:
        logits: (rows, length, vocabulary).
        labels: (rows, length), IGNORED where nothing is predicted.
    """
    targets = labels[:, 1:]
    picked = targets != IGNORED
    own, targets = logits[:, :-1][picked].float(), targets[picked]
    log_probabilities = functional.log_softmax(own, -1)
    with torch.no_grad():
        entropy = -(log_probabilities.exp() * log_probabilities).sum(-1)
        mean, is_best = own.mean(-1), own.argmax(-1) == targets
    found = {
        "log_probs": log_probabilities.gather(-1, targets[:, None])[:, 0],
        "entropy": entropy,
        "mean_logits": mean,
        "is_top1": is_best,
    }
    return LabelScores(
        {n: values.new_zeros(picked.shape).masked_scatter(picked, values) for n, values in found.items()}
    )
