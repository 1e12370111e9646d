"""The scheduler: whatever runs together, each sequence gets the tokens and the logits it has alone."""

import gc
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from generations import RecordingSampler, Watched, endless, finish, fix_budget, ids_of, plain
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import make_checkpoint

from llamita.engine import cache_memory, sequence
from llamita.engine.kv_cache import SequenceCache
from llamita.engine.llm import LLM, Generation
from llamita.engine.prefixes import BLOCK
from llamita.engine.prompt_budget import MIXED_CHUNK
from llamita.engine.sampler import Sampling
from llamita.engine.scheduler import Scheduler, SequenceLimits
from llamita.engine.speculation import StepTimes
from llamita.errors import InputError, RunError

CONTEXT = 400
COMMON = np.random.default_rng(9).integers(0, 256, 60).tolist()  # a beginning that prompts may share


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "llama32", eos_token_id=319)


@pytest.fixture
def llm(directory: Path) -> LLM:
    return make(directory)


@pytest.fixture(autouse=True)
def _fixed_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    fix_budget(monkeypatch)


def make(directory: Path, **options: Any) -> LLM:
    return endless(directory, scheme="llama3.2", context=CONTEXT, **options)


def running(llm: LLM) -> int:
    return len(llm.scheduler._running())


# Equal to running alone

