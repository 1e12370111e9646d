"""The harness that measures the server: its client stamps what arrives, and tiny cases run."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

pytest.importorskip("uvicorn", reason="llamita[serve] is not installed")
sys.path.insert(0, str(ROOT / "benchmarks" / "server"))
from http_streams import Stream


def test_the_client_finds_events_wherever_the_data_is_cut() -> None:
    """An event counts when its last byte is there."""
    first = {"choices": [{"text": "ä"}]}
    last = {"choices": [{"text": "b", "finish_reason": "length"}], "usage": {"completion_tokens": 2}}
    lines = [f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode() for event in (first, last)]
    chunks = [lines[0][:9], lines[0][9:] + lines[1], b": ping\n\n", b"data: [DONE]\n\n"]
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    raw = head + b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in [*chunks, b""])

    async def cut_at(place: int) -> None:
        stream = Stream(b"")
        for part in (raw[:place], raw[place:]):
            stream.data_received(part)
        stream.connection_lost(None)
        reply = stream.reply()
        assert (reply.status, reply.text, reply.tokens) == (200, "äb", 2)
        assert len(reply.gaps) == 1
        assert reply.started < reply.first_seconds + reply.started <= reply.ended

    for place in range(1, len(raw)):
        asyncio.run(cut_at(place))


def test_an_answer_that_breaks_off_has_no_tokens() -> None:
    async def broken() -> None:
        stream = Stream(b"")
        stream.data_received(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1c\r\n")
        stream.data_received(b'data: {"choices":[{"text":"a')
        stream.connection_lost(None)
        assert stream.reply().tokens == 0

    asyncio.run(broken())


def test_tiny_cases_run(tmp_path: Path) -> None:
    history = tmp_path / "history.jsonl"
    command = [sys.executable, str(ROOT / "benchmarks" / "server.py"), "embedded:llama3.2", "--small", "--strict"]
    options = ["--only", "equality,load,second_turn", "--workdir", str(tmp_path), "--history", str(history)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in history.read_text("utf-8").splitlines()]
    assert [line["case"] for line in lines] == ["equality", "load", "load", "second_turn"]
    equality, *loads, second = lines
    assert equality["equal"] == equality["requests"] == 4
    for line in loads:
        assert line["failures"] == 0
        assert line["first_token"]["count"] == line["requests"]
        assert line["machine"]["threads"] == 2
    assert second["cached_share"] > 0.9
    assert done.stdout.count("| clients |") == 1
