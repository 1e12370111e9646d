"""Builds the output items of a response, and the events that tell of them."""

import secrets
from collections.abc import Iterator
from typing import Any

Event = dict[str, Any]
Item = dict[str, Any]


class ResponseItems:
    """The output of a response: a message and calls of functions, in the order in which they come.

    Attributes:
        output: the items so far.
    """

    def __init__(self) -> None:
        self.output: list[Item] = []
        self._calls: dict[int, Item] = {}  # by the index that the chat's deltas give
        self._open: Item | None = None

    def add(self, delta: dict[str, Any], logprobs: list[dict[str, Any]]) -> Iterator[tuple[str, Event]]:
        """Take in a delta of a chat; yield events with their names."""
        if delta.get("content") or (logprobs and "content" in delta):
            yield from self._text(delta["content"], logprobs)
        for part in delta.get("tool_calls", []):
            if part["index"] not in self._calls:
                yield from self._begin_call(part)
            if text := part["function"].get("arguments"):
                item = self._calls[part["index"]]
                item["arguments"] += text
                place = {"item_id": item["id"], "output_index": self.output.index(item)}
                yield "response.function_call_arguments.delta", {**place, "delta": text}

    def finish(self, status: str) -> Iterator[tuple[str, Event]]:
        """End the last item with "completed" or "incomplete"."""
        if not self.output:  # an answer without text still has its message
            yield from self._begin_message()
        yield from self.close(status)

    def _text(self, text: str, logprobs: list[dict[str, Any]]) -> Iterator[tuple[str, Event]]:
        if self._open is None or self._open["type"] != "message":
            yield from self.close("completed")
            yield from self._begin_message()
        assert self._open
        part = self._open["content"][0]
        part["text"] += text
        part["logprobs"] += logprobs
        event = {**self._place(self._open), "content_index": 0, "delta": text, "logprobs": logprobs}
        yield "response.output_text.delta", event

    def _place(self, item: Item) -> Event:
        return {"item_id": item["id"], "output_index": len(self.output) - 1}

    def _begin_message(self) -> Iterator[tuple[str, Event]]:
        item = {"id": f"msg_{secrets.token_hex(12)}", "type": "message", "role": "assistant", "status": "in_progress"}
        yield from self._begin({**item, "content": []})
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        assert self._open
        yield "response.content_part.added", {**self._place(self._open), "content_index": 0, "part": dict(part)}
        self._open["content"].append(part)

    def _begin_call(self, part: dict[str, Any]) -> Iterator[tuple[str, Event]]:
        yield from self.close("completed")
        item = {
            "id": f"fc_{secrets.token_hex(12)}",
            "type": "function_call",
            "call_id": part["id"],
            "name": part["function"]["name"],
            "arguments": "",
            "status": "in_progress",
        }
        self._calls[part["index"]] = item
        yield from self._begin(item)

    def _begin(self, item: Item) -> Iterator[tuple[str, Event]]:
        self.output.append(item)
        self._open = item
        yield "response.output_item.added", {"output_index": len(self.output) - 1, "item": _copy(item)}

    def close(self, status: str) -> Iterator[tuple[str, Event]]:
        """End the item that is open, if there is one, with this status."""
        item, self._open = self._open, None
        if item is None:
            return
        place = self._place(item)
        if item["type"] == "message":
            part = item["content"][0]
            text = {"content_index": 0, "text": part["text"], "logprobs": part["logprobs"]}
            yield "response.output_text.done", {**place, **text}
            yield "response.content_part.done", {**place, "content_index": 0, "part": dict(part)}
        else:
            done = {"name": item["name"], "arguments": item["arguments"]}
            yield "response.function_call_arguments.done", {**place, **done}
        item["status"] = status
        yield "response.output_item.done", {"output_index": place["output_index"], "item": _copy(item)}


def _copy(item: Item) -> Item:
    """Return an item as it is now: what was sent does not change with it."""
    return {**item, "content": [dict(part) for part in item["content"]]} if "content" in item else dict(item)
