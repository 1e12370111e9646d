"""Markup and charts: well formed, escaped, drawn to scale."""

import re
from xml.etree import ElementTree

import pytest
from markupsafe import Markup

from llamita.evaluate.charts import COLORS, bar_chart, line_chart

HOSTILE = "</title><script>alert('x')</script>\x1b[31m\u202e\"&"


def paths(svg: str) -> list[list[tuple[float, ...]]]:
    """The points of every line of a chart."""
    root = ElementTree.fromstring(svg)
    found = [element.attrib["d"][1:].split("L") for element in root.iter("path")]
    return [[tuple(map(float, point.split(","))) for point in points] for points in found]


def test_texts_are_escaped_and_markup_is_not():
    lines = {HOSTILE: [1.0, 2.0], Markup("<b>bold</b>"): [1.0, 2.0]}
    svg = line_chart(HOSTILE, lines, HOSTILE)
    assert isinstance(svg, Markup)
    assert "<script>" not in svg
    assert "\x1b" not in svg
    root = ElementTree.fromstring(svg)
    texts = [element.text for element in root.iter() if element.tag in ("text", "title")]
    assert texts.count("</title><script>alert('x')</script>\\x1b[31m\\u202e\"&") == 3
    assert [element.text for element in root.iter("b")] == ["bold"]


@pytest.mark.parametrize("log", [False, True])
def test_lines_are_drawn_to_scale(log):
    lines = {"a": [0.001, 0.01, 0.1], HOSTILE: [0.1, 0.1, 0.001]}
    first, second = paths(line_chart(HOSTILE, lines, "block", log=log))
    xs, ys = zip(*first, strict=True)
    assert xs[0] < xs[1] < xs[2]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.11)
    assert ys[0] > ys[1] > ys[2]  # the axis points down
    ratio = (ys[0] - ys[1]) / (ys[0] - ys[2])
    assert ratio == pytest.approx(1 / 2 if log else 9 / 99, abs=0.01)
    assert (second[0], second[2][1]) == ((xs[0], ys[2]), ys[0])


def test_a_logarithmic_axis_needs_values_that_differ_tenfold():
    def heights(values: list[float]) -> list[float]:
        return [y for _, y in paths(line_chart("t", {"a": values}, "x", log=True))[0]]

    zero, one, two = heights([0.0, 1.0, 2.0])  # linear, from zero
    assert zero - one == pytest.approx(one - two, abs=0.11)
    low, one, high = heights([-1.0, 1.0, 100.0])
    assert low == one > high


@pytest.mark.parametrize("values", [[0.0], [0.0, 0.0], [1.0], [1e-30, 1e30]])
@pytest.mark.parametrize("log", [False, True])
def test_values_of_no_spread_or_a_huge_one_stay_in_the_picture(values, log):
    svg = line_chart("t", {"a": values}, "x", log=log, width=300, height=200)
    root = ElementTree.fromstring(svg)
    numbers = [float(n) for e in root.iter() for k in ("x", "y", "x1", "y1") if (n := e.get(k))]
    assert all(0 <= n <= 300 for n in numbers)
    assert "nan" not in svg
    assert len(list(root.iter("line"))) <= 20


def test_bars_have_lengths_and_intervals_in_proportion():
    svg = bar_chart("t", {"a": (1.0, 0.5, 2.0), HOSTILE: (2.0, 1.5, 2.5), "none": (0.0, 0.0, 0.0)}, ".2f")
    root = ElementTree.fromstring(svg)
    first, second, third = (float(rect.attrib["width"]) for rect in root.iter("rect"))
    assert second == pytest.approx(2 * first, abs=0.2)
    assert third == 0
    spans = [float(line.attrib["x2"]) - float(line.attrib["x1"]) for line in root.iter("line")]
    assert spans[0] == pytest.approx(1.5 * first, abs=0.2)
    assert "2.00" in "".join(root.itertext())


def test_more_lines_than_colors_repeat_them():
    names = [f"m{i}" for i in range(11)]
    strokes = re.findall(r'stroke="(#\w+)"', line_chart("t", {name: [1.0, 2.0] for name in names}, "x"))
    assert strokes == [*COLORS, *COLORS[:3]]
