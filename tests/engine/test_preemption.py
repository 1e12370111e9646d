"""Pausing: where memory ends, sequences give way and go on later, and nobody can tell but by the clock."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from adapter_files import make_adapter
from generations import Watched, endless, fix_budget, ids_of, interrupted_at, plain
from tiny import make_checkpoint

from llamita.engine import requests, scheduler, sequence
from llamita.engine.llm import LLM
from llamita.engine.prefixes import BLOCK, whole_blocks
from llamita.engine.requests import Generation
from llamita.engine.sampler import Sampling
from llamita.engine.sequence import SequenceState
from llamita.engine.speculation import StepTimes
from llamita.errors import RunError

CONTEXT = 512
MODELS: dict[str, tuple[int, str, dict[str, Any], dict[str, Any]]] = {  # how many requests, and of which model
    "g32": (200, "llama32", {}, {"scheme": "llama3.2"}),
    "float, dynamic rotation": (
        80,
        "llama2",
        {"max_position_embeddings": 128, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
        {"kv_dtype": "int8"},
    ),
}


def make(directory: Path, blocks: int, **options: Any) -> LLM:
    """A model with memory for so many blocks of positions."""
    probe = endless(directory, **options)
    block = probe.new_sequence(BLOCK).nbytes
    return endless(directory, cache_memory=blocks * block, prefix_cache=blocks * block, **options)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "llama32", eos_token_id=319)


def pick(random: np.random.Generator, *values: Any) -> Any:
    return values[random.integers(len(values))]


def mixed_request(random: np.random.Generator, place: int, common: list[int]) -> tuple[list[int], dict[str, Any]]:
    """A prompt, some of which share a beginning, and options of every kind."""
    ids = common[: pick(random, 0, 0, 40, 100)] + ids_of(1000 + place, int(random.integers(1, 60)))
    options: dict[str, Any] = {
        "max_tokens": int(random.integers(1, 340)),
        "temperature": pick(random, 0.0, 0.4, 1.0),
        "seed": place,
        "repetition_penalty": pick(random, 1.0, 1.2),
        "frequency_penalty": pick(random, 0.0, 0.0, 0.5),
        "speculate": pick(random, 0, 4),
        "adapter": pick(random, None, None, "a"),
        "owner": pick(random, None, "x", "y"),
        "logprobs": pick(random, None, None, 2),
        "prompt_logprobs": pick(random, None, None, None, 1),
    }
    if random.random() < 0.3:
        options["stop"] = [chr(random.integers(97, 123)), "xy"]
    return ids, options


@pytest.mark.parametrize("name", MODELS)
def test_answers_of_many_in_little_memory_are_those_of_each_alone(name: str, tmp_path: Path) -> None:
    count, family, overrides, options = MODELS[name]
    directory = make_checkpoint(tmp_path / "model", family, eos_token_id=319, **overrides)
    adapter = make_adapter(tmp_path / "a", directory)
    options = {**options, "context": CONTEXT if name == "g32" else 450, "adapters": {"a": adapter}}
    random, common = np.random.default_rng(7), ids_of(0, 150)
    requests = [mixed_request(random, place, common) for place in range(count)]
    llm = make(directory, 22, **options)
    states, steps, most = list[SequenceState](), 0, 0
    cancelled = {int(place): int(random.integers(0, 1500)) for place in random.choice(count, count // 5, replace=False)}
    while len(states) < len(requests) or llm.scheduler._waiting or llm.scheduler._running():
        while len(states) < len(requests) and random.random() < 0.6:
            ids, own = requests[len(states)]
            states.append(llm.sequence(llm.check(ids, **own)))
            llm.scheduler.submit(states[-1])
        llm.scheduler.step()
        steps += 1
        for place, when in cancelled.items():
            if when == steps and place < len(states):
                llm.scheduler.cancel(states[place])
        load, most = llm.scheduler.load, max(most, len(llm.scheduler._running()))
        assert load.used_positions + load.kept_positions <= load.room_positions == 22 * BLOCK
    assert most == 16
    assert llm.scheduler.counters.preemptions > count // 4
    compare_with_solo_runs(endless(directory, prefix_cache=0, **options), requests, states)


def compare_with_solo_runs(
    alone: LLM, requests: list[tuple[list[int], dict[str, Any]]], states: list[SequenceState]
) -> None:
    for (ids, own), state in zip(requests, states, strict=True):
        options: Any = {**own, "speculate": 0}
        expected = alone.generate(ids, **options)
        *pieces, last = state.events or [""]
        if not isinstance(last, Generation):  # cancelled
            assert expected.text.startswith("".join(map(str, [*pieces, last])))
            continue
        assert (last.text, last.token_ids) == (expected.text, expected.token_ids)
        assert (last.logprobs, last.prompt_logprobs) == (expected.logprobs, expected.prompt_logprobs)
        assert last.finish_reason == expected.finish_reason
        timings = last.timings
        assert timings.generated_tokens == expected.timings.generated_tokens
        assert 0 < timings.queue_seconds < timings.first_token_seconds
        assert timings.prefill_seconds > 0


def test_the_youngest_gives_way_and_goes_on_before_newer_ones(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fix_budget(monkeypatch)
    llm = make(directory, 2)
    watched = Watched(llm)
    states = [llm.sequence(llm.check(ids_of(seed, 100), max_tokens=60, greedy=True, speculate=0)) for seed in range(3)]
    for state in states:
        llm.scheduler.submit(state)
    ends = list[int]()
    while llm.scheduler.step():
        ends += [i for i, state in enumerate(states) if state.is_over and i not in ends]
        load = llm.scheduler.load
        assert load.paused == (states[1] in llm.scheduler._waiting.paused)
    assert ends == [0, 1]
    assert [len(step) for step in watched.steps][:30] == [1] * 30  # the second would need a block more than there is
    for seed, state in enumerate(states):
        generation = state.events[-1]
        assert isinstance(generation, Generation)
        assert generation.token_ids == plain(llm, ids_of(seed, 100), 60, Sampling(0.0))[0]


def test_a_paused_sequence_is_taken_in_again_like_a_prompt(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the budget, with the drafter that it had, in seconds of decoding; the clock strikes once a step."""
    fix_budget(monkeypatch, alone=64, beside=32)
    llm, ticks = make(directory, 4), [0]
    watched = Watched(llm, lambda *_: ticks.append(0))
    clock = SimpleNamespace(perf_counter=lambda: float(len(ticks)))
    for module in (scheduler, sequence, requests):
        monkeypatch.setattr(module, "time", clock)
    states = [llm.sequence(llm.check(ids_of(seed, 60 + 60 * seed), max_tokens=250, greedy=True)) for seed in range(2)]
    for state in states:
        llm.scheduler.submit(state)
    while not llm.scheduler.load.paused:
        assert llm.scheduler.step()
    drafter, prefill = states[1].drafter, states[1].answer.timings.prefill_seconds
    assert states[1].count > 256
    while llm.scheduler.load.paused:
        assert llm.scheduler.step()
    del watched.steps[:]
    while not states[1].is_decoding:
        assert llm.scheduler.step()
    assert states[1].drafter is drafter
    assert [sum(step) for step in watched.steps][:3] == [64] * 3  # and one before
    more = len(watched.steps)
    while llm.scheduler.step():
        pass
    (*_, generation) = states[1].events
    assert isinstance(generation, Generation)
    timings = generation.timings
    assert timings.prefill_seconds == prefill
    assert timings.decode_seconds == timings.decode_steps + more  # the last of the steps again drew a token


