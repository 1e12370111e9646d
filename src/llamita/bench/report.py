"""What the figures of `llamita bench` mean: arithmetic from seconds, bytes and counts of work.

`docs/results/benchmarks.md` defines each. Figures are medians of the repeats. A fraction stands beside the best
limit of the whole run, and beside the limits just before and after each repeat, because clocks swing.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llamita.bench.work import Work

RATIOS: tuple[str, ...] = (
    "decode_tokens_per_second",
    "first_token_seconds",
    "prefill_tokens_per_second",
    "size_bytes",
    "memory_bytes",
    "load_seconds",
)
_CACHES = 4  # a model of fewer bytes than this many last-level caches need not come from memory


@dataclass(frozen=True)
class Limits:
    """The best rates of a run: int8 multiply-adds and bytes read per second; bytes of last-level cache."""

    int8_rate: float
    bandwidth: float
    cache_bytes: int


def best_of(limits: Sequence[Limits]) -> Limits:
    """The best of each."""
    return Limits(
        int8_rate=max(x.int8_rate for x in limits),
        bandwidth=max(x.bandwidth for x in limits),
        cache_bytes=max(x.cache_bytes for x in limits),
    )


@dataclass(frozen=True)
class Runs:
    """Seconds of every repeat.

    `batch` is empty where only one sequence was decoded at a time, `load` for random float weights: a real
    model's are mapped and never made.
    """

    load: list[float]
    prefill: list[float]
    first_token: list[float]
    decode: list[float]
    batch: list[float]


@dataclass(frozen=True)
class Settings:
    """The work of one run: tokens of the prompt, tokens after it, sequences decoded together."""

    prompt_tokens: int
    new_tokens: int
    batch: int


def figures(runs: Runs, settings: Settings) -> dict[str, Any]:
    """Medians, and under "spread" the slowest and fastest of each as [least, most]."""
    tokens = {
        "prefill_tokens_per_second": (settings.prompt_tokens, runs.prefill),
        "decode_tokens_per_second": (settings.new_tokens, runs.decode),
        "batch_tokens_per_second": (settings.batch * settings.new_tokens, runs.batch),
    }
    values = {name: [count / s for s in seconds] for name, (count, seconds) in tokens.items() if seconds}
    values["first_token_seconds"] = runs.first_token
    if runs.load:
        values["load_seconds"] = runs.load
    spread = {name: [min(all_), max(all_)] for name, all_ in values.items()}
    medians = {name: statistics.median(all_) for name, all_ in values.items()}
    return {"load_seconds": None, **medians, "spread": spread}


def fractions(
    work: Work, runs: Runs, settings: Settings, nearby: Sequence[Limits], best: Limits, is_quantized: bool
) -> dict[str, dict[str, Any]]:
    """What was reached beside the limit, by what was done: see `_row`.

    The int8 limit says nothing of float models, nor the bandwidth of memory of models that fit the CPU's
    caches: such fractions are None.

    Args:
        nearby: the limits around each repeat.
        best: the best of the whole run.
    """
    prompt = settings.prompt_tokens
    linear, attention = work.prompt(prompt), work.prompt_attention(prompt)
    near, peak = ([x.int8_rate for x in nearby], best.int8_rate) if is_quantized else ([], None)
    rows = {
        "prefill": _row(linear, "multiply-adds", runs.prefill, near, peak),
        "prefill_with_attention": _row(linear + attention, "multiply-adds", runs.prefill, near, peak),
    }
    for name, (batch, seconds) in {"decode": (1, runs.decode), "batch": (settings.batch, runs.batch)}.items():
        if not seconds:
            continue
        read = work.decode_bytes(prompt, settings.new_tokens, batch)
        is_far = read > _CACHES * best.cache_bytes
        near, peak = ([x.bandwidth for x in nearby], best.bandwidth) if is_far else ([], None)
        rows[name] = _row(read, "bytes", [s / settings.new_tokens for s in seconds], near, peak)
    return rows


def _row(
    amount: float, unit: str, seconds: Sequence[float], nearby: Sequence[float], best: float | None
) -> dict[str, Any]:
    """The work and its unit; median rate; limit and fraction of it; median fraction of the limits nearby."""
    rate = amount / statistics.median(seconds)
    shares = [amount / s / limit for s, limit in zip(seconds, nearby, strict=True)] if nearby else []
    return {"work": amount, "unit": unit, "rate": rate, "limit": best,
            "fraction": None if best is None else rate / best,
            "fraction_nearby": statistics.median(shares) if shares else None}  # fmt: skip


def mark_weak(name: str, rows: Mapping[str, dict[str, Any]]) -> list[str]:
    """A limit that was passed is none: its fractions become None, and a line says so.

    What counts is the work of the linear layers or bytes; with attention, a prompt follows the one without.
    """
    remarks = []
    for what, row in rows.items():
        if what == "prefill_with_attention" or row["fraction"] is None or row["fraction"] <= 1:
            continue
        for weak in (row, rows["prefill_with_attention"])[: 1 + (what == "prefill")]:
            weak["fraction"] = weak["fraction_nearby"] = None
        remarks.append(
            f"{name}: {what}: expected at most the measured limit, {row['limit'] / 1e9:,.1f} G "
            f"{row['unit']}/s, got {row['rate'] / 1e9:,.1f} G: the probe was too weak"
        )
    return remarks


def ratios(model: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, float]:
    """The model's figures divided by the baseline's, where both are known."""
    return {name: model[name] / baseline[name] for name in RATIOS if model[name] and baseline[name]}


def machine_line(result: Mapping[str, Any], more: str) -> str:
    """On what a bench's result was measured, with `more` about it, and when."""
    machine = result["machine"]
    return (
        f"{machine['cpu']}, {machine['isa']}, {machine['threads']} threads; {more}; "
        f"llamita {result['llamita']}, {result['date'][:10]}"
    )


def roofline_points(work: Work, rows: Mapping[str, Mapping[str, Any]], settings: Settings, chunk: int
) -> dict[str, tuple[float, float]]:  # fmt: skip
    """Points of the roofline by what was done: multiply-adds per byte from memory, and per second.

    A prompt reads every weight once for each chunk of so many tokens.
    """
    chunks = -(-settings.prompt_tokens // chunk)
    prefill_bytes = chunks * work.weight_bytes
    points = {"prefill": (work.prompt(settings.prompt_tokens) / prefill_bytes, rows["prefill"]["rate"])}
    for name, batch in (("decode", 1), ("batch", settings.batch)):
        if name in rows:
            intensity = work.decode_multiply_adds(batch) / rows[name]["work"]
            points[name] = (intensity, intensity * rows[name]["rate"])
    return points
