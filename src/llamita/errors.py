"""The two errors that reach a user, each one line: what was expected, what was found, what to try."""


class LlamitaError(Exception):
    """Base of the errors that the command line prints as one line, without a traceback."""

    exit_code = 1


class InputError(LlamitaError):
    """The input or an option is at fault: `<tensor or option>: expected X, got Y; try Z`."""

    exit_code = 2


class RunError(LlamitaError):
    """The surroundings are at fault: a full disk, no permission, no network, too little memory."""
