"""A comparison as one HTML file that needs nothing else: tables, and plots as inline SVG.

Names, texts and tokens come from strangers: all of it passes through `charts.tag`, which escapes, and the
page forbids itself scripts and anything from elsewhere.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llamita.errors import InputError, RunError
from llamita.evaluate.charts import COLORS, Markup, bar_chart, join, legend, line_chart, tag
from llamita.evaluate.compare import Comparison, Difference, Report, is_noise
from llamita.evaluate.layers import PLACES, STREAM
from llamita.models.layer_kinds import describe_groups
from llamita.numerics.intervals import Interval
from llamita.text.printable import megabytes, printable

_DOCTYPE = "<!doctype html>"
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # no script, nothing loaded
_POINTS = 256  # of a profile of channels; more would not be seen
_PLACES = {
    "stream": "residual stream",
    "qkv": "input of q, k, v",
    "attention_out": "input of o_proj",
    "gate_up": "input of gate, up",
    "down": "input of down_proj",
}
_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --muted: #6b6b70; --line: #e2e2e7; --page: #fff }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececf0; --muted: #a0a0a8; --line: #3a3a40; --page: #18181b } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 1000px;
       margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em } p { max-width: 46em }
.scroll { overflow-x: auto } table { border-collapse: collapse; margin: .5em 0 }
th, td { padding: .3em .8em; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top;
         font-variant-numeric: tabular-nums }
th:first-child, td:first-child, td.text, th.text { text-align: left }
td.text, code { white-space: pre-wrap; overflow-wrap: anywhere; font-family: ui-monospace, monospace;
                font-size: .9em }
small, .noise { color: var(--muted) } mark { background: #ffd60a66; color: inherit }
svg { max-width: 100%; height: auto; font: 11px system-ui, sans-serif; fill: var(--ink) }
svg .title { font-weight: 600 } svg .left { text-anchor: end; fill: var(--muted) }
svg .middle { text-anchor: middle; fill: var(--muted) } svg .grid { stroke: var(--line) }
svg path { fill: none; stroke-width: 1.6; stroke-linecap: round }
svg .interval { stroke: var(--ink); stroke-width: 2 }
.legend span { margin-right: 1.4em; white-space: nowrap }
.legend i { display: inline-block; width: .9em; height: .9em; margin-right: .4em; border-radius: 2px }
"""


def render(comparison: Comparison, text_name: str) -> str:
    """The whole page."""
    names = " · ".join(model.name for model in comparison.models)
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"llamita compare: {names}"),
        tag("style", Markup(_STYLE)),
    )
    sections = (_facts, _differences, _stream, _weights, _activations, _places, _continuations)
    body = [section(comparison) for section in sections]
    first, chunk = comparison.models[0], comparison.chunk_tokens
    notes = [
        f"{text_name}: {first.scores.tokens:,} tokens predicted in chunks of {chunk:,}. KL, agreement and "
        f"increase are against {first.name}; intervals hold 95 % of a block bootstrap.",
        *comparison.notes,
    ]
    body[1:1] = [tag("p", note) for note in notes]
    page = tag("html", head, tag("body", tag("h1", f"Compared: {names}"), *body), lang="en")
    return f"{_DOCTYPE}\n{page}\n"


def check_target(path: Path, overwrite: bool) -> None:
    """Raise InputError if the report cannot be written there; it replaces nothing but a page."""
    if not path.parent.is_dir():
        raise InputError("--html", "a file in an existing directory", f"{path}", "try mkdir -p")
    if not os.path.lexists(path):
        return
    if not path.is_file():
        raise InputError("--html", "the name of a file", f"{path}, which is none")
    if not overwrite:
        raise InputError(f"--html: {path} exists; try --overwrite or another name")
    with path.open("rb") as file:
        if file.read(len(_DOCTYPE)).lower() != _DOCTYPE.encode():
            raise InputError(f"--html: --overwrite replaces only a page of HTML, and {path} is none")