def test_a_draft_pauses_nobody(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SequenceState, "wanted", property(lambda s: whole_blocks(s.count)))
    monkeypatch.setattr(StepTimes, "best_length", lambda *_: 4)
    llm = make(directory, 2)
    old = llm.sequence(llm.check([1, 2, 3] * 41 + [1], max_tokens=20, greedy=True))
    young = llm.sequence(llm.check(ids_of(1, 10), max_tokens=2, greedy=True, speculate=0))
    llm.scheduler.submit(old)
    llm.scheduler.submit(young)
    llm.scheduler.step()
    monkeypatch.setattr(old.drafter, "propose", lambda *_: 4)  # its draft would reach the next block
    llm.scheduler.step()
    assert young.is_over
    assert old.drafted == 0
    assert llm.scheduler.counters.preemptions == 0


def test_kept_caches_give_way_before_running_sequences(directory: Path) -> None:
    llm = make(directory, 3)
    llm.generate(ids_of(0, 100), max_tokens=2, greedy=True)
    llm.generate(ids_of(1, 100), max_tokens=2, greedy=True)
    assert llm.scheduler.load.kept_positions == 2 * BLOCK
    llm.generate(ids_of(2, 100), max_tokens=200, greedy=True)
    assert llm.scheduler.counters.preemptions == 0
    assert llm.scheduler.load.kept_positions == 3 * BLOCK


def test_a_declared_length_takes_no_memory_before_it_is_needed(directory: Path) -> None:
    llm = make(directory, 4)
    watched = Watched(llm)
    llm.generate_many([ids_of(seed, 20) for seed in range(4)], max_tokens=480, stop=[" "], greedy=True, speculate=0)
    assert max(map(len, watched.steps)) >= 2  # each declares all of the room


def test_after_an_interrupt_at_any_place_paused_sequences_go_on(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SequenceState, "wanted", property(lambda s: whole_blocks(s.count)))  # enter, then lack a block
    llm = make(directory, 3)
    prompts = [ids_of(seed, 127) for seed in range(2)]
    expected = [plain(llm, ids, 4, Sampling(0.0))[0] for ids in prompts]
    place, pauses, done = 0, 0, 0
    while True:
        streams = [llm.stream(ids, max_tokens=4, greedy=True, speculate=0) for ids in prompts]
        if not interrupted_at(place, lambda streams=streams: list(streams[1])):
            break
        pauses += llm.scheduler.counters.preemptions
        llm.scheduler.counters.preemptions = 0
        for stream, tokens in zip(streams, expected, strict=True):
            try:
                *_, generation = stream
            except (RunError, ValueError):  # it was this one's turn to draw; or its end came before the interrupt
                continue
            if isinstance(generation, Generation):
                done += 1
                assert generation.token_ids == tokens
        llm.scheduler.step()  # an interrupted sweep is done again
        assert not llm.scheduler.load.running
        place += 3
    assert pauses > 50
    assert done > place / 3  # an interrupt costs one of the two at most


def test_a_paused_sequence_can_be_cancelled(directory: Path) -> None:
    llm = make(directory, 4)
    states = [llm.sequence(llm.check(ids_of(seed, 120), max_tokens=250, greedy=True)) for seed in range(2)]
    for state in states:
        llm.scheduler.submit(state)
    while not llm.scheduler.load.paused:
        assert llm.scheduler.step()
    llm.scheduler.cancel(states[1])
    assert llm.scheduler.load.paused == llm.scheduler.load.waiting == 0
    while llm.scheduler.step():
        pass
    assert isinstance(states[0].events[-1], Generation)
    assert not any(isinstance(event, Generation) for event in states[1].events)
