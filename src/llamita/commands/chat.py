"""`llamita chat`: a conversation in the terminal, or one line after the other from a pipe."""

import signal
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from typing import Annotated

import typer

from llamita.commands import console
from llamita.commands.generate import (
    ADAPTER,
    AdapterPath,
    Context,
    KvCache,
    Preset,
    Speculate,
    Temperature,
    Threads,
    describe,
    load_beside,
    show_stream,
    summary,
)
from llamita.engine.llm import LLM
from llamita.engine.requests import DEFAULT_SPECULATE, Options
from llamita.errors import InputError

LEAST_ROOM = 16  # tokens of the context: with fewer there is no reply worth the name
HELP = "/reset forgets what was said, /system TEXT sets the system message, /exit ends; Ctrl-C stops a reply"


@dataclass
class Conversation:
    """What has been said, each message with role and content."""

    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    def with_question(self, text: str) -> list[dict[str, str]]:
        """All messages up to a new one of the user's."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.turns, {"role": "user", "content": text}]

    def add(self, question: str, answer: str) -> None:
        """Keep a question with its answer, be it whole or stopped."""
        self.turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def command(
    model: Annotated[str, typer.Argument(help="A quantized directory, a checkpoint, a hub name or 'embedded'.")],
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of a reply at most.")] = 512,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always take the likeliest token.")] = False,
    temperature: Temperature = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest that sum to this.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes the draws repeatable.")] = None,
    speculate: Speculate = DEFAULT_SPECULATE,
    preset: Preset = None,
    threads: Threads = None,
    context: Context = None,
    kv_cache: KvCache = None,
    adapter: AdapterPath = None,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON for each reply.")] = False,
) -> None:
    """Talk to a model; a line is a message.

    /reset forgets what was said, /system TEXT sets the system message, /exit ends. Where a conversation
    has no room left in the context, its messages go unanswered until /reset; --json then has a line
    {"error": TEXT} in place of the reply.

    Example: llamita chat my-model --system "Answer in one sentence."
    """
    llm = load_beside(model, adapter, preset=preset, threads=threads, context=context, kv_dtype=kv_cache)
    _ = llm.chat_template  # a base model without one is refused before the first question
    options: Options = {
        "max_tokens": max_tokens, "greedy": greedy, "temperature": temperature, "top_p": top_p, "seed": seed,
        "speculate": speculate, "adapter": adapter and ADAPTER,
    }  # fmt: skip
    is_terminal = sys.stdin.isatty() and not as_json
    if is_terminal:
        _welcome()
    conversation = Conversation(system)
    while (line := _read_line(is_terminal)) is not None:
        if line.startswith("/"):
            if not _obey(line, conversation):
                return
        elif line:
            try:
                _reply(llm, conversation, line, options, as_json)
            except InputError as error:  # as a conversation that the template refuses
                if not is_terminal:
                    raise
                console.print_error(f"{error}; /reset begins anew")


def _welcome() -> None:
    """Make the terminal ready."""
    # Python leaves Ctrl-C ignored where it began so: as a script's background job, and its children
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _enable_line_editing()
    console.note(HELP)


def _obey(line: str, conversation: Conversation) -> bool:
    """Carry out a command of the conversation; False to end it."""
    name, _, rest = line.partition(" ")
    if name == "/system":
        conversation.system = rest.strip() or None
    if name in ("/system", "/reset"):
        conversation.turns.clear()
        console.note("a new conversation")
    elif name != "/exit":
        console.note(HELP)
    return name != "/exit"


def _reply(llm: LLM, conversation: Conversation, question: str, options: Options, as_json: bool) -> None:
    """Answer and remember the answer, whole or stopped; without room for one, say what to do."""
    if full := _is_full(llm, conversation.with_question(question), options):
        if as_json:
            console.print_json({"error": full}, indent=None)
        console.print_error(full)
        return
    if as_json:
        generation = llm.generate(conversation.with_question(question), **options)
        console.print_json(describe(generation), indent=None)
        conversation.add(question, generation.text)
        return
    shown: list[str] = []
    try:
        generation = show_stream(llm, conversation.with_question(question), options, shown)
        sys.stdout.write("\n")
        console.note(summary(generation))
        if generation.finish_reason == "context":
            console.note(f"the context of {llm.context} tokens is full; /reset begins anew")
    except KeyboardInterrupt:
        sys.stdout.write("\n")
        console.note("stopped")
    conversation.add(question, "".join(shown))


def _is_full(llm: LLM, messages: list[dict[str, str]], options: Options) -> str | None:
    """What to say where the context has too little room for a reply."""
    used = len(llm.tokenizer.encode(llm.chat_template.render(messages), add_bos=False))
    if used + min(LEAST_ROOM, options.get("max_tokens", LEAST_ROOM)) <= llm.context:
        return None
    larger = f", or up to --context {llm.config.context}" if llm.context < llm.config.context else ""
    return (
        f"context: expected room for a reply within {llm.context} tokens, got a conversation of {used}; "
        f"try /reset, which begins anew{larger}"
    )


def _read_line(is_terminal: bool) -> str | None:
    """The next message, None at the end of the input."""
    if is_terminal:
        try:
            return input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return None
    data = sys.stdin.buffer.readline()
    try:
        return data.decode().strip() if data else None
    except UnicodeDecodeError as error:
        raise InputError("stdin", "UTF-8", f"byte 0x{data[error.start]:02x}", "try iconv") from None


def _enable_line_editing() -> None:
    """Arrow keys and history in `input`, where the system's Python has them."""
    with suppress(ImportError):
        import_module("readline")
