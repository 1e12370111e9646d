"""Draw charts as SVG: lines over a common axis, and bars with intervals.

Jinja's templates in this folder escape every value. No script, no font, nothing from outside.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from llamita.text.printable import printable

COLORS = ("#7a7a80", "#0a6ebd", "#c2410c", "#15803d", "#7e22ce", "#b45309", "#0e7490", "#be185d")
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 10, 24, 34  # margins in pixels
_TICKS = 4  # about so many lines across a linear axis
_LETTER = 6.2  # approximate width of a letter of 11 pixels
_BAR, _GAP = 16, 6  # height of a bar, and the gap after it
_LONGEST_BAR = 320


def _visible(value: object) -> object:
    """Make the control characters of a text visible: names and texts come from strangers."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    finalize=_visible,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(template: str, **values: Any) -> Markup:
    """Fill in a template of this folder; a text is escaped unless it is `Markup`."""
    return Markup(_TEMPLATES.get_template(template).render(**values))


@dataclass(frozen=True)
class _Frame:
    """The part of a picture inside its axes: from 0 to `last` across, from `low` to `high` upward."""

    right: int
    bottom: int
    last: float
    low: float
    high: float
    is_log: bool

    def x(self, place: float) -> float:
        return round(_LEFT + (self.right - _LEFT) * place / max(1, self.last), 1)

    def y(self, value: float) -> float:
        at = (value - self.low) / (self.high - self.low)
        if self.is_log:
            at = math.log10(max(value, self.low) / self.low) / math.log10(self.high / self.low)
        return round(self.bottom - (self.bottom - _TOP) * at, 1)

    def path(self, places: Sequence[float], values: Sequence[float]) -> str:
        points = [f"{self.x(place)},{self.y(value)}" for place, value in zip(places, values, strict=True)]
        return f"M{points[0]}h0.1" if len(points) == 1 else "M" + "L".join(points)


def line_chart(
    title: str, lines: Mapping[str, Sequence[float]], x_label: str, *, x: Mapping[str, Sequence[float]] | None = None,
    width: int = 460, height: int = 220, log: bool = False, x_last: int | None = None, least: float = 0.0,
    most: float | None = None, colors: Sequence[str] = COLORS, faint: Collection[str] = (),
    marks: Mapping[str, float] | None = None, dots: Sequence[tuple[str, float, float]] = (),
    key: Sequence[tuple[str, str]] = (), style: str = "",
) -> Markup:  # fmt: skip
    """Draw lines through values.

    Args:
        x: the place of every value on the axis below; by default they are spread evenly over it.
        log: make the axis on the left logarithmic if values differ tenfold; values that are not positive are
            drawn at its lower end.
        x_last: where the axis below ends; by default the number of values less one.
        least, most: where the axis on the left begins and ends; by default zero and the largest value.
        faint: names of lines to draw half transparent.
        marks: vertical lines, by label.
        dots: label, place and value of single points.
        key: labels and colors of a legend.
        style: CSS for an SVG that is a document by itself.
    """
    values = [value for line in lines.values() for value in line] + [value for _, _, value in dots]
    log = log and max(values) > 10 * min((value for value in values if value > 0), default=math.inf)
    low, high = _range(values, log, least, most)
    count = max((len(line) for line in lines.values()), default=1)
    last = count - 1 if x_last is None else x_last
    frame = _Frame(width - _RIGHT, height - _BOTTOM, last, low, high, log)
    places = x or {n: [i * last / max(1, count - 1) for i in range(len(line))] for n, line in lines.items()}
    x_ticks = {0, last // 2, last} if x is None else {tick for tick in ticks(0, max(1, last)) if tick == int(tick)}
    return render(
        "lines.svg.j2", title=title, x_label=x_label, width=width, height=height, key=key, style=Markup(style),
        left=_LEFT, right=frame.right, top=_TOP, bottom=frame.bottom,
        y_ticks=[(f"{tick:.4g}", frame.y(tick)) for tick in ticks(low, high, log)],
        x_ticks=[(f"{place:,.0f}", frame.x(place)) for place in sorted(x_ticks)],
        marks=[(label, frame.x(place)) for label, place in (marks or {}).items()],
        lines=[(n, frame.path(places[n], line), colors[i % len(colors)], n in faint)
               for i, (n, line) in enumerate(lines.items())],
        dots=[(label, frame.x(place), frame.y(value)) for label, place, value in dots],
    )  # fmt: skip


def bar_chart(
    title: str, bars: Mapping[str, tuple[float, float, float]], spec: str, colors: Sequence[str] = COLORS
) -> Markup:
    """Draw bars from zero to values that are not negative, each with its interval (value, low, high)."""
    left = round(20 + _LETTER * max(len(name) for name in bars))
    scale = _LONGEST_BAR / (max(high for _, _, high in bars.values()) or 1)
    drawn = [
        {"name": name, "text": format(value, spec), "color": colors[i % len(colors)], "y": _TOP + (_BAR + _GAP) * i,
         "width": round(value * scale, 1), "low": round(left + low * scale, 1), "high": round(left + high * scale, 1)}
        for i, (name, (value, low, high)) in enumerate(bars.items())
    ]  # fmt: skip
    height = _TOP + (_BAR + _GAP) * len(bars) + _GAP
    return render("bars.svg.j2", title=title, bars=drawn, left=left, width=left + 420, height=height, thickness=_BAR)


def _range(values: Sequence[float], log: bool, least: float, most: float | None) -> tuple[float, float]:
    """Return the ends of an axis that holds all values; they differ."""
    high = max(values) if most is None else most
    if not log:
        return least, high if high > least else least + 1.0
    positive = [value for value in values if value > 0]
    low = min(positive) if positive else 0.1
    high = max(high, low)
    return 10.0 ** math.floor(math.log10(low)), 10.0 ** math.floor(math.log10(high) + 1)


def ticks(low: float, high: float, log: bool = False) -> list[float]:
    """Return round numbers from low to high."""
    if log:
        first, last = round(math.log10(low)), round(math.log10(high))
        step = max(1, (last - first) // _TICKS)
        return [10.0**power for power in range(first, last + 1, step)]
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    return [step * i for i in range(math.ceil(low / step - 1e-9), int(high / step + 1e-9) + 1)]
