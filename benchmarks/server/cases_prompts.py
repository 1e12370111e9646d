"""Long prompts: beside a running stream, in a chat's second turn, and after a restart."""

import asyncio
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from http_streams import Reply, completion, post, start
from server_bench import COMPLETIONS, Bench, Record, quantiles, run
from server_processes import Server

SLOTS_BESIDE = 4  # of a peer
SOLO_ROOM = 2048  # positions of a peer's slot beyond the long prompt: for what the running stream makes meanwhile
SOLO_TOKENS = 48  # of the running stream, before the long prompt comes
CHAT_TOKENS = 50
BETWEEN_CHATS = 4.0  # seconds


def long_prompt(bench: Bench) -> Iterator[Record]:
    """Send a long prompt beside a running stream, and new chats meanwhile."""
    for kind in (bench.kind(), *bench.peers(SLOTS_BESIDE, bench.sizes.long + SOLO_ROOM)[:1]):
        with bench.serving(kind) as server:
            yield {"case": "long_prompt", "server": kind.name, "settings": kind.settings,
                   **asyncio.run(_beside(bench, server))}  # fmt: skip


async def _beside(bench: Bench, server: Server) -> Record:
    arrived = asyncio.Event()
    most = bench.sizes.context // 4
    running = await start(server.port, COMPLETIONS, completion(bench.prompt(CHAT_TOKENS, "running"), most, 0))
    while len(running.reply().texts) < min(SOLO_TOKENS, most // 4):
        await asyncio.sleep(0.1)
    sent = time.perf_counter()
    long = asyncio.create_task(post(server.port, COMPLETIONS, completion(bench.prompt(bench.sizes.long, "long"), 2, 0)))
    long.add_done_callback(lambda _: arrived.set())
    chats: list[Reply] = []
    while not arrived.is_set():
        if await _within(arrived, BETWEEN_CHATS if bench.sizes.context > 2000 else 0.05):
            break
        chat = completion(bench.prompt(CHAT_TOKENS, f"chat {len(chats)}"), 4, 0)
        chats.append(await post(server.port, COMPLETIONS, chat))
    taken = (await long).texts[0][0]
    running.abort()
    times = [at for at, _ in running.reply().texts]
    gaps = list(pairwise(times))
    beside = [b - a for a, b in gaps if a >= sent and b <= taken]
    inside = [chat for chat in chats if chat.texts and chat.started < taken]
    return {
        "prompt_tokens": bench.sizes.long, "seconds": round(taken - sent, 2),
        "solo_gap": quantiles(b - a for a, b in gaps if b < sent), "gap": quantiles(beside),
        "chat_first": quantiles(chat.first_seconds for chat in inside),
    }  # fmt: skip


async def _within(event: asyncio.Event, seconds: float) -> bool:
    """Wait for an event, but not for longer; return whether it came."""
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        return False
    return True


def second_turn(bench: Bench) -> Iterator[Record]:
    """Ask again after a long first turn, as a chat does: with the whole conversation so far."""
    cached, firsts, share = [], [], []
    with bench.serving(bench.kind()) as server:
        for round_ in range(max(1, bench.sizes.rounds // 2)):
            ids = bench.prompt(bench.sizes.second, f"second {round_}")
            # Small letters, which every tokenizer takes for what they are, so that the answer's tokens are known.
            body = completion(ids, bench.sizes.new, 0, guided_regex=f"[a-z]{{{bench.sizes.new}}}")
            (first,) = run([(server, body)], 1)
            answer = server.post("/tokenize", {"prompt": first.text, "add_special_tokens": False})["tokens"]
            again = ids + answer + bench.prompt(CHAT_TOKENS, f"again {round_}")
            (second,) = run([(server, completion(again, 4, 0))], 1)
            cached.append(second.usage["prompt_tokens_details"]["cached_tokens"])
            share.append(cached[-1] / (len(ids) + len(answer)))
            firsts.append(second.first_seconds)
    yield {"case": "second_turn", "prompt_tokens": bench.sizes.second, "answer_tokens": bench.sizes.new,
           "new_prompt_tokens": CHAT_TOKENS, "cached_tokens": cached,
           "cached_share": round(statistics.median(share), 4), "first": quantiles(firsts)}  # fmt: skip


def restart(bench: Bench) -> Iterator[Record]:
    """End a server that knows a long prompt, start it again, and send the prompt."""
    with tempfile.TemporaryDirectory(dir=bench.workdir) as folder:
        file = Path(folder) / "prompts"
        kind = bench.kind("--prefix-file", str(file))
        body = completion(bench.prompt(bench.sizes.known, "known"), 4, 0)
        plain = Server(bench.kind(), bench.workdir / "plain.log")
        plain.stop()
        server = Server(kind, bench.workdir / "before.log")
        (before,) = run([(server, body)], 1)
        stop_seconds = server.stop()
        size = file.stat().st_size
        server = Server(kind, bench.workdir / "after.log")
        (after,) = run([(server, body)], 1)
        server.stop()
    yield {
        "case": "restart", "prompt_tokens": bench.sizes.known, "first_before": quantiles([before.first_seconds]),
        "first": quantiles([after.first_seconds]), "equal": before.text == after.text,
        "cached_tokens": after.usage["prompt_tokens_details"]["cached_tokens"], "file_megabytes": round(size / 1e6, 1),
        "stop_seconds": round(stop_seconds, 2), "start_seconds": round(server.load_seconds, 2),
        "plain_start_seconds": round(plain.load_seconds, 2),
    }  # fmt: skip
