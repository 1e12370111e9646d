"""What the cases share: sizes, prompts, servers that are started once, and figures of times."""

import asyncio
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from http_streams import Reply, completion, post
from server_processes import LLAMA_SERVER, Kind, Server, llama_server, ours

import llamita
from llamita.engine.llm import LLM

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
Record = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How much each case does.

    Attributes:
        context: of our server; some prompts must exceed it.
        requests: how many for each number of clients of the load.
        lengths: the shortest and longest prompt of the load.
        new: tokens of an answer.
        rounds: how often interleaved runs are repeated.
        alone: answers that are compared with those of the same requests alone.
        schemas: answers with a schema.
        long, known, second: the tokens of the long prompt beside a stream, of the prompt that is known after a restart,
            and of a chat's first turn.
        disconnects: how many clients go away.
        refusals: how many times each refusal is timed.
        window: seconds in which goodput is counted, and before it.
    """

    context: int = 16384
    requests: Mapping[int, int] = field(default_factory=lambda: {1: 4, 4: 8, 8: 16, 16: 24})
    lengths: tuple[int, int] = (64, 2048)
    new: int = 64
    rounds: int = 4
    alone: int = 12
    schemas: int = 8
    long: int = 8192
    known: int = 9600
    second: int = 4000
    disconnects: int = 1000
    refusals: int = 20
    window: tuple[float, float] = (25.0, 8.0)


SMALL = Sizes(1024, {1: 2, 3: 4}, (8, 64), 8, 2, 4, 2, 512, 512, 256, 16, 3, (1.0, 0.3))


@dataclass
class Bench:
    """One run of the harness.

    Attributes:
        model: what `llamita serve` and `llamita.load` take.
        worded: a model whose tokens are words, for structured output; None for none.
        program: llama.cpp's server, None for none.
        files: its models; the first takes part in every load.
        options: its settings; `tune` replaces them by the best.
    """

    model: str
    sizes: Sizes
    threads: int
    workdir: Path
    worded: str | None = None
    program: Path | None = None
    files: Sequence[Path] = ()
    options: Sequence[str] = LLAMA_SERVER[0]

    def peers(self, slots: int, positions: int, options: Sequence[str] | None = None) -> list[Kind]:
        """Return llama.cpp's servers, one for each file, with so many slots of so many positions."""
        if self.program is None:
            return []
        chosen = options or self.options
        return [llama_server(self.program, file, self.threads, slots, positions, chosen) for file in self.files]

    def kind(self, *options: str, model: str | None = None, context: int | None = None) -> Kind:
        """Return our server, with options."""
        most = str(context or self.sizes.context)
        return ours(model or self.model, self.threads, "--context", most, *options)

    @contextmanager
    def serving(self, kind: Kind) -> Iterator[Server]:
        """Start and warm a server; end it after the block."""
        server = Server(kind, self.workdir / f"{kind.name.replace(' ', '-')}.log")
        try:
            self.warm(server)
            yield server
        finally:
            server.stop()

    @cached_property
    def llm(self) -> LLM:
        """The same model in this process, without HTTP."""
        directory, _, scheme = self.model.partition(":")
        return llamita.load(directory, scheme=scheme or None, context=self.sizes.context)

    @cached_property
    def vocab(self) -> int:
        """The ids that prompts draw from: below those of special tokens."""
        return self.llm.config.vocab_size * 9 // 10

    def prompt(self, tokens: int, seed: object) -> list[int]:
        """Return random token ids; no two seeds share a beginning."""
        return random.Random(f"{seed}").choices(range(self.vocab), k=tokens)

    def warm(self, server: Server) -> None:
        """Take in a prompt, and some together, so that threads, buffers and budgets are settled."""
        longest = self.sizes.lengths[1]
        run([(server, completion(self.prompt(longest // 8, "warm"), 8, 0))], 1)
        run([(server, completion(self.prompt(longest // 64, f"warm {i}"), 8, i)) for i in range(8)], 8)


def run(requests: Sequence[tuple[Server, Mapping[str, Any]]], clients: int, path: str = COMPLETIONS) -> list[Reply]:
    """Send requests by so many clients, each taking the next when its last is answered; return the answers in order."""
    replies: list[Reply | None] = [None] * len(requests)
    left = iter(enumerate(requests))

    async def client() -> None:
        for place, (server, body) in left:
            replies[place] = await post(server.port, path, body)

    async def everyone() -> None:
        await asyncio.gather(*(client() for _ in range(clients)))

    asyncio.run(everyone())
    return [reply for reply in replies if reply is not None]


def quantiles(seconds: Iterable[float], digits: int = 1) -> Record:
    """Return median, 95th and 99th percentile and the most, in milliseconds."""
    values = 1000 * np.array(list(seconds))
    if not len(values):
        return {}
    p50, p95, p99 = np.percentile(values, (50, 95, 99))
    figures = {"median_ms": p50, "p95_ms": p95, "p99_ms": p99, "most_ms": values.max()}
    return {"count": len(values), **{name: round(float(value), digits) for name, value in figures.items()}}


def rate(reply: Reply) -> float:
    """Return the tokens per second after the first, as the client sees them."""
    times = [at for at, _ in reply.texts]
    last = times[-1] if times[-1] > times[0] else reply.ended  # a tiny model's pieces can arrive together
    return (reply.tokens - 1) / (last - times[0])


Case = Callable[[Bench], Iterator[Record]]
