"""Many clients at once, on our server and on others with the same requests, in turn."""

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from http_streams import Reply, completion
from server_bench import Bench, Record, quantiles, run
from server_processes import LLAMA_SERVER, Server

SLOTS = 16  # of a peer; as many sequences run in ours
LATER_FILES = 8  # clients of the one load that a peer's other files run
TUNING = (4, 4)  # clients and requests by which settings are chosen


def tune(bench: Bench) -> Iterator[Record]:
    """Find the settings by which llama.cpp's server makes most tokens per second; the later cases use them."""
    best = 0.0
    for options in LLAMA_SERVER if bench.program else ():
        kind = bench.peers(SLOTS, _positions(bench), options)[0]
        with bench.serving(kind) as server:
            least, most = bench.sizes.lengths
            record = {**_loaded(bench, server, *TUNING, (least, most // 4)), "case": "tune"}
        if record["tokens_per_second"] > best:
            best, bench.options = record["tokens_per_second"], options
        yield record


def _positions(bench: Bench) -> int:
    return bench.sizes.lengths[1] + 2 * bench.sizes.new + 64


def load(bench: Bench) -> Iterator[Record]:
    """Load each server with 1 to 16 clients, in turn for each number; the others are stopped meanwhile."""
    with ExitStack() as stack:
        peers = bench.peers(SLOTS, _positions(bench))
        servers = []
        for kind in (bench.kind(), *peers):
            servers.append(stack.enter_context(bench.serving(kind)))
            servers[-1].pause()
        for clients, count in bench.sizes.requests.items():
            for server in servers:
                if server.kind in peers[1:] and clients != LATER_FILES:
                    continue
                server.resume()
                yield _loaded(bench, server, clients, count, bench.sizes.lengths)
                server.pause()


def prompts(bench: Bench, clients: int, count: int, between: tuple[int, int]) -> list[list[int]]:
    """Return prompts whose lengths are spread evenly by their logarithm, in a random order that is always the same."""
    least, most = between
    lengths = [round(least * (most / least) ** (i / max(1, count - 1))) for i in range(count)]
    random.Random(clients).shuffle(lengths)
    return [bench.prompt(length, f"load {clients} {i}") for i, length in enumerate(lengths)]


def _loaded(bench: Bench, server: Server, clients: int, count: int, lengths: tuple[int, int]) -> Record:
    given = prompts(bench, clients, count, lengths)
    requests = [(server, completion(ids, bench.sizes.new, i)) for i, ids in enumerate(given)]
    cpu, began, own = server.cpu_seconds(), time.perf_counter(), time.process_time()
    replies = run(requests, clients)
    own = time.process_time() - own
    seconds = max(reply.ended for reply in replies) - min(reply.started for reply in replies)
    busy = (server.cpu_seconds() - cpu) / (time.perf_counter() - began)
    return {
        "case": "load", "server": server.kind.name, "version": server.kind.version, "settings": server.kind.settings,
        "clients": clients, "requests": count, "prompt_tokens": sum(map(len, given)), "new_tokens": bench.sizes.new,
        **figures(replies, bench.sizes.new, seconds), "seconds": round(seconds, 2), "server_cores": round(busy, 2),
        "client_cores": round(own / seconds, 3), "resident_megabytes": round(server.resident_bytes() / 1e6),
    }  # fmt: skip


def figures(replies: Sequence[Reply], new: int, seconds: float) -> Record:
    """Return what clients saw; an answer without the tokens it was asked for is a failure."""
    good = [reply for reply in replies if reply.status == 200 and reply.tokens == new]
    return {
        "tokens_per_second": round(sum(reply.tokens for reply in good) / seconds, 2),
        "first_token": quantiles(reply.first_seconds for reply in good),
        "gap": quantiles(gap for reply in good for gap in reply.gaps),
        "failures": len(replies) - len(good),
        "pieces_per_token": round(sum(len(r.texts) for r in good) / max(1, sum(r.tokens for r in good)), 3),
    }
