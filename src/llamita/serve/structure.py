"""What an answer must look like: its grammar, and the functions that it may call."""

from collections.abc import Mapping
from typing import Any

from llamita.engine.constraint import Constraint
from llamita.serve.chat_writer import Parser
from llamita.serve.served import Served


class ToolUse:
    definitions: list[dict[str, Any]]

    def parser(self) -> Parser: ...


def read_tools(values: Mapping[str, Any]) -> ToolUse | None:
    return None


def constraint(values: Mapping[str, Any], served: Served, tools: ToolUse | None) -> Constraint | None:
    return None
