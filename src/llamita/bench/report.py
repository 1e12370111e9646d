"""Compute the figures of `llamita bench` from seconds, bytes and counts of work.

`docs/results/benchmarks.md` defines each. Figures are medians of the repeats. Because clocks swing, fractions are
given of the best limit of the whole run, and of the limits just before and after each repeat.
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
    """Return the best of each limit."""
    return Limits(
        int8_rate=max(x.int8_rate for x in limits),
        bandwidth=max(x.bandwidth for x in limits),
        cache_bytes=max(x.cache_bytes for x in limits),
    )


@dataclass(frozen=True)
class Runs:
    """Seconds of every repeat.

    `batch` is empty if only one sequence was decoded at a time, `load` if the weights are random and float:
    those of a real model are mapped, not made.
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
    """Return medians, and under "spread" the least and the most of each."""
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
    """Return the rate and the fraction of the limit for each kind of work; see `_row`.

    Fractions are None for float models, which the int8 limit does not concern, and for decoding models that
    fit the CPU's caches, which the bandwidth of memory does not concern.

    Args:
        nearby: the limits before and after each repeat.
        best: the best limits of the whole run.
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
    """Return the work, its unit, the median rate, the limit, and the fractions of it and of those nearby."""
    rate = amount / statistics.median(seconds)
    shares = [amount / s / limit for s, limit in zip(seconds, nearby, strict=True)] if nearby else []
    return {"work": amount, "unit": unit, "rate": rate, "limit": best,
            "fraction": None if best is None else rate / best,
            "fraction_nearby": statistics.median(shares) if shares else None}  # fmt: skip


def mark_weak(name: str, rows: Mapping[str, dict[str, Any]]) -> list[str]:
    """Remove the fractions of a limit that was exceeded, and return a line for each.

    The work of the linear layers, or the bytes, decide; a prompt with attention follows the one without.
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
    """Return the model's figures divided by the baseline's, where both are known."""
    return {name: model[name] / baseline[name] for name in RATIOS if model[name] and baseline[name]}


def machine_line(result: Mapping[str, Any], more: str) -> str:
    """Return a line that says where and when a result was measured, with `more` in the middle."""
    machine = result["machine"]
    return (
        f"{machine['cpu']}, {machine['isa']}, {machine['threads']} threads; {more}; "
        f"llamita {result['llamita']}, {result['date'][:10]}"
    )


def roofline_points(work: Work, rows: Mapping[str, Mapping[str, Any]], settings: Settings, chunk: int
) -> dict[str, tuple[float, float]]:  # fmt: skip
    """Return points of the roofline for each kind of work: multiply-adds per byte from memory, and per second.

    A prompt reads every weight once for each chunk of `chunk` tokens.
    """
    chunks = -(-settings.prompt_tokens // chunk)
    prefill_bytes = chunks * work.weight_bytes
    points = {"prefill": (work.prompt(settings.prompt_tokens) / prefill_bytes, rows["prefill"]["rate"])}
    for name, batch in (("decode", 1), ("batch", settings.batch)):
        if name in rows:
            intensity = work.decode_multiply_adds(batch) / rows[name]["work"]
            points[name] = (intensity, intensity * rows[name]["rate"])
    return points
