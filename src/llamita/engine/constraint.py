"""What a grammar must offer so that the sampler keeps to it. `serve/grammar.py` has llguidance's."""

from typing import Protocol, Self, runtime_checkable

import numpy as np


@runtime_checkable
class Constraint(Protocol):
    """A grammar together with the tokens that it has accepted. It changes by `accept` alone.

    `allowed` and `accept` raise InputError or RunError if the grammar has failed: generation never goes on without it.
    """

    def allowed(self) -> np.ndarray:
        """Return which tokens may come next: bool (vocab,), with the end tokens where the text may end."""
        ...

    def accept(self, token: int) -> None:
        """Add a token that `allowed` has, perhaps an end token."""
        ...

    def forced(self, limit: int) -> list[int]:
        """Return up to `limit` tokens that must come next one after the other; [] where there is a choice.

        They serve as a draft, so nothing depends on them but speed. It raises nothing.
        """
        ...

    def copy(self) -> Self:
        """Return an independent one in the same state."""
        ...
