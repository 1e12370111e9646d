"""Compute the loss of training: the data's cross-entropy, and the KL divergence from a teacher."""

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from llamita.train.examples import IGNORED

_CHUNK = 1024  # tokens at a time, because each has log-probabilities over the whole vocabulary


def loss_sum(logits: Tensor, labels: Tensor, teacher: Tensor | None, distill: float) -> tuple[Tensor, Tensor]:
    """Return (1 - distill)·cross-entropy + distill·KL(teacher ‖ model), and the cross-entropy alone.

    Both are sums over learned tokens. The KL divergence is that of Hinton et al. 2015 (arXiv 1503.02531) at
    temperature 1.

    Args:
        logits: (rows, length, vocabulary).
        labels: (rows, length), IGNORED where nothing is learned; the logits of the token before predict a label.
        teacher: logits of the same tokens; None if distill is 0.

    Returns:
        the loss in float32, with a gradient, and the cross-entropy, without one.
    """
    targets = labels[:, 1:]
    picked = targets != IGNORED  # skip the others: with a vocabulary of 128,256 every token costs
    own, targets = logits[:, :-1][picked], targets[picked]
    other = None if teacher is None else teacher[:, :-1][picked]
    losses, crossed = [], []
    for start in range(0, len(targets), _CHUNK):
        part = slice(start, start + _CHUNK)
        given = None if other is None else other[part]
        # computed again in the backward pass, to keep nothing between logits and loss in memory
        loss, cross = checkpoint(_chunk_loss, own[part], targets[part], given, distill, use_reentrant=False)
        losses.append(loss)
        crossed.append(cross.detach())
    if not losses:
        return logits.sum() * 0, logits.new_zeros(())
    return torch.stack(losses).sum(), torch.stack(crossed).sum()


def _chunk_loss(logits: Tensor, targets: Tensor, teacher: Tensor | None, distill: float) -> tuple[Tensor, Tensor]:
    log_probabilities = functional.log_softmax(logits.float(), -1)
    cross = functional.nll_loss(log_probabilities, targets, reduction="sum")
    if teacher is None or distill == 0:
        return cross, cross
    wanted = functional.log_softmax(teacher.float(), -1)
    kl = functional.kl_div(log_probabilities, wanted, reduction="sum", log_target=True)
    return (1 - distill) * cross + distill * kl, cross
