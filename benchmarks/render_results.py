"""Render docs/results/speed.md from benchmarks/history: no figure on that page is written by hand.

python benchmarks/render_results.py [--check]
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "peers"))

from contenders import CASES, CONTENDERS, LAYERS, PART_LAYERS
from records import EXTRAPOLATED, summarize

ROOT = Path(__file__).parents[1]
HISTORY = ROOT / "benchmarks" / "history"
PAGE = ROOT / "docs" / "results" / "speed.md"
PREFILL, DECODE = "prefill_tokens_per_second", "decode_tokens_per_second"
FRACTIONS = ("prefill_of_limit", "decode_of_limit", "decode_with_cache_of_limit")
OURS = "llamita-"
INTRODUCTION = """\
# Speed, compared with other engines

`benchmarks/render_results.py` renders this page from `benchmarks/history/`, which holds every single timing.
All engines ran the shape of Llama 3.2 1B with random weights, on the same number of threads.
They ran in turn: a round runs each of its engines once.
The machine's limits are measured before and after each run.
A figure is a median, with the least and the greatest value in brackets; *runs* says of how many runs.

- *prefill*: the prompt's tokens, divided by the time from their ids to the first greedy token.
- *decode*: the tokens after it, one at a time, each chosen by argmax and fed back.
- *prefill of limit*: multiply-adds of linear layers, attention and head per second, as a share of the limit.
  The limit is the rate of int8 multiply-adds in registers.
- *decode of limit*: bytes of weights and scales per second, as a share of the limit.
  In brackets, the bytes of the cache count, too.
  The limit is the bandwidth of reads.
- *ratios*: how many times as fast as that engine llamita is, in prefill and in decode.
- Other engines run from pinned packages.
  Below its tables, a record lists the engines whose settings were chosen by trying.
  It also lists those that ran with the first settings of the harness, without trying others.
  All settings are next to the versions.

To measure again, on an otherwise idle machine:

