"""How many threads the kernels use, and the one place where a wrong number becomes an error for the user."""

from llamita import _native
from llamita.errors import InputError, RunError


def use_threads(count: int | None) -> int:
    """Set the kernels' threads for the whole process, start them, and say how many there are.

    Args:
        count: 1 to 1024; None for those in use, at first LLAMITA_THREADS or else every core.

    Raises:
        InputError: the count, or LLAMITA_THREADS, is not 1 to 1024.
        RunError: the system refuses to start so many.
    """
    try:
        if count is not None:
            _native.set_threads(count)
        return _native.threads()
    except ValueError as error:
        raise InputError(str(error)) from None
    except TypeError:  # what the binding says of a number outside of size_t
        raise InputError("threads", "1 to 1024", f"{count}") from None
    except (RuntimeError, MemoryError) as error:
        raise RunError(str(error) or "threads: expected to start them, got too little memory") from None


def remark(count: int | None = None) -> str | None:
    """What to say of so many threads, by default those in use, if they are more than the usable CPUs."""
    cpus = _native.usable_cpus()
    count = _native.threads() if count is None else count
    if count <= cpus:
        return None
    return f"threads: {count} on {cpus} usable CPUs will be slower than {cpus}"
