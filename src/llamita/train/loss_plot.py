"""Plot training as an SVG: the loss of every step, its running mean, the held-out losses, stages.

Colors of middle lightness on no background are readable on light and dark pages alike.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate

from llamita.evaluate.charts import line_chart

_LOSS, _HELD_OUT = "#3b82c4", "#d9632a"
_STYLE = f"""
svg {{ font: 12px system-ui, sans-serif; fill: #77777d }} .title {{ font-weight: 600 }}
.left {{ text-anchor: end }} .middle {{ text-anchor: middle }} .grid {{ stroke: #88888e; stroke-opacity: .3 }}
path {{ fill: none; stroke-width: 1.6 }} circle {{ fill: {_HELD_OUT} }}
"""
_MARGIN = 0.05  # of the span of losses, free above and below
_WINDOW, _SHORTEST = 0.05, 5  # of a stage's steps in a running mean, and steps at least

Row = Mapping[str, float]
Points = list[tuple[float, float]]  # step, loss


def loss_plot(history: Sequence[Row]) -> str:
    """Return the plot of the rows that training logged, as an SVG document; empty without a loss among them.

    Args:
        history: rows with "stage" and "step" (counted in its stage), and "loss" or "eval_loss".
    """
    lengths: dict[int, int] = {}
    for row in history:
        lengths[int(row["stage"])] = max(lengths.get(int(row["stage"]), 0), int(row.get("step", 0)))
    begins = list(accumulate(lengths.values(), initial=0))
    places = list(zip(lengths, begins, begins[1:], strict=False))
    losses, held_out = ([_points(history, *at, key) for at in places] for key in ("loss", "eval_loss"))
    values = [loss for points in (*losses, *held_out) for _, loss in points]
    if not values:
        return ""
    spare = _MARGIN * (max(values) - min(values)) or abs(max(values)) * _MARGIN or 1.0
    trained = [(number, points) for number, points in enumerate(losses, 1) if points]
    lines = {f"training, stage {number}": points for number, points in trained}
    faint = list(lines)
    lines |= {f"running mean, stage {number}": _running_mean(points) for number, points in trained}
    key = [("each step and running mean", _LOSS)] if trained else []
    return line_chart(
        "loss (nats a token)",
        {name: [loss for _, loss in points] for name, points in lines.items()},
        "step",
        x={name: [step for step, _ in points] for name, points in lines.items()},
        width=720,
        height=360,
        x_last=max(begins[-1], 1),
        least=min(values) - spare,
        most=max(values) + spare,
        colors=[_LOSS],
        faint=faint,
        marks={f"stage {number}": begin for number, begin in enumerate(begins[1:-1], 2)},
        dots=[(f"step {step:,.0f}: held out {loss:.4f}", step, loss) for points in held_out for step, loss in points],
        key=[*key, *([("held out", _HELD_OUT)] if any(held_out) else [])],
        style=_STYLE,
    )


def _points(history: Sequence[Row], stage: int, begin: int, end: int, key: str) -> Points:
    """Return what was logged of examples under this key, once a step counted from the beginning of training."""
    # the losses of preference pairs are no nats a token
    own = [row for row in history if row["stage"] == stage and not any("rewards/" in name for name in row)]
    rows = [row for row in own if math.isfinite(row.get(key, math.nan))]
    return sorted({end if row.get("after") else begin + row["step"]: row[key] for row in rows}.items())


def _running_mean(points: Points) -> Points:
    """Return the mean around each step; at the ends of a stage, where losses fall, no farther ahead than back."""
    reach, losses = max(_SHORTEST, round(_WINDOW * len(points))) // 2, [loss for _, loss in points]
    windows = [losses[max(0, i - reach) : i + min(reach, i) + 1] for i in range(len(losses))]
    return [(step, sum(w) / len(w)) for (step, _), w in zip(points, windows, strict=True)]
