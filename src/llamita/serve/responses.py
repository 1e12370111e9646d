"""`/v1/responses`: OpenAI's newer form as a converter over chat. Nothing is stored between requests."""

import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from llamita.engine.requests import Generation
from llamita.serve.chat import ChatJob, count_tokens, prepare
from llamita.serve.engine_thread import Update
from llamita.serve.errors import ApiError, internal, wrong
from llamita.serve.exchange import Exchange, to_bytes
from llamita.serve.fields import read, shown
from llamita.serve.reply import sign_of_life
from llamita.serve.response_items import Event, ResponseItems
from llamita.serve.state import ServerState
from llamita.serve.tables import RESPONSES
from llamita.serve.usage import usage

_FIELDS = {"messages": "input", "response_format": "text.format", "max_completion_tokens": "max_output_tokens"}
_SAME = ("model", "temperature", "top_p", "tool_choice", "parallel_tool_calls", "top_logprobs")


async def responses(state: ServerState, exchange: Exchange) -> None:
    """Answer, whole or as a stream of named events."""
    values = read(await exchange.read_json(state.bodies), RESPONSES)
    state.check_room(exchange, values.get("model"))
    with _named_here():
        job = await state.prepared(exchange, chat_values(values), partial(prepare, owner=exchange.owner))
    response = _Response(values, job)
    if values.get("stream"):
        await exchange.watched(lambda: _stream(state, exchange, job, response))
    else:
        await exchange.watched(lambda: _whole(state, exchange, job, response))


async def input_tokens(state: ServerState, exchange: Exchange) -> None:
    """Count the tokens of an input, without an answer."""
    values = read(await exchange.read_json(state.bodies), RESPONSES)
    with _named_here():
        counted = await state.prepared(exchange, chat_values(values), count_tokens)
    await exchange.send_json(counted)


@contextmanager
def _named_here() -> Iterator[None]:
    """Let errors name the fields of this form instead of those of a chat."""
    try:
        yield
    except ApiError as error:
        for name, own in _FIELDS.items():
            if error.param is not None and (error.param + "[").startswith((f"{name}[", f"{name}.")):
                error.param = own + error.param.removeprefix(name)
                error.message = error.message.replace(name, own)
        raise


async def _whole(state: ServerState, exchange: Exchange, job: ChatJob, response: "_Response") -> None:
    with state.run(exchange.owner, job) as running:
        (update,) = await running.all()

    def body() -> bytes:
        for _ in response.events(update):
            pass
        return to_bytes(response.object())

    data = await state.preparation.compute(body) if update.logprobs else body()  # these may be megabytes
    await exchange.send_bytes(data, "application/json")


async def _stream(state: ServerState, exchange: Exchange, job: ChatJob, response: "_Response") -> None:
    number = 0

    async def send(name: str, event: Event) -> None:
        nonlocal number
        await exchange.send_event({"type": name, "sequence_number": number, **event}, name)
        number += 1

    with state.run(exchange.owner, job) as running:
        await exchange.begin_stream()
        await send("response.created", {"response": response.object()})
        await send("response.in_progress", {"response": response.object()})
        try:
            async for updates in running:
                before = exchange.pieces
                for update in updates.values():
                    for name, event in response.events(update):
                        await send(name, event)
                await sign_of_life(exchange, running, before)
        except Exception as error:
            response.error = error if isinstance(error, ApiError) else internal(exchange.request_id)
            for name, event in response.close():
                await send(name, event)
            await send("response.failed", {"response": response.object()})
            if response.error is not error:
                raise
            await exchange.end_stream()
            return
    whole = response.object()
    await send(f"response.{whole['status']}", {"response": whole})
    await exchange.end_stream()


