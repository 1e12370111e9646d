"""Random JSON schemas of what servers are asked for, and a validator of them that knows nothing of grammars."""

import json
import random
import re
from typing import Any

_WORDS = ("name", "age", "city", "tags", "is_new", "größe", "x y", 'quo"te', "id")


def random_schema(seed: int) -> dict[str, Any]:
    """Return a schema of an object whose answers are not too long."""
    return _object(random.Random(seed), 3)


def valid(value: Any, schema: dict[str, Any], root: dict[str, Any] | None = None) -> bool:
    """Return whether a value is valid, by the keywords that `random_schema` uses."""
    root = schema if root is None else root
    if "$ref" in schema:
        return valid(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    if "enum" in schema:
        return json.dumps(value) in map(json.dumps, schema["enum"])
    if "const" in schema:
        return json.dumps(value) == json.dumps(schema["const"])
    if "anyOf" in schema:
        return any(valid(value, part, root) for part in schema["anyOf"])
    kind = schema["type"]
    if kind == "object":
        properties = schema.get("properties", {})
        return (
            isinstance(value, dict)
            and set(schema.get("required", [])) <= set(value)
            and (schema.get("additionalProperties", True) or set(value) <= set(properties))
            and all(valid(value[name], part, root) for name, part in properties.items() if name in value)
        )
    if kind == "array":
        least, most = schema.get("minItems", 0), schema.get("maxItems", 10**9)
        is_list = isinstance(value, list) and least <= len(value) <= most
        return is_list and all(valid(part, schema["items"], root) for part in value)
    if kind == "string":
        if not isinstance(value, str) or not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 10**9):
            return False
        return re.search(schema.get("pattern", ""), value) is not None
    if kind == "boolean":
        return isinstance(value, bool)
    if kind == "null":
        return value is None
    is_number = isinstance(value, int if kind == "integer" else int | float) and not isinstance(value, bool)
    return is_number and schema.get("minimum", value) <= value <= schema.get("maximum", value)


def _schema(source: random.Random, depth: int) -> dict[str, Any]:
    kinds = [_text, _number, _whole, _choice, _flag]
    if depth:
        kinds += [_object, _list, _either]
    return source.choice(kinds)(source, depth - 1)


def _object(source: random.Random, depth: int) -> dict[str, Any]:
    names = source.sample(_WORDS, source.randint(1, 4))
    made: dict[str, Any] = {"type": "object", "properties": {name: _schema(source, depth) for name in names}}
    made["required"] = source.sample(names, source.randint(0, len(names)))
    return made | source.choice([{}, {"additionalProperties": False}])


def _list(source: random.Random, depth: int) -> dict[str, Any]:
    least = source.randint(0, 2)
    return {
        "type": "array",
        "items": _schema(source, depth),
        "minItems": least,
        "maxItems": least + source.randint(0, 2),
    }


def _either(source: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_schema(source, depth), _schema(source, depth), {"type": "null"}]}


def _text(source: random.Random, _depth: int) -> dict[str, Any]:
    return {"type": "string"} | source.choice(
        [{"maxLength": 12}, {"minLength": 2, "maxLength": 9}, {"pattern": "^[a-c]{1,5}$"}, {"pattern": r"^\d{4}-\d\d$"}]
    )


def _number(source: random.Random, _depth: int) -> dict[str, Any]:
    return {"type": "number", "minimum": -source.randint(0, 9), "maximum": source.choice([0.5, 10, 250])}


def _whole(source: random.Random, _depth: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": source.randint(-99, 0), "maximum": source.randint(1, 5000)}


def _choice(source: random.Random, _depth: int) -> dict[str, Any]:
    return source.choice([{"enum": ["red", "blue", 3, None, 'a"b']}, {"const": {"k": [1, "x"]}}, {"enum": ["only"]}])


def _flag(_source: random.Random, _depth: int) -> dict[str, Any]:
    return {"type": "boolean"}
