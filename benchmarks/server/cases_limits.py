"""What a server must keep: places of clients that go away, quick refusals, and its pace under too much load."""

import asyncio
import bisect
import random
import time
from collections.abc import Iterator
from typing import Any

from http_streams import HOST, Reply, Stream, completion, post, start
from server_bench import CHAT, COMPLETIONS, Bench, Record, quantiles
from server_processes import Server

AT_ONCE = 8  # clients that go away together
LATEST = 10.0  # seconds after which a place counts as lost
PATIENCE = 2.0  # seconds that a refused client waits at most before it asks again
DELIVERY = 0.005  # seconds in which a step's text reaches its client
QUEUE = 20  # answers that run or wait at most, of which 16 run
OVERLOAD = (16, 64)  # clients: as many as run at once, and four times as many


def disconnects(bench: Bench) -> Iterator[Record]:
    """Leave at random moments, before and in the answer, streamed or not; see when the places are free.

    A stream goes on beside them. Its tokens tell when steps end: a place should be free 50 ms after the step that runs
    when its client leaves.
    """
    with bench.serving(bench.kind()) as server:
        yield {"case": "disconnects", **asyncio.run(_disconnects(bench, server))}


async def _disconnects(bench: Bench, server: Server) -> Record:
    source, freed, lates, waits = random.Random("disconnects"), 0, [], []
    ends: list[float] = []  # of steps, as the running stream shows them
    witness = await _witness(bench, server, ends)
    link = await asyncio.open_connection(HOST, server.port)
    total = bench.sizes.disconnects
    for begun in range(0, total, AT_ONCE):
        streams = [await _long(bench, server, source, begun + i) for i in range(min(AT_ONCE, total - begun))]
        await asyncio.sleep(source.uniform(0.0, 0.3))
        if witness.ended.done():
            witness = await _witness(bench, server, ends)
        left = time.perf_counter()
        for stream in streams:
            stream.abort()
        while (open_ := await _open(link)) > 1 and time.perf_counter() < left + LATEST:
            await asyncio.sleep(0.002)
        free = time.perf_counter()
        freed += len(streams) - max(0, open_ - 1)
        waits.append(free - left)
        await asyncio.sleep(0.05)
        step = bisect.bisect(ends, left + DELIVERY)  # text that comes sooner is of a step that had ended
        if step < len(ends):
            lates.append(max(0.0, free - ends[step]))
    witness.abort()
    link[1].close()
    return {"clients": total, "at_once": AT_ONCE, "freed": freed, "free_after": quantiles(waits),
            "free_after_step": quantiles(lates)}  # fmt: skip


async def _witness(bench: Bench, server: Server, ends: list[float]) -> Stream:
    most = bench.sizes.context - 64
    body = completion(bench.prompt(16, "witness"), most, len(ends))
    return await start(server.port, COMPLETIONS, body, lambda _: ends.append(time.perf_counter()))


