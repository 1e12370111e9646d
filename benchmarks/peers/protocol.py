"""Serve an engine in its own process: one JSON object a line, requests on stdin, answers on stdout.

    {"do": "run", "prompt": 512, "new": 64, "sequences": 1, "seed": 0}
        -> {"prefill_seconds": ..., "decode_seconds": ..., "tokens": [...]}
    {"do": "logits", "prompt": 64}  -> {"logits": [...]}, those that follow the prompt

Prefill runs from the call with the token ids to the first greedy token; decode takes the `new` tokens after
it, each chosen by argmax and fed back. It needs only NumPy, because it is imported in every engine's environment.
"""

import ctypes
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

ORDINARY_TOKENS = 128_000  # of Llama 3's vocabulary; the ids above are special
SHOWN_TOKENS = 8  # of every sequence, in the answer
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Run:
    """The seconds up to the first token of every sequence, and of the tokens after it; tokens include the first."""

    prefill_seconds: float
    decode_seconds: float
    tokens: list[list[int]]


class Engine(Protocol):
    """A loaded model."""

    @property
    def about(self) -> dict[str, Any]:
        """Return version and settings, which tell this engine from another."""
        ...

    def run(self, prompts: list[np.ndarray], new: int) -> Run:
        """Take in fresh prompts, int32 (tokens,) each, then decode `new` tokens after the first of each."""
        ...

    def logits(self, prompt: np.ndarray) -> np.ndarray:
        """Return the logits after the last token of the prompt: float32 (vocab,)."""
        ...


def run_stepwise(start: Callable[[], list[int]], step: Callable[[list[int]], list[int]], new: int) -> Run:
    """Time an engine that goes token by token.

    Args:
        start: takes in the prompts and returns the first token of each.
        step: takes in one token of each sequence and returns the next ones.
        new: how often to step.
    """
    began = time.perf_counter()
    steps = [start()]
    between = time.perf_counter()
    for _ in range(new):
        steps.append(step(steps[-1]))
    ended = time.perf_counter()
    return Run(between - began, ended - between, [list(column) for column in zip(*steps, strict=True)])


def prompt_ids(request: dict[str, Any], sequence: int = 0) -> np.ndarray:
    """Return the same random token ids for every engine, int32 (tokens,).

    Ids of another seed begin differently, so that no engine can answer from a cache of prefixes.
    """
    rng = np.random.default_rng([request.get("seed", 0), sequence])
    return rng.integers(0, request.get("vocabulary", ORDINARY_TOKENS), request["prompt"], dtype=np.int32)


def serve(load: Callable[[dict[str, Any]], Engine]) -> None:
    """Load what the first argument says, announce it, then answer until stdin ends."""
    die_with_parent()
    answers = _private_stdout()
    before = memory_bytes()
    began = time.perf_counter()
    engine = load(json.loads(sys.argv[1]))
    seconds = time.perf_counter() - began
    ready = {"load_seconds": seconds, "memory_bytes": memory_bytes() - before, **engine.about}
    print(json.dumps(ready), file=answers, flush=True)
    for line in sys.stdin:
        try:
            answer = _answer(engine, json.loads(line))
        except Exception as error:  # the parent gets it: one engine's failure must not end the run
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def _answer(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    if request["do"] == "logits":
        return {"logits": engine.logits(prompt_ids(request)).astype(float).tolist()}
    if request["do"] != "run":
        raise ValueError(f"do: expected run or logits, got {request['do']!r}")
    sequences, new = request["sequences"], request["new"]
    run = engine.run([prompt_ids(request, sequence) for sequence in range(sequences)], new)
    if [len(tokens) for tokens in run.tokens] != [1 + new] * sequences:
        raise RuntimeError(f"expected {sequences} x {1 + new} tokens, got {[len(t) for t in run.tokens]}")
    return {
        "prefill_seconds": run.prefill_seconds,
        "decode_seconds": run.decode_seconds,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "tokens": [tokens[:SHOWN_TOKENS] for tokens in run.tokens],
    }


def memory_bytes() -> int:
    """Return the resident memory of this process, mapped files included."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def die_with_parent() -> None:
    """Ask the kernel to end this process with the one that started it, even while it is stopped."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _private_stdout() -> Any:
    """Return a stream for answers only: output of libraries on stdout goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers
