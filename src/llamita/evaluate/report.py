"""Write a comparison as one HTML file that needs nothing else: tables, and plots as inline SVG.

The page is `report.html.j2`. Names, texts and tokens come from strangers: `charts.render` escapes all of it,
and the page forbids itself scripts and anything from elsewhere.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llamita.errors import InputError, RunError
from llamita.evaluate.charts import COLORS, bar_chart, line_chart, render
from llamita.evaluate.compare import Comparison, Report, is_noise
from llamita.evaluate.layers import PLACES, STREAM
from llamita.models.layer_kinds import describe_groups
from llamita.numerics.intervals import Interval
from llamita.text.printable import megabytes, printable

_DOCTYPE = "<!doctype html>"
_POINTS = 256  # of a profile of channels; more would not be seen
_PLACES = {
    "stream": "residual stream",
    "qkv": "input of q, k, v",
    "attention_out": "input of o_proj",
    "gate_up": "input of gate, up",
    "down": "input of down_proj",
}


@dataclass(frozen=True)
class _Figure:
    """A cell of a table: a value with the bounds of its interval."""

    value: str
    bounds: str
    is_noise: bool


def render_report(comparison: Comparison, text_name: str) -> str:
    """Return the whole page."""
    models = comparison.models
    first, chunk = models[0], comparison.chunk_tokens
    note = (
        f"{text_name}: {first.scores.tokens:,} tokens predicted in chunks of {chunk:,}. KL, agreement and "
        f"increase are against {first.name}; intervals hold 95 % of a block bootstrap."
    )
    kl = {printable(m.name): (m.scores.kl.value, m.scores.kl.low, m.scores.kl.high) for m in models if m.scores.kl}
    differences = [
        {"texts": [f"{d.second} less {d.first}"],
         "figures": [_signed(d.kl, 1, "+.5f"), _signed(d.perplexity, 100, "+.2f", " %"),
                     _signed(d.agreement, 100, "+.2f", " %")]}
        for d in comparison.differences
    ]  # fmt: skip
    names = [model.name for model in models]
    return render(
        "report.html.j2",
        title=" · ".join(names),
        notes=[note, *comparison.notes],
        facts=[_facts(model) for model in models],
        kl_chart=bar_chart("mean KL, nats a token", kl, ".5f", COLORS[1:]),
        differences=differences,
        stream=_stream(comparison),
        weights=_weights(comparison),
        activations=_activations(comparison),
        places=[{"position": d.position, "context": d.context, "token": d.token,
                 "opinions": list(zip(names, d.opinions, strict=True))} for d in comparison.disagreements],
        continuations=[model for model in models if model.continuation],
        prompt=comparison.prompt,
    )  # fmt: skip


def check_target(path: Path, overwrite: bool) -> None:
    """Raise InputError if the report cannot be written there; it replaces nothing but a page."""
    if not path.parent.is_dir():
        raise InputError("--html", "a file in an existing directory", f"{path}", "try mkdir -p")
    if not os.path.lexists(path):
        return
    if not path.is_file():
        raise InputError("--html", "the name of a file", f"{path}, which is none")
    if not overwrite:
        raise InputError(f"--html: {path} exists", hint="try --overwrite or another name")
    with path.open("rb") as file:
        if file.read(len(_DOCTYPE)).lower() != _DOCTYPE.encode():
            raise InputError(f"--html: --overwrite replaces only a page of HTML, and {path} is none")


def write(path: Path, page: str, overwrite: bool) -> None:
    """Write the page under another name, then rename it: it appears whole or not at all.

    Raises:
        InputError: see `check_target`.
        RunError: the file cannot be written.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("x", encoding="utf-8") as file:
            file.write(page)
        check_target(path, overwrite)  # another process may have made it meanwhile
        aside.replace(path)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        aside.unlink(missing_ok=True)


def _facts(model: Report) -> dict[str, Any]:
    """Return the row of a model in the first table."""
    scheme, scores = model.scheme, model.scores
    named = f"{scheme['name']}, groups of {describe_groups(scheme)}" if scheme else "float"
    method, size = model.origin.method or "", megabytes(model.weight_bytes)
    figures = [(scores.increase, 100, ".2f", " %"), (scores.kl, 1, ".5f", ""), (scores.agreement, 100, ".2f", " %")]
    return {
        "texts": [model.name, named, method, size, f"{scores.perplexity:.4g}"],
        "figures": [_figure(i, factor, spec, unit) if i else None for i, factor, spec, unit in figures],
    }


