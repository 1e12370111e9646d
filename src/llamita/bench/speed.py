"""Measure how fast a loaded model runs: a prompt, and tokens one at a time after it.

Tokens are random, because they do not change the work. Decoding feeds fixed tokens instead of chosen ones, so
that an end token cannot cut a run short.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llamita.engine.kv_cache import SequenceCache
from llamita.engine.llm import LLM, PREFILL_CHUNK

PROMPT_TOKENS = 512
NEW_TOKENS = 128
_SEED = 0  # of the token ids


@dataclass(frozen=True)
class Speed:
    """Tokens per second: of a prompt, and decoded one at a time after it."""

    prefill: float
    decode: float


def measure_speed(
    llm: LLM, prompt_tokens: int = PROMPT_TOKENS, new_tokens: int = NEW_TOKENS, repeats: int = 5
) -> Speed:
    """Return the medians of `repeats` runs after one that warms up."""
    runs = []
    for _ in range(repeats + 1):
        sequence = llm.new_sequence(prompt_tokens + new_tokens)
        prefill_seconds, _ = prefill(llm, sequence, prompt_tokens)
        runs.append((prefill_seconds, decode(llm, [sequence], new_tokens)))
    return Speed(
        prefill=prompt_tokens / statistics.median(seconds for seconds, _ in runs[1:]),
        decode=new_tokens / statistics.median(seconds for _, seconds in runs[1:]),
    )


def prefill(llm: LLM, sequence: SequenceCache, tokens: int) -> tuple[float, float]:
    """Run a prompt; return seconds to the logits after it, and to the first token (chosen greedily)."""
    ids = random_ids(llm, tokens)
    began = time.perf_counter()
    logits = np.empty((1, llm.config.vocab_size), np.float32)
    for start in range(0, tokens, PREFILL_CHUNK):
        stop = min(start + PREFILL_CHUNK, tokens)
        rows = None if stop == tokens else np.arange(0)  # only the last token's logits are needed
        out = logits if stop == tokens else None
        llm.model.step([(sequence, ids[start:stop])], rows, out)
    done = time.perf_counter()
    logits[0].argmax()
    return done - began, time.perf_counter() - began


def decode(llm: LLM, sequences: Sequence[SequenceCache], tokens: int) -> float:
    """Return the seconds of `tokens` steps over one token of every sequence; rewind the sequences afterwards."""
    ids = random_ids(llm, tokens)
    lengths = [sequence.length for sequence in sequences]
    began = time.perf_counter()
    for position in range(tokens):
        token = ids[position : position + 1]
        llm.model.step([(sequence, token) for sequence in sequences])
    seconds = time.perf_counter() - began
    for sequence, length in zip(sequences, lengths, strict=True):
        sequence.length = length
    return seconds


def random_ids(llm: LLM, tokens: int) -> np.ndarray:
    """Return token ids within the vocabulary, always the same: int32 (tokens,)."""
    return np.random.default_rng(_SEED).integers(0, llm.config.vocab_size, tokens, dtype=np.int32)
