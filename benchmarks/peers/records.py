"""Keep a JSON of every single timing per machine and run, and compute its medians."""

import json
import os
import platform
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from contenders import CASES, CONTENDERS, LAYERS, PART_LAYERS, Case

from llamita.bench.work import Work
from llamita.system.machine import cpu_name

FORMAT = 1
DEFINITIONS = {
    "prefill": "seconds from handing over the prompt's token ids to the first greedy token of every sequence",
    "decode": "seconds of the following tokens, each chosen by argmax and fed back",
    "limits": "measured before and after each run; a run is held against the mean of the two",
    "int8_rate": "10^9 int8 multiply-adds per second, all threads, operands in registers",
    "vnni_rate": "where int8_rate is AMX's: the same of AVX-512 VNNI",
    "read_bandwidth": "10^9 bytes per second, all threads, over 512 MiB",
}
WORK_FIELDS = {  # names in a record of the counts of `llamita.bench.work.Work`
    "linear_macs_per_token": "linear",
    "head_macs": "head",
    "attention_macs_per_pair": "attention",
    "bytes_per_token": "weight_bytes",
    "cache_bytes_per_position": "cache_bytes",
}
EXTRAPOLATED = "executorch"  # the name under which the parts' times are extrapolated
_PARTS = tuple(f"executorch-{layers}" for layers in PART_LAYERS)


def machine(isa: str, threads: int) -> dict[str, Any]:
    """Return the machine that the figures were measured on."""
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "isa": isa,
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def slug(text: str) -> str:
    """Return a text as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def write(path: Path, record: dict[str, Any]) -> None:
    """Write a temporary file and rename it; every timing is on its own line."""
    record = {**record, "summary": summarize(record)}
    timings = record.pop("timings")
    text = json.dumps({**record, "timings": []}, indent=1)
    lines = ",\n".join(f"  {json.dumps(timing)}" for timing in timings)
    if timings:
        text = text.removesuffix('"timings": []\n}') + f'"timings": [\n{lines}\n ]\n}}'
    aside = path.with_suffix(".part")
    aside.write_text(text + "\n", "utf-8")
    aside.rename(path)


def summarize(record: dict[str, Any]) -> dict[str, Any]:
    """Return medians and spread of every contender in every case, and of the limits."""
    timings = record["timings"]
    parts = [t for t in timings if t["contender"] in _PARTS]
    timings = [t for t in timings if t["contender"] not in _PARTS] + list(_extrapolate(parts))
    summary: dict[str, Any] = {"limits": {}, "cases": {}}
    for limit in ("int8_rate", "vnni_rate", "read_bandwidth"):
        if timings and limit in timings[0]:
            summary["limits"][limit] = _spread([t[limit] for t in timings])
    for case in CASES:
        rows = {}
        for name in [*CONTENDERS, EXTRAPOLATED]:
            runs = [t for t in timings if t["contender"] == name and t["case"] == case]
            if runs:
                rows[name] = _row(runs, CASES[case], record["contenders"].get(name, {}).get("work"))
        if rows:
            summary["cases"][case] = rows
    return summary


def _row(runs: list[dict[str, Any]], case: Case, counted: dict[str, int] | None) -> dict[str, Any]:
    """Sum up one contender in one case, with fractions of the limits if its work is known."""
    prefilled, decoded = case.sequences * case.prompt, case.sequences * case.new
    row = {
        "runs": len(runs),
        "prefill_tokens_per_second": _spread([prefilled / t["prefill_seconds"] for t in runs]),
        "decode_tokens_per_second": _spread([decoded / t["decode_seconds"] for t in runs]),
        "first_token_seconds": _spread([t["prefill_seconds"] for t in runs]),
    }
    if counted and case.sequences == 1:
        work = work_of(counted)
        macs = work.prompt(case.prompt) + work.prompt_attention(case.prompt)
        read = work.weight_bytes, work.decode_bytes(case.prompt, case.new)
        if counted["int8"]:
            rates = [macs / t["prefill_seconds"] / 1e9 / t["int8_rate"] for t in runs]
            row["prefill_of_limit"] = _spread(rates)
        for key, amount in zip(("decode_of_limit", "decode_with_cache_of_limit"), read, strict=True):
            row[key] = _spread([amount * case.new / t["decode_seconds"] / 1e9 / t["read_bandwidth"] for t in runs])
    return row


def work_of(counted: dict[str, int]) -> Work:
    """Return the work that a record has for a contender (see `recorded`)."""
    return Work(**{field: counted[key] for key, field in WORK_FIELDS.items()})


def recorded(work: Work, int8: bool) -> dict[str, Any]:
    """Return the work for a record, with a flag: its multiply-adds are int8."""
    return {"int8": int8, **{key: getattr(work, field) for key, field in WORK_FIELDS.items()}}


def _extrapolate(parts: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """Extrapolate the times of few layers to all by straight lines, round by round."""
    few, more = PART_LAYERS
    by_key = {(t["round"], t["case"], t["contender"]): t for t in parts}
    for (round_, case, name), low in by_key.items():
        high = by_key.get((round_, case, _PARTS[1]))
        if name != _PARTS[0] or high is None:
            continue
        merged = {**low, "contender": EXTRAPOLATED}
        for key in ("prefill_seconds", "decode_seconds"):
            merged[key] = low[key] + (high[key] - low[key]) * (LAYERS - few) / (more - few)
        for key in ("int8_rate", "read_bandwidth"):
            merged[key] = (low[key] + high[key]) / 2
        yield merged


def _spread(values: list[float]) -> dict[str, float]:
    digits = [float(f"{value:.5g}") for value in (statistics.median(values), min(values), max(values))]
    return dict(zip(("median", "min", "max"), digits, strict=True))
