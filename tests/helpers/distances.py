"""How far apart logits are: relative errors, and the KL divergence in float64."""

import numpy as np


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference over the largest expected value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return log-probabilities over the last axis, float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def mean_kl(p: np.ndarray, q: np.ndarray) -> float:
    """Return the mean over tokens of KL(p || q) in nats, from logits."""
    log_p, log_q = log_softmax(p), log_softmax(q)
    return float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean())
