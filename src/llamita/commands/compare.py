"""`llamita compare`: show models side by side, which differences exceed noise, and where they arise."""

from pathlib import Path
from typing import Annotated

import typer

from llamita.commands import console
from llamita.commands.options import ChunkTokens, Json, KvCache, Models, Revision, Text, Threads
from llamita.commands.show import interval_rows, scored
from llamita.commands.sources import convert_first, read_prompt
from llamita.errors import InputError
from llamita.evaluate.compare import Comparison, Difference, Disagreement, compare, is_noise, to_values
from llamita.evaluate.contenders import NO_BASELINE, first_float, open_contenders
from llamita.evaluate.report import check_target, render_report, write
from llamita.evaluate.scores import CHUNK_TOKENS, default_text, read_text
from llamita.models.layer_kinds import describe_groups
from llamita.numerics.intervals import Interval
from llamita.text.printable import megabytes, printable

_PROMPT_WORDS = 8  # of the text, used if no prompt is given

_Baseline = Annotated[
    str | None,
    typer.Option(metavar="SRC", help="Compare with this model; by default the first float model, or the source."),
]
_Prompt = Annotated[
    str | None, typer.Option(help="Let each model continue this; '-' reads stdin; by default the text's first words.")
]
_MaxTokens = Annotated[int, typer.Option(min=0, help="Most tokens of a continuation; 0 for none.")]
_Limit = Annotated[int | None, typer.Option(min=1, help="Score only the first N chunks of the text.")]
_Top = Annotated[int, typer.Option(min=1, help="How many layers, and how many tokens of the text, to show.")]
_Html = Annotated[Path | None, typer.Option(metavar="FILE", help="Write a report with plots too.")]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the report that is there.")]


def command(
    models: Models,
    revision: Revision = None,
    baseline: _Baseline = None,
    text: Text = None,
    prompt: _Prompt = None,
    max_tokens: _MaxTokens = 40,
    limit: _Limit = None,
    max_seq_len: ChunkTokens = CHUNK_TOKENS,
    top: _Top = 5,
    threads: Threads = None,
    kv_cache: KvCache = None,
    json: Json = False,
    html: _Html = None,
    overwrite: _Overwrite = False,
) -> None:
    """Show models side by side: size, loss, which differences are noise, and where they arise.

    SRC:SCHEME rounds a float model to nearest while it loads: embedded:arm, or embedded:arm:256 with its
    group size. --kv-cache leaves the baseline as it is.

    Example: llamita compare embedded:arm embedded:llamita --html report.html
    """
    if html:
        check_target(html, overwrite)
    if baseline == NO_BASELINE:
        raise InputError("--baseline", "a model", "'none'", "try `llamita evaluate`, which needs none")
    words = None if prompt is None else read_prompt(prompt)
    content = read_text(text) if text else None
    convert_first(*models, baseline, quiet=json)
    with console.progress(quiet=json) as progress:
        contenders = open_contenders(
            models, baseline or first_float(models), threads=threads, kv_dtype=kv_cache, progress=progress
        )
        if content is None:
            content = default_text(contenders)
        if words is None:
            words = " ".join(content.split()[:_PROMPT_WORDS])
        comparison = compare(contenders, content, prompt=words, max_tokens=max_tokens, limit=limit,
                             chunk_tokens=max_seq_len, places=top, progress=progress)  # fmt: skip
    text_name = str(text) if text else "embedded text"
    try:
        if json:
            console.print_json({"text": text_name, **to_values(comparison)})
        else:
            _print(comparison, text_name, top)
    finally:  # last, so that a failure loses no figures; also when the reader of stdout went away
        if html:
            write(html, render_report(comparison, text_name), overwrite)


def _print(comparison: Comparison, text_name: str, top: int) -> None:
    for note in comparison.notes:
        console.note(printable(note))
    names = [printable(model.name) for model in comparison.models]
    console.print_table("", ["", *names], _facts(comparison))
    console.note(scored(printable(text_name), comparison.models[0].scores.tokens))
    if comparison.differences:
        rows = [row for difference in comparison.differences for row in _difference(difference)]
        columns = ["difference (second minus first)", "KL, nats a token", "perplexity", "top-1 agreement"]
        _print_titled("Differences, token by token; noise where the interval holds zero:", columns, rows)
    _print_layers(comparison, names, top)
    for place in comparison.disagreements:
        _print_place(place, names)
    if comparison.models[0].continuation:
        _print_continuations(comparison, names)


