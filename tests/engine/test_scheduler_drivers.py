"""Drivers of the scheduler other than streams: one thread that steps while others submit, cancel and read streams."""

import threading
from pathlib import Path
from typing import Any

import pytest
from generations import Watched, endless, finish, ids_of, plain
from tiny import make_checkpoint

from llamita.engine.llm import LLM, Generation
from llamita.engine.sampler import Sampling
from llamita.engine.sequence import SequenceState


@pytest.fixture
def llm(tmp_path: Path) -> LLM:
    return endless(make_checkpoint(tmp_path, "llama32", eos_token_id=319), scheme="llama3.2", context=400)


def state(llm: LLM, ids: list[int], **options: Any) -> SequenceState:
    return llm.sequence(llm.check(ids, **{"max_tokens": 8, "greedy": True, **options}))  # type: ignore[typeddict-item]


def test_steps_say_whether_work_remains(llm: LLM) -> None:
    prompts = [ids_of(seed, 20) for seed in range(3)]
    watched = Watched(llm)
    assert not llm.scheduler.step()
    assert not watched.steps
    states = [state(llm, ids, speculate=0) for ids in prompts]
    for one in states:
        llm.scheduler.submit(one)
    assert [llm.scheduler.step() for _ in range(8)] == [True] * 7 + [False]
    assert watched.steps == [[20] * 3, *[[1] * 3] * 7]
    for one, ids in zip(states, prompts, strict=True):
        assert isinstance(generation := one.events[-1], Generation)
        assert generation.token_ids == plain(llm, ids, 8, Sampling(0.0))[0]


def test_a_step_for_a_reader_who_has_an_event_runs_nothing(llm: LLM) -> None:
    one, other = state(llm, ids_of(0, 20)), state(llm, ids_of(1, 20))
    llm.scheduler.submit(one)
    llm.scheduler.submit(other)
    while not one.events:
        assert llm.scheduler.step(one)
    watched = Watched(llm)
    assert llm.scheduler.step(one)
    assert not watched.steps
    llm.scheduler.cancel(other)
    assert llm.scheduler.step()
    assert [len(step) for step in watched.steps] == [1]


def test_a_thread_steps_for_all_while_others_submit_and_cancel(llm: LLM) -> None:
    expected = [plain(llm, ids_of(seed, 20), 8, Sampling(0.0))[0] for seed in range(4)]
    is_closed, is_submitted = threading.Event(), threading.Event()

    def drive() -> None:
        is_last = False
        while not is_last:
            is_submitted.wait()
            is_submitted.clear()
            is_last = is_closed.is_set()
            while llm.scheduler.step():
                pass

    driver = threading.Thread(target=drive)
    driver.start()
    states = [state(llm, ids_of(seed, 20)) for seed in range(4)]
    long = state(llm, ids_of(9, 20), max_tokens=380)
    for one in [long, *states]:
        llm.scheduler.submit(one)
        is_submitted.set()
    llm.scheduler.cancel(long)
    streamed = finish(llm.stream(ids_of(0, 20), max_tokens=8, greedy=True))  # its reader takes turns with the driver
    is_closed.set()
    is_submitted.set()
    driver.join()
    assert streamed.token_ids == expected[0]
    assert [one.events[-1].token_ids for one in states] == expected  # type: ignore[union-attr]
    assert not any(isinstance(event, Generation) for event in long.events)
    assert not llm.scheduler._running()
