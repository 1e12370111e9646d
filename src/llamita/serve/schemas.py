"""Checks JSON schemas before a grammar is made of them, and closes objects that say nothing about further properties.

What the grammar could keep to only in part is refused: an answer that is complete is valid, always.
"""

import json
from collections.abc import Mapping
from typing import Any

from llamita.errors import InputError, shown

LARGEST_SCHEMA = 64 * 1024  # bytes
DEEPEST_SCHEMA = 32
_ONE = ("additionalProperties", "unevaluatedProperties", "items", "additionalItems", "contains", "not", "propertyNames")
_SEVERAL = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_OPEN = {"additionalProperties", "unevaluatedProperties", "$ref", "anyOf", "oneOf"}  # not to be closed, or done already
_OWN_KEY = "x-guidance"  # llguidance's, which would change how the grammar is made


def prepare_schema(schema: object, where: str) -> dict[str, Any] | bool:
    """Return a copy of a schema for the grammar.

    Objects with properties get `additionalProperties: false` where they leave that open, outside of `allOf`: models
    would ramble there, and what is left is valid all the same.

    Raises:
        InputError: it is no schema, too large, too deep, or has pattern properties beside others.
    """
    try:
        size = len(json.dumps(schema))
    except (TypeError, ValueError, RecursionError):
        raise InputError(where, "a JSON schema", shown(schema)) from None
    if size > LARGEST_SCHEMA:
        raise InputError(where, f"at most {LARGEST_SCHEMA} bytes", f"{size}")
    return _prepare(schema, where, DEEPEST_SCHEMA, closed=True)


def call_schema(name: str, parameters: dict[str, Any] | bool) -> dict[str, Any]:
    """Return the schema of a call as Llama 3.1 and 3.2 write it, from the prepared schema of its parameters.

    llguidance reads a grammar word by word, so the beginning of a call must be of the words of JSON where another JSON
    text may come in its place.
    """
    inner = _moved(parameters) if isinstance(parameters, dict) else {}
    properties = {"name": {"const": name}, "parameters": {"type": "object", **inner}}
    required = ["name", "parameters"]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _moved(schema: Any) -> Any:
    """Return a prepared schema whose references follow it to its place in a call."""
    if not isinstance(schema, dict) or "$id" in schema:  # below an own $id, references begin there
        return schema
    made = dict(schema)
    if isinstance(ref := made.get("$ref"), str) and (ref == "#" or ref.startswith("#/")):
        made["$ref"] = f"#/properties/parameters{ref[1:]}"
    for key, value in made.items():
        if key in _NAMED and isinstance(value, dict):
            made[key] = {name: _moved(part) for name, part in value.items()}
        elif key in _SEVERAL and isinstance(value, list):
            made[key] = [_moved(part) for part in value]
        elif key in _ONE:
            made[key] = _moved(value)
    return made


def _prepare(schema: object, where: str, depth: int, closed: bool) -> dict[str, Any] | bool:
    if isinstance(schema, bool):
        return schema
    if not isinstance(schema, Mapping):
        raise InputError(where, "a JSON schema, an object", shown(schema))
    if depth == 0:
        raise InputError(where, f"a schema at most {DEEPEST_SCHEMA} deep", "a deeper one")
    made = {key: value for key, value in schema.items() if key != _OWN_KEY}
    closed = closed and "allOf" not in made

    def inner(key: str, value: object) -> dict[str, Any] | bool:
        return _prepare(value, where, depth - 1, closed and key not in ("allOf", "oneOf"))

    for key, value in made.items():
        if key in _NAMED and isinstance(value, Mapping):
            made[key] = {name: inner(key, part) for name, part in value.items()}
        elif key in _SEVERAL and isinstance(value, list):
            made[key] = [inner(key, part) for part in value]
        elif key in _ONE and value is not None:
            made[key] = inner(key, value)
    if made.get("patternProperties"):
        _check_patterns(made, where)
    elif closed and "properties" in made and not made.keys() & _OPEN:
        made["additionalProperties"] = not _requires_only(made, made["properties"])
    return made


def _requires_only(schema: Mapping[str, Any], names: object) -> bool:
    """Return whether a schema requires no other properties than these."""
    required = schema.get("required", [])
    if not isinstance(required, list) or not isinstance(names, Mapping):
        return False
    return all(isinstance(name, str) and name in names for name in required)


def _check_patterns(schema: dict[str, Any], where: str) -> None:
    """Refuse patterns that may overlap with other properties: a name that fits both has to fit both schemas."""
    patterns = schema["patternProperties"]
    if not isinstance(patterns, Mapping):
        raise InputError(where, "pattern properties in an object", shown(patterns))
    others = schema.get("properties") or schema.get("additionalProperties") not in (None, False)
    if others or len(patterns) > 1:
        raise InputError(where, "one pattern property alone, or none", "others beside it, which may overlap")
    schema["additionalProperties"] = False
