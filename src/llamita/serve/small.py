"""The small endpoints: models, adapters, tokens, health, metrics, the scheduler's load."""

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llamita.engine.scheduler import Scheduler
from llamita.errors import InputError
from llamita.imports.open import open_source
from llamita.loading import open_adapters
from llamita.serve.chat import MOST_COUNTED, encode
from llamita.serve.encoding import encode_text, prompt_ids
from llamita.serve.errors import ApiError, no_model, unavailable, wrong
from llamita.serve.exchange import Exchange
from llamita.serve.fields import is_whole, read
from llamita.serve.guard import check_admin
from llamita.serve.served import Served
from llamita.serve.state import ServerState
from llamita.serve.structure import read_tools
from llamita.serve.tables import ADAPTER, DETOKENIZE, TOKENIZE

_STALLED = 120  # seconds of one step after which the engine counts as stuck; a step takes well under one


async def models(state: ServerState, exchange: Exchange) -> None:
    """List the models and their adapters."""
    await exchange.send_json({"object": "list", "data": [served.entry() for served in state.models.all]})


async def model(state: ServerState, exchange: Exchange) -> None:
    """Show one model."""
    await exchange.send_json(state.models.find(exchange.scope["path_params"]["name"]).entry())


async def tokenize(state: ServerState, exchange: Exchange) -> None:
    """Turn a text or a conversation into token ids, in vLLM's form or llama.cpp's."""
    values = read(await exchange.read_json(state.bodies), TOKENIZE)
    await exchange.send_json(await state.prepared(exchange, values, _tokenize))


def _tokenize(state: ServerState, values: Mapping[str, Any]) -> dict[str, Any]:
    served = state.models.find(values.get("model"))
    llm = served.llm
    given = [name for name in ("prompt", "content", "messages") if name in values]
    if len(given) != 1:
        raise wrong("prompt", f"expected one of prompt, content and messages, got {', '.join(given) or 'none'}.")
    if "messages" in values:
        ids = encode(served, values, read_tools(values), most=MOST_COUNTED)
    else:
        has_bos = values.get("add_special") if "content" in values else values.get("add_special_tokens", True)
        ids = encode_text(served, values[given[0]], None if has_bos else False, given[0], MOST_COUNTED)
    answer: dict[str, Any] = {"count": len(ids), "max_model_len": llm.context, "tokens": ids}
    if values.get("return_token_strs"):
        pieces = [llm.tokenizer.token_bytes(token, skip_special=False) for token in ids]
        answer["token_strs"] = [piece.decode(errors="replace") for piece in pieces]
    return answer


async def detokenize(state: ServerState, exchange: Exchange) -> None:
    """Turn token ids into text."""
    values = read(await exchange.read_json(state.bodies), DETOKENIZE)
    await exchange.send_json(await state.prepared(exchange, values, _detokenize))


def _detokenize(state: ServerState, values: Mapping[str, Any]) -> dict[str, Any]:
    served = state.models.find(values.get("model"))
    if not all(is_whole(token) for token in values["tokens"]):
        raise wrong("tokens", "expected token ids.")
    ids = prompt_ids(served, values["tokens"], False, "tokens")
    text = served.llm.tokenizer.decode(ids, skip_special=False)
    return {"prompt": text, "content": text}


async def tokenizer_info(state: ServerState, exchange: Exchange) -> None:
    """Say what LM Eval wants to know of the tokenizer."""
    tokenizer = state.models.find(None).llm.tokenizer
    info = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token, "pad_token": None}
    await exchange.send_json({**info, "chat_template": None})


async def health(state: ServerState, exchange: Exchange) -> None:
    """Say that the process lives and its engine moves."""
    if state.engine.stalled_seconds > _STALLED:
        raise unavailable(f"The engine's step has taken {state.engine.stalled_seconds:.0f} seconds.", "stalled")
    await exchange.send_json({"status": "ok"})


