"""`llamita chat`: hold a conversation in the terminal, or answer the lines of a pipe one after the other."""

import signal
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from typing import Annotated

import typer

from llamita.commands import console
from llamita.commands.options import (
    AdapterPath,
    Context,
    DraftFrom,
    DrawSeed,
    FloatMath,
    Greedy,
    Json,
    KvCache,
    Model,
    Revision,
    Scheme,
    Speculate,
    Temperature,
    Threads,
    TopP,
)
from llamita.commands.show import describe, show_stream, summary
from llamita.commands.sources import ADAPTER, decode, load_with_adapter
from llamita.engine.llm import LLM
from llamita.engine.requests import DEFAULT_SPECULATE, Options
from llamita.engine.weights import FLOAT_MATHS
from llamita.errors import InputError

LEAST_ROOM = 16  # tokens of the context that a reply needs
HELP = (
    "/reset forgets what was said, /system TEXT does so too and sets the system message (none without TEXT), "
    "/exit ends; Ctrl-C stops a reply"
)

_System = Annotated[str | None, typer.Option(help="The system message.")]
_MaxTokens = Annotated[int, typer.Option(help="Most tokens of a reply.")]


@dataclass
class Conversation:
    """The messages so far, each with role and content."""

    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    def with_question(self, text: str) -> list[dict[str, str]]:
        """Return all messages, with a new one of the user at the end."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.turns, {"role": "user", "content": text}]

    def add(self, question: str, answer: str) -> None:
        """Keep a question with its answer, whole or stopped."""
        self.turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def command(
    model: Model,
    revision: Revision = None,
    system: _System = None,
    max_tokens: _MaxTokens = 512,
    greedy: Greedy = False,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: DrawSeed = None,
    speculate: Speculate = DEFAULT_SPECULATE,
    draft_from: DraftFrom = None,
    scheme: Scheme = None,
    threads: Threads = None,
    context: Context = None,
    kv_cache: KvCache = None,
    float_math: FloatMath = FLOAT_MATHS[0],
    adapter: AdapterPath = None,
    as_json: Json = False,
) -> None:
    """Talk to a model. Each line is a message; so is each line of a pipe.

    /reset forgets what was said, /system TEXT does so too and sets the system message (none without TEXT),
    /exit ends. When the context has no room for a reply, messages go unanswered until /reset. With --json,
    each reply is one line of JSON; a message without room for a reply gets {"error": TEXT}.

    Example: llamita chat my-model --system "Answer in one sentence."
    """
    llm = load_with_adapter(
        model, adapter, scheme=scheme, threads=threads, context=context, kv_dtype=kv_cache, float_math=float_math,
        draft_from=draft_from,
    )  # fmt: skip
    _ = llm.chat_template  # refuse a base model, which has none, before the first question
    options: Options = {
        "max_tokens": max_tokens, "greedy": greedy, "temperature": temperature, "top_p": top_p, "seed": seed,
        "speculate": speculate, "adapter": adapter and ADAPTER,
    }  # fmt: skip
    _talk(llm, Conversation(system), options, as_json)


def _talk(llm: LLM, conversation: Conversation, options: Options, as_json: bool) -> None:
    """Answer line after line, to the end."""
    is_terminal = sys.stdin.isatty() and not as_json
    if is_terminal:
        _welcome()
    while (line := _read_line(is_terminal)) is not None:
        if line.startswith("/"):
            if not _obey(line, conversation):
                return
        elif line:
            try:
                _reply(llm, conversation, line, options, as_json)
            except InputError as error:  # for example, the template refuses the conversation
                if not is_terminal:
                    raise
                console.print_error(f"{error}; /reset begins anew")


def _welcome() -> None:
    """Make the terminal ready."""
    # A script's background job, and its children, begin with Ctrl-C ignored, and Python leaves it so.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _enable_line_editing()
    console.note(HELP)


def _obey(line: str, conversation: Conversation) -> bool:
    """Carry out a command of the conversation; return False to end it."""
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
    """Answer and remember the answer, whole or stopped; say what to do where there is no room for one."""
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
    """Return an error text if the context has too little room for a reply, else None."""
    used = len(llm.tokenizer.encode(llm.chat_template.render(messages), add_bos=False))
    if used + min(LEAST_ROOM, options.get("max_tokens") or LEAST_ROOM) <= llm.context:
        return None
    larger = f", or up to --context {llm.config.context}" if llm.context < llm.config.context else ""
    return (
        f"context: expected room for a reply within {llm.context} tokens, got a conversation of {used}; "
        f"try /reset, which begins anew{larger}"
    )


def _read_line(is_terminal: bool) -> str | None:
    """Return the next message, or None at the end of the input."""
    if is_terminal:
        try:
            return input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return None
    data = sys.stdin.buffer.readline()
    return decode(data, "stdin").strip() if data else None


def _enable_line_editing() -> None:
    """Give `input` arrow keys and a history, where the system's Python has them."""
    with suppress(ImportError):
        import_module("readline")
