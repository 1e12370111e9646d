"""Clients with packages of their own talk to a real server and get what the engine says."""

import socket
import subprocess
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import pytest
from clients import MOST_SECONDS, PYTHON, environment, needs_clients, run_client
from places import ROOT
from served import Served, serving

import llamita
from llamita.engine.llm import LLM

pytestmark = needs_clients

PROMPT = "Once upon a time"
MAX_TOKENS = 12  # of the programs' answers
STACK = ROOT / "integrations" / "llama_stack" / "run.yaml"


@pytest.fixture(scope="module")
def llm() -> LLM:
    return llamita.load("embedded", scheme="llama3.2")


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[Served]:
    with serving({"embedded": llm}) as served:
        yield served


@pytest.fixture(scope="module")
def expected(llm: LLM) -> str:
    return llm.generate([{"role": "user", "content": PROMPT}], greedy=True, max_tokens=MAX_TOKENS).text


@pytest.fixture(scope="module")
def tokens(llm: LLM) -> int:
    """The tokens of the prompt and of the answer."""
    return len(llm.encode_chat([{"role": "user", "content": PROMPT}])) + MAX_TOKENS


def test_an_older_openai_package(server: Served, expected: str, tokens: int, tmp_path: Path) -> None:
    got = run_client("with_openai.py", f"{server.address}/v1", tmp_path)
    assert got["version"].startswith("2.")
    assert got["models"] == ["embedded"]
    assert got["text"] == "".join(got["pieces"]) == got["response"] == expected
    assert got["streamed_tokens"] == tokens
    assert got["overflow"] == "context_length_exceeded"
    assert got["embedding"] == 256


def test_langchain(server: Served, expected: str, tokens: int, tmp_path: Path) -> None:
    got = run_client("with_langchain.py", f"{server.address}/v1", tmp_path)
    assert got["text"] == "".join(got["pieces"]) == expected
    assert got["tokens"] == got["streamed_tokens"] == tokens
    ((name, arguments),) = got["calls"]
    assert name == "weather"
    assert arguments["city"] in ("Paris", "Rome")
    assert got["streamed_calls"] == got["calls"]
    assert got["after"]
    for animal in got["structured"].values():
        assert animal["name"] in ("dog", "cat")
        assert animal["legs"] in (2, 4)
    assert "maximum context length is 2048 tokens" in got["overflow"]
    assert got["embedding"] == 256


def test_litellm(server: Served, expected: str, tokens: int, tmp_path: Path) -> None:
    got = run_client("with_litellm.py", f"{server.address}/v1", tmp_path)
    assert got["text"] == "".join(got["pieces"]) == expected
    assert got["tokens"] == got["streamed_tokens"] == tokens
    assert got["call"][0] == "weather"
    assert got["call"][1]["city"] in ("Paris", "Rome")
    assert "maximum context length is 2048 tokens" in got["overflow"]
    assert "embedded" in got["unknown"]  # the models that there are
    assert got["embedding"] == 256


@pytest.fixture
def llama_stack(server: Served, tmp_path: Path) -> Iterator[str]:
    """Llama Stack's own server, started from our run.yaml."""
    port = _free_port()
    command = [PYTHON, "-m", "llama_stack.distribution.server.server", "--config", STACK, "--port", str(port)]
    variables = {"LLAMITA_URL": f"{server.address}/v1", "LLAMA_STACK_DIR": str(tmp_path), "LLAMITA_MODEL": "embedded"}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            command, env={**environment(tmp_path), **variables}, cwd=tmp_path, stdout=log, stderr=log
        )
        try:
            _wait_for(port, process, tmp_path / "log")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(MOST_SECONDS)


def test_llama_stack(llama_stack: str, llm: LLM, expected: str, tmp_path: Path) -> None:
    got = run_client("with_llama_stack.py", llama_stack, tmp_path)
    assert got["models"] == got["openai_models"] == ["embedded"]
    assert got["native"] == "".join(got["native_pieces"]) == got["through_client"] == expected
    assert got["openai"] == "".join(got["openai_pieces"]) == expected
    assert got["completion"] == llm.generate(PROMPT, greedy=True, max_tokens=MAX_TOKENS).text


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + MOST_SECONDS
    while time.monotonic() < end and process.poll() is None:
        connection = HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/v1/models")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.2)
        finally:
            connection.close()
    pytest.fail(f"Llama Stack does not start:\n{log.read_text(errors='replace')[-4000:]}")
