"""LiteLLM against a server: python with_litellm.py BASE_URL prints what it got as JSON."""

# pyright: reportMissingImports=false
# Its packages are in the clients' own environment.
import json
import os
import sys
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it looks for prices on the network

import litellm

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def main(base_url: str) -> None:
    def ask(text: str, **options: Any) -> Any:
        body = {"model": "openai/embedded", "api_base": base_url, "api_key": "none", "temperature": 0, "max_tokens": 12}
        return litellm.completion(messages=[{"role": "user", "content": text}], **{**body, **options})

    whole = ask("Once upon a time")
    pieces = list(ask("Once upon a time", stream=True, stream_options={"include_usage": True}))
    called = ask(
        "What is the weather?", tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, max_tokens=60
    )
    try:
        ask("a dog " * 1200)
        overflow = "none"
    except litellm.ContextWindowExceededError as error:
        overflow = str(error)
    try:
        ask("Hello", model="openai/another")
        unknown = "none"
    except litellm.NotFoundError as error:
        unknown = str(error)
    call = called.choices[0].message.tool_calls[0].function
    vector = litellm.embedding(model="openai/embedded", input=["A dog."], api_base=base_url, api_key="none")
    print(json.dumps({
        "text": whole.choices[0].message.content,
        "tokens": whole.usage.total_tokens,
        "pieces": [piece.choices[0].delta.content or "" for piece in pieces if piece.choices],
        "streamed_tokens": pieces[-1].usage.total_tokens,
        "call": [call.name, json.loads(call.arguments)],
        "overflow": overflow,
        "unknown": unknown,
        "embedding": len(vector.data[0]["embedding"]),
    }))  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1])
