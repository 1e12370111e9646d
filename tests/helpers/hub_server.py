"""A stand-in for the Hugging Face hub: its HTTP interface, as far as models are read, on this machine.

The library reads the hub's address once, when it is imported, so the commands of a test run in a child process.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

_CHILD = """
import contextlib, io, json, sys
from llamita import cli
for line in sys.stdin:
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            from llamita.commands import console
            console.out.file, console.err.file = out, err
            cli.main(json.loads(line))
        except SystemExit as error:
            code = error.code or 0
    sys.__stdout__.write(json.dumps([code, out.getvalue(), err.getvalue()]) + "\\n")
    sys.__stdout__.flush()
"""
_SECONDS = 120  # that a child may take; it is waited for, never measured


@dataclass
class Repository:
    """A repository: its files by commit, and what branches and tags stand for."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    gated: bool = False

    def commit(self, files: dict[str, bytes], *names: str) -> str:
        """Add a commit under these names; return its hash."""
        sha = hashlib.sha1(b"".join(name.encode() + data for name, data in sorted(files.items()))).hexdigest()
        self.commits[sha] = files
        self.names |= dict.fromkeys(names or ("main",), sha)
        return sha

    def file(self, name: str) -> bytes:
        """Return a file of the main branch."""
        return self.commits[self.names["main"]][name]

    def find(self, revision: str) -> str | None:
        """Return the commit of a branch, a tag or a hash, None if there is none."""
        sha = self.names.get(revision, revision)
        return sha if sha in self.commits else None


@dataclass
class Result:
    """What a command did: its exit code and what it printed."""

    code: int
    out: str
    err: str


class Hub:
    """The stand-in.

    Attributes:
        repositories: by name.
        requests: method, path and range of each request for a file, in order.
        sent: the bytes of each file that were sent.
        stops_after: send only so many bytes of a file, and keep the connection open.
        cuts_after: send only so many bytes of a file, once, and close the connection.
    """

    def __init__(self, cache: Path) -> None:
        self.repositories: dict[str, Repository] = defaultdict(Repository)
        self.requests: list[tuple[str, str, str | None]] = []
        self.sent: dict[str, int] = defaultdict(int)
        self.stops_after: int | None = None
        self.cuts_after: int | None = None
        self.stopped = threading.Event()
        self.cache = cache
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """End the server."""
        self._server.shutdown()
        self._server.server_close()

    def fetched(self) -> list[str]:
        """Return the files of which anything was sent, without their folders, and forget them."""
        found = sorted({Path(path).name for path in self.sent})
        self.sent.clear()
        return found

    def environment(self, offline: bool) -> dict[str, str]:
        """Return a child's environment, in which this is the hub."""
        kept = {k: v for k, v in os.environ.items() if not k.upper().endswith("_PROXY") and not k.startswith("HF_")}
        return kept | {
            "HF_ENDPOINT": f"http://127.0.0.1:{self._server.server_port}", "HF_HOME": str(self.cache),
            "HF_HUB_OFFLINE": str(int(offline)), "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "COLUMNS": "200",
        }  # fmt: skip

    def run(self, *commands: list[Any], offline: bool = False) -> list[Result]:
        """Run command lines, one after the other in one child process."""
        lines = "".join(json.dumps([str(word) for word in words]) + "\n" for words in commands)
        child = subprocess.run([sys.executable, "-c", _CHILD], input=lines, env=self.environment(offline),
                               capture_output=True, text=True, timeout=_SECONDS)  # fmt: skip
        results = [Result(*json.loads(line)) for line in child.stdout.splitlines()]
        assert len(results) == len(commands), child.stderr
        return results

    def interrupt(self, command: list[Any], sent: int) -> None:
        """Run a command line, and kill its process once so many bytes of a file were sent."""
        self.stops_after = sent
        self.stopped.clear()
        child = subprocess.Popen([sys.executable, "-m", "llamita", *map(str, command)], env=self.environment(False),
                                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        try:
            assert self.stopped.wait(_SECONDS)
            time.sleep(1)  # for the client to write what it has
        finally:
            child.kill()
            child.wait()
            self.stops_after = None


@contextmanager
def serving(cache: Path) -> Iterator[Hub]:
    """Yield the stand-in, with a cache for its children."""
    hub = Hub(cache)
    try:
        yield hub
    finally:
        hub.close()


def files_of(directory: Path) -> dict[str, bytes]:
    """Return the files of a directory as a commit takes them."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer()

        def do_HEAD(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self._refuse(404, None)

        def log_message(self, format: str, *args: Any) -> None:
            """Print nothing."""

        def _answer(self) -> None:
            words = [unquote(word) for word in urlsplit(self.path).path.strip("/").split("/")]
            is_api = words[:2] == ["api", "models"]
            owner, name, *rest = words[2:] if is_api else words
            repository = hub.repositories.get(f"{owner}/{name}")
            kind, revision, *path = rest or ["revision", "main"]
            if repository is None or kind not in ("revision", "tree", "resolve"):
                return self._refuse(404, "RepoNotFound")
            commit = repository.find(revision)
            if commit is None:
                return self._refuse(404, "RevisionNotFound")
            files = repository.commits[commit]
            if kind == "resolve":
                return self._file(repository, commit, "/".join(path))
            sizes = [(name, len(data)) for name, data in files.items()]
            if kind == "tree":
                return self._json([{"type": "file", "path": n, "size": s, "oid": n} for n, s in sizes])
            siblings = [{"rfilename": n, "size": s} for n, s in sizes]
            return self._json({"id": f"{owner}/{name}", "sha": commit, "siblings": siblings, "tags": []})

        def _file(self, repository: Repository, commit: str, name: str) -> None:
            data, wanted = repository.commits[commit].get(name), self.headers.get("Range")
            hub.requests.append((self.command, name, wanted))
            if repository.gated:
                return self._refuse(403, "GatedRepo")
            if data is None:
                return self._refuse(404, "EntryNotFound")
            start, stop = 0, len(data)
            if wanted:
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                start, stop = int(first), min(int(last) + 1 if last else stop, stop)
            self.send_response(206 if wanted else 200)
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", commit)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(stop - start))
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
            self.end_headers()
            if self.command == "GET":
                self._send(name, data[start:stop])
            return None

        def _send(self, name: str, data: bytes) -> None:
            part = data[: hub.stops_after or hub.cuts_after]
            hub.sent[name] += len(part)
            self.wfile.write(part)
            if len(part) == len(data):
                return
            self.wfile.flush()
            self.close_connection = True
            if hub.stops_after:
                hub.stopped.set()
                time.sleep(_SECONDS)
            hub.cuts_after = None

        def _refuse(self, status: int, code: str | None) -> None:
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
                self.send_header("X-Error-Message", f"refused: {code}")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _json(self, value: Any) -> None:
            data = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

    return Handler