```
python benchmarks/peers.py --tune
python benchmarks/render_results.py
```
The first command installs the other engines from the package registry, each into its own environment.
The exact versions are in `benchmarks/peers/*.txt`; llama.cpp is compiled.
It also makes the models.
All of this needs 25 GB of disk and 20 GB of memory.
"""


def render(records: list[dict[str, Any]]) -> str:
    """Return the whole page, newest record first."""
    parts = [INTRODUCTION]
    if not any("vnni_rate" in timing for record in records for timing in record["timings"]):
        parts.append("No record is of a machine with AMX: llamita's kernel for it was not measured.\n")
    for record in sorted(records, key=lambda record: record["started"], reverse=True):
        parts.append(_render_record(record))
    return "\n".join(parts)


def _render_record(record: dict[str, Any]) -> str:
    machine, summary = record["machine"], summarize(record)
    macs, reads = (_rate(summary["limits"][name]) for name in ("int8_rate", "read_bandwidth"))
    vnni = f" ({_rate(summary['limits']['vnni_rate'])} without AMX)" if "vnni_rate" in summary["limits"] else ""
    day, time = record["started"].rstrip("Z").split("T")
    lines = [
        f"## {machine['cpu']}, {machine['threads']} threads, {machine['isa']}, {day} {time} UTC",
        "",
        f"Limits: {macs} GMAC/s in int8{vnni}, {reads} GB/s of reads.",
        "",
    ]
    lines += [f"{note}\n" for note in record["notes"]]
    for case, rows in summary["cases"].items():
        lines += [*_table(case, rows, record), ""]
    return "\n".join(lines + _contenders(record))


def _table(case: str, rows: dict[str, Any], record: dict[str, Any]) -> list[str]:
    """Return a table: the rates of every contender, and ours over theirs."""
    shape = CASES[case]
    sequences = f"{shape.sequences} sequences together, each with a" if shape.sequences > 1 else "A"
    ours = [name for name in rows if name.startswith(OURS)]
    four_bit = [name for name in ours if record["contenders"][name]["weights"] == "4-bit"]
    heads = ["engine", "MB", "runs", "prefill tok/s", "decode tok/s", "prefill of limit", "decode of limit"]
    heads += [f"{record['contenders'][name]['label']}: ratios" for name in four_bit]
    lines = [f"{sequences} prompt of {shape.prompt:,} tokens, then {shape.new} more.", ""]
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, row in rows.items():
        cells = [_label(name, record), _size(name, record), str(row["runs"])]
        cells += [_rate(row[PREFILL]), _rate(row[DECODE]), *_fractions(row)]
        cells += ["" if name == us else _ratios(rows[us], row) for us in four_bit]
        lines.append(f"| {' | '.join(cells)} |")
    return lines + _absent(case, rows, record)


def _absent(case: str, rows: dict[str, Any], record: dict[str, Any]) -> list[str]:
    """Name the contenders that are not in a table, with the reason."""
    missing = []
    for name, contender in CONTENDERS.items():
        if name in rows or (contender.layers < LAYERS and EXTRAPOLATED in rows):
            continue
        if case not in contender.cases:
            why = "not run with this prompt"
        else:
            why = "failed, see below" if name in record["failures"] else "left out of this run"
        missing.append(f"- {contender.label} ({why})")
    return ["", "Not in this table:", "", *missing] if missing else []


def _label(name: str, record: dict[str, Any]) -> str:
    if name == EXTRAPOLATED:
        few, more = PART_LAYERS
        return f"ExecuTorch 8da4w, groups of 32 (*extrapolated from {few} and {more} layers*)"
    return record["contenders"][name]["label"]


def _size(name: str, record: dict[str, Any]) -> str:
    return "" if name == EXTRAPOLATED else f"{record['contenders'][name]['size_bytes'] / 1e6:,.0f}"


def _fractions(row: dict[str, Any]) -> list[str]:
    prefill, decode, with_cache = (f"{row[f]['median']:.0%}" if f in row else "" for f in FRACTIONS)
    return [prefill, f"{decode} ({with_cache})" if decode else ""]


def _ratios(ours: dict[str, Any], row: dict[str, Any]) -> str:
    return ", ".join(f"{ours[key]['median'] / row[key]['median']:.2f} x" for key in (PREFILL, DECODE))


def _rate(spread: dict[str, float]) -> str:
    digits = 0 if spread["median"] >= 100 else 1
    median, least, greatest = (f"{spread[key]:,.{digits}f}" for key in ("median", "min", "max"))
    return f"{median} ({least} to {greatest})"


def _contenders(record: dict[str, Any]) -> list[str]:
    """Return the table of versions and settings, which also shows whether the model was the same."""
    lines = ["| engine | version | settings | logits |", "|---|---|---|---|"]
    for name in [name for name in CONTENDERS if name in record["contenders"]]:
        entry = record["contenders"][name]
        settings = {key: value for key, value in entry["settings"].items() if key != "system"}
        text = ", ".join(f"{key} {value}" for key, value in settings.items())
        lines.append(f"| {entry['label']} | {entry['version']} | {text} | {_logits(entry)} |")
    lines += [
        "",
        "*logits*: their correlation with those of llamita's BF16 engine after the same prompt.",
        "The weights are random, and every 4-bit format rounds them by another rule.",
        "So a value shows that the model is the same, but nothing about the quality of a trained model.",
        "For float weights it is near 1.",
        "",
    ]
    return [*lines, *_settings(record), *_failures(record), ""]


def _settings(record: dict[str, Any]) -> list[str]:
    """List the engines whose settings were chosen by trying, and those that had a choice and tried none."""
    lines = []
    for name, tuning in record["tuning"].items():
        totals = {
            variant: sorted(map(sum, runs))[len(runs) // 2]
            for variant, runs in tuning["prefill_and_decode_seconds"].items()
        }
        tried = ", ".join(f"{variant} {seconds:.2f} s" for variant, seconds in totals.items())
        lines.append(f"- {CONTENDERS[name].label}, settings tried (prompt and tokens together): {tried}.")
    untried = [
        contender.label
        for name, contender in CONTENDERS.items()
        if len(contender.variants) > 1 and name in record["contenders"] and name not in record["tuning"]
    ]
    return [*lines, f"- Default settings, no others tried: {'; '.join(untried)}."] if untried else lines


def _failures(record: dict[str, Any]) -> list[str]:
    ran = {timing["contender"] for timing in record["timings"]}
    return [
        f"- {CONTENDERS[name].label} {'failed in a later run' if name in ran else 'did not run'}: {why}"
        for name, why in record["failures"].items()
    ]


def _logits(entry: dict[str, Any]) -> str:
    if "logits_correlation" in entry:
        return f"{entry['logits_correlation']:.4f}"
    return {True: "finite", False: "not finite", None: ""}[entry.get("logits_are_finite")]


def read_records() -> list[dict[str, Any]]:
    """Read every file of the history."""
    return [json.loads(path.read_text("utf-8")) for path in sorted(HISTORY.glob("*.json"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only check that the page is up to date")
    if not parser.parse_args().check:
        PAGE.write_text(render(read_records()), "utf-8")
    elif PAGE.read_text("utf-8") != render(read_records()):
        raise SystemExit(f"{PAGE} is out of date: run python benchmarks/render_results.py")


if __name__ == "__main__":
    main()
