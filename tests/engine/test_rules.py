"""Penalties, biases, least lengths, end tokens and grammars: each against its formula, with and without speculation."""

from collections import Counter
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from generations import Chain, endless
from tiny import make_checkpoint

import llamita
from llamita.engine.llm import LLM
from llamita.engine.sampler import Rules, Sampler, Sampling
from llamita.engine.speculation import StepTimes
from llamita.errors import InputError, RunError

VOCAB = 500
END = 3
GREEDY = Sampling(temperature=0.0)
PROMPT = "Once upon a time, there was a dog. Once upon a time, there"


class Cycle:
    """A grammar of tokens in a fixed order, with a choice of two at each place; `end` may come after `least`."""

    def __init__(self, vocab: int, places: list[list[int]], end: int | None = None, least: int = 0) -> None:
        self.vocab, self.places, self.end, self.least = vocab, places, end, least
        self.count = 0

    def allowed(self) -> np.ndarray:
        mask = np.zeros(self.vocab, dtype=bool)
        mask[self.places[self.count % len(self.places)]] = True
        if self.end is not None and self.count >= self.least:
            mask[self.end] = True
        return mask

    def accept(self, token: int) -> None:
        if not self.allowed()[token]:
            raise RunError("grammar", "one of its tokens", f"{token}")
        self.count += 1

    def forced(self, limit: int) -> list[int]:
        found = []
        while len(found) < limit and len(place := self.places[(self.count + len(found)) % len(self.places)]) == 1:
            if self.end is not None and self.count + len(found) >= self.least:
                break
            found += place
        return found

    def copy(self) -> Self:
        copied = type(self)(self.vocab, self.places, self.end, self.least)
        copied.count = self.count
        return copied


@pytest.fixture(scope="module")
def embedded() -> LLM:
    return llamita.load("embedded", scheme="llama3.2")


