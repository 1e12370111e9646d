"""Render a conversation as the one text that the model was trained to continue.

Chat templates are programs that come with a model, so they are untrusted. `template_process` renders them in another
process, with limits to their memory and time.
"""

import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

from llamita.errors import InputError, RunError, shown
from llamita.system import child
from llamita.system.files import exists_in, read_bytes
from llamita.text.tokenizer import read_settings

Message = dict[str, Any]  # {"role": str, "content": str or [{"type": "text", "text": str}, ...]}
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
        self._process: _Process | None = None
        self._lock = Lock()
        _TEMPLATES.add(self)
        self._ask(None)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Return the conversation as one text, special tokens written out, open for the assistant's turn.

        Raises:
            InputError: a message is not a role with a text, or the template refuses the conversation, takes too long
                or takes too much memory.
            RunError: the process that renders it cannot run.
        """
        values = {"messages": [_plain(m) for m in messages], "add_generation_prompt": add_generation_prompt}
        return self._ask({**values, **self._tokens})

    def _ask(self, values: dict[str, Any] | None) -> str:
        """Return the text for these values; without values, only check the template."""
        try:
            request = json.dumps({"template": self._source, "values": values})
            is_kept = json.loads(request)["values"] == values  # JSON turns the keys of objects into texts
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError("messages", "values that JSON has", str(error)) from None
        if not is_kept:
            raise InputError("messages", "values that JSON has", "others, such as keys that are no texts")
        with self._lock:
            if self._process is None or self._process.has_ended():
                self._forget()
                self._process = _Process(self)
            try:
                answer = json.loads(self._process.answer(request))
            except BaseException:  # an interrupt, too: the next request must not get this one's answer
                self._forget()
                raise
        if "invalid" in answer:
            raise InputError("chat template", "a Jinja template", answer["invalid"])
        if "refused" in answer:
            raise InputError(f"chat template: refused this conversation: {answer['refused']}")
        return answer["text"]

    def _forget(self) -> None:
        if self._process is not None:
            self._process.end()
        self._process = None

    def _leave_to_parent(self) -> None:
        """In a forked child: start another process when one is needed, and leave the present one to the parent."""
        self._lock = Lock()  # another thread may have held it
        if self._process is not None:
            self._process.end.detach()
        self._process = None


_TEMPLATES: "weakref.WeakSet[ChatTemplate]" = weakref.WeakSet()


def _after_fork() -> None:
    for template in _TEMPLATES:
        template._leave_to_parent()


os.register_at_fork(after_in_child=_after_fork)


class _Process:
    """The process of a template; it ends with the template, or by `end`."""

    def __init__(self, template: ChatTemplate) -> None:
        # In a process group of its own: Ctrl-C at the terminal stops an answer, not this process.
        self._popen = subprocess.Popen(
            [sys.executable, "-P", _PROGRAM, str(_SECONDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            env=child.environment(),
            process_group=0,
        )
        self.end = weakref.finalize(template, _end, self._popen)

    def has_ended(self) -> bool:
        return self._popen.poll() is not None

    def answer(self, request: str) -> str:
        """Return the answer to a request, a line of JSON."""
        assert self._popen.stdin
        assert self._popen.stdout
        with suppress(BrokenPipeError):
            self._popen.stdin.write(request + "\n")
            self._popen.stdin.flush()
        if line := self._popen.stdout.readline():
            return line
        _, errors = self._popen.communicate()
        code = self._popen.returncode
        if code == -signal.SIGPROF:
            raise InputError(f"chat template: it takes more than {_SECONDS} seconds")
        if code < 0:
            raise InputError(f"chat template: its process ended with signal {-code}")
        last = errors.strip().splitlines()[-1:]
        raise RunError("chat template", "a process that renders it", f"exit code {code}", *last)


def _end(popen: "subprocess.Popen[str]") -> None:
    popen.kill()
    popen.communicate()


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


def _plain(message: Message) -> Message:
    """Return a copy whose content is one string, as templates of text models expect it."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise InputError("messages", "objects with a role and a content", shown(message))
    content = message.get("content")
    if isinstance(content, list):
        parts = [p.get("text") if isinstance(p, dict) and p.get("type") == "text" else None for p in content]
        content = "".join(parts) if all(isinstance(p, str) for p in parts) else None  # type: ignore[arg-type]
    if not isinstance(content, str):
        raise InputError("messages: content", "a text", shown(message.get("content")))
    return {**message, "content": content}
