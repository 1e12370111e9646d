"""Owners: whose turn it is, and what one learns of another."""

from pathlib import Path
from typing import Any

import pytest
from generations import Watched, endless, finish, fix_budget, ids_of
from tiny import make_checkpoint

from llamita.engine.admission import Waiting
from llamita.engine.llm import LLM
from llamita.engine.prefixes import SavedOwner, is_same_owner
from llamita.engine.scheduler import Scheduler, SequenceLimits
from llamita.engine.sequence import SequenceState


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "llama32", eos_token_id=319)


def submit(llm: LLM, owner: str | None, seed: int, **options: Any) -> SequenceState:
    chosen: Any = {"max_tokens": 3, "speculate": 0, "owner": owner, **options}
    state = llm.sequence(llm.check(ids_of(seed, 20), **chosen))
    llm.scheduler.submit(state)
    return state


def ends(llm: LLM, states: dict[str, SequenceState]) -> list[str]:
    """The names in the order in which they end."""
    order: list[str] = []
    while llm.scheduler.step():
        order += [name for name, state in states.items() if state.is_over and name not in order]
    return order + [name for name in states if name not in order]


def test_owners_take_turns(directory: Path) -> None:
    llm = endless(directory, max_sequences=1)
    states = {name: submit(llm, name[0], seed) for seed, name in enumerate(("a1", "a2", "a3", "b1", "b2", "c1"))}
    assert ends(llm, states) == ["a1", "b1", "c1", "a2", "b2", "a3"]
    states = {name: submit(llm, name[0], seed) for seed, name in enumerate(("a4", "c2", "b3"))}
    assert ends(llm, states) == ["c2", "b3", "a4"]  # a had the last turn


def test_one_owner_is_served_in_order_of_arrival(directory: Path) -> None:
    llm = endless(directory, max_sequences=1)
    states = {str(seed): submit(llm, None, seed) for seed in range(5)}
    assert ends(llm, states) == list("01234")


def test_while_others_wait_an_owner_gets_half_of_the_slots(directory: Path) -> None:
    llm = endless(directory, max_sequences=4)
    for seed in range(12):
        submit(llm, "a", seed, max_tokens=50 + seed)
    llm.scheduler.step()
    assert llm.scheduler.load.running == 4  # nobody else waits
    others = [submit(llm, "b", 20 + seed, max_tokens=60) for seed in range(5)]
    most, together = 0, 0
    while not all(other.is_over for other in others):
        llm.scheduler.step()
        running = [s.request.owner for s in llm.scheduler._running()]
        together = max(together, len(running))
        if any(s.request.owner == "a" for s in llm.scheduler._waiting):
            most = max(most, running.count("b"))
    assert (most, together) == (2, 4)


def test_who_was_cancelled_while_it_waited_takes_no_turn(directory: Path) -> None:
    llm = endless(directory, max_sequences=1)
    states = {name: submit(llm, name[0], seed) for seed, name in enumerate(("a1", "b1", "b2", "c1"))}
    llm.scheduler.cancel(states.pop("b1"))
    assert llm.scheduler.load.waiting == 3
    assert ends(llm, states) == ["a1", "b2", "c1"]
    assert not llm.scheduler._waiting


def test_owners_who_left_are_forgotten(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llamita.engine.admission._REMEMBERED", 3)
    waiting, llm = Waiting(), endless(directory)
    for seed in range(10):
        waiting.note(llm.sequence(llm.check(ids_of(seed, 3), owner=f"{seed}")))
    assert list(waiting._turns) == ["7", "8", "9"]


@pytest.mark.parametrize("is_shared", [False, True])
def test_beginnings_are_shared_within_an_owner(directory: Path, is_shared: bool) -> None:
    llm = endless(directory)
    limits = SequenceLimits(4, 2**30, 2**28, llm.kv_dtype, llm.context, share_prefixes=is_shared)
    llm.scheduler = Scheduler(llm.model, limits)

    def reused(owner: str | None) -> int:
        return llm.generate(ids_of(0, 40), max_tokens=2, owner=owner).timings.reused_tokens

    expected = [0, 39, 39, 39, 39, 39] if is_shared else [0, 39, 0, 39, 0, 39]
    assert [reused(owner) for owner in ("a", "a", "b", "b", None, "a")] == expected
    counters = llm.scheduler.counters
    assert (counters.prefix_queries, counters.prefix_hits) == (6 * 40, sum(expected))


def test_a_running_prompt_of_another_is_not_waited_for(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fix_budget(monkeypatch)
    llm = endless(directory)
    watched = Watched(llm)
    common = ids_of(0, 300)
    streams = [llm.stream(common, max_tokens=1, owner=owner) for owner in ("a", "b", "a")]
    assert [finish(stream).timings.reused_tokens for stream in streams] == [0, 0, 299]
    assert watched.tokens == 300 + 300 + 1


def test_a_cancelled_prefill_is_kept(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fix_budget(monkeypatch, alone=100)
    llm = endless(directory)
    stream = llm.stream(ids_of(0, 400), max_tokens=1)
    llm.scheduler.step()
    llm.scheduler.step()
    stream.close()
    assert llm.generate(ids_of(0, 400), max_tokens=1).timings.reused_tokens == 200


def test_a_saved_owner_is_known_by_its_hash() -> None:
    saved = SavedOwner.of("key", b"salt")
    assert is_same_owner(saved, "key")
    assert is_same_owner("key", saved)
    assert is_same_owner(saved, SavedOwner.of("key", b"salt"))
    assert is_same_owner(None, None)
    assert not any(is_same_owner(saved, other) for other in ("other", None, SavedOwner.of("other", b"salt")))
    assert not is_same_owner("a", None)


def test_a_snapshot_counts_what_waits_and_runs(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fix_budget(monkeypatch, alone=30, beside=16)
    llm = endless(directory, max_sequences=2)
    states = [submit(llm, None, seed, max_tokens=5) for seed in range(4)]
    load = llm.scheduler.load
    assert (load.waiting, load.waiting_tokens, load.running, load.used_positions) == (4, 80, 0, 0)
    llm.scheduler.step()
    load = llm.scheduler.load
    assert (load.waiting, load.waiting_tokens, load.running, load.decoding) == (2, 40, 2, 1)
    assert [tuple(s) for s in load.sequences] == [(20, 20, True, None), (10, 20, False, None)]
    assert load.used_positions == 256
    assert load.kept_positions == load.paused == 0
    while llm.scheduler.step():
        pass
    load = llm.scheduler.load
    assert (load.waiting, load.running, load.used_positions, load.kept_positions) == (0, 0, 0, 4 * 128)
    counters = llm.scheduler.counters
    assert (counters.prompt_tokens, counters.generated_tokens, counters.preemptions) == (80, 20, 0)
    assert all(state.is_over for state in states)
