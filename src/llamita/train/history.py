"""Sum up the stages of a training from what was logged."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_ENDS = 5  # steps; the first and the last loss are means of as many


@dataclass(frozen=True)
class StageResult:
    """The losses of one stage.

    Attributes:
        first, last: means of the training loss over its first and last steps.
        held_out: nats a learned token at its end; None if nothing was held out.
        preferred: the share of held-out pairs whose preferred answer the model rates higher; None without pairs.
    """

    stage: int
    first: float
    last: float
    held_out: float | None
    preferred: float | None


def _result(number: int, rows: list[dict[str, Any]]) -> StageResult:
    losses = [row["loss"] for row in rows if "loss" in row]
    ends = losses[:_ENDS], losses[-_ENDS:]
    first, last = (sum(part) / len(part) if part else 0.0 for part in ends)

    def newest(name: str) -> float | None:
        return next((row[name] for row in reversed(rows) if name in row), None)

    held_out = next((r["eval_loss"] for r in rows if r.get("is_end") and r["after"] == number), None)
    return StageResult(number, first, last, held_out, newest("eval_rewards/accuracies"))


def stage_results(history: Iterable[dict[str, Any]]) -> list[StageResult]:
    """Return the result of each stage, in order."""
    by_stage: dict[int, list[dict[str, Any]]] = {}
    for row in history:
        by_stage.setdefault(int(row["stage"]), []).append(row)
    return [_result(number, rows) for number, rows in sorted(by_stage.items())]
