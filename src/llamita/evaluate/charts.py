"""HTML and SVG from values, safe by construction: a text is escaped unless it is markup made here.

Two charts: lines over a common axis, and bars with intervals. No script, no font, nothing from outside.
"""

import html
import math
from collections.abc import Mapping, Sequence

from llamita.text.printable import printable

COLORS = ("#7a7a80", "#0a6ebd", "#c2410c", "#15803d", "#7e22ce", "#b45309", "#0e7490", "#be185d")
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 10, 24, 34  # margins in pixels
_TICKS = 4  # about so many lines across a linear axis
_LETTER = 6.2  # width of a letter of 11 pixels, roughly
_BAR = 22  # height of a bar with its gap
_VOID = {"meta", "line", "rect", "path", "circle"}  # elements without an end


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element; `class_` and `stroke_width` are spelled `class` and `stroke-width`; None is left out."""
    pairs = ((key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items() if value is not None)
    head = name + "".join(f' {key}="{escape(str(value))}"' for key, value in pairs)
    if name in _VOID:
        return Markup(f"<{head}>" if name == "meta" else f"<{head}/>")
    return Markup(f"<{head}>{join(children)}</{name}>")


def join(children: Sequence[object]) -> Markup:
    """Markup as it is, anything else as text."""
    return Markup("".join(c if isinstance(c, Markup) else escape(str(c)) for c in children))


def escape(text: str) -> Markup:
    """Text for between tags and within quotes; control characters become visible."""
    return Markup(html.escape(printable(text)))


def line_chart(
    title: str, lines: Mapping[str, Sequence[float]], x_label: str, *, width: int = 460, height: int = 220,
    log: bool = False, x_last: int | None = None, most: float | None = None, colors: Sequence[str] = COLORS,
) -> Markup:  # fmt: skip
    """Lines through values at 0, 1, 2, …; the axis below runs to `x_last`, that on the left to `most`.

    With `log` the axis is logarithmic if values differ tenfold; those that are not positive are drawn at
    its lower end.
    """
    values = [value for line in lines.values() for value in line]
    log = log and max(values) > 10 * min((value for value in values if value > 0), default=math.inf)
    low, high = _range(values, log, most)
    count = max(len(line) for line in lines.values())
    last = count - 1 if x_last is None else x_last
    inner_width, inner_height = width - _LEFT - _RIGHT, height - _TOP - _BOTTOM

    def x_of(place: float) -> float:
        return _LEFT + inner_width * place / max(1, count - 1)

    def y_of(value: float) -> float:
        at = math.log10(max(value, low) / low) / math.log10(high / low) if log else (value - low) / (high - low)
        return _TOP + inner_height * (1 - at)

    parts = [tag("text", title, x=_LEFT, y=14, class_="title")]
    for tick in ticks(low, high, log):
        y = round(y_of(tick), 1)
        parts.append(tag("line", x1=_LEFT, x2=width - _RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", f"{tick:.3g}", x=_LEFT - 6, y=y + 4, class_="left"))
    for place in sorted({0, last // 2, last}):
        x = x_of(place * (count - 1) / max(1, last))
        parts.append(tag("text", f"{place:,}", x=round(x, 1), y=height - 18, class_="middle"))
    parts.append(tag("text", x_label, x=_LEFT + inner_width / 2, y=height - 4, class_="middle"))
    for (name, line), color in zip(lines.items(), _cycle(colors, len(lines)), strict=True):
        points = [f"{x_of(place):.1f},{y_of(value):.1f}" for place, value in enumerate(line)]
        path = f"M{points[0]}h0.1" if len(points) == 1 else "M" + "L".join(points)
        parts.append(tag("g", tag("title", name), tag("path", d=path, stroke=color)))
    return tag("svg", *parts, viewBox=f"0 0 {width} {height}", width=width, height=height, role="img")


def bar_chart(
    title: str, bars: Mapping[str, tuple[float, float, float]], spec: str, colors: Sequence[str] = COLORS
) -> Markup:
    """Bars from zero to a value that is not negative, each with its interval (value, low, high)."""
    left = 20 + _LETTER * max(len(name) for name in bars)
    width, height = left + 420, _TOP + _BAR * len(bars) + 6
    scale = 320 / (max(high for _, _, high in bars.values()) or 1)
    parts = [tag("text", title, x=0, y=14, class_="title")]
    for i, (name, (value, low, high)) in enumerate(bars.items()):
        y, color = _TOP + _BAR * i, colors[i % len(colors)]
        middle = y + (_BAR - 6) / 2
        parts.append(tag("text", name, x=left - 6, y=y + 12, class_="left"))
        parts.append(tag("rect", x=left, y=y, width=f"{value * scale:.1f}", height=_BAR - 6, fill=color))
        parts.append(tag("line", x1=f"{left + low * scale:.1f}", x2=f"{left + high * scale:.1f}",
                         y1=middle, y2=middle, class_="interval"))  # fmt: skip
        parts.append(tag("text", format(value, spec), x=f"{left + high * scale + 6:.1f}", y=y + 12))
    return tag("svg", *parts, viewBox=f"0 0 {width:.0f} {height}", width=round(width), height=height, role="img")


def legend(names: Sequence[str], colors: Sequence[str] = COLORS) -> Markup:
    """Which color is whose."""
    pairs = zip(names, _cycle(colors, len(names)), strict=True)
    items = [tag("span", tag("i", style=f"background:{color}"), name) for name, color in pairs]
    return tag("p", *items, class_="legend")


def _cycle(colors: Sequence[str], count: int) -> list[str]:
    return [colors[i % len(colors)] for i in range(count)]


def _range(values: Sequence[float], log: bool, most: float | None) -> tuple[float, float]:
    """The ends of an axis that holds all values; they differ."""
    high = max(values) if most is None else most
    if not log:
        return 0.0, high if high > 0 else 1.0
    positive = [value for value in values if value > 0]
    low = min(positive) if positive else 0.1
    high = max(high, low)
    return 10.0 ** math.floor(math.log10(low)), 10.0 ** math.floor(math.log10(high) + 1)


def ticks(low: float, high: float, log: bool = False) -> list[float]:
    """Round numbers from low to high."""
    if log:
        first, last = round(math.log10(low)), round(math.log10(high))
        step = max(1, (last - first) // _TICKS)
        return [10.0**power for power in range(first, last + 1, step)]
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    return [step * i for i in range(math.ceil(low / step - 1e-9), int(high / step + 1e-9) + 1)]
