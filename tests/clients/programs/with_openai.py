"""The openai package of this environment, an older one: python with_openai.py BASE_URL prints what it got as JSON."""

import json
import sys
from typing import Any

import openai


def main(base_url: str) -> None:
    client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0)
    body: Any = {
        "model": "embedded",
        "messages": [{"role": "user", "content": "Once upon a time"}],
        "temperature": 0,
        "max_tokens": 12,
    }
    chunks = list(client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}))
    response = client.responses.create(model="embedded", input="Once upon a time", temperature=0, max_output_tokens=12)
    try:
        client.chat.completions.create(**{**body, "messages": [{"role": "user", "content": "a dog " * 1200}]})
        overflow = None
    except openai.BadRequestError as error:
        overflow = error.code
    print(json.dumps({
        "version": openai.__version__,
        "models": [model.id for model in client.models.list()],
        "text": client.chat.completions.create(**body).choices[0].message.content,
        "pieces": [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices],
        "streamed_tokens": chunks[-1].usage.total_tokens if chunks[-1].usage else None,
        "response": response.output_text,
        "overflow": overflow,
        "embedding": len(client.embeddings.create(model="embedded", input="A dog.").data[0].embedding),
    }))  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1])
