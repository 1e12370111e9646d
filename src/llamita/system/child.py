"""Start Python in a process of its own, and limit the memory and the time of such a process from inside."""

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any


def environment() -> dict[str, str]:
    """Return the environment in which a child finds the packages that this process finds."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def limit_memory(most: int) -> None:
    """Limit this process's address space, in bytes. Where the system cannot (macOS), nothing is limited."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def answer_lines(answer: Callable[[Any], Any], seconds: float, memory: int) -> None:
    """Answer each line of stdin, a JSON value, with a line on stdout, until the input ends.

    Args:
        answer: makes the value of an answer of that of a request.
        seconds: of CPU time for each. A request that takes more ends the process by SIGPROF, also inside of a long
            operation.
        memory: bytes of address space.
    """
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # a parent may have had it ignored or blocked
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    limit_memory(memory)
    replies = sys.stdout  # of this process alone: nothing else is written there
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        text = json.dumps(answer(json.loads(line)))
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(text + "\n")
        replies.flush()
