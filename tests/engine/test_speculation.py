"""Speculation: tokens and distribution are those of plain decoding, and drafts come when they pay."""

from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from generations import Chain, Watched, endless, plain
from tiny import make_checkpoint

import llamita
from llamita.engine.llm import LLM
from llamita.engine.sampler import Sampling
from llamita.engine.speculation import DECODE_ROWS, Drafter, StepTimes
from llamita.errors import InputError

PATTERN = [7, 8, 9, 10, 11]


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


def loop(tokens: list[int]) -> np.ndarray:
    """Return the probabilities of a text that repeats these tokens."""
    table = np.full((256, 256), 1e-9)
    for a, b in zip(tokens, tokens[1:] + tokens[:1], strict=True):
        table[a, b] = 1.0
    return table


# The output


TEXTS = [
    "Once upon a time, there was a little dog. The little dog was happy. Once upon a time, there",
    "one two three one two three one two",
    'Tom said, "I like the red ball." Sam said, "I like the red ball." Tom said,',
    "The cat sat. The cat ran. The cat ate. The",
]


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("options", [
    {"greedy": True}, {"temperature": 0.3, "top_p": 1.0}, {"temperature": 1.0, "top_k": 5, "top_p": 1.0},
    {"greedy": True, "repetition_penalty": 1.3}, {"temperature": 0.5, "repetition_penalty": 1.05},
], ids=str)  # fmt: skip
def test_output_is_that_of_plain_decoding(embedded: LLM, options: dict[str, Any]) -> None:
    drafted = accepted = 0
    for seed, text in enumerate(TEXTS):
        every = {**options, "max_tokens": 60, "seed": seed}
        found = [embedded.generate(text, speculate=n, **every) for n in (0, 1, 5)]
        assert all(g.token_ids == found[0].token_ids for g in found)
        assert all(g.text == found[0].text and g.finish_reason == found[0].finish_reason for g in found)
        assert found[0].timings.drafted_tokens == 0
        drafted += sum(g.timings.drafted_tokens for g in found)
        accepted += sum(g.timings.accepted_tokens for g in found)
    assert 0 < accepted < drafted


@pytest.mark.usefixtures("always")
def test_the_distribution_is_that_of_the_model(tiny: LLM) -> None:
    """Unseeded draws of three tokens after a prompt full of drafts, against the product of probabilities.

    The bound is seven standard deviations above the mean of chi-square with 63 degrees of freedom.
    """
    table = np.random.default_rng(0).dirichlet(np.ones(4) * 2, size=4)
    Chain(tiny, table)
    prompt, runs = [0, 1, 2, 3] * 5 + [0, 1, 2], 4000
    counts, drafted, accepted = Counter(), 0, 0
    for _ in range(runs):
        generation = tiny.generate(prompt, max_tokens=4, temperature=1.0, top_p=1.0)
        counts[tuple(generation.token_ids[1:])] += 1
        drafted += generation.timings.drafted_tokens
        accepted += generation.timings.accepted_tokens
    assert 0 < accepted < drafted
    first = table[2]
    expected = {
        (a, b, c): runs * sum(first[z] * table[z, a] for z in range(4)) * table[a, b] * table[b, c]
        for a, b, c in product(range(4), repeat=3)
    }
    assert set(counts) <= set(expected)
    chi_square = sum((counts[k] - e) ** 2 / e for k, e in expected.items())
    assert chi_square < 63 + 7 * np.sqrt(2 * 63)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("count", range(1, 12))
def test_limits_end_within_a_draft(tiny: LLM, count: int) -> None:
    Chain(tiny, loop(PATTERN))
    generation = tiny.generate(PATTERN * 2, max_tokens=count, greedy=True)
    assert generation.token_ids == (PATTERN * 3)[:count]
    timings = generation.timings
    assert timings.generated_tokens == count
    assert timings.drafted_tokens == timings.accepted_tokens == count - 1 - timings.decode_steps
    near_end = tiny.generate((PATTERN * 200)[: tiny.context - count], max_tokens=100, greedy=True)
    assert (len(near_end.token_ids), near_end.finish_reason) == (count, "context")


