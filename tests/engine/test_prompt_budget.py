"""How many prompt tokens a step takes in, on a clock that the tests set."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from generations import Watched, endless, finish, ids_of, plain
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_checkpoint

from llamita.engine import scheduler
from llamita.engine.llm import LLM
from llamita.engine.prompt_budget import (
    ALONE_SECONDS,
    BESIDE_SECONDS,
    LEAST_TOKENS,
    MIXED_CHUNK,
    MOST_TOKENS,
    PREFILL_CHUNK,
    SMOOTH_SECONDS,
    PromptBudget,
    share,
)
from llamita.engine.sampler import Sampling


class Machine:
    """A model's steps with seconds of their own: `row` for each decoded token, `token` and `key` for a prompt's."""

    def __init__(self, llm: LLM, patch: pytest.MonkeyPatch, row: float, token: float, key: float = 0.0) -> None:
        self.now, self._row, self._token, self._key = 1.0, row, token, key
        self.seconds: list[float] = []
        patch.setattr(scheduler, "time", SimpleNamespace(perf_counter=lambda: self.now))
        self.watched = Watched(llm, self._pass)

    def _pass(self, _count: int, sequences: Any, _logits: np.ndarray) -> None:
        prompts = [(cache.length, len(ids)) for cache, ids in sequences if len(ids) > 1]
        taken = 0.005 + self._row * (len(sequences) - len(prompts))
        taken += sum(count * (self._token + self._key * length) for length, count in prompts)
        self.seconds.append(taken)
        self.now += taken


@pytest.fixture
def llm(tmp_path: Path) -> LLM:
    directory = make_checkpoint(tmp_path, "llama32", eos_token_id=319, max_position_embeddings=16384)
    return endless(directory, scheme="llama3.2", prefix_cache=0)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (0.001, SMOOTH_SECONDS),  # fast streams
        (0.025, 3 * 0.03),  # three times what a step takes without prompts: 5 ms, and the row
        (0.07, BESIDE_SECONDS),
        (0.195, 1.5 * 0.2),  # slow streams leave prompts a third of the time
    ],
)
def test_beside_a_running_generation_a_step_takes_its_time(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, row: float, expected: float
) -> None:
    machine = Machine(llm, monkeypatch, row=row, token=0.0005, key=1e-7)
    decoding = llm.stream(ids_of(0, 20), max_tokens=900, greedy=True, speculate=0)
    for _ in range(8):
        next(decoding)
    del machine.seconds[:]
    list(llm.stream(ids_of(1, 6000), max_tokens=1, greedy=True, speculate=0))
    steps = machine.seconds[4:-1]
    assert len(steps) > 20
    piece = LEAST_TOKENS * (0.0005 + 6000 * 1e-7)  # the budget is rounded to half of this, and some steps late
    assert expected - 2 * piece < min(steps)
    assert max(steps) < expected + 2 * piece
    decoding.close()


def test_beside_many_prompts_a_step_takes_longer() -> None:
    budget = PromptBudget()
    budget.add(100, 0.12, 0.02, True)  # 1 ms for each token
    assert [budget.tokens(0.02, True, prompts) for prompts in (1, 4, 5, 16)] == [40, 40, 128, 128]


def test_alone_a_step_takes_longer(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(llm, monkeypatch, row=0.03, token=0.003)
    generation = finish(llm.stream(ids_of(1, 3000), max_tokens=5, greedy=True, speculate=0))
    assert machine.watched.steps[0] == [PREFILL_CHUNK]
    assert all(abs(seconds - ALONE_SECONDS) < 16 * 0.003 for seconds in machine.seconds[2:-6])
    assert generation.token_ids == plain(llm, ids_of(1, 3000), 5, Sampling(0.0))[0]
    assert llm.scheduler.load.prefill_rate == pytest.approx(1 / 0.003, rel=0.1)


@pytest.mark.parametrize(("token", "expected"), [(1e-6, MOST_TOKENS), (1.0, LEAST_TOKENS)])
def test_a_step_has_bounds(llm: LLM, monkeypatch: pytest.MonkeyPatch, token: float, expected: int) -> None:
    machine = Machine(llm, monkeypatch, row=0.0, token=token)
    list(llm.stream(ids_of(1, 3000), max_tokens=1))
    assert machine.watched.steps[3] == [expected]


def test_before_anything_is_measured_the_budget_is_fixed() -> None:
    budget = PromptBudget()
    assert (budget.tokens(0.0, False), budget.tokens(0.0, True), budget.rate) == (PREFILL_CHUNK, MIXED_CHUNK, 0.0)
    budget.add(LEAST_TOKENS - 1, 5.0, 0.0, False)  # too few to say anything
    assert budget.tokens(0.0, False) == PREFILL_CHUNK
    budget.add(250, 0.5, 0.0, False)
    assert budget.tokens(0.05, True) == 48  # by the time of a token alone: 0.1 s of 0.15, 2 ms each


def test_one_slow_step_changes_little() -> None:
    budget = PromptBudget()
    for _ in range(5):
        budget.add(256, 0.5, 0.0, False)
    budget.add(256, 60.0, 0.0, False)
    assert budget.tokens(0.0, False) >= 208


def test_a_short_prompt_passes_a_long_one(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(llm, monkeypatch, row=0.03, token=0.004)
    long = llm.stream(ids_of(1, 8000), max_tokens=1)
    llm.scheduler.step()
    short = llm.stream(ids_of(2, 150), max_tokens=1)
    steps = llm.scheduler.counters.steps
    finish(short)
    assert llm.scheduler.counters.steps - steps <= 2
    long.close()


@given(budget=st.integers(1, 512), remaining=st.lists(st.integers(0, 2000), max_size=16))
def test_shares(budget: int, remaining: list[int]) -> None:
    parts = share(budget, remaining)
    assert all(0 <= part <= rest for part, rest in zip(parts, remaining, strict=True))
    assert sum(parts) == min(budget, sum(remaining))
    if remaining:
        assert parts[0] >= min(remaining[0], budget // 4)
        order = sorted(range(1, len(remaining)), key=remaining.__getitem__)  # the rest: the shortest first
        part_done = [i for i in order if 0 < parts[i] < remaining[i]]
        assert len(part_done) <= 1
        assert all(parts[i] == 0 for i in order if part_done and order.index(i) > order.index(part_done[0]))


def test_the_oldest_prompt_is_overtaken_by_three_tokens_for_each_of_its_own() -> None:
    left, overtaken = 1000, 0
    while left:
        parts = share(64, [left, 30, 30, 30, 30])  # shorter ones without end
        left -= parts[0]
        overtaken += sum(parts[1:])
    assert overtaken <= 3 * 1000
