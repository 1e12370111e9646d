"""LangChain's ChatOpenAI against a server: python with_langchain.py BASE_URL prints what it got as JSON."""

# pyright: reportMissingImports=false
# Its packages are in the clients' own environment.
import json
import sys
from typing import Literal

from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel


class Animal(BaseModel):
    """An animal."""

    name: Literal["dog", "cat"]
    legs: Literal[2, 4]


@tool
def weather(city: Literal["Paris", "Rome"]) -> str:
    """Tell the weather of a city."""
    return "sunny"


def main(base_url: str) -> None:
    chat = ChatOpenAI(base_url=base_url, api_key="none", model="embedded", temperature=0, max_tokens=12, max_retries=2)
    answer = chat.invoke("Once upon a time")
    pieces = list(chat.stream("Once upon a time", stream_usage=True))
    long = chat.model_copy(update={"max_tokens": 60})
    called = long.bind_tools([weather], tool_choice="required", parallel_tool_calls=False)
    call = called.invoke("What is the weather?")
    first, *more = called.stream("What is the weather?")
    streamed = sum(more, first)
    result = ToolMessage("sunny", tool_call_id=call.tool_calls[0]["id"])
    after = chat.bind_tools([weather], tool_choice="none").invoke([HumanMessage("What is the weather?"), call, result])
    try:
        chat.invoke([HumanMessage("a dog " * 1200)])
        overflow = "none"
    except ContextOverflowError as error:
        overflow = str(error)
    embeddings = OpenAIEmbeddings(base_url=base_url, api_key="none", model="embedded", check_embedding_ctx_length=False)
    print(json.dumps({
        "text": answer.content,
        "tokens": answer.usage_metadata["total_tokens"],
        "pieces": [piece.content for piece in pieces],
        "streamed_tokens": max((piece.usage_metadata or {}).get("total_tokens", 0) for piece in pieces),
        "calls": [[c["name"], c["args"]] for c in call.tool_calls],
        "streamed_calls": [[c["name"], c["args"]] for c in streamed.tool_calls],
        "after": isinstance(after, AIMessage) and bool(after.content),
        "structured": {
            method: long.with_structured_output(Animal, method=method).invoke("Name an animal.").model_dump()
            for method in ("json_schema", "function_calling")
        },
        "overflow": overflow,
        "embedding": len(embeddings.embed_query("A dog.")),
    }))  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1])
