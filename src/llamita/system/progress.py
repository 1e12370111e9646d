"""Define the callback through which long work reports its progress."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None] | None  # (current item, number done, total)
