"""A server under mixed load for a while, and what each of its answers has to be: that of the engine alone.

As a program, it is the server: `python soak.py ADAPTERS` prints its port and serves until stdin ends.
"""

import json
import random
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from adapter_files import make_adapter
from mutants import mutant
from served import serving

from llamita.engine.llm import LLM
from llamita.engine.requests import Generation, Request
from llamita.engine.stream import Stream
from llamita.loading import open_adapters, open_model
from llamita.serve import chat, completions, responses, start
from llamita.serve.engine_thread import Update
from llamita.serve.fields import read
from llamita.serve.keys import Keys
from llamita.serve.state import Job, ServerState
from llamita.serve.tables import CHAT, COMPLETIONS, RESPONSES

KEYS = ("sk-soak-first-1", "sk-soak-second-2")
ADAPTERS = ("poet", "pirate")
CONTEXT, BLOCKS, SEQUENCES = 512, 12, 6  # a sequence takes up to 4 blocks, so that some have to give way
SECONDS = 120  # for one answer, among 32 clients on a busy machine
SPECS = 240
_WORDS = ["once", "upon", "a", "time", "there", "was", "little", "dog", "that", "ran", "to", "and", "saw", "bird"]
_SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer",
           "minimum": 0, "maximum": 99}}, "required": ["name", "age"]}  # fmt: skip
_TOOL = {"type": "function", "function": {"name": "look", "parameters": _SCHEMA}}


def write_adapters(directory: Path) -> None:
    """Write the small random adapters that the server has."""
    for seed, name in enumerate(ADAPTERS):
        make_adapter(directory / name, open_model("embedded").path, seed, rank=2)


def load(adapters: Path) -> LLM:
    """Load the model of the server, with little memory for keys and values."""
    opened = open_model("embedded", "llama3.2")
    loaded = open_adapters(opened, {name: adapters / name for name in ADAPTERS})
    block = LLM(opened, max_sequences=1).new_sequence(128).nbytes
    return LLM(
        opened, context=CONTEXT, max_sequences=SEQUENCES, cache_memory=BLOCKS * block, prefix_cache=4 * block,
        adapters=loaded,
    )  # fmt: skip


def spec(number: int) -> tuple[str, dict[str, Any]]:
    """Return the path and the body of this number; the same each time."""
    r = random.Random(number)
    text = " ".join(r.choices(_WORDS, k=r.choice((3, 10, 40, 150))))
    body: dict[str, Any] = {"model": r.choice(("embedded", "embedded", *(f"embedded:{name}" for name in ADAPTERS)))}
    body |= {"max_tokens": r.choice((1, 5, 20, 60, 150))}
    body |= {"temperature": 0} if r.random() < 0.4 else {"seed": r.randrange(1000), "temperature": r.choice((0.7, 1.2))}
    extra = r.randrange(8)
    body |= ({"n": 3}, {"stop": ["and", " dog"]}, {"frequency_penalty": 0.7, "presence_penalty": 0.3}, {"n": 2},
             {"min_tokens": 4, "ignore_eos": True}, {"logit_bias": {"100": -50, "200": 3}}, {}, {})[extra]  # fmt: skip
    if r.random() < 0.4:
        body |= ({"echo": True, "logprobs": 2}, {"logprobs": 3}, {})[r.randrange(3)]
        return "/v1/completions", {"prompt": text, **body}
    if r.random() < 0.15:
        plain = {name: body[name] for name in ("model", "temperature") if name in body}
        return "/v1/responses", {"input": text, "max_output_tokens": 20, **plain, "temperature": 0}
    body["messages"] = [{"role": "user", "content": text}]
    kind = r.randrange(6)
    body |= ({"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": _SCHEMA}}},
             {"guided_regex": "[a-d ]{5,30}!"}, {"tools": [_TOOL], "tool_choice": "required"}, {"tools": [_TOOL]},
             {"logprobs": True, "top_logprobs": 2}, {})[kind]  # fmt: skip
    return "/v1/chat/completions", body


def expected(state: ServerState, llm: LLM, number: int) -> list[Any]:
    """Return the choices of an answer, each of whose sequences the engine ran alone."""
    path, body = spec(number)
    if path == "/v1/responses":
        job = chat.prepare(state, responses.chat_values(read(body, RESPONSES)), None)
        return [_alone(llm, job.requests[0]).text]
    if path == "/v1/completions":
        job: Job = completions._prepare(state, read(body, COMPLETIONS), None)
        writers: list[Any] = [completions._CompletionWriter(job, request) for request in job.requests]  # type: ignore[arg-type]
    else:
        chat_job = job = chat.prepare(state, read(body, CHAT), None)
        writers = list(chat_job.writers())
    return [plain(w.whole(_update(_alone(llm, request)))) for w, request in zip(writers, job.requests, strict=True)]


def _alone(llm: LLM, request: Request) -> Generation:
    *_, last = Stream(llm.scheduler, llm.sequence(request))
    assert isinstance(last, Generation)
    return last


def _update(made: Generation) -> Update:
    return Update(made.text, list(made.logprobs or ()), list(made.prompt_logprobs or ()), made)


def plain(choice: Any) -> Any:
    """Return a choice without what differs each time: its place, and the ids of calls."""
    copy = json.loads(json.dumps(choice))
    copy.pop("index", None)
    for call in (copy.get("message") or {}).get("tool_calls", ()):
        del call["id"]
    return copy


