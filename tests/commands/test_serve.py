"""`llamita serve`: what it refuses before it loads anything, what it prints, and kept prompts over a restart."""

import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

import pytest
from command import one_line, run

pytest.importorskip("uvicorn", reason="llamita[serve] is not installed")

from llamita.system import extras
from llamita.system.child import environment


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--host", "0.0.0.0"], "--host"),
        (["--api-key", "short"], "--api-key"),
        (["--api-key-file", "/nowhere/keys"], "/nowhere/keys"),
        (["--adapter", "poet"], "--adapter"),
        (["--adapter", "poet=/nowhere/at/all"], "/nowhere/at/all"),
        (["--allow-origin", "example.com"], "--allow-origin"),
        (["embedded"], "MODEL"),
        (["embedded:nothing"], "scheme"),
        (["/nowhere/model"], "/nowhere/model"),
        (["--context", "4096"], "context"),
        (["--prefix-file", "/nowhere/at/all/file"], "--prefix-file"),
        (["--draft-from", "/nowhere/at/all/file"], "/nowhere/at/all/file: cannot be read"),
    ],
)
def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], named: str) -> None:
    assert run("serve", "embedded", "--port", "0", *arguments) == 2
    assert named in one_line(capsys)


def test_a_taken_port_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert run("serve", "embedded", "--port", taken.getsockname()[1]) == 1
    assert "--port" in one_line(capsys)


def test_without_its_packages_it_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lack(name: str) -> None:
        raise ModuleNotFoundError("x", name="uvicorn")

    monkeypatch.setattr(extras, "import_module", lack)
    assert run("serve", "embedded") == 1
    assert "pip install 'llamita[serve]'" in one_line(capsys)


@contextmanager
def serving(*arguments: object) -> Iterator[tuple[int, list[str]]]:
    """The command in a process of its own; its port and the lines it printed."""
    command = [sys.executable, "-m", "llamita", "serve", *map(str, arguments), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment()) as process:
        assert process.stderr
        lines: list[str] = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith("try: "):
                break
        port = int(re.findall(r"http://127\.0\.0\.1:(\d+)", "".join(lines))[0])
        reader = threading.Thread(target=lambda: lines.extend(process.stderr or ()))
        reader.start()
        try:
            yield port, lines
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
            reader.join()


def post(port: int, path: str, body: dict) -> dict:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    data = response.read()
    assert response.status == 200, data
    return json.loads(data)


def test_it_prints_where_it_is_what_it_has_and_a_request() -> None:
    with serving("embedded", "four=embedded:llama3.2", "--log-requests") as (port, lines):
        text = "".join(lines)
        assert f"http://127.0.0.1:{port}/v1" in text
        assert "  embedded: 2048 tokens of context" in text
        assert "  four: 2048 tokens of context" in text
        request = lines[-1].partition("-d '")[2].rstrip().rstrip("'")
        answer = post(port, "/v1/chat/completions", json.loads(request) | {"max_tokens": 2})
        assert answer["model"] == "embedded"
        assert post(port, "/v1/completions", {"prompt": "a", "max_tokens": 1, "model": "four"})["model"] == "four"
    assert any("POST /v1/completions 200" in line for line in lines)


def test_kept_prompts_are_found_after_a_restart(tmp_path: Path) -> None:
    body = {"prompt": "Once upon a time there was a dog who lived in a big house. " * 20, "max_tokens": 5, "seed": 1}
    kept = tmp_path / "kept"
    with serving("embedded:llama3.2", "--prefix-file", kept) as (port, _):
        first = post(port, "/v1/completions", body)
        assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert kept.stat().st_mode & 0o077 == 0
    with serving("embedded:llama3.2", "--prefix-file", kept) as (port, _):
        again = post(port, "/v1/completions", body)
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == again["usage"]["prompt_tokens"] - 1
        assert again["choices"] == first["choices"]
    with serving("embedded", "--prefix-file", kept) as (port, lines):  # another model
        assert "--prefix-file" in "".join(lines)
        assert "it is not used" in "".join(lines)
        other = post(port, "/v1/completions", body)
        assert other["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    with serving("embedded:llama3.2", "--prefix-file", kept) as (port, _):  # it was left as it was
        assert post(port, "/v1/completions", body)["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    with serving("embedded:llama3.2", "--prefix-file", precious) as (port, lines):
        post(port, "/v1/completions", {"prompt": "Once upon a time " * 20, "max_tokens": 1})
        assert "left as it is" in "".join(lines)
    assert precious.read_text() == "mine"