@pytest.mark.usefixtures("always")
def test_end_tokens_and_stop_strings_within_a_draft(tiny: LLM) -> None:
    letters = tiny.tokenizer.encode("abcdef", add_bos=False)
    Chain(tiny, loop(letters))
    stopped = tiny.generate(letters * 3, max_tokens=50, greedy=True, stop=["bcd"])
    assert (stopped.text, stopped.finish_reason, len(stopped.token_ids)) == ("a", "stop", 4)
    tiny.tokenizer.eos_token_ids = (letters[3],)
    ended = tiny.generate(letters * 3, max_tokens=50, greedy=True)
    assert (ended.text, ended.finish_reason, ended.timings.generated_tokens) == ("abc", "stop", 4)
    assert ended.timings.decode_steps == 1


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(("speculate", "steps"), [(4, 32), (15, 10), (100, 10)])
def test_a_loop_takes_a_fraction_of_the_steps(tiny: LLM, speculate: int, steps: int) -> None:
    """A step gives the drafted tokens and one more, and 161 tokens are one of the prompt's and 160 of steps."""
    Chain(tiny, loop(PATTERN))
    timings = tiny.generate(PATTERN * 3, max_tokens=161, greedy=True, speculate=speculate).timings
    assert (timings.decode_steps, timings.accepted_tokens) == (steps, 160 - steps)
    assert timings.drafted_tokens == timings.accepted_tokens


@pytest.mark.usefixtures("always")
def test_company_leaves_fewer_rows_for_drafts(tiny: LLM) -> None:
    prompts = [PATTERN * 6 + [20 + i] + PATTERN for i in range(10)]
    alone = [plain(tiny, ids, 20, Sampling(0.0))[0] for ids in prompts]
    for count in (2, 5, 10):
        watched = Watched(tiny)
        found = tiny.generate_many(prompts[:count], max_tokens=20, greedy=True)
        assert [g.token_ids for g in found] == alone[:count]
        decoding = watched.steps[1:]
        assert max(map(sum, decoding)) <= DECODE_ROWS
        tiny.scheduler.model = tiny.model


def test_speculate_is_checked(tiny: LLM) -> None:
    for wrong in (-1, 1.5, True):
        with pytest.raises(InputError, match="speculate"):
            tiny.generate("x", speculate=wrong)  # type: ignore[arg-type]


# Drafts


def drafter_of(tokens: list[int], room: int = 20) -> tuple[Drafter, np.ndarray]:
    ids = np.zeros(len(tokens) + room, dtype=np.int32)
    ids[: len(tokens)] = tokens
    return Drafter(ids, len(tokens)), ids


def drafts(drafter: Drafter, ids: np.ndarray, known: int, limit: int) -> list[int]:
    return ids[known : known + drafter.propose(limit)].tolist()


def test_a_draft_follows_the_last_of_the_longest_matches() -> None:
    for tokens, expected in [
        ([1, 2, 3, 4, 5, 1, 2, 3], [4, 5, 1, 2]),
        ([1, 2, 9, 7, 2, 9, 8, 1, 2, 9], [7, 2, 9, 8]),  # three tokens, further away, before two
        ([5, 6, 1, 5, 6, 2, 9, 5, 6], [2, 9, 5, 6]),  # the later of two
        ([9, 1, 2, 3, 4, 5, 8, 2, 3, 4, 5, 7, 1, 2, 3, 4, 5], [8, 2, 3, 4]),  # five before four
        ([5, 1, 5], [1, 5]),  # one token is trusted for two
        ([4, 4, 4], [4, 4, 4, 4]),  # on and on from itself
        ([1, 2, 1, 2], [1, 2, 1, 2]),
        ([1, 2, 3], []),
        ([1], []),
    ]:
        drafter, ids = drafter_of(tokens)
        assert drafts(drafter, ids, len(tokens), 4) == expected


def test_drafts_are_judged_even_where_they_are_not_verified() -> None:
    drafter, _ = drafter_of([1, 2, 3, 4, 5, 6, 1, 2, 3], room=100)
    before = drafter.rate
    assert drafter.propose(4) == 4
    assert [drafter.add(token) for token in (4, 5)] == [True, True]
    assert drafter.rate > before
    for other in range(100, 130):  # what follows 1, 2 is another token each time
        for token in (1, 2, other):
            drafter.propose(4)
            drafter.add(token)
    drafter.add(1)
    drafter.add(2)
    assert drafter.propose(4) == 4
    assert drafter.rate < 0.1


