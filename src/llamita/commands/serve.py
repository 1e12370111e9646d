"""`llamita serve`: an OpenAI-compatible server with a page to chat on."""

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from llamita.commands import console
from llamita.commands.options import Context, DraftFrom, FloatMath, KvCache, Revision, Threads, model_argument
from llamita.commands.sources import convert_first
from llamita.engine.llm import LLM, MAX_SEQUENCES
from llamita.engine.weights import FLOAT_MATHS
from llamita.errors import InputError
from llamita.imports.names import split_scheme
from llamita.loading import open_adapters, open_model
from llamita.system.extras import load_optional
from llamita.system.machine import usable_memory
from llamita.system.threads import remark, use_threads

_LACKING = (
    "serve: expected the package {package}, found none; try pip install 'llamita[serve]' (in a checkout '.[serve]')"
)
_KEY = "LLAMITA_API_KEY"

_Models = Annotated[
    list[str], model_argument("MODEL", "Models, the first of them the default; NAME=MODEL gives one a name")
]
_Host = Annotated[
    str, typer.Option(metavar="ADDRESS", help="The address to listen at. Others than this machine's own need keys.")
]
_Port = Annotated[int, typer.Option(metavar="PORT", min=0, max=65535, help="The port; 0 takes a free one.")]
_Keys = Annotated[
    list[str] | None,
    typer.Option(
        "--api-key",
        metavar="KEY",
        help="A key that requests need; repeatable. Other users of this machine can see it in the list of processes: "
        f"a file, or the variable {_KEY}, is safer.",
    ),
]
_KeyFile = Annotated[Path | None, typer.Option("--api-key-file", metavar="FILE", help="Keys, one a line.")]
_AdminFile = Annotated[
    Path | None,
    typer.Option("--admin-key-file", metavar="FILE", help="Keys of administrators, who may load and unload adapters."),
]
_NoAuth = Annotated[bool, typer.Option("--no-auth", help="Listen at any address without keys.")]
_Hosts = Annotated[
    list[str] | None,
    typer.Option("--allowed-host", metavar="NAME", help="A name that the Host header may have, too; repeatable."),
]
_Origins = Annotated[
    list[str] | None,
    typer.Option("--allow-origin", metavar="URL", help="A web page's origin that may send requests; repeatable."),
]
_Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", "--adaptor", metavar="NAME=DIR", help="An adapter of the first model; repeatable."),
]
_AdaptersDirectory = Annotated[
    Path | None,
    typer.Option("--adapters", metavar="DIR", help="The directory of adapters that an administrator may load."),
]
_Slots = Annotated[
    int, typer.Option("--max-sequences", metavar="N", min=1, help="How many answers run at once; more wait.")
]
_Queue = Annotated[
    int, typer.Option("--max-queue", metavar="N", min=1, help="How many answers may run and wait; more get 429.")
]
_PerKey = Annotated[
    int | None,
    typer.Option("--max-per-key", metavar="N", min=1, help="The same for one key; by default half of --max-queue."),
]
_Share = Annotated[
    bool, typer.Option("--share-prefixes", help="Share kept prompts between keys. Answer times may then betray them.")
]
_PrefixFile = Annotated[
    Path | None,
    typer.Option("--prefix-file", metavar="FILE", help="Save kept prompts here at the end, and find them again."),
]
_Drain = Annotated[
    float, typer.Option("--drain", metavar="SECONDS", min=0, help="Seconds for running answers when the server ends.")
]
_FirstToken = Annotated[
    float, typer.Option(metavar="SECONDS", min=1, help="Most seconds from a request to its first token.")
]
_Total = Annotated[float, typer.Option(metavar="SECONDS", min=1, help="Most seconds from a request to its end.")]
_Log = Annotated[bool, typer.Option("--log-requests", help="Log each request on stderr, without prompts or keys.")]


