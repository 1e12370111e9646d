"""Start, pause and end the servers that are measured, each in its own process."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from http_streams import HOST

import llamita

START_SECONDS = 180
END_SECONDS = 60
# Settings of llama.cpp's server for two cores: each slot has its own cache unless it says -kvu, and nothing is copied
# aside. The first is what comes without `tune`.
LLAMA_SERVER = tuple(
    (*choice.split(), "--cache-ram", "0", "--no-ui")
    for choice in ("-fa on -b 512 -ub 512", "-fa on -b 128 -ub 128", "-fa off -b 512 -ub 512", "-fa on -kvu -ub 512")
)


class ServerError(Exception):
    """A server does not start or end as it should."""


@dataclass(frozen=True)
class Kind:
    """A server to start.

    Attributes:
        name: in the records.
        version: of the program.
        command: without the port.
        settings: of the command, for the records.
    """

    name: str
    version: str
    command: tuple[str, ...]
    settings: str


def ours(model: str, threads: int, *options: str) -> Kind:
    """Return llamita's server."""
    settings = ("--threads", str(threads), *options)
    return Kind("llamita", llamita.__version__, (sys.executable, "-m", "llamita", "serve", model, *settings),
                " ".join(settings))  # fmt: skip


def llama_server(program: Path, gguf: Path, threads: int, slots: int, positions: int, options: Sequence[str]) -> Kind:
    """Return llama.cpp's server with so many slots of so many positions each."""
    shown = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    version = re.search(r"version: (.*)", shown.stdout + shown.stderr)
    sizes = ("-t", str(threads), "--parallel", str(slots), "-c", str(slots * positions))
    settings = (*sizes, *options)
    return Kind(f"llama-server {gguf.stem}", version[1] if version else "?",
                (str(program), "-m", str(gguf), *settings), " ".join(settings))  # fmt: skip


class Server:
    """A server that runs.

    Attributes:
        load_seconds: from its start to its first sign of readiness.
    """

    def __init__(self, kind: Kind, log: Path) -> None:
        self.kind = kind
        with socket.create_server((HOST, 0)) as free:
            self.port = free.getsockname()[1]
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        with log.open("wb") as file:
            command = [*kind.command, "--port", str(self.port)]
            self._process = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ)
        self._wait()
        self.load_seconds = time.perf_counter() - began

    def _wait(self) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self._process.poll() is None:
            try:
                if self.get("/health")[0] == 200:
                    return
            except (OSError, HTTPException):
                pass
            time.sleep(0.05)
        self._process.kill()
        said = self._log.read_text("utf-8", "replace").strip().rpartition("\n")[2]
        raise ServerError(f"{self.kind.name}: it does not answer, and said last: {said}")

    def get(self, path: str) -> tuple[int, bytes]:
        """Return the status and the body of a GET request."""
        connection = HTTPConnection(HOST, self.port, timeout=END_SECONDS)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Return the JSON of an answer that is not streamed."""
        connection = HTTPConnection(HOST, self.port, timeout=START_SECONDS)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            data = response.read()
            if response.status != 200:
                raise ServerError(f"{self.kind.name}: {path}: {response.status} {data[:500]!r}")
            return json.loads(data)
        finally:
            connection.close()

    def model(self) -> dict[str, Any]:
        """Return the first model of the list."""
        return json.loads(self.get("/v1/models")[1])["data"][0]

    def cpu_seconds(self) -> float:
        """Return the processor time that the process has taken."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text("utf-8").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident_bytes(self) -> int:
        """Return the memory that the process holds."""
        pages = Path(f"/proc/{self._process.pid}/statm").read_text("utf-8").split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def pause(self) -> None:
        """Take the processor from it, while another one is measured."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it run on."""
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> float:
        """End it as a service manager does; return how many seconds it took."""
        self.resume()
        began = time.perf_counter()
        self._process.send_signal(signal.SIGTERM)
        try:
            status = self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise ServerError(f"{self.kind.name}: it does not end") from None
        if status and self.kind.name == "llamita":
            raise ServerError(f"{self.kind.name}: it ended with {status}; see {self._log}")
        return time.perf_counter() - began
