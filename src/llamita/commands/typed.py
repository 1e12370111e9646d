"""Name options in errors as the user typed them, not as Python or the parser of the command line calls them."""

import re
from collections.abc import Iterable
from typing import Any

from llamita.errors import InputError, LlamitaError, shown

_PARAMETERS = {"kv_dtype": "kv_cache"}  # names of the library that commands call otherwise
_EXPECTED = {  # texts of Typer and of its older versions' Click, and ours
    r"Input should be a valid integer.*|.* is not a valid integer\.": "a whole number",
    r"Input should be a valid number.*|.* is not a valid float\.": "a number",
    r"Input should be greater than or equal to (\S+)|.* is not in the range x>=(\S+)\.": "at least",
}


def at_option(error: LlamitaError, parameters: Iterable[Any], arguments: list[str]) -> LlamitaError:
    """Return an error about a parameter under the option through which its value came, any other as it is.

    Args:
        parameters: those of the command, as Typer has them.
        arguments: of the command line.
    """
    name, colon, rest = error.where.partition(":")
    for parameter in parameters:
        if parameter.name == _PARAMETERS.get(name, name) and (found := _typed(parameter, arguments)):
            return error.at(f"{found[0]}{colon}{rest}")
    return error


def usage_error(error: Any, arguments: list[str], hint: str) -> InputError:
    """Return Typer's error about an option in the words of all others; `hint` is for those that have none."""
    parameter, message = getattr(error, "param", None), getattr(error, "message", "")
    found = parameter and _typed(parameter, arguments)
    for pattern, expected in _EXPECTED.items():
        if found and (match := re.fullmatch(pattern, message)):
            bounds = [bound for bound in match.groups() if bound]
            return InputError(found[0], " ".join([expected, *bounds]), shown(found[1]))
    text = error.format_message().replace(" (env var: 'None')", "")  # which some versions of Typer add
    return InputError(text.rstrip("."), hint=hint)


def _typed(parameter: Any, arguments: list[str]) -> tuple[str, str] | None:
    """Return the option of a parameter as it was typed, and its value; None if it was not."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        if name.startswith("-") and name in parameter.opts:
            return name, value if equals else following
    return None