@dataclass
class Result:
    """What clients saw."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


class Client:
    """Sends requests of all kinds, one after the other."""

    def __init__(self, port: int, number: int, answers: Mapping[int, list[Any]], result: Result) -> None:
        self._port, self._answers, self._result = port, answers, result
        self._random = random.Random(number)
        self._headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEYS[number % len(KEYS)]}"}

    def run(self, until: float) -> None:
        """Go on until a time, or until something is wrong."""
        while time.monotonic() < until and not self._result.wrong:
            what = self._random.random()
            try:
                self._abort() if what < 0.2 else self._break() if what < 0.3 else self._ask()
            except (OSError, HTTPException) as error:
                self._result.wrong.append(f"lost: {type(error).__name__} {error}")

    def _post(self, path: str, body: bytes) -> tuple[HTTPConnection, Any]:
        connection = HTTPConnection("127.0.0.1", self._port, timeout=SECONDS)
        connection.request("POST", path, body, self._headers)
        return connection, connection.getresponse()

    def _ask(self) -> None:
        number = self._random.choice(list(self._answers))
        path, body = spec(number)
        is_stream = path != "/v1/responses" and self._random.random() < 0.5
        connection, response = self._post(path, json.dumps({**body, "stream": is_stream}).encode())
        data = response.read().decode()
        connection.close()
        if response.status != 200:
            self._result.wrong.append(f"spec({number}): {response.status} {data[:300]}")
            return
        found = _folded(data, path) if is_stream else _whole(json.loads(data), path)
        right = self._answers[number] if not is_stream else [_streamed(choice) for choice in self._answers[number]]
        self._result.counts["streamed" if is_stream else "whole"] += 1
        if found != right:
            self._result.wrong.append(f"spec({number}), stream {is_stream}: {found} instead of {right}"[:3000])

    def _abort(self) -> None:
        """Go away at some time: before the answer, or amid it."""
        path, body = spec(self._random.randrange(SPECS))
        data = json.dumps({**body, "stream": self._random.random() < 0.7}).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in self._headers.items())
        with socket.create_connection(("127.0.0.1", self._port), SECONDS) as peer:
            peer.sendall(head.encode() + b"\r\n" + data[: None if self._random.random() < 0.9 else len(data) // 2])
            peer.settimeout(self._random.random() * 0.5 + 0.001)
            with suppress(OSError):
                peer.recv(self._random.choice((1, 500, 5000)))
            if self._random.random() < 0.5:  # reset instead of an end
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self._result.counts["aborted"] += 1

    def _break(self) -> None:
        number = self._random.randrange(1 << 30)
        path, data = mutant(number)
        connection, response = self._post(path, data)
        response.read()
        connection.close()
        self._result.counts["broken"] += 1
        if response.status >= 500:
            self._result.wrong.append(f"mutant({number}): {response.status}")


def _whole(body: Any, path: str) -> list[Any]:
    if path != "/v1/responses":
        return [plain(choice) for choice in body["choices"]]
    return ["".join(part["text"] for item in body["output"] for part in item.get("content", ()))]


def _streamed(choice: Any) -> list[Any]:
    """Return what a stream adds up to for a choice: text, calls, the tokens' log-probabilities, the end."""
    message = choice.get("message") or {"content": choice.get("text")}
    calls = [[c["function"]["name"], c["function"]["arguments"]] for c in message.get("tool_calls", ())]
    scores = choice["logprobs"] or {}
    numbers = [entry["logprob"] for entry in scores.get("content", ())] or scores.get("token_logprobs", [])
    return [message["content"] or "", calls, numbers, choice["finish_reason"]]


def _folded(data: str, path: str) -> list[Any]:
    """Return the same for the events of a stream."""
    lines = [line for line in data.split("\n\n") if line.startswith("data: ")]
    assert lines.pop() == "data: [DONE]", data[-300:]
    found: dict[int, list[Any]] = {}
    for line in lines:
        for choice in json.loads(line.removeprefix("data: "))["choices"]:
            own = found.setdefault(choice["index"], ["", [], [], None])
            delta = choice.get("delta") or {"content": choice.get("text")}
            own[0] += delta.get("content") or ""
            for part in delta.get("tool_calls", ()):
                if "id" in part:
                    own[1].append([part["function"]["name"], ""])
                own[1][-1][1] += part["function"]["arguments"]
            scores = choice["logprobs"] or {}
            own[2] += [entry["logprob"] for entry in scores.get("content", ())] or scores.get("token_logprobs", [])
            own[3] = choice["finish_reason"] or own[3]
    return [found[index] for index in sorted(found)]


def run_clients(port: int, clients: int, seconds: float, answers: Mapping[int, list[Any]]) -> Result:
    """Let clients ask for some seconds; return what they saw."""
    result, until = Result(), time.monotonic() + seconds
    threads = [
        threading.Thread(target=partial(Client(port, number, answers, result).run, until)) for number in range(clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return result


def main() -> None:
    """Serve until stdin ends."""
    bounds = start.Bounds(requests=1000, requests_per_key=1000)
    llm = load(Path(sys.argv[1]))
    with tempfile.TemporaryDirectory() as none, serving(
        {"embedded": llm}, Keys(KEYS, KEYS[:1]), bounds=bounds, adapters=Path(none)
    ) as served:  # fmt: skip
        print(served.port, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