def test_the_trust_in_a_draft_is_that_of_its_match() -> None:
    """Drafts after matches of one token fail; those after longer ones keep their rate, and may be longer."""
    drafter, _ = drafter_of([1, 2, 3, 4, 5, 6, 7, 8, 9], room=200)
    for other in range(100, 140):
        for token in (9, other):
            drafter.propose(15)
            drafter.add(token)
    drafter.add(9)
    assert drafter.propose(15) == 2
    assert drafter.rate < 0.1
    for token in (1, 2, 3, 4):
        drafter.add(token)
    assert drafter.propose(15) == 8
    assert drafter.rate > 0.5


# Whether they pay


def timed(seconds: dict[int, float]) -> StepTimes:
    times = StepTimes()
    for rows, value in seconds.items():
        for _ in range(5):
            times.add(rows, value)
    return times


def test_what_is_not_measured_is_tried_and_the_plain_step_comes_first() -> None:
    assert StepTimes().best_length(1, [(4, 1.0)]) == 0
    plain = timed({1: 1.0})
    assert plain.best_length(1, [(4, 0.5)]) == 4  # more rows take at least as long: nothing else is known
    assert plain.best_length(1, [(4, 0.01)]) == 0  # not even if they took no longer
    assert timed({1: 1.0, 5: 5.0}).best_length(1, [(4, 0.9)]) == 0  # between, a row takes 1.0
    assert timed({1: 1.0, 5: 1.4, 9: 9.0}).best_length(1, [(8, 0.9)]) == 4


ROWS = {1: 1.0, 2: 1.1, 3: 1.2, 4: 1.8, 5: 2.0, 6: 2.0, 7: 2.0, 8: 2.0}


@pytest.mark.parametrize(
    ("sequences", "drafts", "expected"),
    [
        (1, [(4, 0.05)], 0),
        (1, [(4, 0.5)], 2),  # 1.75 tokens in 1.2; one draft brings 1.5 in 1.1, four 1.94 in 2.0
        (1, [(4, 0.12)], 0),  # 1.12 tokens in 1.1 are hardly more than 1 in 1.0
        (1, [(4, 0.2)], 1),
        (1, [(4, 1.0)], 2),  # 3 tokens in 1.2 are 5 in 2.0, and the shorter is enough
        (1, [(1, 1.0)], 1),
        (2, [(2, 0.5), (3, 0.9)], 3),  # 2 + 0.75 + 2.439 in seven rows
    ],
)
def test_the_length_of_drafts_brings_the_most_tokens_a_second(
    sequences: int, drafts: list[tuple[int, float]], expected: int
) -> None:
    assert timed(ROWS).best_length(sequences, drafts) == expected


def test_spikes_count_little_and_refusals_are_forgiven() -> None:
    times = timed({1: 1.0, 2: 1.2})
    times.add(2, 1000.0)
    assert times.best_length(1, [(1, 0.4)]) == 1  # 1.32 at most
    slow = timed({1: 1.0, 2: 2.0})
    tries = [slow.best_length(1, [(1, 0.5)]) for _ in range(500)]
    assert tries[0] == 0
    assert 1 in tries
    slow.add(2, 2.0)  # measured again: as slow as it was
    assert slow.best_length(1, [(1, 0.5)]) == 0


def test_drafting_stops_where_it_costs_too_much_and_comes_back(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every draft is right. First each row costs two steps more, then nothing."""
    add, cost = StepTimes.add, {"row": 2.0}
    monkeypatch.setattr(StepTimes, "add", lambda self, n, _: add(self, n, 1.0 + cost["row"] * (n - 1)))
    Chain(tiny, loop(PATTERN))
    dear = tiny.generate(PATTERN * 2, max_tokens=100, greedy=True).timings
    assert 0 < dear.drafted_tokens == dear.accepted_tokens < 50  # to measure what they cost
    assert tiny.generate(PATTERN * 2, max_tokens=50, greedy=True).timings.drafted_tokens == 0
    cost["row"] = 0.0
    cheap = tiny.generate(PATTERN * 2, max_tokens=450, greedy=True).timings
    assert cheap.drafted_tokens == cheap.accepted_tokens > 50
