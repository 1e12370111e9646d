"""`/v1/chat/completions`: from messages to a job, and from its updates to OpenAI's chat form."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from llamita.engine.requests import Options
from llamita.errors import InputError
from llamita.serve.chat_writer import ChatWriter
from llamita.serve.encoding import encode_text
from llamita.serve.errors import from_llamita, too_long, wrong
from llamita.serve.exchange import Exchange
from llamita.serve.fields import read, shown
from llamita.serve.options import engine_options, for_choice
from llamita.serve.reply import reply
from llamita.serve.served import Served
from llamita.serve.state import Job, ServerState
from llamita.serve.structure import read_tools
from llamita.serve.tables import CHAT
from llamita.serve.tool_deltas import ToolDeltas
from llamita.serve.tool_text import in_text
from llamita.serve.tools import ToolChoice
from llamita.text.chat_template import check_extra

_ROLES = ("developer", "system", "user", "assistant", "tool", "function", "ipython")  # the last is Llama's own
MOST_COUNTED = 1 << 20  # tokens that are counted or returned where the context is no limit


@dataclass
class ChatJob(Job):
    """A job that answers a conversation.

    Attributes:
        top_logprobs: how many alternatives to send with each token; None for no log-probabilities.
        tools: the functions that the model may call; None if it may call none.
    """

    top_logprobs: int | None = None
    tools: ToolChoice | None = None

    def writers(self) -> list[ChatWriter]:
        """Return what turns the updates of each choice into deltas."""
        tokenizer, has_logprobs = self.served.llm.tokenizer, self.top_logprobs is not None
        tools = self.tools
        form = self.served.structure.call_form if tools and tools.has_format else None
        return [ChatWriter(tokenizer, tools and ToolDeltas(tools, form), has_logprobs) for _ in self.requests]


async def chat(state: ServerState, exchange: Exchange) -> None:
    """Answer a conversation, whole or as a stream."""
    values = read(await exchange.read_json(state.bodies), CHAT)
    state.check_room(exchange, values.get("model"))
    job = await state.prepared(exchange, values, partial(prepare, owner=exchange.owner))
    await reply(state, exchange, job, job.writers(), values, ("chatcmpl", "chat.completion", "chat.completion.chunk"))


def prepare(state: ServerState, values: Mapping[str, Any], owner: str | None) -> ChatJob:
    """Return the job of a checked body. Everything that its writer can get wrong is found here.

    Raises:
        ApiError, InputError: a field is at fault, or the prompt leaves no room.
    """
    served = state.models.find(values.get("model"))
    llm, messages = served.llm, values["messages"]
    if not messages:
        raise wrong("messages", "expected at least one.")
    tools = read_tools(values)
    continues = _continues(values)
    ids = encode(served, values, tools, continues)
    if len(ids) >= llm.context:
        raise too_long(len(ids), llm.context, "messages")
    top = _top_logprobs(values)
    options = _options(values, served, owner, top, tools)
    n = values.get("n", 1)
    requests = [llm.check(ids, continues=continues, **for_choice(options, choice)) for choice in range(n)]
    return ChatJob(served, requests, n, top, tools)


def encode(
    served: Served,
    values: Mapping[str, Any],
    tools: ToolChoice | None,
    continues: bool = False,
    most: int | None = None,
) -> list[int]:
    """Return the token ids of a body's conversation; `most` is that of `encode_text`.

    Raises:
        ApiError, InputError: a message is at fault, or the template refuses the conversation.
    """
    _check_roles(values["messages"])
    extra = values.get("chat_template_kwargs")
    try:
        check_extra(extra)
    except InputError as error:
        raise from_llamita(error, "chat_template_kwargs") from None
    llm, messages, definitions = served.llm, values["messages"], tools.tools if tools else ()
    if not llm.chat_template.takes_tools:
        messages, definitions = in_text(messages, definitions, served.structure.call_form), ()
    try:
        template, given = llm.chat_template, definitions or None
        text = template.render(messages, tools=given, continue_final_message=continues, extra=extra)
        return encode_text(served, text, False, "messages", most)
    except InputError as error:
        raise from_llamita(error, "messages" if error.where.startswith("chat template") else None) from None


def _check_roles(messages: list[Any]) -> None:
    """Refuse a role that is none: templates write whatever they are given, and the model would answer oddly."""
    for place, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if isinstance(role, str) and role not in _ROLES:
            raise wrong(f"messages[{place}].role", f"expected one of {', '.join(_ROLES)}, got {shown(role)}.")


def _continues(values: Mapping[str, Any]) -> bool:
    """Return whether the answer continues the last message."""
    last = values["messages"][-1] if values["messages"] else None
    is_open = isinstance(last, dict) and last.get("role") == "assistant" and not last.get("tool_calls")
    return values.get("continue_final_message", is_open)


def _top_logprobs(values: Mapping[str, Any]) -> int | None:
    if not values.get("logprobs"):
        if values.get("top_logprobs"):
            raise wrong("top_logprobs", "needs `logprobs: true`.")
        return None
    return values.get("top_logprobs", 0)


def _options(
    values: Mapping[str, Any], served: Served, owner: str | None, top: int | None, tools: ToolChoice | None
) -> Options:
    return {
        **engine_options(values, served.llm.config.vocab_size),
        "max_tokens": values.get("max_completion_tokens", values.get("max_tokens")),
        "logprobs": top,
        "owner": owner,
        "adapter": served.adapter,
        "show_special": tools is not None,
        "constraint": served.structure.constraint(values, owner, tools),
    }


async def input_tokens(state: ServerState, exchange: Exchange) -> None:
    """Count the tokens of a conversation, without an answer."""
    values = read(await exchange.read_json(state.bodies), CHAT)
    await exchange.send_json(await state.prepared(exchange, values, count_tokens))


def count_tokens(state: ServerState, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return how many tokens the conversation of a checked body has."""
    served = state.models.find(values.get("model"))
    ids = encode(served, values, read_tools(values), _continues(values), MOST_COUNTED)
    return {"object": "response.input_tokens", "input_tokens": len(ids), "max_model_len": served.llm.context}
