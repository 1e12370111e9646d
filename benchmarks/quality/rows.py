"""Define the rows of docs/results/quality.md: the chain of methods, its scales, its calibration text."""

from dataclasses import dataclass, field
from typing import Any

from llamita.methods.chain import PRESET_METHODS

GROUP_SIZES = (32, 128, 256)
SEEDS = (0, 1, 2)
REVISION = 1  # raise it when a method computes something else: all cells then run again
SAMPLES, LENGTH = 64, 512  # of calibration text; twice as many changed no row by more than 1 %
TWINS: dict[str, set[str]] = {"plain": set(), "basis": {"basis"}, "pairs": {"pairs"}, "both": {"basis", "pairs"}}
FLOAT = "BF16"
YARDSTICK = "torchao round to nearest"
META = "spinquant + gptq"
REAL_PRESET = "equalize + R4 + qronos + tuned scales"
PRESET = "preset llamita (own text)"


@dataclass(frozen=True)
class Row:
    """Describe one way to quantize.

    Attributes:
        method: the chain, as `llamita quantize --method` takes it; "none" leaves the model as it is.
        scales: the rule by which scales are chosen.
        calibration: "real" for the text that --text names, "self" for what the model writes, "" for none.
        settings: of the chain's methods.
        twins: keys of TWINS on which the row says something.
        on_basis_thrice: whether it runs with every seed on the twin *basis*, too; others run with one there,
            which is enough where rows differ by ten times the spread of seeds.
        on_wikitext: whether the plain model is scored by LM Eval, too, which takes longer than most methods.
    """

    method: str
    scales: str = "search"
    calibration: str = "real"
    settings: dict[str, Any] = field(default_factory=dict)
    twins: tuple[str, ...] = tuple(TWINS)
    on_wikitext: bool = False
    on_basis_thrice: bool = False

    @property
    def is_random(self) -> bool:
        """Tell whether seeds make a difference."""
        return bool(self.calibration)

    def runs(self, twin: str, seed: int) -> bool:
        """Tell whether there is a cell for this twin and seed."""
        if twin not in self.twins:
            return False
        return seed == SEEDS[0] or (self.is_random and (twin == "plain" or (twin == "basis" and self.on_basis_thrice)))


_PLAIN = ("plain",)
_BASIS = ("plain", "basis")
_EACH = ("plain", "basis", "pairs")
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
    "gptq": Row("gptq", twins=_BASIS, on_wikitext=True),
    "gptq (own text)": Row("gptq", calibration="self", twins=_PLAIN),
    "qronos": Row("qronos", twins=_BASIS),
    "R1": Row("spinquant", settings=_rotations("R1"), twins=_BASIS),
    "R2": Row("spinquant", settings=_rotations("R2"), twins=_BASIS),
    "R4": Row("spinquant", calibration="", settings=_rotations("R4"), twins=_BASIS),
    "spinquant (R1 + R2 + R4)": Row("spinquant", twins=_EACH, on_basis_thrice=True),
    META: Row("spinquant+gptq", on_wikitext=True, on_basis_thrice=True),
    "block tuning": Row("tune", twins=_PLAIN),
    "qronos + tuned scales": Row("qronos+tune", settings=_SCALES_ALONE, twins=_BASIS),
    "qronos + block tuning": Row("qronos+tune", twins=_PLAIN),
    "equalize + qronos + tuned scales": Row("equalize+qronos+tune", settings=_SCALES_ALONE, twins=_BASIS),
    "R4 + qronos + tuned scales": Row("spinquant+qronos+tune", settings=_rotations("R4") | _SCALES_ALONE, twins=_PLAIN),
    REAL_PRESET: Row(_PRESET, settings=_PRESET_SETTINGS, on_wikitext=True),
    PRESET: Row(_PRESET, calibration="self", settings=_PRESET_SETTINGS, twins=_PLAIN),
    "spinquant + qronos + tuned scales": Row(
        "spinquant+qronos+tune", settings=_SCALES_ALONE, twins=_EACH, on_basis_thrice=True
    ),
    "equalize + spinquant + qronos + tuned scales": Row(
        "equalize+spinquant+qronos+tune", settings=_SCALES_ALONE, twins=("pairs", "both")
    ),
}
