"""Generations without a scheduler, and stand-ins for the parts of one."""

import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import numpy as np
import pytest

import llamita
from llamita.engine import admission, cache_memory, scheduler, sequence, stream
from llamita.engine.llm import LLM, Generation
from llamita.engine.prompt_budget import MIXED_CHUNK, PREFILL_CHUNK, PromptBudget
from llamita.engine.sampler import Rules, Sampler, Sampling
from llamita.engine.stream import Stream

WATCHED = {m.__file__ for m in (admission, cache_memory, scheduler, sequence, stream, threading)}  # for interrupts


def endless(model: Path, **options: Any) -> LLM:
    """Load a model without end tokens: every generation is as long as it is asked to be."""
    llm = llamita.load(model, **options)
    llm.tokenizer.eos_token_ids = ()
    return llm


def fix_budget(patch: pytest.MonkeyPatch, alone: int = PREFILL_CHUNK, beside: int = MIXED_CHUNK) -> None:
    """Let steps take in so many prompt tokens, however long they take."""
    patch.setattr(PromptBudget, "tokens", lambda _self, _seconds, is_mixed, _prompts: beside if is_mixed else alone)


def plain(
    llm: LLM, ids: Sequence[int], count: int, sampling: Sampling, ends: Sequence[int] = ()
) -> tuple[list[int], list[np.ndarray]]:
    """The specification: one sequence, one token a step. Tokens, and the logits that each was drawn from."""
    sampler = Sampler(sampling, np.asarray(ids), llm.config.vocab_size)
    cache = llm.new_sequence(len(ids) + count)
    pending, tokens, rows = np.array(ids, dtype=np.int32), [], []
    while len(tokens) < count and not (tokens and tokens[-1] in ends):
        rows.append(llm.model.step([(cache, pending)])[0].copy())
        tokens.append(sampler.choose(rows[-1]))
        pending = np.array(tokens[-1:], dtype=np.int32)
    return tokens, rows


class RecordingSampler(Sampler):
    """Keeps the logits that it drew from, by the prompt."""

    rows: ClassVar[defaultdict[bytes, list[np.ndarray]]] = defaultdict(list)

    def __init__(self, sampling: Sampling, prompt: np.ndarray, vocab_size: int, rules: Rules) -> None:
        super().__init__(sampling, prompt, vocab_size, rules)
        self._prompt = np.asarray(prompt, dtype=np.int32).tobytes()

    def choose(self, logits: np.ndarray) -> int:
        self.rows[self._prompt].append(logits.copy())
        return super().choose(logits)


class Watched:
    """A model that notes the tokens of each step, and may meddle with it."""

    def __init__(self, llm: LLM, meddle: Callable[[int, Any, np.ndarray], None] | None = None) -> None:
        self.config = llm.config
        self.steps: list[list[int]] = []  # tokens of each sequence in each step
        self._model = llm.model
        self._meddle = meddle
        llm.scheduler.model = self  # type: ignore[assignment]

    def step(self, sequences: Any, rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        self.steps.append([len(ids) for _, ids in sequences])
        logits = self._model.step(sequences, rows, out)
        if self._meddle:
            self._meddle(len(self.steps), sequences, logits)
        return logits

    @property
    def tokens(self) -> int:
        return sum(map(sum, self.steps))


class Chain:
    """A model whose logits depend on the last token alone: log-probabilities, a row for each token.

    Where the table ends, tokens have no chance and are followed by anything.
    """

    def __init__(self, llm: LLM, probabilities: np.ndarray) -> None:
        self.config = llm.config
        self._logits = np.full((llm.config.vocab_size,) * 2, -1e4, dtype=np.float32)
        self._logits[: len(probabilities), : len(probabilities)] = np.log(probabilities)
        llm.scheduler.model = self  # type: ignore[assignment]

    def step(self, sequences: Any, rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        for cache, ids in sequences:
            cache.length += len(ids)
            assert cache.length <= cache.capacity
        out[:] = self._logits[np.concatenate([ids for _, ids in sequences])[rows]]
        return out


def ids_of(seed: int, count: int) -> list[int]:
    """Random token ids."""
    return np.random.default_rng(seed).integers(0, 256, count).tolist()


def finish(stream: Stream) -> Generation:
    """What a stream ends with."""
    *_, generation = stream
    assert isinstance(generation, Generation)
    return generation


def once(call: Callable[[], Any]) -> Callable[[], None]:
    """Return a function that runs `call` the first time and does nothing from then on."""
    calls = [call]

    def run() -> None:
        if calls:
            calls.pop()()

    return run


def interrupt() -> None:
    raise KeyboardInterrupt


def interrupted_at(place: int, call: Callable[[], Any]) -> bool:
    """Run `call` with an interrupt at one of the places in the scheduler where Python lets one in.

    These are the beginnings of functions and the ends of calls to C. False if there are fewer places.
    """
    places = count()

    def watch(frame: FrameType, event: str, _argument: Any) -> None:
        is_here = frame.f_code.co_filename in WATCHED
        if is_here and event in ("call", "c_return") and next(places) == place:
            interrupt()

    sys.setprofile(watch)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.setprofile(None)
    return False
