"""Describe the rotations of a model as a plain value: those in its weights, and the work left for run time.

R1 rotates the residual stream and R2 the values of a head; both are merged into weights (SpinQuant, arXiv
2405.16406). R4 is a run-time rotation: a Hadamard transform of down_proj's input. Tied tables under R1 need one more
product at run time, `head_transform`. `docs/reference/packed-model.md` says how `llamita.json` lists them.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llamita.errors import InputError, shown

NAMES = ("R1", "R2", "R4")  # in the order in which they are listed


@dataclass(frozen=True)
class Rotations:
    """List the rotations of a model.

    Attributes:
        names: some of NAMES, in their order.
        r4_size: length of the run-time transform, the inputs of down_proj; None without R4.
        head_transform: (hidden, hidden) M, float32, float16 or bf16 bits, only with R1 and tied tables. The head
            reads M·x of the final norm's output x.
    """

    names: tuple[str, ...] = ()
    r4_size: int | None = None
    head_transform: np.ndarray | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.names != tuple(name for name in NAMES if name in self.names):
            raise InputError("rotations", f"some of {', '.join(NAMES)}, in this order", ", ".join(self.names))
        has_size = type(self.r4_size) is int and self.r4_size > 0
        if has_size != ("R4" in self.names) or not (has_size or self.r4_size is None):
            raise InputError("rotations: R4: size", "a length with R4 alone", f"{self.r4_size!r}")
        transform = self.head_transform
        if transform is not None and (
            "R1" not in self.names or transform.ndim != 2 or transform.shape[0] != transform.shape[1]
        ):
            raise InputError("rotations", "a square transform with R1", f"{transform.shape}")

    @property
    def acts_at_run_time(self) -> bool:
        """Return whether a runtime must do more than a plain Llama does."""
        return self.r4_size is not None or self.head_transform is not None

    def to_list(self) -> list[dict[str, Any]]:
        """Return the list for `llamita.json`; `from_list` is the inverse, except for the head's transform."""
        sizes = {"R4": {"size": self.r4_size}}
        return [{"name": name, **sizes.get(name, {})} for name in self.names]

    @classmethod
    def from_list(cls, values: Any, head_transform: np.ndarray | None = None) -> "Rotations":
        """Read the list of `llamita.json`; unknown entries raise InputError."""
        if not isinstance(values, list):
            raise InputError("rotations", "a list", shown(values))
        size = None
        for value in values:
            keys = {"name", "size"} if isinstance(value, dict) and value.get("name") == "R4" else {"name"}
            if not isinstance(value, dict) or set(value) != keys or value["name"] not in NAMES:
                raise InputError("rotations", f"some of {', '.join(NAMES)}", shown(value), "try a newer llamita")
            size = value.get("size", size)
        return cls(tuple(value["name"] for value in values), size, head_transform)