@pytest.fixture
def tiny(tmp_path: Path) -> LLM:
    return endless(make_checkpoint(tmp_path, "llama32"))


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify every draft, whatever it costs."""
    monkeypatch.setattr(StepTimes, "best_length", lambda *_: 100)


def rows_of(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, (count, VOCAB)).astype(np.float32)


# Each rule


@pytest.mark.parametrize(("frequency", "presence"), [(0.7, 0.0), (0.0, 1.5), (0.5, 0.25), (-2.0, 0.5), (2.0, 2.0)])
def test_penalties_are_those_of_openai(frequency: float, presence: float) -> None:
    """Logit less count times frequency less presence, by generated tokens alone."""
    prompt = np.arange(100)
    sampler = Sampler(Sampling(0.0, frequency_penalty=frequency, presence_penalty=presence), prompt, VOCAB)
    counts, found, expected = np.zeros(VOCAB), [], []
    for row in np.tile(rows_of(1, 1), (60, 1)):
        expected.append(int((row - frequency * counts - presence * (counts > 0)).argmax()))
        found.append(sampler.choose(row))
        counts[expected[-1]] += 1
    assert found == expected
    assert len(set(found)) > 1 or frequency < 0


def test_penalties_follow_the_repetition_penalty_and_biases_come_before_it() -> None:
    bias = {5: 3.0, 9: -50.0, 44: 7.5}
    sampling = Sampling(0.0, repetition_penalty=1.4, frequency_penalty=0.3, presence_penalty=0.2)
    sampler = Sampler(sampling, np.array([5, 7]), VOCAB, Rules(bias))
    counts, seen = Counter(), {5, 7}
    for row in np.tile(rows_of(2, 1), (40, 1)):
        logits = row.astype(np.float64)
        for token, value in bias.items():
            logits[token] += value
        for token in seen:
            logits[token] *= 1.4 if logits[token] < 0 else 1 / 1.4
        for token, count in counts.items():
            logits[token] -= 0.3 * count + 0.2
        token = sampler.choose(row)
        assert logits.max() - logits[token] < 1e-5  # float32 beside float64
        counts[token] += 1
        seen.add(token)


@pytest.mark.parametrize("bias", [{}, {3: 100.0}, {3: -100.0, 8: 1.5, 499: 2.0}])
def test_biases_and_least_lengths_are_those_of_transformers(bias: dict[int, float]) -> None:
    torch = pytest.importorskip("torch", reason="compares with transformers")
    process = pytest.importorskip("transformers.generation.logits_process", reason="compares with transformers")
    sampler = Sampler(GREEDY, np.arange(4), VOCAB, Rules(bias, ends=(END, 8), min_tokens=5))
    ids = torch.arange(4)[None]
    least = process.MinNewTokensLengthLogitsProcessor(4, 5, [END, 8], device="cpu")
    for row in rows_of(4, 12):
        row[END] = 9.0
        scores = torch.from_numpy(row)[None]
        if bias:
            biases = {(token,): value for token, value in bias.items()}
            scores = process.SequenceBiasLogitsProcessor(biases)(ids, scores)
        token = sampler.choose(row)
        assert token == int(least(ids, scores).argmax())
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


def test_draws_come_from_what_is_allowed() -> None:
    allowed = [4, 90, 91, 300]
    rules = Rules(ends=(END,), constraint=Cycle(VOCAB, [allowed]))
    sampler = Sampler(Sampling(temperature=1.5, top_p=1.0, seed=0), np.array([0]), VOCAB, rules)
    row = rows_of(5, 1)[0]
    counts = np.bincount([sampler.choose(row) for _ in range(20_000)], minlength=VOCAB)
    weights = np.exp(row[allowed].astype(np.float64) / 1.5)
    assert counts.sum() == counts[allowed].sum()
    np.testing.assert_allclose(counts[allowed] / 20_000, weights / weights.sum(), atol=0.018)  # five standard errors


def test_a_grammar_that_allows_nothing_is_an_error_and_one_that_allows_the_end_alone_ends() -> None:
    row = rows_of(6, 1)[0]
    with pytest.raises(RunError, match="grammar: expected a token that may come next, got none"):
        Sampler(GREEDY, np.array([0]), VOCAB, Rules(constraint=Cycle(VOCAB, [[]]))).choose(row)
    for least in (None, 10):
        rules = Rules(ends=(END,), min_tokens=least, constraint=Cycle(VOCAB, [[7], []], END, 1))
        sampler = Sampler(GREEDY, np.array([0]), VOCAB, rules)
        assert [sampler.choose(row) for _ in range(2)] == [7, END]


# Through the model


def test_end_tokens_wait_for_the_least_length(tiny: LLM) -> None:
    table = np.full((256, 256), 1e-9)
    table[:, 65], table[:, 66] = 0.9, 0.1
    Chain(tiny, table)
    tiny.tokenizer.eos_token_ids = (65,)
    ended = tiny.generate([1], max_tokens=10, greedy=True)
    assert (ended.token_ids, ended.finish_reason) == ([], "stop")
    later = tiny.generate([1], max_tokens=10, greedy=True, min_tokens=4)
    assert (later.token_ids, later.finish_reason) == ([66] * 4, "stop")
    never = tiny.generate([1], max_tokens=10, greedy=True, ignore_eos=True)
    assert (never.token_ids, never.finish_reason) == ([66] * 10, "length")


def test_stop_texts_wait_for_the_least_length(tiny: LLM) -> None:
    Chain(tiny, np.eye(256)[np.arange(1, 257) % 256] + 1e-9)  # each byte is followed by the next one
    ids = tiny.tokenizer.encode("a", add_bos=False)
    assert tiny.generate(ids, max_tokens=6, greedy=True, stop="c").text == "b"
    assert tiny.generate(ids, max_tokens=6, greedy=True, stop="c", min_tokens=3).text == "bcdefg"
    assert tiny.generate(ids, max_tokens=6, greedy=True, stop=["c", "e"], min_tokens=3).text == "bcd"


def test_special_tokens_are_written_out_where_asked_for(tiny: LLM) -> None:
    special = next(token for token, added in tiny.tokenizer._added.items() if added.special)
    letter, end = tiny.tokenizer.encode("AB", add_bos=False)
    tiny.tokenizer.eos_token_ids = (end,)
    options: dict[str, Any] = {
        "greedy": True,
        "constraint": Cycle(tiny.config.vocab_size, [[special], [letter], [end]]),
    }
    assert tiny.generate([1], max_tokens=4, **options).text == "A"
    shown = tiny.generate([1], max_tokens=4, show_special=True, **options)
    assert shown.text == tiny.tokenizer.decode([special], skip_special=False) + "A"
    assert (shown.finish_reason, len(shown.token_ids)) == ("stop", 2)


def test_without_a_limit_the_context_is_filled(tiny: LLM) -> None:
    generation = tiny.generate([1] * (tiny.context - 9), max_tokens=None, greedy=True)
    assert (len(generation.token_ids), generation.finish_reason) == (9, "context")


def test_grammars_of_many_prompts_do_not_share_their_state(tiny: LLM) -> None:
    grammar = Cycle(tiny.config.vocab_size, [[70], [71, 72], [73]])
    found = tiny.generate_many(["a", "b", "c"], max_tokens=6, greedy=True, constraint=grammar)
    assert all(grammar.places[i % 3].count(token) for g in found for i, token in enumerate(g.token_ids))
    assert grammar.count == 0


def test_a_grammar_that_fails_ends_its_own_sequence_alone(tiny: LLM) -> None:
    class Failing(Cycle):
        def accept(self, token: int) -> None:
            if self.count == 2:
                raise RunError("grammar: it broke")
            super().accept(token)

    failing = tiny.stream("a", max_tokens=9, constraint=Failing(tiny.config.vocab_size, [[65]]))
    other = tiny.stream("b", max_tokens=9, greedy=True)
    with pytest.raises(RunError, match="it broke"):
        list(failing)
    assert len(list(other)[-1].token_ids) == 9  # type: ignore[union-attr]


# Speculation


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("how", [{"greedy": True}, {"temperature": 1.0, "top_p": 1.0, "seed": 5}], ids=str)
@pytest.mark.parametrize("rules", [
    {"frequency_penalty": 0.4, "presence_penalty": 0.3}, {"logit_bias": {5: 4.0, 90: -100.0, 300: 2.5}},
    {"min_tokens": 50}, {"ignore_eos": True}, {"logprobs": 3}, {"stop": ["dog", "happy"], "min_tokens": 20},
    {"constraint": Cycle(4096, [[300, 301], [5], [6], [7], [8, 9], [10]])}, {"show_special": True},
    {"constraint": Cycle(4096, [list(range(4096))])},
    {"constraint": Cycle(4096, [[40], [50, 51]]), "frequency_penalty": 1.0, "logprobs": 2, "repetition_penalty": 1.2},
], ids=" and ".join)  # fmt: skip
def test_speculation_changes_nothing(embedded: LLM, how: dict[str, Any], rules: dict[str, Any]) -> None:
    assert embedded.config.vocab_size == 4096
    found = [embedded.generate(PROMPT, speculate=n, max_tokens=60, **how, **rules) for n in (0, 8)]
    assert found[0].token_ids == found[1].token_ids
    assert (found[0].text, found[0].logprobs) == (found[1].text, found[1].logprobs)
    assert found[0].timings.drafted_tokens == 0


@pytest.mark.usefixtures("always")
def test_what_a_grammar_forces_is_drafted_and_right(tiny: LLM) -> None:
    grammar = Cycle(tiny.config.vocab_size, [[80, 81], *([token] for token in range(40, 52))])
    options: dict[str, Any] = {"max_tokens": 40, "seed": 1, "constraint": grammar}
    generation = tiny.generate([1, 2], **options)
    assert generation.timings.drafted_tokens == generation.timings.accepted_tokens > 20
    assert tiny.generate([1, 2], speculate=0, **options).token_ids == generation.token_ids


# What is refused


@pytest.mark.parametrize(("name", "value"), [
    ("max_tokens", 0), ("max_tokens", 1.5), ("frequency_penalty", 2.1), ("presence_penalty", float("nan")),
    ("frequency_penalty", "much"), ("logit_bias", [1]), ("logit_bias", {-1: 1.0}), ("logit_bias", {4096: 1.0}),
    ("logit_bias", {"5": 1.0}), ("logit_bias", {5: 101}), ("logit_bias", {5: float("nan")}), ("logit_bias", {5: True}),
    ("min_tokens", -1), ("min_tokens", None), ("ignore_eos", 1), ("logprobs", 21), ("logprobs", -1), ("logprobs", True),
    ("prompt_logprobs", 2.0), ("constraint", "a+"), ("show_special", None), ("owner", 5),
])  # fmt: skip
def test_wrong_options_are_named(embedded: LLM, name: str, value: object) -> None:
    with pytest.raises(InputError, match=f"{name}: expected"):
        embedded.generate("x", **{name: value})  # type: ignore[arg-type]