def _figure(interval: Interval, factor: float, spec: str, unit: str = "") -> _Figure:
    value, low, high = (format(x * factor, spec) for x in (interval.value, interval.low, interval.high))
    return _Figure(f"{value}{unit}", f"{low} to {high}", False)


def _signed(interval: Interval, factor: float, spec: str, unit: str = "") -> _Figure:
    return replace(_figure(interval, factor, spec, unit), is_noise=is_noise(interval))


def _stream(comparison: Comparison) -> dict[str, Any] | None:
    """Return the part about the residual stream's error after each block."""
    models = [(m, color) for m, color in _colored(comparison) if m.layers and not m.is_baseline]
    lines = {printable(m.name): m.layers.stream_errors for m, _ in models if m.layers}
    if not lines:
        return None
    colors = [color for _, color in models]
    chart = line_chart("relative squared error of the residual stream", lines, "blocks passed", log=True,
                       width=720, height=280, colors=colors)  # fmt: skip
    turned = ", ".join(m.name for m, _ in models if m.is_turned)
    return {"tokens": f"{comparison.layer_tokens:,}", "turned": turned, "names": list(lines), "colors": colors,
            "chart": chart}  # fmt: skip


def _weights(comparison: Comparison) -> dict[str, Any] | None:
    """Return the part about errors of the dequantized matrices: a plot for each kind, the blocks on its axis."""
    models = [(m, color) for m, color in _colored(comparison) if m.weight_errors]
    if not models:
        return None
    names, colors = [printable(m.name) for m, _ in models], [color for _, color in models]
    kinds: dict[str, dict[int, list[float]]] = {}
    tables: dict[str, list[str]] = {}
    for i, (model, _) in enumerate(models):
        for name, error in (model.weight_errors or {}).items():
            if name.startswith("model.layers."):
                kinds.setdefault(name.split(".", 3)[3], {}).setdefault(i, []).append(error)
            else:
                tables.setdefault(name, [""] * len(models))[i] = f"{error:.3e}"
    charts = [
        line_chart(kind, {names[i]: line for i, line in lines.items()}, "block", width=320, height=180,
                   log=True, colors=[colors[i] for i in lines])
        for kind, lines in kinds.items()
    ]  # fmt: skip
    return {"names": names, "colors": colors, "charts": charts, "tables": tables}


def _activations(comparison: Comparison) -> dict[str, Any] | None:
    """Return the part about the largest value of each channel: how it spreads over blocks, and one block in full."""
    models = [(m, color) for m, color in _colored(comparison) if m.layers]
    if not models:
        return None
    names, colors = [printable(m.name) for m, _ in models], [color for _, color in models]
    places = []
    for place in PLACES:
        peaks = [m.layers.peaks[place] for m, _ in models if m.layers]
        ratios = [row.max(axis=1) / np.maximum(np.median(row, axis=1), 1e-9) for row in peaks]
        lines = {name: ratio.tolist() for name, ratio in zip(names, ratios, strict=True)}
        label = "blocks passed" if place == STREAM else "block"
        worst = int(np.max(ratios, axis=0).argmax())
        most = max(float(row[worst].max()) for row in peaks)
        profiles = [
            line_chart(name, {name: _profile(row[worst])}, "channel", width=320, height=160, most=most,
                       x_last=row.shape[1] - 1, colors=[color])
            for name, row, color in zip(names, peaks, colors, strict=True)
        ]  # fmt: skip
        places.append({
            "name": _PLACES[place],
            "chart": line_chart("largest / median channel", lines, label, log=True, colors=colors),
            "where": f"after {worst} blocks" if place == STREAM else f"block {worst}",
            "profiles": profiles,
        })  # fmt: skip
    return {"names": names, "colors": colors, "places": places}


def _profile(channels: np.ndarray) -> list[float]:
    """Return at most `_POINTS` values, each the largest of its neighbours."""
    edges = np.linspace(0, len(channels), min(_POINTS, len(channels)) + 1).astype(int)
    return np.maximum.reduceat(channels, edges[:-1]).tolist()


def _colored(comparison: Comparison) -> list[tuple[Report, str]]:
    """Return every model with its color, the same in all plots; the baseline's is grey."""
    others = COLORS[1:]
    return [
        (model, COLORS[0] if i == 0 else others[(i - 1) % len(others)]) for i, model in enumerate(comparison.models)
    ]
