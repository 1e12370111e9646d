"""Write values as text for people: sizes, counts, and strangers' names made harmless."""


def printable(text: str) -> str:
    """Return text of models and strangers on one line, with escapes for what could move a cursor or hide."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def counted(count: int, noun: str) -> str:
    """Write a number of things: "1 step", "2 steps"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def megabytes(count: float) -> str:
    """Write bytes as MB (10^6 bytes), with three figures or more."""
    return f"{count / 1e6:,.1f} MB" if count < 1e8 else f"{count / 1e6:,.0f} MB"
