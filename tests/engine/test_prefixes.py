"""Prefix reuse: what is shared, what is not, and that nobody can tell but by the clock."""

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from generations import Watched, endless, fix_budget, ids_of, plain
from tiny import make_checkpoint

from llamita.engine import cache_memory
from llamita.engine.kv_cache import SequenceCache
from llamita.engine.llm import LLM
from llamita.engine.prefixes import BLOCK, Prefix, PrefixCache, common_length
from llamita.engine.sampler import Sampling
from llamita.models.rope import RopeConfig

CONTEXT = 512
ROPE = {"rope_type": "dynamic", "factor": 4.0}


def make(directory: Path, **options: Any) -> LLM:
    return endless(directory, scheme="llama3.2", **options)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "llama32", max_position_embeddings=CONTEXT)


@pytest.fixture
def llm(directory: Path) -> LLM:
    return make(directory)


@pytest.fixture(autouse=True)
def _fixed_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    fix_budget(monkeypatch)


def expect(llm: LLM, ids: list[int], reused: int, count: int = 6) -> list[int]:
    """Generate and return tokens; `reused` prompt tokens are reused, and the result is that of a lone sequence."""
    generation = llm.generate(ids, max_tokens=count, temperature=1.0, seed=1, speculate=0)
    assert generation.timings.reused_tokens == reused
    assert generation.token_ids == plain(llm, ids, count, Sampling(1.0, seed=1))[0]
    return generation.token_ids


