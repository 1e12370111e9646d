"""Start Python in a process of its own, and limit the memory of such a process from inside."""

import os
import resource
import sys
from contextlib import suppress


def environment() -> dict[str, str]:
    """Return the environment in which a child finds the packages that this process finds."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def limit_memory(most: int) -> None:
    """Limit this process's address space, in bytes. Where the system cannot (macOS), nothing is limited."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
