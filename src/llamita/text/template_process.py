"""Render chat templates in a process of its own, whose memory and time are limited.

Chat templates are Jinja programs that come with a model, so they are untrusted. They run in Jinja's immutable
sandbox, with the few helpers that transformers gives them.

A request is a line of JSON, {"template": str, "values": {…} or null}, and so is its answer: {"text": str},
{"invalid": why} for a template that cannot be compiled, or {"refused": why}. Null values compile and no more.
A request that takes too much time ends the process. Where the system cannot limit memory (macOS), time alone is.
"""

import json
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llamita.system.child import answer_lines

MEMORY = 1 << 30  # bytes of address space; Python and Jinja take some 30 MB
LARGEST_TEXT = 1 << 24  # characters of a rendered conversation; a million tokens have some five million
_LONGEST_REASON = 500  # characters


def main() -> None:
    """Answer requests until the input ends; `sys.argv` has the seconds of CPU time for each."""
    answer_lines(_answer, float(sys.argv[1]), MEMORY)


def _answer(request: dict[str, Any]) -> dict[str, str]:
    kind = "invalid"
    try:
        template = _compile(request["template"])
        kind = "refused"
        return {"text": "" if request["values"] is None else _render(template, request["values"])}
    except MemoryError:
        return {kind: "it takes too much memory"}
    except Exception as error:  # a template can fail like any program, and the compiler at depth or large numbers
        return {kind: " ".join(str(error).split())[:_LONGEST_REASON]}


def _render(template: jinja2.Template, values: dict[str, Any]) -> str:
    pieces, length = [], 0
    for piece in template.generate(**values):
        pieces.append(piece)
        length += len(piece)
        if length > LARGEST_TEXT:
            raise jinja2.TemplateError(f"more than {LARGEST_TEXT} characters")
    return "".join(pieces)


@lru_cache(maxsize=1)
def _compile(source: str) -> jinja2.Template:
    """Return a template, set up as transformers does it."""
    extensions = ["jinja2.ext.loopcontrols", _GenerationBlock]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = datetime.now().strftime
    return environment.from_string(source)


class _GenerationBlock(Extension):
    """Accept `{% generation %}`, which marks the assistant's words for training, as plain template."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own interface)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return a value as JSON; Jinja's own filter would escape HTML.

    The parameters are those of transformers. `json.dumps` takes more, among them functions to call.
    """
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


if __name__ == "__main__":
    main()
