"""`/v1/embeddings`: the mean of a text's final hidden states, of length 1."""

import asyncio
import base64
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from llamita.serve.completions import prompts_of
from llamita.serve.encoding import prompt_ids
from llamita.serve.errors import timed_out, too_long, unavailable
from llamita.serve.exchange import Exchange
from llamita.serve.fields import read
from llamita.serve.preparation import run_in
from llamita.serve.served import Served
from llamita.serve.state import ServerState
from llamita.serve.tables import EMBEDDINGS

_CHUNK = 64  # tokens at once: the gap between two tokens of everybody else grows by the time that these take


async def embeddings(state: ServerState, exchange: Exchange) -> None:
    """Answer with a vector for each text. They are made one after the other, and wait in the queue of all answers."""
    values = read(await exchange.read_json(state.bodies), EMBEDDINGS)
    served, texts = await state.prepared(exchange, values, _prompts)
    count = sum(map(len, texts))

    async def work() -> None:
        if state.is_draining:
            raise unavailable("The server is stopping.", "draining")
        most = state.limits.total_seconds
        with state.queue.place(exchange.owner, len(texts), count, lambda: served.llm.scheduler.load):
            try:
                async with asyncio.timeout(most):
                    vectors = await _embed(state, served, texts)
            except TimeoutError:
                raise timed_out(f"The embeddings took longer than {most:g} seconds.") from None
        shown = [_shown(vector, values.get("encoding_format", "float")) for vector in vectors]
        data = [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(shown)]
        usage = {"prompt_tokens": count, "total_tokens": count}
        await exchange.send_json({"object": "list", "data": data, "model": served.id, "usage": usage})

    await exchange.watched(work)


def _prompts(state: ServerState, values: Mapping[str, Any]) -> tuple[Served, list[list[int]]]:
    served = state.models.find(values.get("model"))
    texts = [prompt_ids(served, prompt, True, "input") for prompt in prompts_of(values["input"], "input")]
    for ids in texts:
        if not ids or len(ids) > served.llm.context:
            raise too_long(len(ids), served.llm.context, "input")
    return served, texts


async def _embed(state: ServerState, served: Served, texts: list[list[int]]) -> list[np.ndarray]:
    """Return the vectors. If this is cancelled, it ends when the thread has, after its present chunk."""
    is_wanted = threading.Event()
    is_wanted.set()

    def run() -> list[np.ndarray]:
        return [served.llm.embed(ids, served.adapter, _CHUNK, is_wanted.is_set) for ids in texts]

    return await run_in(state.embedder, run, is_wanted.clear)


def _shown(vector: np.ndarray, form: str) -> Any:
    return vector.tolist() if form == "float" else base64.b64encode(vector.astype("<f4").tobytes()).decode()