def write(path: Path, page: str, overwrite: bool) -> None:
    """Write the page beside its place, then rename it: it appears whole or not at all.

    Raises:
        InputError: see `check_target`.
        RunError: the file cannot be written.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("x", encoding="utf-8") as file:
            file.write(page)
        check_target(path, overwrite)  # another may have made it meanwhile
        aside.replace(path)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        aside.unlink(missing_ok=True)


def _facts(comparison: Comparison) -> Markup:
    models = comparison.models
    header = ["", "scheme", "method", "weight files", "perplexity", "increase", "mean KL", "agreement"]
    rows = []
    for model in models:
        scheme, scores = model.scheme, model.scores
        named = f"{scheme['name']}, groups of {describe_groups(scheme)}" if scheme else "float"
        rows.append([
            model.name, named, model.origin.method or "", megabytes(model.weight_bytes),
            f"{scores.perplexity:.4g}", _interval(scores.increase, 100, ".2f", " %"),
            _interval(scores.kl, 1, ".5f"), _interval(scores.agreement, 100, ".2f", " %"),
        ])  # fmt: skip
    kl = {printable(m.name): (m.scores.kl.value, m.scores.kl.low, m.scores.kl.high) for m in models if m.scores.kl}
    return join([_table(header, rows), bar_chart("mean KL, nats a token", kl, ".5f", COLORS[1:])])


def _interval(interval: Interval | None, factor: float, spec: str, unit: str = "") -> Markup:
    if interval is None:
        return Markup("")
    value, low, high = (format(x * factor, spec) for x in (interval.value, interval.low, interval.high))
    return join([f"{value}{unit} ", tag("small", f"{low} to {high}")])


def _differences(comparison: Comparison) -> Markup:
    if not comparison.differences:
        return Markup("")
    rows = [
        [f"{d.second} less {d.first}", *(_signed(i, factor, spec, unit) for i, factor, spec, unit in _parts(d))]
        for d in comparison.differences
    ]
    header = ["", "KL, nats a token", "perplexity", "top-1 agreement"]
    note = "Token by token on the same text. Where the interval holds zero, the difference is noise."
    return join([tag("h2", "Which differences are noise"), tag("p", note), _table(header, rows)])


def _parts(difference: Difference) -> list[tuple[Interval, int, str, str]]:
    return [
        (difference.kl, 1, "+.5f", ""),
        (difference.perplexity, 100, "+.2f", " %"),
        (difference.agreement, 100, "+.2f", " %"),
    ]


def _signed(interval: Interval, factor: int, spec: str, unit: str) -> Markup:
    cell = _interval(interval, factor, spec, unit)
    return join([cell, tag("span", " noise", class_="noise")]) if is_noise(interval) else cell


def _stream(comparison: Comparison) -> Markup:
    """The residual stream's error after each block."""
    models = [(m, color) for m, color in _colored(comparison) if m.layers and not m.is_baseline]
    lines = {printable(m.name): m.layers.stream_errors for m, _ in models if m.layers}
    if not lines:
        return Markup("")
    turned = [m.name for m, _ in models if m.is_turned]
    note = (f"On the first {comparison.layer_tokens:,} tokens: mean over tokens of ‖x' - x‖² / ‖x‖², after "
            "the embedding (0) and after each block.")  # fmt: skip
    if turned:
        note += f" Rotated streams ({', '.join(turned)}) were turned back first."
    colors = [color for _, color in models]
    chart = line_chart("relative squared error of the residual stream", lines, "blocks passed", log=True,
                       width=720, height=280, colors=colors)  # fmt: skip
    return join([tag("h2", "Where errors arise: outputs"), tag("p", note), legend(list(lines), colors), chart])


def _weights(comparison: Comparison) -> Markup:
    """The errors of the dequantized matrices: a plot for each kind, the blocks on its axis."""
    models = [(m, color) for m, color in _colored(comparison) if m.weight_errors]
    if not models:
        return Markup("")
    colors = [color for _, color in models]
    kinds: dict[str, dict[str, list[float]]] = {}
    tables: dict[str, list[str]] = {}
    for i, (model, _) in enumerate(models):
        for name, error in (model.weight_errors or {}).items():
            if name.startswith("model.layers."):
                kind = name.split(".", 3)[3]
                kinds.setdefault(kind, {}).setdefault(f"{i}", []).append(error)
            else:
                tables.setdefault(name, [""] * len(models))[i] = f"{error:.3e}"
    names = [printable(m.name) for m, _ in models]
    charts = [
        line_chart(kind, {names[int(i)]: line for i, line in lines.items()}, "block", width=320, height=180,
                   log=True, colors=[colors[int(i)] for i in lines])
        for kind, lines in kinds.items()
    ]  # fmt: skip
    rows = [[name, *cells] for name, cells in tables.items()]
    note = "Relative squared error of the dequantized weights: Σ(w' - w)² / Σw²."
    return join([tag("h2", "Where errors arise: weights"), tag("p", note), legend(names, colors), *charts,
                 _table(["", *names], rows)])  # fmt: skip


