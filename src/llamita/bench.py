"""How fast a loaded model runs: prefill and decode in tokens per second, medians of several runs."""

import statistics
import time
from dataclasses import dataclass

import numpy as np

from llamita.engine.llm import LLM, PREFILL_CHUNK

PROMPT_TOKENS = 512
NEW_TOKENS = 128
_SEED = 0  # of the prompt's token ids; what they are does not change the work


@dataclass(frozen=True)
class Speed:
    """Tokens per second: of a prompt, and one at a time after it."""

    prefill: float
    decode: float


def measure_speed(
    llm: LLM, prompt_tokens: int = PROMPT_TOKENS, new_tokens: int = NEW_TOKENS, repeats: int = 5
) -> Speed:
    """Prefill a prompt of random tokens, then decode: the median of `repeats` runs after one that warms up.

    Decoding feeds fixed tokens instead of sampled ones, so that an end token cannot cut a run short.
    """
    total = prompt_tokens + new_tokens
    ids = np.random.default_rng(_SEED).integers(0, llm.config.vocab_size, total, dtype=np.int32)
    runs = [_run_once(llm, ids, prompt_tokens) for _ in range(repeats + 1)][1:]
    return Speed(
        prefill=prompt_tokens / statistics.median(prefill for prefill, _ in runs),
        decode=new_tokens / statistics.median(decode for _, decode in runs),
    )


def _run_once(llm: LLM, ids: np.ndarray, prompt_tokens: int) -> tuple[float, float]:
    """Seconds of the prompt and of the tokens after it."""
    sequence = llm.new_sequence(len(ids))
    began = time.perf_counter()
    for start in range(0, prompt_tokens, PREFILL_CHUNK):
        stop = min(start + PREFILL_CHUNK, prompt_tokens)
        rows = None if stop == prompt_tokens else np.arange(0)  # only the last token's logits are needed
        llm.model.step([(sequence, ids[start:stop])], rows)
    between = time.perf_counter()
    for position in range(prompt_tokens, len(ids)):
        llm.model.step([(sequence, ids[position : position + 1])])
    return between - began, time.perf_counter() - between
