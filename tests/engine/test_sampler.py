"""The sampler against transformers' logits processors, and against what its settings promise."""

from typing import Any

import numpy as np
import pytest

from llamita.engine.sampler import Sampler, Sampling, _position, distribution, penalize
from llamita.errors import InputError, RunError

VOCAB = 5000
NEUTRAL = {"temperature": 1.0, "top_p": 1.0}
SETTINGS = [
    {},
    {"temperature": 0.6},
    {"top_k": 40},
    {"top_k": 1},
    {"top_k": 10**6},
    {"top_p": 0.9},
    {"top_p": 0.1},
    {"top_p": 0.0},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"temperature": 0.7, "top_k": 50, "top_p": 0.8, "min_p": 0.02},
    {"temperature": 1.7, "top_k": 300, "top_p": 0.95, "min_p": 0.1},
]


def oracle() -> tuple[Any, Any]:
    """Torch, and transformers' logits processors."""
    reason = "compares with transformers"
    torch = pytest.importorskip("torch", reason=reason)
    return torch, pytest.importorskip("transformers.generation.logits_process", reason=reason)


def logits_of(seed: int, spread: float = 4.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, spread, VOCAB).astype(np.float32)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_distribution_is_that_of_transformers(settings: dict[str, float], seed: int) -> None:
    torch, process = oracle()
    scores = torch.from_numpy(logits_of(seed))[None]
    for name, warper in [
        ("temperature", process.TemperatureLogitsWarper),
        ("top_k", process.TopKLogitsWarper),
        ("top_p", process.TopPLogitsWarper),
        ("min_p", process.MinPLogitsWarper),
    ]:
        if name in settings:
            scores = warper(settings[name])(None, scores)
    expected = torch.softmax(scores[0].double(), -1).numpy()
    tokens, probabilities = distribution(logits_of(seed), Sampling(**{**NEUTRAL, **settings}))  # type: ignore[arg-type]
    assert sorted(tokens) == np.flatnonzero(expected).tolist()
    np.testing.assert_allclose(probabilities, expected[tokens], rtol=1e-4)


def test_repetition_penalty_is_that_of_transformers() -> None:
    torch, process = oracle()
    seen, logits = np.array([3, 3, 17, 4999]), logits_of(2)
    processor = process.RepetitionPenaltyLogitsProcessor(1.3)
    expected = processor(torch.from_numpy(seen)[None], torch.from_numpy(logits)[None])
    np.testing.assert_array_equal(penalize(logits, np.unique(seen), 1.3), expected[0].numpy())


def test_penalty_reaches_prompt_and_answer_even_when_greedy() -> None:
    logits = np.zeros(10, dtype=np.float32)
    logits[[4, 5, 6]] = 3.0, 2.9, 2.8
    sampler = Sampler(Sampling(temperature=0.0, repetition_penalty=1.5), np.array([4]), 10)
    assert [sampler.choose(logits) for _ in range(3)] == [5, 6, 4]
    assert logits[4] == 3.0  # the caller's array is as it was


def test_greedy_takes_the_first_of_the_largest() -> None:
    logits = np.array([0, 7, 7, 1], dtype=np.float32)
    assert Sampler(Sampling(temperature=0.0), np.array([0]), 4).choose(logits) == 1


def test_draws_follow_the_distribution_and_the_seed() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2], dtype=np.float32))
    settings = Sampling(temperature=1.0, top_p=1.0, seed=7)
    runs = [[Sampler(settings, np.array([0]), 3).choose(logits)] for _ in range(3)]
    assert runs[0] == runs[1] == runs[2]
    sampler = Sampler(settings, np.array([0]), 3)
    counts = np.bincount([sampler.choose(logits) for _ in range(20_000)])
    np.testing.assert_allclose(counts / 20_000, [0.5, 0.3, 0.2], atol=0.015)  # over four standard errors


@pytest.mark.parametrize("count", [1, 63, 64, 65, 1000])
def test_every_token_has_its_share_of_the_unit_interval(count: int) -> None:
    """The middle of each token's part; logits with probabilities that float64 holds well."""
    weights = np.random.default_rng(count).integers(0, 9, count) + (np.arange(count) == 0)
    edges = np.concatenate([[0], np.cumsum(weights)]) / weights.sum()
    middles = (edges[:-1] + edges[1:]) / 2
    found = [_position(weights / weights.sum(), middle) for middle in middles[weights > 0]]
    assert found == np.flatnonzero(weights).tolist()
    assert _position(weights / weights.sum(), 1 - 2**-53) == np.flatnonzero(weights)[-1]


def test_same_seed_same_draws_another_seed_others() -> None:
    def draw(seed: int) -> list[int]:
        sampler = Sampler(Sampling(seed=seed), np.array([0]), VOCAB)
        return [sampler.choose(logits_of(i, 1.0)) for i in range(20)]

    assert draw(1) == draw(1) != draw(2)


def test_ties_and_extremes() -> None:
    flat = np.zeros(100, dtype=np.float32)
    tokens, probabilities = distribution(flat, Sampling(temperature=1.0, top_k=5, top_p=1.0))
    assert len(tokens) == 100  # all tie with the fifth
    tokens, _ = distribution(flat, Sampling(temperature=1.0, top_p=0.0))
    assert len(tokens) == 1
    tokens, _ = distribution(flat, Sampling(temperature=1.0, top_p=0.5))
    assert len(tokens) == 50  # as many as it takes, though all are alike
    peak = np.zeros(1000, dtype=np.float32)
    peak[777] = 1.0
    tokens, _ = distribution(peak, Sampling(temperature=1.0, top_p=0.0))
    assert tokens.tolist() == [777]  # the likeliest, though it has hardly more than its share
    steep = np.array([1e30, -1e30, 3e38, -np.inf], dtype=np.float32)
    tokens, probabilities = distribution(steep, Sampling(temperature=1e-30))
    assert tokens[probabilities.argmax()] == 2
    assert np.isfinite(probabilities).all()


@pytest.mark.parametrize("penalty", [0.01, 1e6])
def test_the_largest_penalties_leave_numbers(penalty: float) -> None:
    logits = logits_of(3)
    tokens, probabilities = distribution(penalize(logits, np.arange(VOCAB), penalty), Sampling())
    assert len(tokens)
    assert np.isfinite(probabilities).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_logits_are_an_error(bad: float) -> None:
    logits = np.array([0, bad, 1], dtype=np.float32)
    with pytest.raises(RunError, match="logits"):
        Sampler(Sampling(), np.array([0]), 3).choose(logits)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 1e-39},
        {"repetition_penalty": 1e39},
        {"seed": -1},
    ],
    ids=str,
)
def test_impossible_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(settings))):
        Sampling(**settings)  # type: ignore[arg-type]


def test_the_model_recommends_only_where_it_samples() -> None:
    values = {"temperature": 0.6, "top_p": 0.9, "bos_token_id": 1}
    assert Sampling.from_generation_config(values) == Sampling()
    recommended = Sampling.from_generation_config({**values, "do_sample": True})
    assert (recommended.temperature, recommended.top_p, recommended.top_k) == (0.6, 0.9, 0)
