"""The type of the callback through which long work reports how far it is."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None] | None  # what is being done, how many of it are done, of how many
