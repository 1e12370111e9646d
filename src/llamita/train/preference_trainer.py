"""Direct preference optimization of adapters (DPO, Rafailov et al. 2023, arXiv 2305.18290), by TRL."""

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM
from trl.trainer.dpo_trainer import DPOTrainer

from llamita.train.examples import IGNORED
from llamita.train.preferences import Pair


class PairTrainer(DPOTrainer):
    """Trains PEFT's adapters on tokenized pairs; the reference is the model with its adapters as they begin.

    TRL multiplies hidden states with the head's float weights. A head that rounds has to be called instead.
    """

    def __init__(self, model: Any, **kwargs: Any) -> None:
        super().__init__(model=model, **kwargs)
        self._base: Any = model.get_base_model()
        self._base.forward = MethodType(_forward, self._base)

    def release(self) -> None:
        """Leave the model as it was given, but for what its adapters have learned."""
        del self._base.forward
        model: Any = self.model
        model.delete_adapter("ref")

    def _prepare_dataset(self, dataset: Any, *arguments: Any, **kwargs: Any) -> Any:
        del arguments, kwargs
        return dataset  # tokenized as all our examples are


def as_pairs(pairs: Sequence[Pair]) -> Dataset:
    """Pairs as the trainer takes them."""
    return Dataset.from_dict(
        {
            "prompt_ids": [pair.prompt for pair in pairs],
            "chosen_ids": [pair.chosen for pair in pairs],
            "rejected_ids": [pair.rejected for pair in pairs],
        }
    )


class Scored(dict[str, Tensor]):
    """What TRL reads of each token that a label foretells: (rows, length - 1) each, by name."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def _forward(model: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
    """transformers' forward; `fused_lm_head` asks for log-probabilities of the labels in place of logits."""
    outputs: Any = LlamaForCausalLM.forward(model, *args, **kwargs)
    return score(outputs.logits, labels) if fused_lm_head else outputs


def score(logits: Tensor, labels: Tensor) -> Scored:
    """How likely each label is, in float32, 0 where there is none.

    Args:
        logits: (rows, length, vocabulary).
        labels: (rows, length), IGNORED where nothing is foretold.
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
    return Scored({n: values.new_zeros(picked.shape).masked_scatter(picked, values) for n, values in found.items()})