def _activations(comparison: Comparison) -> Markup:
    """The largest absolute value of each channel: how it spreads over blocks, and one block in full."""
    models = [(m, color) for m, color in _colored(comparison) if m.layers]
    if not models:
        return Markup("")
    colors, names = [c for _, c in models], [printable(m.name) for m, _ in models]
    note = ("Largest absolute value of each channel over the tokens. Outliers show where the largest channel "
            "is far above the median one; rotations spread them, and mix the channels.")  # fmt: skip
    parts = [tag("h2", "Activation ranges"), tag("p", note), legend(names, colors)]
    for place in PLACES:
        peaks = [m.layers.peaks[place] for m, _ in models if m.layers]
        ratios = [row.max(axis=1) / np.maximum(np.median(row, axis=1), 1e-9) for row in peaks]
        lines = {name: ratio.tolist() for name, ratio in zip(names, ratios, strict=True)}
        label = "blocks passed" if place == STREAM else "block"
        parts.append(tag("h3", _PLACES[place]))
        parts.append(line_chart("largest / median channel", lines, label, log=True, colors=colors))
        worst = int(np.max(ratios, axis=0).argmax())
        most = max(float(row[worst].max()) for row in peaks)
        parts.append(tag("p", tag("small", f"Every channel, after {worst} blocks:" if place == STREAM else
                                  f"Every channel, block {worst}:")))  # fmt: skip
        parts += [
            line_chart(name, {name: _profile(row[worst])}, "channel", width=320, height=160, most=most,
                       x_last=row.shape[1] - 1, colors=[color])
            for name, row, color in zip(names, peaks, colors, strict=True)
        ]  # fmt: skip
    return join(parts)


def _profile(channels: np.ndarray) -> list[float]:
    """At most `_POINTS` values, each the largest of its neighbours."""
    edges = np.linspace(0, len(channels), min(_POINTS, len(channels)) + 1).astype(int)
    return np.maximum.reduceat(channels, edges[:-1]).tolist()


def _places(comparison: Comparison) -> Markup:
    parts = [tag("h2", "Where they differ most in the text")]
    for place in comparison.disagreements:
        text = tag("code", "…", place.context, tag("mark", place.token))
        rows = [
            [model.name, tag("code", o.said), f"{o.probability:.1%}", f"{o.right_probability:.1%}", f"{o.kl:.3f}"]
            for model, o in zip(comparison.models, place.opinions, strict=True)
        ]
        header = ["", "would have said", "at", "probability of the text's", "KL, nats"]
        parts += [tag("p", tag("small", f"token {place.position:,} "), text), _table(header, rows)]
    return join(parts)


def _continuations(comparison: Comparison) -> Markup:
    columns = [(m, m.continuation) for m in comparison.models if m.continuation]
    if not columns:
        return Markup("")
    header = tag("tr", *(tag("th", model.name, class_="text") for model, _ in columns))
    cells = tag("tr", *(tag("td", c.text, class_="text") for _, c in columns))
    said = ["" if m.is_baseline else f"as the baseline: {c.same_tokens} of {c.tokens} tokens" for m, c in columns]
    same = tag("tr", *(tag("td", tag("small", text), class_="text") for text in said))
    return join([tag("h2", "Continued greedily"), tag("p", tag("code", comparison.prompt)),
                 tag("div", tag("table", header, cells, same), class_="scroll")])  # fmt: skip


def _table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> Markup:
    if not rows:
        return Markup("")
    lines = [tag("tr", *(tag("th", cell) for cell in header))]
    lines += [tag("tr", *(tag("td", cell) for cell in row)) for row in rows]
    return tag("div", tag("table", *lines), class_="scroll")


def _colored(comparison: Comparison) -> list[tuple[Report, str]]:
    """Every model with its color, the same in all plots; the baseline's is grey."""
    others = COLORS[1:]
    return [
        (model, COLORS[0] if i == 0 else others[(i - 1) % len(others)]) for i, model in enumerate(comparison.models)
    ]