class _Response:
    """The response object as it grows.

    Attributes:
        error: why it failed.
    """

    def __init__(self, values: Mapping[str, Any], job: ChatJob) -> None:
        self.error: ApiError | None = None
        self._values, self._job = values, job
        self._writer = job.writers()[0]
        self._items = ResponseItems()
        self._generation: Generation | None = None
        self._id, self._created = f"resp_{secrets.token_hex(16)}", int(time.time())

    def events(self, update: Update) -> Iterator[tuple[str, Event]]:
        """Yield the events of an update, each with its name."""
        for delta, logprobs in self._writer.deltas(update):
            yield from self._items.add(delta, logprobs)
        if update.generation:
            self._generation = update.generation
            yield from self._items.finish("completed" if self._is_whole else "incomplete")

    def close(self) -> Iterator[tuple[str, Event]]:
        """Yield the events that end an item in the middle."""
        yield from self._items.close("incomplete")

    @property
    def _is_whole(self) -> bool:
        return self._generation is not None and self._writer.reason(self._generation) != "length"

    def object(self) -> dict[str, Any]:
        """Return the response object."""
        values, done = self._values, self._generation is not None
        status = "completed" if self._is_whole else "incomplete" if done else "failed" if self.error else "in_progress"
        error = self.error and {"code": self.error.code or "server_error", "message": self.error.message}
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": values.get("instructions"),
            "max_output_tokens": values.get("max_output_tokens"),
            "model": self._job.served.id,
            "output": self._items.output,
            "parallel_tool_calls": values.get("parallel_tool_calls", True),
            "previous_response_id": None,
            "store": False,
            "temperature": values.get("temperature"),
            "top_p": values.get("top_p"),
            "text": values.get("text", {"format": {"type": "text"}}),
            "tool_choice": values.get("tool_choice", "auto"),
            "tools": values.get("tools", []),
            "truncation": "disabled",
            "metadata": values.get("metadata", {}),
            "usage": _usage(self._generation) if self._generation else None,
        }


def _usage(generation: Generation) -> dict[str, Any]:
    counts = usage([generation], 1)
    return {
        "input_tokens": counts["prompt_tokens"],
        "input_tokens_details": {**counts["prompt_tokens_details"], "cache_write_tokens": 0},  # for which nobody pays
        "output_tokens": counts["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": counts["total_tokens"],
    }


def chat_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same request as the fields of a chat.

    Raises:
        ApiError: an item of the input, or the format, is none that this server knows.
    """
    system = values.get("instructions")
    chat = {name: values[name] for name in _SAME if name in values}
    chat["messages"] = [{"role": "system", "content": system}] if system else []
    chat["messages"] += _messages(values["input"])
    chat["logprobs"] = "top_logprobs" in values
    if "max_output_tokens" in values:
        chat["max_completion_tokens"] = values["max_output_tokens"]
    if (form := values.get("text", {}).get("format")) is not None:
        chat["response_format"] = _format(form)
    if tools := [_tool(t) for t in values.get("tools", []) if isinstance(t, dict) and t.get("type") == "function"]:
        chat["tools"] = tools
    else:
        chat.pop("tool_choice", None)  # it may name a tool that was left out
    choice = values.get("tool_choice")
    if tools and isinstance(choice, dict):
        if choice.get("type") != "function":
            raise wrong("tool_choice", f"expected a function, got {shown(choice)}.")
        chat["tool_choice"] = {"type": "function", "function": {"name": choice.get("name")}}
    return chat


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {name: tool[name] for name in tool if name != "type"}}


def _format(given: Any) -> dict[str, Any]:
    if not isinstance(given, dict) or not isinstance(given.get("type"), str):
        raise wrong("text.format", f"expected an object with a type, got {shown(given)}.")
    if given["type"] != "json_schema":
        return dict(given)
    return {"type": "json_schema", "json_schema": {name: given[name] for name in given if name != "type"}}


def _messages(given: Any) -> list[dict[str, Any]]:
    """Return the messages of an input; calls that follow each other belong to one message of the assistant."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list):
        raise wrong("input", f"expected a text or a list, got {shown(given)}.")
    messages: list[dict[str, Any]] = []
    for place, item in enumerate(given):
        kind = item.get("type", "message") if isinstance(item, dict) else None
        if kind == "message":
            messages.append({"role": item.get("role"), "content": item.get("content")})
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None})
            messages[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
        elif kind != "reasoning":
            raise wrong(f"input[{place}]", f"expected a message, a call or its output, got {shown(item)}.")
    return messages