async def ready(state: ServerState, exchange: Exchange) -> None:
    """Say whether a request would be taken in."""
    if state.is_draining:
        raise unavailable("The server is stopping.", "draining")
    if state.queue.open >= state.queue.bounds.requests:
        raise unavailable("The queue is full.", "queue_full")
    await health(state, exchange)


async def metrics(state: ServerState, exchange: Exchange) -> None:
    """Return the counters in Prometheus' form."""
    await exchange.send_bytes(state.metrics.render(), "text/plain; version=0.0.4; charset=utf-8")


async def load(state: ServerState, exchange: Exchange) -> None:
    """Show the schedulers at work. A key sees its own sequences, an administrator's all."""
    owner = None if state.keys.is_admin(exchange.key) else exchange.owner
    shown = [{"id": name, **_load(llm.scheduler, owner)} for name, llm in state.models.llms.items()]
    await exchange.send_json({"models": shown, "uptime_s": round(time.time() - state.started, 3)})


def _load(scheduler: Scheduler, owner: str | None) -> dict[str, Any]:
    now, done = scheduler.load, scheduler.counters
    running = [
        {"tokens": s.tokens, "prompt_tokens": s.prompt_tokens, "state": "decode" if s.is_decoding else "prefill"}
        for s in now.sequences
        if owner in (None, s.owner)
    ]
    return {
        "running": running,
        "waiting": now.waiting,
        "waiting_tokens": now.waiting_tokens,
        "paused": now.paused,
        "used": now.used_positions,
        "kept": now.kept_positions,
        "room": now.room_positions,
        "prefill_rate": round(now.prefill_rate, 1),
        "counters": asdict(done),
    }


async def adapters(state: ServerState, exchange: Exchange) -> None:
    """List the adapters; an administrator loads another one from the server's directory of adapters."""
    if exchange.scope["method"] == "GET":
        data = [served.entry() for served in state.models.all if served.adapter]
        await exchange.send_json({"object": "list", "data": data})
        return
    check_admin(state, exchange)
    values = read(await exchange.read_json(state.bodies), ADAPTER)
    await exchange.send_json(await state.prepared(exchange, values, _load_adapter))


def _load_adapter(state: ServerState, values: Mapping[str, Any]) -> dict[str, Any]:
    served, name = _base(state, values), values["name"]
    if state.adapters_directory is None:
        raise wrong("name", "this server loads no adapters; start it with --adapters DIRECTORY.")
    # Only names of entries, which have no separator: nothing outside the directory can be meant.
    known = sorted(path.name for path in state.adapters_directory.iterdir() if path.is_dir())
    if name not in known:
        raise wrong("name", f"expected a directory of the server's adapters ({', '.join(known) or 'none'}).")
    if name not in served.llm.adapters:
        paths: dict[str, str | Path] = {name: state.adapters_directory / name}
        try:
            served.llm.adapters.update(open_adapters(open_source(served.llm.path), paths))
        except InputError as error:
            raise error.at("name") from None
    return state.models.find(f"{served.id}:{name}").entry()


async def unload_adapter(state: ServerState, exchange: Exchange) -> None:
    """Forget an adapter, by the model's whole name or as it was loaded; answers that use it go on to their end."""
    check_admin(state, exchange)
    name = exchange.scope["path_params"]["name"]
    try:
        served = state.models.find(name)
    except ApiError:
        short = [served for served in state.models.all if served.adapter == name]
        if len(short) != 1:
            raise
        served = short[0]
    if served.adapter is None:
        raise no_model(name, [served.id for served in state.models.all if served.adapter])
    served.llm.adapters.pop(served.adapter, None)
    await exchange.send_json({"id": served.id, "object": "model", "deleted": True})


def _base(state: ServerState, values: Mapping[str, Any]) -> Served:
    served = state.models.find(values.get("model"))
    if served.adapter is not None:
        raise wrong("model", "expected a model, not one of its adapters.")
    return served


async def not_found(state: ServerState, exchange: Exchange) -> None:
    """Refuse a path that is none of the server's."""
    path = exchange.scope["path"][:100]
    raise ApiError(404, f"There is nothing at {exchange.scope['method']} {path}.", code="not_found")
