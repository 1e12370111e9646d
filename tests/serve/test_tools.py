"""Tools and the choice among them: what is taken, and what is refused by name."""

from typing import Any

import pytest

from llamita.errors import InputError
from llamita.serve.tools import HERMES, LLAMA, call_form, check_tools


def tool(name: Any = "f", **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **function}}


def test_choices() -> None:
    two = [tool("f"), tool("g", description="does", parameters={"type": "object"}, strict=True)]
    auto = check_tools(two)
    assert (auto.mode, auto.name, auto.parallel, auto.names) == ("auto", None, True, {"f", "g"})
    assert list(auto.tools) == two
    assert check_tools(two, "required", False).mode == "required"
    assert not check_tools(two, "required", False).parallel
    for choice in ({"type": "function", "function": {"name": "g"}}, {"type": "function", "name": "g"}):
        named = check_tools(two, choice)
        assert (named.mode, named.name, len(named.tools)) == ("required", "g", 2)
    for nothing in (check_tools(None), check_tools([]), check_tools(two, "none"), check_tools(None, "auto")):
        assert (nothing.mode, nothing.tools, nothing.names) == ("none", (), frozenset())


@pytest.mark.parametrize(("tools", "choice", "parallel", "where"), [
    (5, None, None, "tools: expected a list"), ("x", None, None, "tools: expected a list"),
    ([5], None, None, r"tools\[0\]: expected"), ([{"type": "web_search"}], None, None, r"tools\[0\]: expected"),
    ([tool("f"), tool("f")], None, None, r"tools\[1\].function.name: expected another"),
    ([tool("a b")], None, None, r"tools\[0\].function.name"), ([tool("x" * 65)], None, None, "1 to 64"),
    ([tool("")], None, None, "name"), ([tool(None)], None, None, "name"), ([tool("f\n")], None, None, "name"),
    ([tool(parameters=5)], None, None, "parameters"),
    ([tool(parameters={"type": "string"})], None, None, "parameters"),
    ([tool(description=5)], None, None, "description"),
    ([tool(f"f{i}") for i in range(129)], None, None, "at most 128"),
    ([tool(description="x" * 70_000)], None, None, "at most 65536 bytes"), ([tool(x={1})], None, None, "JSON has"),
    (None, "required", None, "tool_choice"), ([tool()], "any", None, "tool_choice"), ([tool()], 5, None, "tool_choice"),
    ([tool()], {"type": "function", "function": {"name": "g"}}, None, "tool_choice: expected the name of one"),
    ([tool()], {"type": "function", "function": 5}, None, "tool_choice"),
    ([tool()], {"name": "f"}, None, "tool_choice"),
    ([tool()], None, "yes", "parallel_tool_calls"),
])  # fmt: skip
def test_wrong_tools_are_named(tools: Any, choice: Any, parallel: Any, where: str) -> None:
    with pytest.raises(InputError, match=where):
        check_tools(tools, choice, parallel)


def test_the_form_of_calls_follows_the_template() -> None:
    assert call_form("{{ '<tool_call>' }}") is HERMES
    assert call_form('{"name": "f", "parameters": {}}') is LLAMA
    assert LLAMA.begin("f") == '{"name": "f", "parameters": '
