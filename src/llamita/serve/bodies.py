"""A bound on the memory of all requests' bodies together, so that many large ones are refused rather than taken in."""

from collections import Counter

from llamita.serve.errors import busy

ALL_BYTES = 256 << 20
MOST_VALUES = 300_000  # of one body: token ids of all prompts that may wait, and more; a list of two bytes takes 64
VALUE_BYTES = 64


class Bodies:
    """Counts the bytes of bodies that are held.

    Args:
        most: bytes of one body.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.held = 0
        self._by_owner: Counter[str | None] = Counter()

    def take(self, owner: str | None, size: int) -> None:
        """Count bytes of a body; an owner with a key has at most half of all.

        Raises:
            ApiError: 429, there is no room; nothing is counted.
        """
        is_owners = owner is not None and self._by_owner[owner] + size > ALL_BYTES // 2
        if self.held + size > ALL_BYTES or is_owners:
            raise busy("Bodies of other requests take the memory that there is for them.", 1, "bodies_full")
        self.held += size
        self._by_owner[owner] += size

    def free(self, owner: str | None, size: int) -> None:
        """Give back what was counted."""
        self.held -= size
        self._by_owner[owner] -= size
        if not self._by_owner[owner]:
            del self._by_owner[owner]
