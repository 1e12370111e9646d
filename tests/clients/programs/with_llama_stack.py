"""Llama Stack 0.2 in front of a server, by its own client and by the openai package.

python with_llama_stack.py ADDRESS prints what it got as JSON.
"""

# pyright: reportMissingImports=false
# Its packages are in the clients' own environment.
import json
import sys
from typing import Any

import openai
from llama_stack_client import LlamaStackClient

MESSAGES: Any = [{"role": "user", "content": "Once upon a time"}]
PARTS: Any = [{"role": "user", "content": [{"type": "text", "text": "Once upon a time"}]}]
LIMITS: Any = {"strategy": {"type": "greedy"}, "max_tokens": 12}


def main(address: str) -> None:
    stack = LlamaStackClient(base_url=address)
    native = stack.inference.chat_completion(model_id="embedded", messages=MESSAGES, sampling_params=LIMITS)
    events = stack.inference.chat_completion(
        model_id="embedded", messages=MESSAGES, sampling_params=LIMITS, stream=True
    )
    client = openai.OpenAI(base_url=f"{address}/v1/openai/v1", api_key="none", max_retries=0)
    body: Any = {"model": "embedded", "temperature": 0, "max_tokens": 12}
    chunks = client.chat.completions.create(**body, messages=MESSAGES, stream=True)
    print(json.dumps({
        "models": [model.identifier for model in stack.models.list()],
        "native": native.completion_message.content,
        "native_pieces": [event.event.delta.text for event in events],
        "through_client": stack.chat.completions.create(**body, messages=MESSAGES).choices[0].message.content,
        "openai_models": [model.id for model in client.models.list()],
        "openai": client.chat.completions.create(**body, messages=PARTS).choices[0].message.content,
        "openai_pieces": [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices],
        "completion": client.completions.create(**body, prompt="Once upon a time").choices[0].text,
    }))  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1])
