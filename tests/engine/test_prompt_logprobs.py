"""Scores of prompts: the numbers of `iter_logits`, beside whatever else runs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from generations import Watched, endless, finish, fix_budget, ids_of
from tiny import make_checkpoint

from llamita.engine.llm import LLM
from llamita.engine.logprobs import TokenLogprob, score
from llamita.engine.scheduler import SCORED_ROWS
from llamita.errors import RunError


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "llama32", eos_token_id=319)


@pytest.fixture
def llm(directory: Path) -> LLM:
    return endless(directory, scheme="llama3.2")


def expected(llm: LLM, ids: list[int], count: int) -> list[TokenLogprob | None]:
    logits = np.concatenate(list(llm.iter_logits(ids)))
    return [None, *(score(row, token, count) for row, token in zip(logits, ids[1:], strict=False))]


@pytest.mark.parametrize("length", [1, 2, SCORED_ROWS, SCORED_ROWS + 1, 300])
@pytest.mark.parametrize("max_tokens", [0, 3])
def test_prompts_are_scored(llm: LLM, length: int, max_tokens: int) -> None:
    ids = ids_of(length, length)
    generation = llm.generate(ids, max_tokens=max_tokens, prompt_logprobs=2, greedy=True)
    assert generation.prompt_logprobs == expected(llm, ids, 2)
    assert len(generation.token_ids) == max_tokens
    assert generation.token_ids == llm.generate(ids, max_tokens=3, greedy=True).token_ids[:max_tokens]
    assert generation.finish_reason == "length"


def test_scoring_beside_others_changes_nothing(llm: LLM) -> None:
    prompts = [ids_of(seed, 30 + 61 * seed) for seed in range(5)]
    options: list[Any] = [
        {"max_tokens": 20 * (seed % 2), "prompt_logprobs": 3, "logprobs": 1, "seed": seed}
        if seed % 3
        else {"max_tokens": 60, "seed": seed}
        for seed in range(5)
    ]
    alone = [llm.generate(ids, **own) for ids, own in zip(prompts, options, strict=True)]
    streams = [llm.stream(ids, **own) for ids, own in zip(prompts, options, strict=True)]
    for ids, stream, solo in zip(prompts, streams, alone, strict=True):
        found = finish(stream)
        assert (found.token_ids, found.logprobs) == (solo.token_ids, solo.logprobs)
        assert found.prompt_logprobs == solo.prompt_logprobs
        if found.prompt_logprobs:
            assert found.prompt_logprobs == expected(llm, ids, 3)


def test_rows_of_a_step_are_few(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    fix_budget(monkeypatch, alone=512)
    rows: list[int] = []
    watched = Watched(llm, lambda _count, _sequences, logits: rows.append(len(logits)))
    llm.generate_many([ids_of(seed, 100) for seed in range(3)], max_tokens=0, prompt_logprobs=0)
    assert max(rows) == SCORED_ROWS
    assert watched.tokens == 300


def test_what_is_known_is_not_reused_but_kept_for_others(llm: LLM) -> None:
    ids = ids_of(0, 100)
    llm.generate(ids, max_tokens=1)
    generation = llm.generate(ids, max_tokens=0, prompt_logprobs=0)
    assert generation.timings.reused_tokens == 0
    assert llm.generate([*ids, 1], max_tokens=1).timings.reused_tokens == 100


def test_an_interrupted_step_is_scored_again(llm: LLM) -> None:
    def meddle(count: int, *_: Any) -> None:
        if count == 2:
            raise KeyboardInterrupt

    ids = ids_of(0, 200)
    Watched(llm, meddle)
    stream = llm.stream(ids, max_tokens=2, prompt_logprobs=1)
    with pytest.raises(KeyboardInterrupt):
        finish(stream)
    assert finish(stream).prompt_logprobs == expected(llm, ids, 1)


def test_broken_weights_are_named(llm: LLM) -> None:
    def meddle(_count: int, _sequences: Any, logits: np.ndarray) -> None:
        logits[0] = np.nan

    Watched(llm, meddle)
    with pytest.raises(RunError, match="logits: expected finite values"):
        llm.generate(ids_of(0, 20), max_tokens=0, prompt_logprobs=1)
    assert not llm.scheduler.load.running
