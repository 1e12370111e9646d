"""Set the number of the kernels' threads; turn a wrong number into an error for the user."""

from llamita import _native
from llamita.errors import InputError, RunError


def use_threads(count: int | None) -> int:
    """Set the kernels' threads for the whole process, start them, and return their number.

    Args:
        count: 1 to 1024; None keeps the number in use, at first LLAMITA_THREADS or else every core.

    Raises:
        InputError: the count, or LLAMITA_THREADS, is not 1 to 1024.
        RunError: the system refuses to start that many.
    """
    try:
        if count is not None:
            _native.set_threads(count)
        return _native.threads()
    except ValueError as error:
        raise InputError(str(error)) from None
    except TypeError:  # the binding's error for a number outside of size_t
        raise InputError("threads", "1 to 1024", f"{count}") from None
    except (RuntimeError, MemoryError) as error:
        raise RunError(str(error) or "threads: expected to start them, got too little memory") from None


def remark(count: int | None = None) -> str | None:
    """Return a warning if `count`, by default the threads in use, exceeds the usable CPUs, else None."""
    cpus = _native.usable_cpus()
    count = _native.threads() if count is None else count
    if count <= cpus:
        return None
    return f"threads: {count} on {cpus} usable CPUs will be slower than {cpus}"
