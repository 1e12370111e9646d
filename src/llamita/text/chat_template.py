"""Render a conversation as the one text that the model was trained to continue.

Chat templates are programs that come with a model, so they are untrusted. `template_process` renders them in another
process, with limits to their memory and time.
"""

import json
import re
import secrets
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llamita.errors import InputError, RunError, shown
from llamita.system.files import exists_in, read_bytes
from llamita.system.helpers import Ended, Helpers
from llamita.text.messages import Message, has_parallel_calls, plain_messages, unroll_calls
from llamita.text.tokenizer import read_settings

# What a caller may set besides: the settings that known templates have, by their types.
EXTRAS = {
    "date_string": str,  # Llama 3.1 and later
    "tools_in_user_message": bool,
    "enable_thinking": bool,  # Qwen3, SmolLM3
    "thinking": bool,  # Granite
    "reasoning_effort": str,
}
_LONGEST_EXTRA = 64  # characters
_LARGEST_TEMPLATE = 1 << 20  # characters; the longest real ones have about 20,000
_SECONDS = 5  # of CPU time for one conversation; real templates take milliseconds
_PROGRAM = str(Path(__file__).with_name("template_process.py"))


class ChatTemplate:
    """A chat template with the special tokens that it may name. Threads may share it.

    Raises:
        InputError: the source is not a template of Jinja.
        RunError: the process that renders it cannot run.
    """

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        if len(source) > _LARGEST_TEMPLATE:
            raise InputError("chat template", f"at most {_LARGEST_TEMPLATE} characters", f"{len(source)}")
        self._source = source
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._helpers = Helpers(_PROGRAM, [str(_SECONDS)])
        self._ask(None)

    @property
    def takes_tools(self) -> bool:
        """Whether the template looks at tools at all."""
        return re.search(r"\btools\b", self._source) is not None

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the conversation as one text, special tokens written out, open for the assistant's turn.

        Several calls of tools in one turn become one call a turn if the template takes no more.

        Args:
            messages: in OpenAI's form; see `text/messages.py`.
            tools: in OpenAI's form, {"type": "function", "function": {…}}.
            add_generation_prompt: False leaves the assistant's turn unopened.
            continue_final_message: the last message is an assistant's, and the text ends where its content does.
            extra: further variables, of `EXTRAS` alone.

        Raises:
            InputError: a message is not a role with a text, or the template refuses the conversation, takes too long
                or takes too much memory.
            RunError: the process that renders it cannot run.
        """
        plain, mark = plain_messages(messages), ""
        if continue_final_message:
            mark = _mark(plain)
            plain[-1]["content"] += mark
        values = {
            **check_extra(extra),
            "tools": None if tools is None else list(tools),
            "documents": None,
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
            **self._tokens,
        }
        try:
            text = self._ask({**values, "messages": plain})
        except InputError:
            if not has_parallel_calls(plain):
                raise
            text = self._ask({**values, "messages": unroll_calls(plain)})
        return _until_mark(text, mark) if mark else text

    def _ask(self, values: dict[str, Any] | None) -> str:
        """Return the text for these values; without values, only check the template."""
        try:
            request = json.dumps({"template": self._source, "values": values})
            is_kept = json.loads(request)["values"] == values  # JSON turns the keys of objects into texts
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError("messages", "values that JSON has", str(error)) from None
        if not is_kept:
            raise InputError("messages", "values that JSON has", "others, such as keys that are no texts")
        try:
            answer = json.loads(self._helpers.ask(request))
        except Ended as ended:
            if ended.code == -signal.SIGPROF:
                raise InputError(f"chat template: it takes more than {_SECONDS} seconds") from None
            if ended.code < 0:
                raise InputError(f"chat template: its process ended with signal {-ended.code}") from None
            expected, got = "a process that renders it", f"exit code {ended.code}"
            raise RunError("chat template", expected, got, ended.last or None) from None
        if "invalid" in answer:
            raise InputError("chat template", "a Jinja template", answer["invalid"])
        if "refused" in answer:
            raise InputError(f"chat template: refused this conversation: {answer['refused']}")
        return answer["text"]


def find_template(directory: Path) -> str | None:
    """Return the source of a model's chat template; None if it has none, like a base model.

    It is in `chat_template.jinja`, or else in `tokenizer_config.json`.

    Raises:
        InputError: the file is not UTF-8.
    """
    if exists_in(directory, "chat_template.jinja"):
        try:
            return read_bytes(directory, "chat_template.jinja", _LARGEST_TEMPLATE).decode()
        except UnicodeDecodeError as error:
            raise InputError("chat_template.jinja", "UTF-8", f"{error}") from None
    template = read_settings(directory, "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several, each named; the one for plain conversations is "default"
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def read_template(directory: Path) -> str:
    """Return the source of a model's chat template; see `find_template`.

    Raises:
        InputError: the model has none.
    """
    template = find_template(directory)
    if template is None:
        raise InputError(str(directory), "a chat template", "none, as in base models", "try `llamita generate`")
    return template


def check_extra(extra: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return further variables of a template; raise InputError for one that is not of `EXTRAS`."""
    for name, value in (extra or {}).items():
        kind = EXTRAS.get(name) if isinstance(name, str) else None
        if kind is None:
            raise InputError("chat template: variables", f"some of {', '.join(EXTRAS)}", shown(name))
        if not isinstance(value, kind):
            raise InputError(f"chat template: {name}", "a text" if kind is str else "true or false", shown(value))
        if isinstance(value, str) and (len(value) > _LONGEST_EXTRA or not value.isprintable()):
            raise InputError(f"chat template: {name}", f"one line of at most {_LONGEST_EXTRA} characters", shown(value))
    return dict(extra or {})


def _mark(messages: Sequence[Message]) -> str:
    """Return a text that nobody writes, to find the end of the last content by: templates may trim what follows it."""
    if not messages or messages[-1]["role"] != "assistant" or "tool_calls" in messages[-1]:
        raise InputError("messages", "an assistant's text at the end, to be continued", "none")
    return f"<{secrets.token_hex(16)}> "


def _until_mark(text: str, mark: str) -> str:
    """Return the text before the mark, as transformers cuts it: without spaces at the end if the template trims."""
    start = text.rfind(mark.rstrip())
    if start < 0:
        raise InputError("chat template: it does not write out the last message, so that cannot be continued")
    return text[:start] if text.startswith(mark, start) else text[:start].rstrip()
