"""Sends the answers of a job, whole or as a stream, in OpenAI's frame around what each choice has to say."""

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from llamita.engine.requests import Generation
from llamita.serve.engine_thread import Update
from llamita.serve.exchange import Exchange, encode, to_bytes
from llamita.serve.options import wants_usage
from llamita.serve.state import Job, Running, ServerState
from llamita.serve.usage import timings, usage

_REASONS = {"context": "length"}  # the engine's word for a full context; OpenAI has one for both
Part = dict[str, Any]  # an entry of `choices` without its index


class Writer(Protocol):
    """Says what one choice has made."""

    def opening(self) -> list[Part]:
        """Return the parts of a stream that come before all text."""
        ...

    def parts(self, update: Update) -> Iterator[Part]:
        """Yield the next parts of a stream."""
        ...

    def whole(self, update: Update) -> Part:
        """Return the entry of an answer that is not streamed."""
        ...


def reason_of(generation: Generation) -> str:
    """Return OpenAI's word for the end of an answer."""
    return _REASONS.get(generation.finish_reason, generation.finish_reason)


async def reply(
    state: ServerState,
    exchange: Exchange,
    job: Job,
    writers: Sequence[Writer],
    values: Mapping[str, Any],
    kinds: tuple[str, str, str],
) -> None:
    """Run a job and send what it makes; the job ends if the client goes away.

    Args:
        state: runs the job.
        exchange: the request.
        job: its sequences.
        writers: one for each.
        values: the fields of the body, for `stream` and `stream_options`.
        kinds: the beginning of the id, and `object` of a whole answer and of a piece.
    """
    include_usage = wants_usage(values)
    head = {
        "id": f"{kinds[0]}-{secrets.token_hex(12)}",
        "object": kinds[2 if values.get("stream") else 1],
        "created": int(time.time()),
        "model": job.served.id,
        "system_fingerprint": job.served.fingerprint,
    }
    if values.get("stream"):
        await exchange.watched(lambda: _stream(state, exchange, job, writers, head, include_usage))
    else:
        await exchange.watched(lambda: _whole(state, exchange, job, writers, head))


def _counts(generations: Sequence[Generation], job: Job) -> dict[str, Any]:
    return {"usage": usage(generations, job.choices), "timings": timings(generations[0])}


async def _whole(
    state: ServerState, exchange: Exchange, job: Job, writers: Sequence[Writer], head: Mapping[str, Any]
) -> None:
    with state.run(exchange.owner, job) as running:
        updates = await running.all()

    def make() -> list[dict[str, Any]]:
        return [{"index": i, **writer.whole(u)} for i, (writer, u) in enumerate(zip(writers, updates, strict=True))]

    generations = [update.generation for update in updates if update.generation]

    def body() -> bytes:
        return to_bytes({**head, "choices": make(), **_counts(generations, job)})

    # Log-probabilities may be megabytes, which is seconds' work.
    has_many = any(update.prompt_logprobs or update.logprobs for update in updates)
    data = await state.preparation.compute(body) if has_many else body()
    await exchange.send_bytes(data, "application/json")


async def sign_of_life(exchange: Exchange, running: Running, before: int) -> None:
    """Send a comment if a stream has had nothing to send for long; `before`: its pieces before the last updates."""
    if exchange.pieces == before and running.is_silent:
        await exchange.send_line(": ping\n\n")
    if exchange.pieces > before:
        running.note_sent()


async def _stream(
    state: ServerState,
    exchange: Exchange,
    job: Job,
    writers: Sequence[Writer],
    head: Mapping[str, Any],
    include_usage: bool,
) -> None:
    # Each step sends an event, so what all events share is encoded once.
    begin, end = f'data: {encode(head)[:-1]},"choices":', (',"usage":null' if include_usage else "") + "}\n\n"
    generations: dict[int, Generation] = {}

    async def send(index: int, part: Part) -> None:
        await exchange.send_line(f"{begin}{encode([{'index': index, **part}])}{end}")

    with state.run(exchange.owner, job) as running:
        await exchange.begin_stream()
        for index, writer in enumerate(writers):
            for part in writer.opening():
                await send(index, part)
        async for updates in running:
            before = exchange.pieces
            for index, update in updates.items():
                for part in writers[index].parts(update):
                    await send(index, part)
                if update.generation:
                    generations[index] = update.generation
            await sign_of_life(exchange, running, before)
    if include_usage:
        ordered = [generations[index] for index in sorted(generations)]
        await exchange.send_event({**head, "choices": [], **_counts(ordered, job)})
    await exchange.send_line("data: [DONE]\n\n")
    await exchange.end_stream()
