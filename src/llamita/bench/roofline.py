"""Draw the result of `llamita bench`: a roofline with the rates reached, and bars against the baseline.

The roofline model is that of Williams, Waterman and Patterson (CACM 52(4), 2009). Only this file imports
matplotlib.
"""

import os
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llamita.bench.report import Settings, machine_line, roofline_points
from llamita.bench.work import Work
from llamita.engine.llm import PREFILL_CHUNK

_INK, _MUTED, _ROOF = "#1c1c1e", "#6b6b70", "#3a3a3c"
_OURS, _THEIRS, _ACCENTS = ("#0a6ebd", "#b8bcc4", {"prefill": "#c2410c", "decode": "#0a6ebd", "batch": "#15803d"})
_DPI = 160
_BARS = (  # label, key, unit, divisor, whether more is better
    ("decode", "decode_tokens_per_second", "tok/s", 1, True),
    ("prefill", "prefill_tokens_per_second", "tok/s", 1, True),
    ("time to first token", "first_token_seconds", "s", 1, False),
    ("model size", "size_bytes", "MB", 1e6, False),
    ("memory", "memory_bytes", "MB", 1e6, False),
)


def draw(result: dict[str, Any], path: Path) -> None:
    """Write the picture of a result (`bench.run.run_bench`) as PNG, whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    has_baseline = result["baseline"] is not None
    figure = Figure(figsize=(12.5 if has_baseline else 7.5, 5.6), layout="constrained")
    if has_baseline:
        roof, bars = figure.subplots(1, 2, width_ratios=[1.15, 1])
        _bars(bars, result)
    else:
        roof = figure.subplots()
    _roofline(roof, result)
    figure.suptitle(_title(result), fontsize=12, color=_INK, x=0.01, ha="left", fontweight="bold")
    machine = machine_line(result, f"medians of {result['settings']['repeats']}")
    figure.supxlabel(machine, fontsize=8, color=_MUTED, x=0.01, ha="left")
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(aside, format="png", dpi=_DPI)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _title(result: dict[str, Any]) -> str:
    settings = result["settings"]
    against = f" against {result['baseline']['name']}" if result["baseline"] else ""
    weights = ", random weights" if result["model"]["is_random"] else ""
    return (
        f"{result['model']['name']}{against}: a prompt of {settings['prompt_tokens']:,} tokens, "
        f"{settings['new_tokens']:,} more{weights}"
    )


def _roofline(axes: Axes, result: dict[str, Any]) -> None:
    """Draw multiply-adds per byte against multiply-adds per second, both logarithmic."""
    peak, bandwidth = result["limits"]["int8_rate"], result["limits"]["bandwidth"]
    settings = {key: result["settings"][key] for key in ("prompt_tokens", "new_tokens", "batch")}
    model = result["model"]
    points = roofline_points(Work(**model["work"]), model["of_limit"], Settings(**settings), PREFILL_CHUNK)
    ridge = peak / bandwidth
    left = min(0.5, *(x / 3 for x, _ in points.values()))
    right = max(10 * ridge, *(3 * x for x, _ in points.values()))
    axes.plot([left, ridge, right], [left * bandwidth / 1e9, peak / 1e9, peak / 1e9], color=_ROOF, lw=2)
    bottom = min(left * bandwidth, *(y for _, y in points.values())) / 2e9
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, 3 * peak / 1e9))
    axes.annotate(f"int8 limit: {peak / 1e9:,.0f} G multiply-adds/s", (right, peak / 1e9), (-6, 6),
                  textcoords="offset points", ha="right", va="bottom", color=_ROOF, fontsize=9)  # fmt: skip
    slope = ridge / 1.8  # the label is left of it, near the ridge, where no point can be
    axes.annotate(f"read bandwidth:\n{bandwidth / 1e9:,.1f} GB/s", (slope, slope * bandwidth / 1e9), (-10, 0),
                  textcoords="offset points", ha="right", va="center", color=_ROOF, fontsize=9)  # fmt: skip
    for name, (x, y) in points.items():
        _point(axes, name, x, y / 1e9, result)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _position: f"{value:,g}")
    axes.set_xlabel("int8 multiply-adds per byte read from memory", color=_INK)
    axes.set_ylabel("G multiply-adds per second", color=_INK)
    axes.grid(True, which="major", color="#e5e5ea", lw=0.8)
    axes.tick_params(colors=_MUTED, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)


def _point(axes: Axes, name: str, x: float, y: float, result: dict[str, Any]) -> None:
    """Draw a rate, with its share of the roof above it if that is known."""
    color, row, settings = _ACCENTS[name], result["model"]["of_limit"][name], result["settings"]
    label = {"prefill": f"prefill, {settings['prompt_tokens']:,} tokens", "decode": "decode",
             "batch": f"decode, {settings['batch']} sequences"}[name]  # fmt: skip
    if row["fraction"] is not None:
        what = "int8 limit" if name == "prefill" else "bandwidth"
        label += f"\n{row['fraction']:.0%} of the {what}"
    axes.plot([x], [y], "o", ms=9, color=color, mec="white", mew=1.2, zorder=3)
    side = -1 if name == "prefill" else 1
    axes.annotate(label, (x, y), (10 * side, -6), textcoords="offset points", va="top", color=color,
                  ha="right" if side < 0 else "left", fontsize=9, fontweight="bold")  # fmt: skip


def _bars(axes: Axes, result: dict[str, Any]) -> None:
    """Draw each figure as a share of the larger of the two, with its value, and the ratio at the right edge."""
    model, baseline = result["model"], result["baseline"]
    for i, (_, key, unit, divisor, more_is_better) in enumerate(_BARS):
        most = max(model[key], baseline[key])
        for offset, values, color, ink in ((-0.19, model, _OURS, _OURS), (0.19, baseline, _THEIRS, _MUTED)):
            share = values[key] / most
            axes.barh(i + offset, share, height=0.34, color=color)
            axes.annotate(f"{_short(values[key] / divisor)} {unit}", (share, i + offset), (4, 0),
                          textcoords="offset points", va="center", fontsize=9, color=ink)  # fmt: skip
        ratio = model[key] / baseline[key]
        better = ratio if more_is_better else 1 / ratio
        word = "faster" if more_is_better else "sooner" if unit == "s" else "smaller"
        text = f"{better:.1f}x {word}" if better >= 1 else f"{better:.2f}x"
        axes.annotate(text, (1.7, i), ha="right", va="center", fontsize=11, fontweight="bold", color=_INK)
    axes.set(yticks=range(len(_BARS)), yticklabels=[label for label, *_ in _BARS], xlim=(0, 1.7), xticks=[])
    axes.invert_yaxis()
    axes.tick_params(length=0, labelsize=10, colors=_INK)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.set_title(f"{model['name']} (blue) and {baseline['name']} (grey)", fontsize=10, color=_INK, loc="left")


def _short(value: float) -> str:
    """Write a number with three figures, or with all whole ones."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
