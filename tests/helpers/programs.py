"""Python programs in a process of their own."""

import os
import subprocess
import sys

MOST_SECONDS = 60  # a program that takes longer hangs


def run_program(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program's text in a new process, with these environment variables set as well."""
    return subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **variables}, capture_output=True, text=True,
        timeout=MOST_SECONDS,
    )  # fmt: skip
