"""The time that a job has, and the signs of life of one that says nothing."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, cast

import pytest
from served import serving
from starlette.types import Message

import llamita
from llamita.engine.requests import Generation
from llamita.serve import reply, state
from llamita.serve.engine_thread import Mailbox, Update
from llamita.serve.errors import ApiError
from llamita.serve.exchange import Exchange
from llamita.serve.keys import Keys
from llamita.serve.state import Limits, Running

LONG = {"messages": [{"role": "user", "content": "Once upon a time"}], "ignore_eos": True}


class Silent:
    """Counts nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


def run(work: Callable[[Mailbox, Callable[[Limits], Running]], Awaitable[None]]) -> None:
    """Run a test of a job with one choice."""

    async def main() -> None:
        mailbox = Mailbox(cast(Any, None), cast(Any, [object()]))
        made: list[Running] = []

        def make(limits: Limits) -> Running:
            made.append(Running(mailbox, limits, cast(Any, Silent())))
            return made[-1]

        try:
            await asyncio.wait_for(work(mailbox, make), 20)
        finally:
            for running in made:
                running.note_end()

    asyncio.run(main())


def give(mailbox: Mailbox, update: Update) -> None:
    mailbox._updates[0] = update
    mailbox.wake()


def test_the_whole_time_holds_before_the_first_token_too() -> None:
    async def work(_: Mailbox, make: Callable[[Limits], Running]) -> None:
        with pytest.raises(ApiError, match="The first token took longer"):
            await anext(make(Limits(first_token_seconds=600, total_seconds=0.2)))

    run(work)


def test_a_silence_after_the_first_token_ends_in_time() -> None:
    async def work(mailbox: Mailbox, make: Callable[[Limits], Running]) -> None:
        running = make(Limits(first_token_seconds=600, total_seconds=0.3))
        give(mailbox, Update("a"))
        assert (await anext(running))[0].text == "a"
        with pytest.raises(ApiError, match="The answer took longer"):
            await anext(running)

    run(work)


def test_an_answer_that_is_there_is_not_thrown_away() -> None:
    async def work(mailbox: Mailbox, make: Callable[[Limits], Running]) -> None:
        running = make(Limits(total_seconds=0.01))
        give(mailbox, Update("a", generation=cast(Generation, object())))
        await asyncio.sleep(0.05)
        assert (await running.all())[0].text == "a"

    run(work)


def test_a_late_reader_loses_neither_a_token_nor_an_error() -> None:
    async def work(mailbox: Mailbox, make: Callable[[Limits], Running]) -> None:
        running = make(Limits(first_token_seconds=0.05))
        give(mailbox, Update("a"))
        await asyncio.sleep(0.1)
        assert (await anext(running))[0].text == "a"
        failing = make(Limits(first_token_seconds=0.05))
        give(mailbox, Update(error=ValueError("broken")))
        await asyncio.sleep(0.1)
        with pytest.raises(ValueError, match="broken"):
            await anext(failing)

    run(work)


def test_a_stream_whose_text_is_held_back_gives_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "SIGN_OF_LIFE", 0.1)
    sent: list[bytes] = []

    async def send(message: Message) -> None:
        sent.append(message["body"])

    async def work(mailbox: Mailbox, make: Callable[[Limits], Running]) -> None:
        exchange = Exchange({"headers": []}, cast(Any, None), send)
        running = make(Limits())
        for _ in range(20):
            give(mailbox, Update("a"))  # and nobody makes anything of it
            await anext(running)
            await reply.sign_of_life(exchange, running, exchange.pieces)
            await asyncio.sleep(0.02)

    run(work)
    assert 2 <= len(sent) <= 4
    assert set(sent) == {b": ping\n\n"}


def test_a_refusal_leaves_no_timer() -> None:
    llm = llamita.load("embedded", scheme="llama3.2", cache_memory=llamita.load("embedded").new_sequence(128).nbytes)

    def timers(loop: Any) -> list[asyncio.TimerHandle]:
        return [t for t in loop._scheduled if not t.cancelled() and "_ring" in repr(t)]

    with serving({"embedded": llm}) as server:
        loops: list[Any] = []
        check = server.state.queue.check

        def spied(owner: str | None, load: Any) -> None:
            loops.append(asyncio.get_running_loop())
            check(owner, load)

        server.state.queue.check = spied
        status, error = server.refuse("/v1/chat/completions", {**LONG, "max_tokens": 1000})
        assert (status, error["param"]) == (400, "max_tokens")
        assert timers(loops[0]) == []


def test_a_key_sees_its_own_sequences_at_work() -> None:
    keys = ["a" * 20, "b" * 20, "c" * 20]
    llm = llamita.load("embedded", scheme="llama3.2")

    def running(server: Any, key: str) -> list[Mapping[str, Any]]:
        headers = {"Authorization": f"Bearer {key}"}
        return json.loads(server.ask("GET", "/v1/load", headers=headers)[2])["models"][0]["running"]

    with serving({"embedded": llm}, keys=Keys(keys[:2], keys[2:])) as server:
        request = llm.check(
            "Once upon a time", max_tokens=None, ignore_eos=True, owner=server.state.keys.owner(keys[0])
        )
        sequence = llm.sequence(request)
        llm.scheduler.submit(sequence)
        llm.scheduler.step()
        try:
            assert [len(running(server, key)) for key in keys] == [1, 0, 1]
        finally:
            llm.scheduler.cancel(sequence)
