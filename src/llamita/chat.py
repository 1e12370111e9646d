"""Chat templates: a conversation to the one text that the model was trained to continue.

Templates are Jinja programs that come with a model, so they are untrusted: they run in Jinja's immutable
sandbox, with the few helpers that transformers gives them, and may not grow without bound.
"""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llamita.errors import InputError
from llamita.files import has, read_bytes
from llamita.tokenizer import read_settings

Message = dict[str, Any]  # {"role": str, "content": str or [{"type": "text", "text": str}, ...]}
_LARGEST_TEMPLATE = 1 << 20  # characters; the longest real ones have about 20,000
_LARGEST_TEXT = 1 << 26  # characters of a rendered conversation; above any context


class ChatTemplate:
    """A compiled chat template with the special tokens that it may name."""

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        if len(source) > _LARGEST_TEMPLATE:
            raise InputError(
                f"chat template: expected at most {_LARGEST_TEMPLATE} letters, got {len(source)}"
            )
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        try:
            self._template = _environment().from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise InputError(f"chat template: expected a Jinja template, got {error}") from None

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The conversation as one text, special tokens written out, open for the assistant's turn.

        Raises:
            InputError: a message is not a role with a text, or the template refuses the conversation.
        """
        values = {"messages": [_plain(m) for m in messages], "add_generation_prompt": add_generation_prompt}
        pieces, length = [], 0
        try:
            for piece in self._template.generate(**values, **self._tokens):
                pieces.append(piece)
                length += len(piece)
                if length > _LARGEST_TEXT:
                    raise jinja2.TemplateError(f"more than {_LARGEST_TEXT} characters")
        except Exception as error:  # a template can fail like any program
            raise InputError(f"chat template: refused this conversation: {error}") from None
        return "".join(pieces)


def read_template(directory: Path) -> str:
    """The source of a model's chat template: `chat_template.jinja`, else from `tokenizer_config.json`.

    Raises:
        InputError: the model has none.
    """
    if has(directory, "chat_template.jinja"):
        try:
            return read_bytes(directory, "chat_template.jinja", _LARGEST_TEMPLATE).decode()
        except UnicodeDecodeError as error:
            raise InputError(f"chat_template.jinja: expected UTF-8, got {error}") from None
    template = read_settings(directory, "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several, each named; the one for plain conversations is "default"
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        raise InputError(
            f"{directory}: expected a chat template, got none; try `llamita generate`: a base model"
        )
    return template


def _plain(message: Message) -> Message:
    """A copy whose content is one string, as templates of text models expect it."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise InputError(f"messages: expected objects with a role and a content, got {message!r}")
    content = message.get("content")
    if isinstance(content, list):
        parts = [p.get("text") if isinstance(p, dict) and p.get("type") == "text" else None for p in content]
        content = "".join(parts) if all(isinstance(p, str) for p in parts) else None  # type: ignore[arg-type]
    if not isinstance(content, str):
        raise InputError(f"messages: content: expected a text, got {message.get('content')!r}")
    return {**message, "content": content}


def _environment() -> jinja2.Environment:
    """Jinja as transformers sets it up for chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlock]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda style: datetime.now().strftime(style)
    return environment


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's words for training; here its body is plain template."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own interface)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, ensure_ascii: bool = False, **style: Any) -> str:
    """Jinja's own filter escapes HTML; templates want plain JSON, in the style they ask for."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **style)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
