"""Checks the fields of a request's body against a table, which also makes the docs' table and the OpenAPI document.

A field of the table is used, accepted without effect, or refused because ignoring it would change the answer. A field
that no table has is ignored, as OpenAI's own server does.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from llamita.serve.errors import ApiError, wrong

_LONGEST_SHOWN = 60  # characters of a wrong value in a message


@dataclass(frozen=True)
class Kind:
    """What a field may hold.

    Attributes:
        expected: in words, after "expected".
        accepts: whether a value is of this kind.
        schema: the same for the OpenAPI document.
    """

    expected: str
    accepts: Callable[[Any], bool]
    schema: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Field:
    """A row of a table.

    Attributes:
        kind: what a used field may hold; None for a field without effect or a refused one.
        note: what it does, for the docs.
        is_required: the request needs it.
        neutral: values with which a refused field changes nothing.
        refusal: why it is refused; "" for a field that is not.
    """

    kind: Kind | None
    note: str
    is_required: bool = False
    neutral: tuple[Any, ...] = ()
    refusal: str = ""

    @property
    def effect(self) -> str:
        """The docs' word for it."""
        return "refused" if self.refusal else "used" if self.kind else "no effect"


Table = Mapping[str, Field]


def number(least: float, most: float) -> Kind:
    """A number in a range."""
    return Kind(
        f"a number from {least:g} to {most:g}",
        lambda v: isinstance(v, int | float) and not isinstance(v, bool) and least <= v <= most,
        {"type": "number", "minimum": least, "maximum": most},
    )


def whole(least: int, most: int) -> Kind:
    """A whole number in a range; 3.0 is one, because some clients send floats."""
    return Kind(
        f"a whole number from {least} to {most}",
        lambda v: is_whole(v) and least <= v <= most,
        {"type": "integer", "minimum": least, "maximum": most},
    )


def is_whole(value: Any) -> bool:
    """Return whether a JSON value is a whole number."""
    return not isinstance(value, bool) and (isinstance(value, int) or (isinstance(value, float) and value.is_integer()))


def text(longest: int = 1 << 24) -> Kind:
    """A text."""
    return Kind("a text", lambda v: isinstance(v, str) and len(v) <= longest, {"type": "string"})


def choice(*values: str) -> Kind:
    """One of a few words."""
    return Kind(f"one of {', '.join(values)}", lambda v: v in values, {"type": "string", "enum": list(values)})


def texts(most: int, longest: int) -> Kind:
    """A text of so many characters, or up to `most` of them."""
    one = {"type": "string", "maxLength": longest}

    def accepts(value: Any) -> bool:
        several = value if isinstance(value, list) else [value]
        return len(several) <= most and all(isinstance(s, str) and len(s) <= longest for s in several)

    return Kind(
        f"a text or a list of up to {most}, of at most {longest} characters",
        accepts,
        {"oneOf": [one, {"type": "array", "items": one, "maxItems": most}]},
    )


FLAG = Kind("true or false", lambda v: isinstance(v, bool), {"type": "boolean"})
OBJECT = Kind("an object", lambda v: isinstance(v, dict), {"type": "object"})


def record(required: tuple[str, ...] = (), **properties: Any) -> Kind:
    """An object; the schemas of its properties are for the OpenAPI document alone."""
    return replace(OBJECT, schema={"type": "object", "properties": properties, "required": list(required)})


def listing(items: dict[str, Any], least: int = 0) -> Kind:
    """A list; the schema of its items is for the OpenAPI document alone."""
    return Kind("a list", lambda v: isinstance(v, list), {"type": "array", "items": items, "minItems": least})


ANY = Kind("a value", lambda v: True)


def refused(why: str, *neutral: Any) -> Field:
    """Return the row of a field that is refused unless it has a neutral value."""
    return Field(None, why, neutral=neutral, refusal=why)


def ignored(note: str) -> Field:
    """Return the row of a field that has no effect."""
    return Field(None, note)


def read(body: Mapping[str, Any], table: Table, within: str = "") -> dict[str, Any]:
    """Return the used fields of a body; null counts as absent.

    Args:
        body: the JSON object.
        table: its fields.
        within: the name of the outer field, for messages.

    Raises:
        ApiError: a field has a wrong value, is missing, or is refused. Its `param` names the field.
    """
    values = {}
    for name, row in table.items():
        value, param = body.get(name), f"{within}.{name}" if within else name
        if value is None:
            if row.is_required:
                raise ApiError(400, f"{param}: is missing.", param=param, code="missing_required_parameter")
        elif row.refusal:
            if value not in row.neutral:
                raise wrong(param, f"is not supported: {row.refusal}.", "unsupported_parameter")
        elif row.kind:
            if not row.kind.accepts(value):
                raise wrong(param, f"expected {row.kind.expected}, got {shown(value)}.")
            values[name] = int(value) if row.kind.schema.get("type") == "integer" else value
    return values


def shown(value: Any) -> str:
    """Return a value from outside, cut to a length that a message can bear."""
    return repr(value)[:_LONGEST_SHOWN]
