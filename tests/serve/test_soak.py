"""Many clients for long: nothing is lost or wrong, and memory, threads and files do not grow.

The long run takes LLAMITA_SOAK_MINUTES, 10 by default.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from statistics import median
from threading import Event, Thread
from typing import Any

import pytest
import soak

from llamita.serve import start
from llamita.system.child import environment

MINUTES = float(os.environ.get("LLAMITA_SOAK_MINUTES", "10"))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("soak")
    soak.write_adapters(directory)
    return directory


@pytest.fixture(scope="module")
def answers(adapters: Path) -> dict[int, list[Any]]:
    """What the engine alone says."""
    llm = soak.load(adapters)
    state = start.make_state(start.Models({"embedded": llm}), start.Keys(), start.Limits(), start.Bounds())
    return {number: soak.expected(state, llm, number) for number in range(soak.SPECS)}


@pytest.fixture
def server(adapters: Path) -> Iterator[tuple[int, int]]:
    """A server in a process of its own; its port and its process."""
    command = [sys.executable, soak.__file__, str(adapters)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    ) as process:
        assert process.stdout
        yield int(process.stdout.readline()), process.pid
        process.communicate("")
        assert process.returncode == 0


class Watch(Thread):
    """Looks at a process each quarter of a second.

    Attributes:
        seen: (resident bytes, threads, open files), in order.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.seen: list[tuple[int, int, int]] = []
        self._pid, self.over = pid, Event()

    def run(self) -> None:
        while not self.over.wait(0.25):
            self.seen.append(look(self._pid))


def look(pid: int) -> tuple[int, int, int]:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    rss = int(status["VmRSS"].split()[0]) * 1024
    return rss, int(status["Threads"]), len(os.listdir(f"/proc/{pid}/fd"))


def ask(port: int, path: str) -> str:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path, headers={"Authorization": f"Bearer {soak.KEYS[0]}"})
    data = connection.getresponse().read().decode()
    connection.close()
    return data


def until_idle(port: int) -> dict[str, Any]:
    end = time.monotonic() + 60
    while True:
        (load,) = json.loads(ask(port, "/v1/load"))["models"]
        if not load["running"] and not load["waiting"] and not load["paused"]:
            return load
        assert time.monotonic() < end, load
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks at a process as Linux shows it")
@pytest.mark.parametrize(
    ("clients", "seconds"), [(12, 15), pytest.param(32, MINUTES * 60, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_under_mixed_load(
    server: tuple[int, int], answers: dict[int, list[Any]], clients: int, seconds: float, capsys: Any
) -> None:
    port, pid = server
    warm = soak.run_clients(port, clients, seconds / 4, answers)
    assert not warm.wrong
    until_idle(port)
    before = look(pid)
    watch = Watch(pid)
    watch.start()
    result = soak.run_clients(port, clients, seconds, answers)
    watch.over.set()
    assert not result.wrong
    load = until_idle(port)
    end = time.monotonic() + 20
    while (after := look(pid))[1:] > before[1:] and time.monotonic() < end:  # connections that are being closed
        time.sleep(0.1)
    third = len(watch.seen) // 3
    early, late = (median(rss for rss, _, _ in part) for part in (watch.seen[:third], watch.seen[-third:]))
    with capsys.disabled():
        paused = load["counters"]["preemptions"]
        print(f"\n{dict(result.counts)}; {paused} pauses; memory {early / 2**20:.1f} -> {late / 2**20:.1f} MiB;"
              f" threads, files {before[1:]} -> {after[1:]}")  # fmt: skip
    assert load["used"] == 0
    assert load["counters"]["preemptions"] > 0  # the memory was too small for all
    assert after[1] <= before[1] + 2  # the mask's and the helpers' threads begin with their first use
    assert after[2] <= before[2] + 4
    assert 'llamita_http_requests_total{status="200"}' in ask(port, "/metrics")
    assert 'llamita_http_requests_total{status="5' not in ask(port, "/metrics")
    if seconds > 60:
        assert abs(late - early) < 0.05 * early
