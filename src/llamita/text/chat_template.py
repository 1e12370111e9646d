"""Render a conversation as the one text that the model was trained to continue.

Chat templates are programs that come with a model, so they are untrusted. `template_process` renders them in another
process, with limits to their memory and time.
"""

import json
import signal
import subprocess
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from llamita.errors import InputError, shown
from llamita.system.files import exists_in, read_bytes
from llamita.text.tokenizer import read_settings

Message = dict[str, Any]  # {"role": str, "content": str or [{"type": "text", "text": str}, ...]}
_LARGEST_TEMPLATE = 1 << 20  # characters; the longest real ones have about 20,000
_SECONDS = 10  # of CPU time for one conversation; real templates take milliseconds


class ChatTemplate:
    """A chat template with the special tokens that it may name. Threads may share it.

    Raises:
        InputError: the source is not a template of Jinja.
    """

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        if len(source) > _LARGEST_TEMPLATE:
            raise InputError("chat template", f"at most {_LARGEST_TEMPLATE} characters", f"{len(source)}")
        self._source = source
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._lock = Lock()
        self._process: subprocess.Popen[str] | None = None
        self._ask(None)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Return the conversation as one text, special tokens written out, open for the assistant's turn.

        Raises:
            InputError: a message is not a role with a text, or the template refuses the conversation, takes too long
                or takes too much memory.
        """
        values = {"messages": [_plain(m) for m in messages], "add_generation_prompt": add_generation_prompt}
        return self._ask({**values, **self._tokens})

    def _ask(self, values: dict[str, Any] | None) -> str:
        """Return the text for these values; without values, only check the template."""
        try:
            request = json.dumps({"template": self._source, "values": values})
        except (TypeError, ValueError) as error:
            raise InputError("messages", "values that JSON has", str(error)) from None
        with self._lock:
            answer = json.loads(self._answer(request))
        if "invalid" in answer:
            raise InputError("chat template", "a Jinja template", answer["invalid"])
        if "refused" in answer:
            raise InputError(f"chat template: refused this conversation: {answer['refused']}")
        return answer["text"]

    def _answer(self, request: str) -> str:
        """Return the process's answer to a request; start the process if there is none."""
        process = self._process or self._start()
        assert process.stdin
        assert process.stdout
        line = ""
        try:
            process.stdin.write(request + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            pass  # it ended before the request
        finally:
            if not line:  # also if this thread is interrupted: the next request must not get this one's answer
                self._process = None
                _end(process)
        if not line:
            is_late = process.returncode == -signal.SIGPROF
            why = f"it takes more than {_SECONDS} seconds" if is_late else f"its process ended ({process.returncode})"
            raise InputError(f"chat template: {why}")
        return line

    def _start(self) -> subprocess.Popen[str]:
        # In a process group of its own: Ctrl-C at the terminal stops an answer, not this process.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "llamita.text.template_process", str(_SECONDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            process_group=0,
        )
        weakref.finalize(self, _end, self._process)
        return self._process


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


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
