"""The OpenAPI document. Its fields come from the tables that requests are checked by."""

from functools import lru_cache
from typing import Any

from llamita import __version__
from llamita.serve import tables
from llamita.serve.exchange import Exchange
from llamita.serve.fields import Field, Kind, Table
from llamita.serve.state import ServerState

_BODIES: dict[str, tuple[str, Table]] = {
    "/v1/chat/completions": ("Answer a conversation", tables.CHAT),
    "/v1/chat/completions/input_tokens": ("Count the tokens of a conversation", tables.CHAT),
    "/v1/completions": ("Continue a text", tables.COMPLETIONS),
    "/v1/responses": ("Answer, in OpenAI's newer form", tables.RESPONSES),
    "/v1/responses/input_tokens": ("Count the tokens of an input", tables.RESPONSES),
    "/v1/embeddings": ("Mean of a text's final states", tables.EMBEDDINGS),
    "/v1/adapters": ("Load an adapter", tables.ADAPTER),
    "/tokenize": ("Turn text into token ids", tables.TOKENIZE),
    "/detokenize": ("Turn token ids into text", tables.DETOKENIZE),
}
_LOOKS = {
    "/v1/models": "List the models",
    "/v1/models/{name}": "Show one model",
    "/v1/adapters": "List the adapters",
    "/v1/load": "Show the schedulers at work",
    "/tokenizer_info": "Show the tokenizer's special tokens",
    "/health": "Say whether the engine moves",
    "/ready": "Say whether a request would be taken in",
    "/metrics": "Show the counters for Prometheus",
}
# An example of each body, with which the document's readers can try the server.
_EXAMPLES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Once upon a time"}], "max_tokens": 16},
    "/v1/completions": {"prompt": "Once upon a time", "max_tokens": 16},
    "/v1/responses": {"input": "Once upon a time", "max_output_tokens": 16},
    "/v1/embeddings": {"input": "Once upon a time"},
    "/v1/adapters": {"name": "poet"},
    "/tokenize": {"prompt": "Once upon a time"},
    "/detokenize": {"tokens": [65, 66]},
}
_STREAMS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
_ERROR = {"$ref": "#/components/schemas/Error"}
_NAME = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}


async def document(state: ServerState, exchange: Exchange) -> None:
    """Send the document."""
    await exchange.send_json(openapi())


@lru_cache(maxsize=1)
def openapi() -> dict[str, Any]:
    """Return the document."""
    paths: dict[str, Any] = {}
    for path, summary in _LOOKS.items():
        parameters = {"parameters": [_NAME]} if "{name}" in path else {}
        paths.setdefault(path, {})["get"] = {"summary": summary, **parameters, "responses": _answers(path)}
    for path, (summary, table) in _BODIES.items():
        example = _EXAMPLES[path.removesuffix("/input_tokens")]
        content = {"application/json": {"schema": _schema(table), "example": example}}
        body = {"required": True, "content": content}
        paths.setdefault(path, {})["post"] = {"summary": summary, "requestBody": body, "responses": _answers(path)}
    paths["/v1/adapters/{name}"] = {
        "delete": {"summary": "Forget an adapter", "parameters": [_NAME], "responses": _answers("")}
    }
    error = {"type": "object", "required": ["error"], "properties": {"error": {"type": "object"}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "llamita", "version": __version__},
        "paths": paths,
        "components": {"schemas": {"Error": error}, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{"key": []}, {}],
    }


def _answers(path: str) -> dict[str, Any]:
    """Return the answers of a path, by status."""
    text = {"schema": {"type": "string"}}
    content = {"text/plain": text} if path == "/metrics" else {"application/json": {"schema": {"type": "object"}}}
    if path in _STREAMS:
        event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
        content["text/event-stream"] = {"schema": event}
    refusal = {"description": "Refused, in OpenAI's form", "content": {"application/json": {"schema": _ERROR}}}
    return {"200": {"description": "Done", "content": content}, "4XX": refusal, "503": refusal}


def _schema(table: Table) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {name: _field(row, row.kind) for name, row in table.items() if row.kind},
        "required": [name for name, row in table.items() if row.is_required],
    }


def _field(row: Field, kind: Kind) -> dict[str, Any]:
    """Return a field's schema: null counts as absent."""
    schema = kind.schema if row.is_required else {"anyOf": [kind.schema, {"type": "null"}]}
    return {**schema, "description": row.note}
