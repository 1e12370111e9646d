"""Whatever comes in, the server answers each within a time, never with a fault of its own, and is right afterwards."""

import json
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from mutants import BODIES, mutant
from served import Served, serving

import llamita
from llamita.engine.llm import LLM
from llamita.serve.keys import Keys

KEY = "sk-fuzzing-key"
SECONDS = 60  # for one answer, on a busy machine; usual ones take milliseconds
PROMPT = "Once upon a time there was a"


@pytest.fixture(scope="module")
def llm() -> LLM:
    return llamita.load("embedded", scheme="llama3.2", context=128, max_sequences=4)


@pytest.fixture(scope="module")
def server(llm: LLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving({"embedded": llm}, Keys([KEY], [KEY]), adapters=tmp_path_factory.mktemp("adapters")) as served:
        yield served


def check_is_right(server: Served, llm: LLM) -> None:
    """The engine's own answer comes, and nothing is left over."""
    key = {"Authorization": f"Bearer {KEY}"}
    body = {"prompt": PROMPT, "max_tokens": 30, "temperature": 0}
    status, _, data = server.ask("POST", "/v1/completions", body, key)
    assert status == 200, data
    assert json.loads(data)["choices"][0]["text"] == llm.generate(PROMPT, max_tokens=30, greedy=True).text
    end = time.monotonic() + SECONDS
    while (load := json.loads(server.ask("GET", "/v1/load", headers=key)[2])["models"][0]) and (
        load["running"] or load["waiting"] or server.state.queue.open
    ):
        assert time.monotonic() < end, load
        time.sleep(0.01)


def ask(server: Served, number: int) -> tuple[int, str]:
    """Send a mutant; return the status and what is wrong with the answer, "" if nothing is."""
    path, body = mutant(number)
    began = time.monotonic()
    status, headers, data = server.ask("POST", path, body, {"Authorization": f"Bearer {KEY}"})
    wrong = f"mutant({number}): {path} {status} {data[:300]!r}"
    if time.monotonic() - began > SECONDS:
        return status, "slow " + wrong
    if status == 200 and headers["content-type"].startswith("text/event-stream"):
        return status, wrong if '"code":"internal"' in data.decode() else ""
    if headers["content-type"] != "application/json":
        return status, wrong
    if status == 200:
        json.loads(data)
        return status, ""
    error = json.loads(data)["error"]
    return status, "" if status < 500 and set(error) >= {"message", "code"} and len(data) < 2048 else wrong


def run(server: Served, llm: LLM, numbers: range) -> Counter[int]:
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda number: ask(server, number), numbers))
    assert not [wrong for _, wrong in answers if wrong]
    check_is_right(server, llm)
    return Counter(status for status, _ in answers)


@pytest.mark.parametrize("place", range(len(BODIES)))
def test_bodies_are_right_before_they_are_changed(server: Served, place: int) -> None:
    path, body = BODIES[place]
    status, _, data = server.ask("POST", path, body, {"Authorization": f"Bearer {KEY}"})
    assert status == 200 or path == "/v1/adapters", data


def test_changed_bodies_are_answered(server: Served, llm: LLM) -> None:
    statuses = run(server, llm, range(300))
    assert statuses[200] > 30  # what is changed is often still right
    assert statuses[400] > 100


@pytest.mark.slow
def test_many_changed_bodies_are_answered(server: Served, llm: LLM) -> None:
    run(server, llm, range(300, 5000))
