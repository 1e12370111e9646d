"""What an answer must look like: its grammar, and the functions that it may call."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from llamita.engine.constraint import Constraint
from llamita.engine.llm import LLM
from llamita.serve.errors import wrong
from llamita.serve.fields import shown
from llamita.serve.grammar import Grammars
from llamita.serve.tools import CallForm, ToolChoice, call_form, check_tools
from llamita.system.files import read_bytes
from llamita.text.chat_template import find_template

_LARGEST_TOKENIZER = 1 << 28  # bytes; that of Llama 3 has 9 million
_FORMATS = ("text", "json_object", "json_schema")


class Structure:
    """Makes the grammars of one loaded model, which are read on first use."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    @cached_property
    def grammars(self) -> Grammars:
        """The compiler of grammars; about a second for a vocabulary of 128,000."""
        llm = self._llm
        text = read_bytes(llm.path, "tokenizer.json", _LARGEST_TOKENIZER).decode()
        return Grammars(text, llm.config.vocab_size, llm.tokenizer.eos_token_ids)

    @cached_property
    def call_form(self) -> CallForm:
        """How the model writes calls."""
        return call_form(find_template(self._llm.path) or "")

    def constraint(
        self, values: Mapping[str, Any], owner: str | None, tools: ToolChoice | None = None
    ) -> Constraint | None:
        """Return the grammar that a checked body asks for, None for free text. It is kept for its owner.

        Raises:
            ApiError: it asks for several, or for one that is none.
            InputError: llguidance cannot keep to it.
        """
        asked = [name for name in ("guided_regex", "guided_grammar") if name in values]
        schema = _schema(values)
        asked += ["response_format"] if schema is not None else []
        if len(asked) > 1:
            raise wrong(asked[0], f"cannot be combined with {asked[1]}.")
        if tools and asked and asked[0] != "response_format":
            raise wrong(asked[0], "cannot be combined with tools; send tool_choice none to leave them out.")
        answer = None if schema is None else self.grammars.json_schema(schema, "response_format", owner)
        if tools and (asked or tools.mode == "required"):  # the form of answers is nothing to calls that must be
            return self.grammars.tool_calls(
                tools.tools, self.call_form, name=tools.name, parallel=tools.parallel and tools.name is None,
                otherwise=schema if tools.mode == "auto" else None, owner=owner,
            )  # fmt: skip
        if "guided_regex" in values:
            return self.grammars.regex(values["guided_regex"], "guided_regex", owner)
        if "guided_grammar" in values:
            return self.grammars.lark(values["guided_grammar"], "guided_grammar", owner)
        return answer


def read_tools(values: Mapping[str, Any]) -> ToolChoice | None:
    """Return the checked tools of a body, None if the model may call none.

    Raises:
        ApiError: the response format beside them is none.
        InputError: one is not OpenAI's.
    """
    choice = check_tools(values.get("tools"), values.get("tool_choice"), values.get("parallel_tool_calls"))
    if not choice.tools:
        return None
    return replace(choice, has_format=choice.mode == "auto" and _schema(values) is not None)


def _schema(values: Mapping[str, Any]) -> Any:
    """Return the schema of a body's response format, None for free text."""
    given = values.get("response_format", {"type": "text"})
    kind = given.get("type")
    if not isinstance(kind, str) or kind not in _FORMATS:
        raise wrong("response_format.type", f"expected one of {', '.join(_FORMATS)}, got {shown(kind)}.")
    if kind != "json_schema":
        return {"type": "object"} if kind == "json_object" else None
    inner = given.get("json_schema")
    if not isinstance(inner, dict) or inner.get("schema") is None:
        raise wrong("response_format.json_schema", f"expected an object with a schema, got {shown(inner)}.")
    return inner["schema"]
