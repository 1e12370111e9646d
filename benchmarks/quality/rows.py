"""The rows of docs/quality.md: which chain of methods, on which scales, calibrated on what."""

from dataclasses import dataclass, field
from typing import Any

GROUP_SIZES = (32, 128, 256)
SEEDS = (0, 1, 2)
SAMPLES, LENGTH = 128, 512  # of calibration text
TWINS: dict[str, set[str]] = {
    "plain": set(),
    "basis": {"basis"},
    "pairs": {"pairs"},
    "both": {"basis", "pairs"},
}
YARDSTICK = "torchao round to nearest"
META = "spinquant + gptq"


@dataclass(frozen=True)
class Row:
    """One way to quantize.

    Attributes:
        method: the chain, as `llamita quantize --method` takes it.
        scales: the rule by which scales are chosen.
        calibration: "real" for the text that --text names, "self" for what the model writes, "" for none.
        settings: of the chain's methods.
        twins: keys of TWINS on which it says something.
    """

    method: str
    scales: str = "search"
    calibration: str = "real"
    settings: dict[str, Any] = field(default_factory=dict)
    twins: tuple[str, ...] = tuple(TWINS)

    @property
    def is_random(self) -> bool:
        """Whether seeds make a difference."""
        return bool(self.calibration)


_SCALES_ALONE = {"tune.rate": 0}  # no second descent, over codes


def _rotations(names: str) -> dict[str, Any]:
    return {"spinquant.rotations": names}


ROWS: dict[str, Row] = {
    YARDSTICK: Row("rtn", scales="torchao", calibration=""),
    "searched scales": Row("rtn", calibration=""),
    "weighted scales": Row("rtn", scales="weighted", calibration=""),
    "equalize": Row("equalize", calibration=""),
    "gptq": Row("gptq"),
    "gptq, own text": Row("gptq", calibration="self", twins=("plain",)),
    "qronos": Row("qronos"),
    "qronos, own text": Row("qronos", calibration="self", twins=("plain",)),
    "R1": Row("spinquant", settings=_rotations("R1")),
    "R2": Row("spinquant", settings=_rotations("R2")),
    "R4": Row("spinquant", settings=_rotations("R4")),
    "spinquant (R1, R2, R4)": Row("spinquant"),
    META: Row("spinquant+gptq"),
    "block tuning": Row("tune"),
    "qronos + tuned scales": Row("qronos+tune", settings=_SCALES_ALONE),
    "qronos + tuned scales, own text": Row("qronos+tune", calibration="self", settings=_SCALES_ALONE),
    "qronos + block tuning": Row("qronos+tune"),
    "equalize + qronos + tuned scales": Row("equalize+qronos+tune", settings=_SCALES_ALONE),
    "R4 + qronos + tuned scales": Row("spinquant+qronos+tune", settings=_rotations("R4") | _SCALES_ALONE),
    "spinquant + qronos + tuned scales": Row("spinquant+qronos+tune", settings=_SCALES_ALONE),
}