def _facts(comparison: Comparison) -> list[list[str]]:
    """Return the table: a row per metric, a column per model."""
    models, schemes = comparison.models, [model.scheme for model in comparison.models]
    scores = [model.scores for model in models]
    return [
        ["scheme", *(s["name"] if s else "float" for s in schemes)],
        ["weights in a group", *(describe_groups(s) if s else "" for s in schemes)],
        ["method", *(printable(model.origin.method or "") for model in models)],
        ["weight files", *(megabytes(model.weight_bytes) for model in models)],
        [f"token perplexity, chunks of {comparison.chunk_tokens:,}", *(f"{s.perplexity:.4g}" for s in scores)],
        *interval_rows("  over the baseline's", [s.increase for s in scores], 100, ".2f", "\xa0%"),
        *interval_rows("mean KL, nats a token", [s.kl for s in scores], 1, ".5f", ""),
        *interval_rows("top-1 agreement", [s.agreement for s in scores], 100, ".2f", "\xa0%"),
    ]


def _print_titled(title: str, columns: list[str], rows: list[list[str]], figures: bool = True) -> None:
    """Print a table under a line that may be longer than the table is wide."""
    console.print_line(title)
    console.print_table("", columns, rows, figures)


def _difference(difference: Difference) -> list[list[str]]:
    """Return two rows: the differences of a pair, and the bounds of their intervals under them."""
    cells = (
        _signed(difference.kl, 1, ".5f", ""),
        _signed(difference.perplexity, 100, ".2f", " %"),
        _signed(difference.agreement, 100, ".2f", " %"),
    )
    pair = printable(f"{difference.second} - {difference.first}")
    return [[pair, *(value for value, _ in cells)], ["", *(bounds for _, bounds in cells)]]


def _signed(interval: Interval, factor: int, spec: str, unit: str) -> tuple[str, str]:
    """Return a difference, marked where it is noise, and its bounds."""
    value, low, high = (f"{x * factor:+{spec}}" for x in (interval.value, interval.low, interval.high))
    verdict = "noise: " if is_noise(interval) else ""
    return f"{verdict}{value}{unit}".replace(" ", "\xa0"), f"{low} to {high}".replace(" ", "\xa0")


def _print_layers(comparison: Comparison, names: list[str], top: int) -> None:
    """Print the layers with the largest errors."""
    weights = [model.weight_errors for model in comparison.models[1:]]
    modules = {name: max(w[name] for w in weights if w and name in w) for w in weights if w for name in w}
    worst = sorted(modules, key=lambda name: -modules[name])[:top]
    if worst:
        rows = [[name, *(f"{w[name]:.3e}" if w and name in w else "" for w in weights)] for name in worst]
        _print_titled("Weights: relative squared error, largest first:", ["layer", *names[1:]], rows)
    layers = [model.layers for model in comparison.models[1:]]
    present = [layer.stream_errors for layer in layers if layer]
    if present:
        places = sorted(range(len(present[0])), key=lambda at: -max(errors[at] for errors in present))[:top]
        rows = [
            [
                f"block {at - 1}" if at else "embedding",
                *(f"{layer.stream_errors[at]:.3e}" if layer else "" for layer in layers),
            ]
            for at in places
        ]
        title = f"Residual stream, {comparison.layer_tokens:,} tokens: relative squared error, largest first:"
        _print_titled(title, ["after", *names[1:]], rows)


def _print_place(place: Disagreement, names: list[str]) -> None:
    """Print a place in the text where models differ."""
    rows = [
        [name, f"{printable(o.said)} ({o.probability:.1%})", f"{o.right_probability:.1%}", f"{o.kl:.3f}"]
        for name, o in zip(names, place.opinions, strict=True)
    ]
    context, token = printable(place.context), printable(place.token)
    title = f"Token {place.position:,}, where they differ most: …{context}[{token}]"
    _print_titled(title, ["", "would have said", f"of [{token}]", "KL, nats"], rows)


def _print_continuations(comparison: Comparison, names: list[str]) -> None:
    rows = []
    for name, model in zip(names, comparison.models, strict=True):
        c = model.continuation
        assert c
        same = "" if model.is_baseline else f"{c.same_tokens} of {c.tokens}"
        rows.append([name, same, printable(c.text)])
    title = f"Continued greedily: {printable(comparison.prompt)}"
    _print_titled(title, ["", "tokens as the baseline's", "text"], rows, figures=False)