def test_a_chat_goes_on_where_it_was(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = ids_of(0, 40)
    answer = expect(llm, ids, 0)
    monkeypatch.setattr(SequenceCache, "copy_prefix", None)  # the cache itself is continued
    for turn in range(1, 4):
        known = len(ids) + len(answer) - 1  # the newest token was never taken in
        ids = [*ids, *answer, *ids_of(turn, 10)]
        watched = Watched(llm)
        answer = expect(llm, ids, known)
        assert watched.steps[0] == [len(ids) - known]
        llm.scheduler.model = llm.model


def test_a_cache_without_room_is_copied(tmp_path: Path) -> None:
    llm = make(make_checkpoint(tmp_path, "llama32", max_position_embeddings=1024))
    ids = ids_of(0, 100)
    answer = expect(llm, ids, 0)  # capacity: four times the least that counts
    copies = _count_copies(llm, [*ids, *answer, *ids_of(1, 4 * BLOCK - 120)], 105)
    assert copies == 0
    assert _count_copies(llm, [*ids, *answer, *ids_of(1, 4 * BLOCK)], 4 * BLOCK - 14) == 1


def _count_copies(llm: LLM, ids: list[int], reused: int) -> int:
    """Generate as `expect` does; return how many caches were copied for it."""
    copy, copies = SequenceCache.copy_prefix, list[int]()

    def counted(cache: SequenceCache, source: SequenceCache, tokens: int) -> None:
        copies.append(tokens)
        copy(cache, source, tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SequenceCache, "copy_prefix", counted)
        expect(llm, ids, reused)
    return len(copies)


def test_the_same_prompt_again_computes_its_last_token(llm: LLM) -> None:
    ids = ids_of(0, 100)
    expect(llm, ids, 0)
    expect(llm, ids, 99)
    expect(llm, ids[:50], 49)


def test_branches_keep_what_they_came_from(llm: LLM) -> None:
    """A beginning that several sequences continue differently is copied, and stays for the next."""
    common = ids_of(0, 60)
    for seed in range(1, 5):
        expect(llm, common + ids_of(seed, 60), 0 if seed == 1 else 60)
    assert len(llm.scheduler._memory.kept._kept) == 4
    for seed in range(1, 5):
        expect(llm, common + ids_of(seed, 60), 119)


def test_short_beginnings_are_computed(llm: LLM) -> None:
    common = ids_of(0, 15)
    expect(llm, common + ids_of(1, 20), 0)
    expect(llm, common + ids_of(2, 20), 0)


def test_running_sequences_lend_too(llm: LLM) -> None:
    ids = ids_of(0, 50)
    stream = llm.stream(ids, max_tokens=50, greedy=True, speculate=0)
    next(stream)
    expect(llm, ids + ids_of(1, 20), 50)
    *_, generation = stream
    assert generation.token_ids == plain(llm, ids, 50, Sampling(0.0))[0]  # type: ignore[union-attr]


def test_prompts_together_compute_their_beginning_once(llm: LLM) -> None:
    common = ids_of(0, 300)
    prompts = [common + ids_of(seed, 10) for seed in range(1, 6)]
    watched = Watched(llm)
    found = llm.generate_many(prompts, max_tokens=1)
    assert watched.tokens == 310 + 4 * 10
    assert [g.timings.reused_tokens for g in found] == [0, 300, 300, 300, 300]


def test_a_prompt_that_waits_for_another_holds_nobody_back(llm: LLM) -> None:
    common = ids_of(0, 300)
    watched = Watched(llm)
    streams = [llm.stream(common + ids_of(seed, 10), max_tokens=1) for seed in (1, 2)]
    other = llm.stream(ids_of(3, 40), max_tokens=1)
    for stream in (*streams, other):
        list(stream)
    assert watched.steps == [[216, 40], [94], [10]]


def test_cancelled_sequences_leave_what_they_have(llm: LLM) -> None:
    ids = ids_of(0, 60)
    stream = llm.stream(ids, max_tokens=50)
    next(stream)
    stream.close()
    expect(llm, ids + ids_of(1, 10), 60)


def test_zero_turns_it_off(directory: Path) -> None:
    llm = make(directory, prefix_cache=0)
    for _ in range(2):
        expect(llm, ids_of(0, 50), 0)
    assert [g.timings.reused_tokens for g in llm.generate_many([ids_of(0, 50)] * 3, max_tokens=2)] == [0] * 3


def test_least_recently_used_go_first(directory: Path) -> None:
    block = make(directory).new_sequence(BLOCK).nbytes
    llm = make(directory, prefix_cache=2 * block)  # two of 55 tokens
    a, b, c = ([*ids_of(seed, 50)] for seed in range(3))
    expect(llm, a, 0)
    expect(llm, b, 0)
    expect(llm, a, 49)
    expect(llm, c, 0)  # b goes
    expect(llm, a, 49)
    expect(llm, b, 0)
    assert llm.scheduler._memory.kept.positions == 2 * BLOCK


def test_kept_caches_give_way_to_running_ones(directory: Path) -> None:
    block = make(directory).new_sequence(BLOCK).nbytes
    llm = make(directory, cache_memory=3 * block, prefix_cache=3 * block)
    expect(llm, ids_of(0, 100), 0)
    expect(llm, ids_of(1, 100), 0)
    expect(llm, ids_of(2, 180), 0)  # two blocks: the first gives way
    expect(llm, ids_of(1, 100), 99)
    expect(llm, ids_of(0, 100), 0)


def test_what_a_prompt_takes_over_does_not_give_way_to_it(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = make(directory).new_sequence(BLOCK).nbytes
    llm = make(directory, cache_memory=3 * block, prefix_cache=3 * block)
    ids = ids_of(0, 200)
    answer = expect(llm, ids, 0)
    with monkeypatch.context() as patch:
        patch.setattr(SequenceCache, "copy_prefix", None)
        expect(llm, [*ids, *answer, *ids_of(1, 10)], 205)  # there is no room for two more blocks
        expect(llm, [*ids[:150], *ids_of(2, 10)], 150)  # nor can the rest of it stay for others
    expect(llm, [*ids[:150], *ids_of(3, 150)], 150)  # three blocks
    assert llm.scheduler._memory.kept.positions == 3 * BLOCK


def test_memory_that_a_cache_once_took_counts(llm: LLM) -> None:
    ids = ids_of(0, 265)

    def meddle(count: int, *_: Any) -> None:
        if count == 2:
            raise KeyboardInterrupt

    Watched(llm, meddle)
    stream = llm.stream(ids[:257], max_tokens=20, greedy=True, speculate=0)
    with pytest.raises(KeyboardInterrupt):  # with 257 tokens taken in, of which 256 count
        next(stream)
    stream.close()
    assert llm.scheduler._memory.kept.positions == 3 * BLOCK
    llm.scheduler.model = llm.model
    stream = llm.stream([*ids[:240], 1], max_tokens=20, greedy=True, speculate=0)  # continues in the same cache
    next(stream)
    assert len(llm.scheduler._memory.kept._kept) == 0
    stream.close()
    assert 240 < len(llm.scheduler._memory.kept._kept[0].ids) <= 256  # two blocks, in a cache of three
    assert llm.scheduler._memory.kept.positions == 3 * BLOCK


def test_by_default_a_whole_context_is_kept(directory: Path) -> None:
    llm = make(directory, context=200)
    expect(llm, ids_of(0, 190), 0)
    expect(llm, ids_of(0, 190), 189)


@pytest.mark.parametrize("blocks", [3, 5])
def test_live_caches_stay_within_the_memory(directory: Path, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Count the written blocks of running and kept caches, and of ended streams that are still referred to."""
    llm, live = make(directory), weakref.WeakSet()
    block = llm.new_sequence(BLOCK).nbytes
    llm = make(directory, cache_memory=blocks * block, prefix_cache=blocks * block)

    class Noted(SequenceCache):
        most = 0

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            live.add(self)

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            self.__dict__["most"] = max(self.most, self.length if name == "length" else 0)

    def meddle(*_: Any) -> None:
        taken.append(sum(-(-cache.most // BLOCK) for cache in live))

    monkeypatch.setattr(cache_memory, "SequenceCache", Noted)
    Watched(llm, meddle)
    taken: list[int] = []
    random = np.random.default_rng(blocks)
    common, streams = ids_of(0, 300), []
    for seed in range(40):
        length, own = random.integers(0, 250), random.integers(1, 100)
        streams.append(llm.stream(common[:length] + ids_of(seed + 1, int(own)), max_tokens=10))
        for _ in range(random.integers(0, 8)):
            next(streams[-1], None)
        if random.random() < 0.3:
            streams[-1].close()
    for stream in streams:
        list(stream)
    assert max(taken) == blocks


def test_dynamic_rotation_shares_only_under_equal_frequencies(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama2", max_position_embeddings=64, rope_scaling=ROPE)
    llm = make(tmp_path)
    ids = ids_of(0, 90)
    expect(llm, ids[:30], 0)  # 36 in all: the trained frequencies
    expect(llm, ids[:40], 30)  # 46: the same ones
    expect(llm, ids, 0)  # 96: others
    expect(llm, ids, 89)
    expect(llm, ids[:80], 0)  # 86: others again


def test_what_another_holds_is_not_kept_twice(llm: LLM) -> None:
    config = llm.config
    kept = PrefixCache(1000, RopeConfig(10000.0), config.head_dim)
    ids = np.arange(100, dtype=np.int32)

    def prefix(count: int) -> Prefix:
        return Prefix(ids[:count], SequenceCache(config, BLOCK, "f16", BLOCK), BLOCK, BLOCK)

    for count in (50, 80, 60, 80):
        kept.keep(prefix(count))
    assert [len(prefix.ids) for prefix in kept._kept] == [80]
    assert kept.positions == BLOCK


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [([], [], 0), ([1], [], 0), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1, 5, 3], 1), ([2], [1], 0)],
)
def test_common_length(a: list[int], b: list[int], expected: int) -> None:
    assert common_length(np.array(a), np.array(b)) == expected