async def _long(bench: Bench, server: Server, source: random.Random, number: int) -> Stream:
    """Send a request whose answer is longer than its client stays."""
    body = completion(bench.prompt(source.randint(8, 48), f"leaves {number}"), bench.sizes.context // 2, number)
    if number % 4 == 3:
        del body["stream"], body["stream_options"]
    return await start(server.port, COMPLETIONS, body)


async def _open(link: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> int:
    """Return how many sequences run and wait."""
    reader, writer = link
    writer.write(b"GET /v1/load HTTP/1.1\r\nHost: localhost\r\n\r\n")
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
    _, _, text = (await reader.readexactly(length)).partition(b'"running":[')
    running, _, rest = text.partition(b"]")
    return running.count(b"{") + int(rest.partition(b'"waiting":')[2].partition(b",")[0])


def refusals(bench: Bench) -> Iterator[Record]:
    """Time refusals of a server that rests, of one that works, and of one whose queue is full."""
    with bench.serving(bench.kind("--max-queue", str(QUEUE))) as server:
        for state, busy in (("rests", 0), ("works", QUEUE - 1), ("is full", QUEUE)):
            for name, (path, body, status) in _bad(bench).items():
                if (name == "queue full") == (state == "is full"):
                    replies = asyncio.run(_refused(bench, server, path, body, busy))
                    yield {"case": "refusals", "server_state": state, "request": name, "status": status,
                           "right": sum(reply.status == status for reply in replies),
                           "answer": quantiles((reply.ended - reply.started for reply in replies), 2)}  # fmt: skip


def _bad(bench: Bench) -> dict[str, tuple[str, Any, int]]:
    message = {"messages": [{"role": "user", "content": "Hello"}]}
    return {
        "bad JSON": (COMPLETIONS, b"{", 400),
        "bad field": (CHAT, {**message, "temperature": 9}, 400),
        "unknown model": (CHAT, {**message, "model": "no-such"}, 404),
        "prompt too long": (COMPLETIONS, completion(bench.prompt(bench.sizes.context + 1, "too long"), 1, 0), 400),
        "bad schema": (CHAT, {**message, "response_format": {"type": "json_schema", "json_schema": {
            "name": "x", "schema": {"type": "nonsense"}}}}, 400),
        "queue full": (COMPLETIONS, completion(bench.prompt(16, "full"), 4, 0), 429),
    }  # fmt: skip


async def _refused(bench: Bench, server: Server, path: str, body: Any, busy: int) -> list[Reply]:
    """Send a request again and again beside `busy` others, of which 16 run and the rest wait."""
    half = bench.sizes.context // 2
    others = [
        await start(server.port, COMPLETIONS, completion(bench.prompt(16, f"busy {i}"), half, i)) for i in range(busy)
    ]
    if busy:
        await asyncio.sleep(min(2.0, bench.sizes.window[0]))
    replies = []
    for _ in range(bench.sizes.refusals):
        replies.append(await post(server.port, path, body))
        await asyncio.sleep(0.01)
    for other in others:
        other.abort()
    await asyncio.sleep(0.5)
    return replies


def goodput(bench: Bench) -> Iterator[Record]:
    """Count the tokens of finished answers per second, of as many clients as run at once and of four times as many."""
    rates = []
    with bench.serving(bench.kind()) as server:
        for clients in OVERLOAD:
            figures = asyncio.run(_goodput(bench, server, clients))
            rates.append(figures["tokens_per_second"])
            yield {"case": "goodput", "clients": clients, **figures, "of_peak": round(rates[-1] / rates[0], 4)}


async def _goodput(bench: Bench, server: Server, clients: int) -> Record:
    window, before = bench.sizes.window
    begin = time.perf_counter() + before
    end, replies = begin + window, list[Reply]()
    least = bench.sizes.lengths[0]

    async def client(number: int) -> None:
        source = random.Random(f"goodput {clients} {number}")
        while time.perf_counter() < end:
            ids = bench.prompt(source.randint(least, 4 * least), source.random())
            reply = await post(server.port, COMPLETIONS, completion(ids, bench.sizes.new // 2, 0))
            replies.append(reply)
            if reply.status != 200:
                await asyncio.sleep(min(PATIENCE, float(reply.headers.get("retry-after", PATIENCE))))

    await asyncio.gather(*(client(number) for number in range(clients)))
    whole = [reply for reply in replies if reply.tokens]
    tokens = sum(begin <= at < end for reply in whole for at, _ in reply.texts)
    refused = [reply for reply in replies if reply.status == 429]
    return {
        "tokens_per_second": round(tokens / window, 2), "answers": len(whole), "refused": len(refused),
        "failures": len(replies) - len(whole) - len(refused),
        "refusal": quantiles((reply.ended - reply.started for reply in refused), 2),
        "first_token": quantiles(reply.first_seconds for reply in whole),
    }  # fmt: skip
