"""Log-probabilities: the numbers of the logits and of evaluation, and where they come with an answer."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import llamita
from llamita.engine.llm import LLM
from llamita.engine.logprobs import score
from llamita.evaluate.scores import token_losses


@pytest.fixture(scope="module")
def embedded() -> LLM:
    return llamita.load("embedded", scheme="llama3.2")


@pytest.mark.parametrize("vocab", [2, 257, 5000, 128_256])
@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_they_are_the_logarithms_of_the_softmax(vocab: int, count: int) -> None:
    logits = np.random.default_rng(vocab).normal(0, 5, vocab).astype(np.float32)
    exact = logits.astype(np.float64)
    exact -= exact.max() + np.log(np.exp(exact - exact.max()).sum())
    found = score(logits, 1, count)
    # An exponential and a difference in float32: each within some units in the last place of numbers up to 50.
    assert found.logprob == pytest.approx(exact[1], abs=1e-5)
    best = np.argsort(-logits, kind="stable")[:count]
    assert [token for token, _ in found.top] == best.tolist()
    np.testing.assert_allclose([value for _, value in found.top], exact[best], atol=1e-5)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=200), st.integers(0, 20))
def test_ties_come_in_order_of_their_ids_and_the_token_has_one_number(levels: list[int], count: int) -> None:
    logits = np.array(levels, dtype=np.float32)
    expected = sorted(range(len(levels)), key=lambda token: (-levels[token], token))[:count]
    for token in (0, len(levels) - 1, int(logits.argmax())):
        found = score(logits, token, count)
        assert [other for other, _ in found.top] == expected
        assert dict(found.top).get(token, found.logprob) == found.logprob


@pytest.mark.parametrize("vocab", [259, 4099, 49_152, 128_256])
def test_they_are_the_losses_of_evaluation_to_the_bit(vocab: int) -> None:
    logits = np.random.default_rng(1).normal(0, 4, (40, vocab)).astype(np.float32)
    targets = np.random.default_rng(2).integers(0, vocab, 40)
    found = [score(row, int(token), 3).logprob for row, token in zip(logits, targets, strict=True)]
    assert found == (-token_losses(logits, targets)).tolist()


def test_they_come_from_the_logits_before_any_rule(embedded: LLM) -> None:
    options = {"max_tokens": 20, "seed": 2, "temperature": 1.5, "logit_bias": {7: 3.0}, "frequency_penalty": 1.0}
    generation = embedded.generate("Once upon a time", logprobs=4, **options)  # type: ignore[arg-type]
    ids = embedded.tokenizer.encode("Once upon a time")
    logits = embedded.logits(ids + generation.token_ids)[len(ids) - 1 : -1]
    expected = [score(row, token, 4) for row, token in zip(logits, generation.token_ids, strict=True)]
    assert generation.logprobs == expected
    assert embedded.generate("Once upon a time", **options).logprobs is None  # type: ignore[arg-type]


def test_the_end_token_has_one_too(embedded: LLM) -> None:
    end = embedded.tokenizer.eos_token_ids[0]
    generation = embedded.generate("Once", max_tokens=5, min_tokens=2, logit_bias={end: 100.0}, logprobs=0)
    assert generation.finish_reason == "stop"
    assert generation.logprobs
    assert [entry.token for entry in generation.logprobs] == [*generation.token_ids, end]
    assert generation.timings.generated_tokens == 3
    assert not generation.logprobs[0].top
