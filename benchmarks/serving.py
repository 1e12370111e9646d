"""Measure what batching, prefix reuse and speculation gain here: `python benchmarks/serving.py MODEL`.

For the speculation rows, logits are replaced after real steps of the model, so that its text is a loop. Every draft
is right, so this is the most that speculation can gain. All figures are medians of interleaved runs.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import llamita
from llamita.engine.llm import LLM
from llamita.engine.requests import Generation

LOOP = list(range(100, 132))


class Looped:
    """Runs the model, but returns logits whose text repeats LOOP."""

    def __init__(self, llm: LLM) -> None:
        self.config = llm.config
        self._model = llm.model

    def step(self, sequences: Any, rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        logits = self._model.step(sequences, rows, out)
        ids = np.concatenate([ids for _, ids in sequences])
        for row, at in zip(logits, rows, strict=True):
            row[:] = 0
            row[LOOP[(int(ids[at]) - LOOP[0] + 1) % len(LOOP)]] = 100
        return logits


def step_seconds(llm: LLM, rows: int) -> float:
    """Return the seconds of a step with `rows` rows of one sequence, after 64 tokens."""
    cache, ids = llm.new_sequence(64 + rows), np.arange(64, dtype=np.int32)
    llm.model.step([(cache, ids)], np.arange(0))
    began = time.perf_counter()
    llm.model.step([(cache, ids[:rows])], np.arange(rows))
    return time.perf_counter() - began


def interleaved(runs: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Return the median of each action, after a round that warms up."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            found[name].append(run())
    return {name: statistics.median(values[1:]) for name, values in found.items()}


def together(llm: LLM, count: int, tokens: int) -> float:
    """Return the decoded tokens a second of `count` sequences, without their prompts."""
    prompts = [LOOP[i:] for i in range(count)]  # all of them fit one step
    found = llm.generate_many(prompts, max_tokens=tokens, greedy=True, speculate=0)
    return sum(g.timings.decode_rate for g in found)


def looped(llm: LLM, tokens: int, speculate: int) -> Generation:
    return llm.generate(LOOP * 3, max_tokens=tokens, greedy=True, speculate=speculate)


def first_token(llm: LLM, known: int, new: int) -> float:
    """Return the seconds to the first token of a prompt of which a part is known."""
    ids = np.random.default_rng(time.perf_counter_ns()).integers(2, 4000, known + new)
    if known:
        llm.generate(ids[:known], max_tokens=1)
    return llm.generate(ids, max_tokens=1).timings.first_token_seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    llm = llamita.load(arguments.model, context=2048)
    tokens, repeats = arguments.tokens, arguments.repeats
    steps = interleaved({str(n): lambda n=n: step_seconds(llm, n) for n in (1, 2, 3, 5, 8)}, repeats)
    print("a step of rows, relative to one:", {n: round(t / steps["1"], 2) for n, t in steps.items()})
    firsts = {"512 tokens": lambda: first_token(llm, 0, 512), "480 of them known": lambda: first_token(llm, 480, 32)}
    print("first token, ms:", {n: round(t * 1e3, 1) for n, t in interleaved(firsts, repeats).items()})
    llm.scheduler.model = Looped(llm)  # type: ignore[assignment]
    rates = interleaved({str(n): lambda n=n: together(llm, n, tokens) for n in (1, 2, 4, 8)}, repeats)
    print("sequences together, tok/s:", {n: round(rate, 1) for n, rate in rates.items()})
    looped(llm, 2 * tokens, 4)  # learns what steps take
    runs = {str(n): lambda n=n: looped(llm, 2 * tokens, n).timings.decode_rate for n in (0, 4)}
    print("drafts, all right, tok/s:", {n: round(rate, 1) for n, rate in interleaved(runs, repeats).items()})
    timings = looped(llm, 2 * tokens, 4).timings
    print(f"tokens a step: {(timings.generated_tokens - 1) / timings.decode_steps:.2f}")


if __name__ == "__main__":
    main()