def command(
    models: _Models,
    revision: Revision = None,
    adapter: _Adapters = None,
    adapters: _AdaptersDirectory = None,
    host: _Host = "127.0.0.1",
    port: _Port = 8080,
    api_key: _Keys = None,
    api_key_file: _KeyFile = None,
    admin_key_file: _AdminFile = None,
    no_auth: _NoAuth = False,
    allowed_host: _Hosts = None,
    allow_origin: _Origins = None,
    max_sequences: _Slots = MAX_SEQUENCES,
    max_queue: _Queue = 80,
    max_per_key: _PerKey = None,
    share_prefixes: _Share = False,
    prefix_file: _PrefixFile = None,
    first_token_timeout: _FirstToken = 600,
    timeout: _Total = 3600,
    drain: _Drain = 10,
    draft_from: DraftFrom = None,
    log_requests: _Log = False,
    threads: Threads = None,
    context: Context = None,
    kv_cache: KvCache = None,
    float_math: FloatMath = FLOAT_MATHS[0],
) -> None:
    """Serve models to any OpenAI client, and a page to chat on.

    The server speaks /v1/chat/completions, /v1/completions, /v1/responses, /v1/embeddings and more; the page is at /.
    A prompt that does not fit is refused, never cut. SRC:SCHEME rounds a float model as it loads: try
    `llamita serve embedded embedded:llama3.2`, which shows both side by side.

    Example: llamita serve my-model --adapter poet=adapters/poet
    """
    parts: Any = load_optional("llamita.serve.start", _LACKING)  # its packages are not on the lean side
    keys = parts.collect_keys(api_key, api_key_file, admin_key_file)
    access = parts.access(host, allowed_host, allow_origin, keys.are_needed or no_auth)
    parts.check_paths(adapters, admin_key_file, prefix_file)
    listener = _listener(parts, host, port, log_requests)
    llms = _load_all(models, _pairs(adapter or []), threads, {
        **_shares(len(models)), "max_sequences": max_sequences, "context": context, "kv_dtype": kv_cache,
        "float_math": float_math, "draft_from": draft_from, "share_prefixes": share_prefixes,
        "takes_adapters": bool(adapters)})  # fmt: skip
    bounds = parts.Bounds(max_queue, max_per_key or max(1, max_queue // 2))
    limits = parts.Limits(first_token_timeout, timeout, drain_seconds=drain)
    state = parts.make_state(parts.Models(llms), keys, limits, bounds, adapters)
    parts.serve_keeping(prefix_file, console.note, state, access, listener, lambda at: _announce(state, host, at))


def _listener(parts: Any, host: str, port: int, logs_requests: bool) -> Any:
    """Return a bound socket; from now on the server's faults go to stderr, and each request if that is wanted."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger = logging.getLogger("llamita")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if logs_requests else logging.ERROR)
    return parts.listen(host, port)


def _shares(models: int) -> dict[str, int]:
    """Return the memory for keys and values of each of so many models."""
    memory = usable_memory() // models
    return {"cache_memory": memory // 2, "prefix_cache": memory // 8}


def _pairs(given: list[str]) -> dict[str, Path]:
    """Return the adapters of --adapter NAME=DIR."""
    pairs = {}
    for text in given:
        name, equals, directory = text.partition("=")
        if not equals or not name or not directory:
            raise InputError("--adapter", "NAME=DIR", repr(text))
        pairs[name] = Path(directory)
    return pairs


def _load_all(
    models: list[str], adapters: dict[str, Path], threads: int | None, options: dict[str, Any]
) -> dict[str, LLM]:
    """Load the models; return them by the names that requests give."""
    use_threads(threads)
    llms: dict[str, LLM] = {}
    for text in models:
        name, source = _split_name(text)
        if name in llms:
            raise InputError("MODEL", "a different name for each", f"{name} twice", "try NAME=MODEL")
        base, rest = split_scheme(source)
        convert_first(base)
        opened = open_model(base, rest[1:] or None)
        llms[name] = LLM(opened, adapters={} if llms else open_adapters(opened, adapters), **options)
    console.note(remark())
    return llms


def _split_name(text: str) -> tuple[str, str]:
    """Return the name and the model of NAME=MODEL, or of MODEL, whose last part is then the name."""
    name, equals, source = text.partition("=")
    if equals and name and source and not os.path.exists(text):
        return name, source
    base, rest = split_scheme(text)
    path = Path(base)
    short = path.resolve().stem if path.is_file() else path.resolve().name if path.is_dir() else base
    return short + rest, text


def _announce(state: Any, host: str, port: int) -> None:
    """Print where the server is, what it has, its limits, and a request to try."""
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    address = f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"
    console.note(f"serving at {address}  (page: {address}/, clients: {address}/v1)")
    for served in state.models.all:
        kind = "" if served.llm.scheme else ", float weights"
        console.note(f"  {served.id}: {served.llm.context} tokens of context{kind}")
    bounds, load = state.queue.bounds, next(iter(state.models.llms.values())).scheduler.load
    each = f", {bounds.requests_per_key} of one key" if state.keys.are_needed else ""
    room = f"room for {load.room_positions} tokens of keys and values"
    console.note(f"  at most {bounds.requests} answers run or wait{each}; {room}")
    key = ' -H "Authorization: Bearer $KEY"' if state.keys.are_needed else ""
    question = '{"messages":[{"role":"user","content":"Hello!"}],"max_tokens":64}'
    console.note(f"try: curl {address}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{question}'")