REQUESTS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 5),
        "common": st.sampled_from([0, 0, 20, 60]),
        "prompt": st.integers(1, 90),
        "max_tokens": st.integers(1, 25),
        "temperature": st.sampled_from([0.0, 0.0, 0.3, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.0, 1.2]),
        "speculate": st.integers(0, 5),
        "pulls": st.integers(0, 6),  # pieces waited for before the next request comes
        "is_cancelled": st.sampled_from([False, False, False, True]),
    }
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    requests=st.lists(REQUESTS, min_size=1, max_size=7),
    chunks=st.tuples(st.sampled_from([3, 17, 64, 256]), st.sampled_from([1, 7, 64])),
    sequences=st.integers(1, 5),
    kept=st.sampled_from([0, 256, 10_000]),  # positions
    pays=st.sampled_from(["always", "rarely", "sometimes"]),
)
def test_arrivals_chunks_and_cancellations_change_nothing(
    shared: LLM, requests: list[dict[str, Any]], chunks: tuple[int, int], sequences: int, kept: int, pays: str
) -> None:
    llm = shared
    probe = SequenceCache(llm.config, 128, llm.kv_dtype, 128)
    limits = SequenceLimits(sequences, 2**30, kept * probe.nbytes // 128, llm.kv_dtype, CONTEXT)
    llm.scheduler = Scheduler(llm.model, limits)
    share, flips = {"always": 1.0, "rarely": 0.0, "sometimes": 0.5}[pays], np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        fix_budget(patch, *chunks)
        patch.setattr(sequence, "Sampler", RecordingSampler)
        patch.setattr(StepTimes, "best_length", lambda *_: 5 if flips.random() < share else flips.integers(3))
        RecordingSampler.rows.clear()
        run_and_compare(llm, requests)


@pytest.fixture(scope="module")
def shared(directory: Path) -> LLM:
    return make(directory)


def run_and_compare(llm: LLM, requests: list[dict[str, Any]]) -> None:
    """Start the requests one after the other, cancel some, and compare each with itself alone."""
    streams, prompts = [], []
    for place, r in enumerate(requests):
        ids = COMMON[: r["common"]] + ids_of(r["seed"], r["prompt"]) + [256 + place]  # no two are equal
        options = {k: r[k] for k in ("max_tokens", "temperature", "repetition_penalty", "speculate", "seed")}
        prompts.append(ids)
        streams.append(llm.stream(ids, **options))
        for _ in range(r["pulls"]):
            next(streams[place], None)
        if r["is_cancelled"]:
            streams[place].close()
    for ids, r, stream in zip(prompts, requests, streams, strict=True):
        events = list(stream)
        sampling = Sampling(r["temperature"], repetition_penalty=r["repetition_penalty"], seed=r["seed"])
        tokens, rows = plain(llm, ids, r["max_tokens"], sampling)
        found = RecordingSampler.rows[np.array(ids, dtype=np.int32).tobytes()]
        if r["is_cancelled"]:
            rows = rows[: len(found)]
        elif events:
            assert isinstance(events[-1], Generation)
            assert events[-1].token_ids == tokens
        np.testing.assert_array_equal(found, rows)
    assert running(llm) == 0


def test_many_together_are_as_one_after_the_other(llm: LLM) -> None:
    prompts = [ids_of(seed, 5 + 17 * seed) for seed in range(20)]
    together = llm.generate_many(prompts, max_tokens=10, temperature=1.0, seed=4)
    alone = [llm.generate(ids, max_tokens=10, temperature=1.0, seed=4) for ids in prompts]
    assert [g.token_ids for g in together] == [g.token_ids for g in alone]
    assert llm.generate_many([]) == []


def test_generate_many_names_the_prompt_that_is_wrong(llm: LLM) -> None:
    with pytest.raises(InputError, match=r"prompt 1 of 2, from 0: token ids"):
        llm.generate_many([[1], [-1]])
    assert running(llm) == 0


def test_threads_share_steps(llm: LLM) -> None:
    prompts = [ids_of(seed, 20) for seed in range(6)]
    alone = [llm.generate(ids, max_tokens=30, greedy=True, speculate=0).token_ids for ids in prompts]
    watched = Watched(llm)
    found: list[Any] = [None] * len(prompts)
    ready = threading.Barrier(len(prompts))

    def work(place: int) -> None:
        stream = llm.stream(prompts[place], max_tokens=30, greedy=True, speculate=0)
        ready.wait()
        found[place] = finish(stream).token_ids

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone
    assert len(watched.steps) < 40  # 30 if they run side by side, 180 if one after the other


# What a step takes in


def test_running_generations_never_wait_for_a_prompt(llm: LLM) -> None:
    watched = Watched(llm)
    stream = llm.stream(ids_of(0, 10), max_tokens=40, greedy=True, speculate=0)
    next(stream)
    long = llm.stream(ids_of(1, 300), max_tokens=2, greedy=True, speculate=0)
    del watched.steps[:]
    finish(stream)
    assert watched.steps[:5] == [[1, MIXED_CHUNK]] * 4 + [[1, 300 - 4 * MIXED_CHUNK]]
    assert len(watched.steps) == 39
    assert len(finish(long).token_ids) == 2


def test_prompts_alone_share_a_step(llm: LLM) -> None:
    """A quarter to the oldest, the rest to the shortest."""
    watched = Watched(llm)
    streams = [llm.stream(ids_of(i, n), max_tokens=1) for i, n in enumerate((390, 350, 50))]
    for stream in streams:
        finish(stream)
    assert watched.steps == [[64, 256 - 64 - 50, 50], [64, 256 - 64], [240, 16], [22]]


def test_a_generation_alone_takes_a_step_a_token(llm: LLM) -> None:
    watched = Watched(llm)
    generation = llm.generate(ids_of(0, 300), max_tokens=5, speculate=0)
    assert watched.steps == [[256], [44], [1], [1], [1], [1]]
    assert generation.timings.decode_steps == 4


def test_sequences_beyond_the_limit_wait(directory: Path) -> None:
    llm = make(directory, max_sequences=2)
    watched = Watched(llm)
    llm.generate_many([ids_of(i, 20) for i in range(5)], max_tokens=4, speculate=0)
    assert max(map(len, watched.steps)) == 2


def test_sequences_that_do_not_fit_wait_and_those_that_never_will_are_refused(directory: Path) -> None:
    block = make(directory).new_sequence(BLOCK).nbytes
    llm = make(directory, cache_memory=3 * block - 1)
    watched = Watched(llm)
    llm.generate_many([ids_of(i, 30) for i in range(4)], max_tokens=15, speculate=0)  # a block each
    assert max(map(len, watched.steps)) == 2
    with pytest.raises(InputError, match=r"max_tokens: expected up to 256 tokens .* got 257") as caught:
        llm.stream(ids_of(0, 217), max_tokens=40)
    assert all(name in str(caught.value) for name in ("--max-tokens", "--context", "--kv-cache int8"))


@pytest.mark.parametrize("options", [{"max_sequences": 0}, {"cache_memory": 0}, {"prefix_cache": -1}], ids=str)
def test_impossible_limits_are_refused(directory: Path, options: dict[str, int]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        make(directory, **options)


# Ends before the end


def test_an_error_ends_its_own_sequence_alone(llm: LLM) -> None:
    poison = 99

    def meddle(_count: int, sequences: Any, logits: np.ndarray) -> None:
        for row, (_, ids) in enumerate(sequences):
            if poison in ids:
                logits[row] = np.nan

    prompts = [[1, 2, 3], [1, poison, 3], [4, 5, 6]]
    alone = [plain(llm, ids, 8, Sampling(0.0))[0] for ids in prompts]
    assert not any(poison in tokens for tokens in alone)
    Watched(llm, meddle)
    streams = [llm.stream(ids, max_tokens=8, greedy=True, speculate=0) for ids in prompts]
    assert finish(streams[0]).token_ids == alone[0]
    with pytest.raises(RunError, match="logits"):
        finish(streams[1])
    assert finish(streams[2]).token_ids == alone[2]
    with pytest.raises(RunError, match="logits"):
        llm.generate_many(prompts, max_tokens=8, greedy=True, speculate=0)
    gc.collect()
    assert running(llm) == 0


def test_without_memory_for_its_cache_a_sequence_ends_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(1000))

    def allocate(*arguments: Any) -> SequenceCache:
        if next(calls) == 1:  # the second sequence's
            raise MemoryError
        return SequenceCache(*arguments)

    monkeypatch.setattr(cache_memory, "SequenceCache", allocate)
    prompts = [ids_of(seed, 20) for seed in range(3)]
    streams = [llm.stream(ids, max_tokens=4, greedy=True, speculate=0) for ids in prompts]
    with pytest.raises(RunError, match="memory: expected room for keys and values of 400 tokens"):
        finish(streams[1])
    for place in (0, 2):
        assert finish(streams[place]).token_ids == plain(llm, prompts[place], 4, Sampling(0.0))[0]
    assert running(llm) == 0


@pytest.mark.parametrize("step", [1, 2, 3, 7])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_step_is_done_again(llm: LLM, step: int, error: type[BaseException]) -> None:
    """Interrupt when the model has computed the tokens and the scheduler has not seen the logits."""

    def meddle(count: int, _sequences: Any, _logits: np.ndarray) -> None:
        if count == step:
            raise error

    prompts = [ids_of(0, 300), ids_of(1, 30)]
    alone = [plain(llm, ids, 8, Sampling(0.0))[0] for ids in prompts]
    Watched(llm, meddle)
    streams = [llm.stream(ids, max_tokens=8, greedy=True) for ids in prompts]
    with pytest.raises(error):
        finish(streams[0])
    assert [finish(stream).token_ids for stream in streams] == alone


def test_an_interrupt_between_draws_ends_one_sequence(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [ids_of(seed, 20) for seed in range(3)]
    alone = [plain(llm, ids, 8, Sampling(0.0))[0] for ids in prompts]
    calls = iter(range(1000))

    class Interrupted(RecordingSampler):
        def choose(self, logits: np.ndarray) -> int:
            if next(calls) == 7:  # the third step's second sequence
                raise KeyboardInterrupt
            return super().choose(logits)

    monkeypatch.setattr(sequence, "Sampler", Interrupted)
    streams = [llm.stream(ids, max_tokens=8, greedy=True, speculate=0) for ids in prompts]
    with pytest.raises(KeyboardInterrupt):
        finish(streams[0])
    assert finish(streams[0]).token_ids == alone[0]
    with pytest.raises(RunError, match="interrupted"):
        finish(streams[1])
    assert finish(streams[2]).token_ids == alone[2]


def test_closing_ends_a_stream_at_once(llm: LLM) -> None:
    watched = Watched(llm)
    stream = llm.stream(ids_of(0, 20), max_tokens=50, speculate=0)
    next(stream)
    stream.close()
    stream.close()
    assert running(llm) == 0
    assert not any(isinstance(event, Generation) for event in stream)
    waiting = llm.stream(ids_of(0, 20), max_tokens=50)
    del stream, waiting  # never read: as good as closed
    gc.collect()
    del watched.steps[:]
    llm.generate(ids_of(1, 20), max_tokens=3, speculate=0)
    assert [len(step) for step in watched.steps] == [1, 1, 1]


def test_closing_from_another_thread_ends_the_wait(llm: LLM) -> None:
    """One thread runs a step and another waits for that step; both are cancelled meanwhile."""
    in_step, go_on = threading.Event(), threading.Event()

    def meddle(count: int, _sequences: Any, _logits: np.ndarray) -> None:
        if count == 2:
            in_step.set()
            assert go_on.wait(60)

    Watched(llm, meddle)
    streams = [llm.stream(ids_of(i, 20), max_tokens=50, speculate=0) for i in range(2)]
    seen: list[list[Any]] = [[], []]
    threads = [threading.Thread(target=lambda i=i: seen[i].extend(streams[i])) for i in range(2)]
    for thread in threads:
        thread.start()
    assert in_step.wait(60)
    for stream in streams:
        stream.close()
    go_on.set()
    for thread in threads:
        thread.join()
    assert running(llm) == 0
    assert not any(isinstance(event, Generation) for events in seen for event in events)


def test_timings_tell_waiting_from_working(directory: Path) -> None:
    llm = make(directory, max_sequences=1)
    first, second = llm.generate_many([ids_of(i, 50) for i in range(2)], max_tokens=20, speculate=0)
    for timings in (first.timings, second.timings):
        assert 0 < timings.queue_seconds < timings.first_token_seconds
        assert timings.queue_seconds + timings.prefill_seconds < timings.first_token_seconds
        assert timings.decode_seconds > 0
    assert second.timings.queue_seconds > first.timings.first_token_seconds + first.timings.decode_seconds
