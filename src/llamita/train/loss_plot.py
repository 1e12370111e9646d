"""The course of training as an SVG: the loss of every step, its running mean, the held-out losses, stages.

Colors of middle lightness on no background: readable on light and dark pages alike.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from llamita.evaluate.charts import Markup, tag, ticks

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 720, 360, 58, 18, 34, 46  # the last four: margins
_TEXT, _GRID, _HELD_OUT = "#77777d", "#88888e", "#d9632a"
_MEAN = {"stroke": "#3b82c4", "stroke_width": 2}
_STEPS = {"stroke": "#3b82c4", "stroke_width": 1, "stroke_opacity": 0.5}
_MARGIN = 0.05  # of the span of losses, free above and below
_WINDOW, _SHORTEST = 0.05, 5  # of a stage's steps in a running mean, and steps at least

Row = Mapping[str, float]
Points = list[tuple[float, float]]  # step, loss


def loss_plot(history: Sequence[Row]) -> str:
    """The rows that training logged, as an SVG document; empty where no loss is among them.

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
    canvas = _Canvas(max(begins[-1], 1), min(values) - spare, max(values) + spare)
    parts = [*canvas.axes(), *canvas.boundaries(begins[1:-1])]
    parts += [canvas.line(points, _STEPS) for points in losses if points]
    parts += [canvas.line(_running_mean(points), _MEAN) for points in losses if points]
    parts += [canvas.dot(step, loss) for points in held_out for step, loss in points]
    parts.append(_legend(any(losses), any(held_out)))
    look = {"font_family": "system-ui, sans-serif", "font_size": 12, "role": "img"}
    size = {"viewBox": f"0 0 {_WIDTH} {_HEIGHT}", "width": _WIDTH, "height": _HEIGHT}
    return tag("svg", *parts, xmlns="http://www.w3.org/2000/svg", **size, **look) + "\n"


def _points(history: Sequence[Row], stage: int, begin: int, end: int, key: str) -> Points:
    """What was logged of examples under this key, once a step counted from the beginning of training."""
    own = [row for row in history if row["stage"] == stage and not any("rewards/" in name for name in row)]
    rows = [row for row in own if math.isfinite(row.get(key, math.nan))]  # those of pairs are no nats a token
    return sorted({end if row.get("after") else begin + row["step"]: row[key] for row in rows}.items())


def _running_mean(points: Points) -> Points:
    """Around each step; where a stage begins and losses fall, no farther ahead than back."""
    reach, losses = max(_SHORTEST, round(_WINDOW * len(points))) // 2, [loss for _, loss in points]
    windows = [losses[max(0, i - reach) : i + min(reach, i) + 1] for i in range(len(losses))]
    return [(step, sum(w) / len(w)) for (step, _), w in zip(points, windows, strict=True)]


class _Canvas:
    """Where steps and losses lie in the picture."""

    def __init__(self, steps: int, low: float, high: float) -> None:
        self._steps, self._low, self._high = steps, low, high

    def x(self, step: float) -> float:
        return round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * step / self._steps, 1)

    def y(self, loss: float) -> float:
        share = (loss - self._low) / (self._high - self._low)
        return round(_HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * share, 1)

    def axes(self) -> list[Markup]:
        parts, ends = [], {"x1": _LEFT, "x2": _WIDTH - _RIGHT}
        for tick in ticks(self._low, self._high):
            y = self.y(tick)
            parts.append(tag("line", **ends, y1=y, y2=y, stroke=_GRID, stroke_opacity=0.3))
            parts.append(_text(f"{tick:.4g}", _LEFT - 8, y + 4, "end"))
        whole = [tick for tick in ticks(0, self._steps) if tick == int(tick)]
        parts += [_text(f"{tick:,.0f}", self.x(tick), _HEIGHT - _BOTTOM + 18) for tick in whole]
        parts.append(_text("step", (_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 8))
        turned = f"translate(14 {(_TOP + _HEIGHT - _BOTTOM) / 2}) rotate(-90)"
        return [*parts, tag("g", _text("loss (nats a token)", 0, 0), transform=turned)]

    def boundaries(self, begins: Sequence[int]) -> list[Markup]:
        """Where a stage ends and the next begins."""
        parts, style = [], {"y1": _TOP, "y2": _HEIGHT - _BOTTOM, "stroke": _GRID, "stroke_dasharray": "4 4"}
        for number, x in enumerate(map(self.x, begins), 2):
            parts += [tag("line", x1=x, x2=x, **style), _text(f"stage {number}", x + 6, _TOP + 12, "start")]
        return parts

    def line(self, points: Points, style: Mapping[str, Any]) -> Markup:
        path = "M" + "L".join(f"{self.x(step)},{self.y(loss)}" for step, loss in points)
        return tag("path", d=path, fill="none", **style)

    def dot(self, step: float, loss: float) -> Markup:
        title = tag("title", f"step {step:,.0f}: held out {loss:.4f}")
        return tag("g", title, tag("circle", cx=self.x(step), cy=self.y(loss), r=4, fill=_HELD_OUT))


def _text(text: str, x: float, y: float, anchor: str = "middle") -> Markup:
    return tag("text", text, x=x, y=y, text_anchor=anchor, fill=_TEXT)


def _legend(has_losses: bool, has_held_out: bool) -> Markup:
    parts, x = list[Markup](), float(_LEFT)
    for text, style in (("training", _STEPS), ("running mean", _MEAN)) if has_losses else ():
        parts.append(tag("line", x1=x, x2=x + 22, y1=16, y2=16, **style))
        parts.append(_text(text, x + 28, 20, "start"))
        x += 52 + 6.2 * len(text)  # a letter of 12 pixels is about so wide
    if has_held_out:
        parts.append(tag("circle", cx=x + 4, cy=16, r=4, fill=_HELD_OUT))
        parts.append(_text("held out", x + 14, 20, "start"))
    return tag("g", *parts)
