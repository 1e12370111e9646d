"""Define the callbacks through which long work reports to the user; library code never prints."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None] | None  # (current item, number done, total)
Note = Callable[[str], None] | None  # gets one line for the user
