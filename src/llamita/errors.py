"""The two errors that reach a user, each one line: what is wrong, what was expected, what was found, what to try."""

from typing import Self

_LONGEST = 80  # characters of a value from outside in a message


class LlamitaError(Exception):
    """Base of the errors that the command line prints as one line, without a traceback.

    The line is `<where>: expected <expected>, got <got>; <hint>`. Parts that are absent are left out, so that `where`
    alone can be a whole sentence.

    Args:
        where: the tensor, option or file at fault, or a sentence.
        expected: what is accepted there.
        got: what was found; `shown` makes a value fit for it.
        hint: what to do about it, such as "try --group-size 32".
    """

    exit_code = 1

    def __init__(
        self, where: str, expected: str | None = None, got: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(where)
        self.where, self.expected, self.got, self.hint = where, expected, got, hint

    def __str__(self) -> str:
        facts = [f"expected {self.expected}"] if self.expected is not None else []
        facts += [f"got {self.got}"] if self.got is not None else []
        line = f"{self.where}: {', '.join(facts)}" if facts else self.where
        return line if self.hint is None else f"{line}; {self.hint}"

    def at(self, where: str) -> Self:
        """Return the same error about another place, such as the option through which a value came."""
        return type(self)(where, self.expected, self.got, self.hint)

    def within(self, outer: str) -> Self:
        """Return the same error with its place named from outside in: `<outer>: <where>: expected …`."""
        return self.at(f"{outer}: {self.where}")


class InputError(LlamitaError):
    """The input or an option is at fault."""

    exit_code = 2


class RunError(LlamitaError):
    """The surroundings are at fault: a full disk, no permission, no network, too little memory."""


def shown(value: object, longest: int = _LONGEST) -> str:
    """Return a value from a file or a caller as Python writes it, cut to a length that a message can bear."""
    return repr(value)[:longest]


def first_line(error: Exception) -> str:
    """Return the first line of another library's message, or the error's type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
