"""The scheduler where threads and interrupts come at the worst moment: forced, not waited for."""

import gc
import threading
from collections import deque
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from generations import Watched, endless, finish, ids_of, interrupt, interrupted_at, once, plain
from tiny import make_checkpoint

from llamita.engine.admission import Waiting
from llamita.engine.llm import LLM, Generation
from llamita.engine.sampler import Sampling
from llamita.engine.scheduler import Scheduler
from llamita.engine.sequence import SequenceState
from llamita.errors import RunError


@pytest.fixture
def llm(tmp_path: Path) -> LLM:
    return endless(make_checkpoint(tmp_path, "llama32", eos_token_id=319), scheme="llama3.2")


def test_an_end_that_comes_between_two_looks_is_seen(llm: LLM) -> None:
    """The stream's reader finds no event; before its next look another reader's step ends the sequence."""
    streams = [llm.stream(ids_of(i, 20), max_tokens=1, greedy=True) for i in range(2)]
    step = once(lambda: finish(streams[1]))

    class Events(deque):
        def __bool__(self) -> bool:
            found = len(self) > 0
            step()
            return found

    streams[0]._sequence.events = Events()
    assert finish(streams[0]).token_ids == plain(llm, ids_of(0, 20), 1, Sampling(0.0))[0]


def test_an_interrupted_sweep_leaves_nobody_asleep(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    waits, wait = threading.Event(), llm.scheduler._changed.wait
    monkeypatch.setattr(llm.scheduler._changed, "wait", lambda: (waits.set(), wait()))  # the lock is held
    sweep, fail = Scheduler._sweep, once(interrupt)
    monkeypatch.setattr(Scheduler, "_sweep", lambda self: (fail(), sweep(self)))
    streams = [llm.stream(ids_of(i, 20), max_tokens=5, greedy=True, speculate=0) for i in range(2)]
    found: list[Generation] = []
    other = threading.Thread(target=lambda: found.append(finish(streams[1])), daemon=True)

    def meddle(count: int, *_: Any) -> None:
        if count == 1:
            other.start()
            assert waits.wait(60)

    Watched(llm, meddle)
    with pytest.raises(KeyboardInterrupt):
        list(streams[0])
    other.join(60)
    assert not other.is_alive()
    assert found[0].token_ids == plain(llm, ids_of(1, 20), 5, Sampling(0.0))[0]


def test_an_interrupted_submission_leaves_no_request(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    append = Waiting.append
    with monkeypatch.context() as patch:
        patch.setattr(Waiting, "append", lambda self, sequence: (append(self, sequence), interrupt()))
        with pytest.raises(KeyboardInterrupt):
            llm.stream(ids_of(0, 20), max_tokens=50)
    gc.collect()
    watched = Watched(llm)
    llm.generate(ids_of(1, 20), max_tokens=3, speculate=0)
    assert [len(step) for step in watched.steps] == [1, 1, 1]


@pytest.mark.parametrize("is_marked", [False, True])
def test_an_interrupt_after_the_end_is_no_error(llm: LLM, is_marked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Generation is there; whether the sequence is marked as over or not yet."""
    original, fail = SequenceState.finish, once(interrupt)

    def ends(sequence: SequenceState) -> None:
        original(sequence)
        sequence.is_over = is_marked
        fail()
        sequence.is_over = True

    monkeypatch.setattr(SequenceState, "finish", ends)
    stream = llm.stream(ids_of(0, 20), max_tokens=3, greedy=True)
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    *_, generation = stream
    assert isinstance(generation, Generation)
    assert generation.token_ids == plain(llm, ids_of(0, 20), 3, Sampling(0.0))[0]
    assert not llm.scheduler._running()


def test_a_sequence_that_a_sweep_missed_is_not_computed(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep after a failed draw is interrupted: the next step meets a sequence without a cache."""

    def meddle(count: int, _sequences: Any, logits: np.ndarray) -> None:
        if count == 3:
            logits[0] = np.nan

    sweeps = iter(range(1000))
    sweep = Scheduler._sweep
    monkeypatch.setattr(Scheduler, "_sweep", lambda self: interrupt() if next(sweeps) == 2 else sweep(self))
    Watched(llm, meddle)
    streams = [llm.stream(ids_of(i, 20), max_tokens=8, greedy=True, speculate=0) for i in range(2)]
    with pytest.raises(KeyboardInterrupt):
        list(streams[1])
    assert finish(streams[1]).token_ids == plain(llm, ids_of(1, 20), 8, Sampling(0.0))[0]
    with pytest.raises(RunError, match="logits"):
        list(streams[0])


def test_after_an_interrupt_at_any_place_other_threads_go_on(llm: LLM) -> None:
    ids = ids_of(1, 20)
    expected = plain(llm, ids, 2, Sampling(0.0))[0]
    place = 0
    while True:
        stream = llm.stream(ids_of(0, 20), max_tokens=2, greedy=True)
        if not interrupted_at(place, lambda stream=stream: list(stream)):
            break
        found: list[Generation] = []
        generate = partial(llm.generate, ids, max_tokens=2, greedy=True)
        other = threading.Thread(target=lambda found=found, run=generate: found.append(run()), daemon=True)
        other.start()
        other.join(60)
        assert found, place
        assert found[0].token_ids == expected
        place += 1
    assert place > 50
