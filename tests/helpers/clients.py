"""Clients of the server with packages of their own: programs in the environment that `make test-clients` builds."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

PYTHON = ROOT / ".venv-clients" / "bin" / "python"
PROGRAMS = ROOT / "tests" / "clients" / "programs"
MOST_SECONDS = 180  # LiteLLM alone takes 10 to be imported on a busy machine

needs_clients = pytest.mark.skipif(
    not PYTHON.exists(), reason="the clients' own environment is missing: run `make test-clients`"
)


def run_client(program: str, address: str, cwd: Path) -> dict[str, Any]:
    """Run a program of `tests/clients/programs` against an address; return the JSON object that it prints."""
    done = subprocess.run(
        [PYTHON, PROGRAMS / program, address], capture_output=True, text=True, timeout=MOST_SECONDS,
        cwd=cwd, env=environment(cwd),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def environment(home: Path) -> dict[str, str]:
    """Return variables for a client's process: nothing of this one's settings, and a home of its own."""
    return {"PATH": os.environ["PATH"], "HOME": str(home), "NO_PROXY": "127.0.0.1", "PYTHONUNBUFFERED": "1"}
