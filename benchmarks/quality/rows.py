"""The rows of docs/quality.md: which chain of methods, on which scales, calibrated on what."""

from dataclasses import dataclass, field
from typing import Any

from llamita.methods.chain import PRESET_METHODS

GROUP_SIZES = (32, 128, 256)
SEEDS = (0, 1, 2)
REVISION = 1  # of the methods: raised when one of them computes something else, and all cells run again
SAMPLES, LENGTH = 64, 512  # of calibration text; twice as many changed no row by more than 1 %
TWINS: dict[str, set[str]] = {
    "plain": set(),
    "basis": {"basis"},
    "pairs": {"pairs"},
    "both": {"basis", "pairs"},
}
FLOAT = "BF16"
YARDSTICK = "torchao round to nearest"
META = "spinquant + gptq"
REAL_PRESET = "equalize + R4 + qronos + tuned scales"
PRESET = "the same on own text: preset llamita"


@dataclass(frozen=True)
class Row:
    """One way to quantize.

    Attributes:
        method: the chain, as `llamita quantize --method` takes it; "none" leaves the model as it is.
        scales: the rule by which scales are chosen.
        calibration: "real" for the text that --text names, "self" for what the model writes, "" for none.
        settings: of the chain's methods.
        twins: keys of TWINS on which it says something.
        on_wikitext: whether the plain model is scored by LM Eval, too, which takes longer than most methods.
    """

    method: str
    scales: str = "search"
    calibration: str = "real"
    settings: dict[str, Any] = field(default_factory=dict)
    twins: tuple[str, ...] = tuple(TWINS)
    on_wikitext: bool = False

    @property
    def is_random(self) -> bool:
        """Whether seeds make a difference."""
        return bool(self.calibration)


_PLAIN = ("plain",)
_SCALES_ALONE = {"tune.rate": 0}  # no second descent, over codes
_PRESET, _PRESET_SETTINGS = PRESET_METHODS["llamita"]


def _rotations(names: str) -> dict[str, Any]:
    return {"spinquant.rotations": names}


ROWS: dict[str, Row] = {
    FLOAT: Row("none", calibration="", twins=_PLAIN, on_wikitext=True),
    YARDSTICK: Row("rtn", scales="torchao", calibration="", on_wikitext=True),
    "searched scales": Row("rtn", calibration="", on_wikitext=True),
    "weighted scales": Row("rtn", scales="weighted", calibration=""),
    "equalize": Row("equalize", calibration=""),
    "gptq": Row("gptq", on_wikitext=True),
    "gptq (own text)": Row("gptq", calibration="self", twins=_PLAIN),
    "qronos": Row("qronos"),
    "R1": Row("spinquant", settings=_rotations("R1"), twins=("plain", "basis")),
    "R2": Row("spinquant", settings=_rotations("R2"), twins=("plain", "basis")),
    "R4": Row("spinquant", calibration="", settings=_rotations("R4"), twins=("plain", "basis")),
    "spinquant (R1 + R2 + R4)": Row("spinquant"),
    META: Row("spinquant+gptq", on_wikitext=True),
    "block tuning": Row("tune", twins=("plain", "both")),
    "qronos + tuned scales": Row("qronos+tune", settings=_SCALES_ALONE),
    "qronos + block tuning": Row("qronos+tune", twins=_PLAIN),
    "equalize + qronos + tuned scales": Row("equalize+qronos+tune", settings=_SCALES_ALONE),
    "R4 + qronos + tuned scales": Row(
        "spinquant+qronos+tune", settings=_rotations("R4") | _SCALES_ALONE, twins=_PLAIN
    ),
    REAL_PRESET: Row(_PRESET, settings=_PRESET_SETTINGS, on_wikitext=True),
    PRESET: Row(_PRESET, calibration="self", settings=_PRESET_SETTINGS, twins=_PLAIN),
    "spinquant + qronos + tuned scales": Row("spinquant+qronos+tune", settings=_SCALES_ALONE),
    "equalize + spinquant + qronos + tuned scales": Row(
        "equalize+spinquant+qronos+tune", settings=_SCALES_ALONE, twins=("pairs", "both")
    ),
}
