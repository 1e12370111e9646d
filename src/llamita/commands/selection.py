"""The goal of `llamita quantize` (`--max-size`, `--max-loss`): read it, and print how layers were chosen for it."""

import re
from dataclasses import asdict
from typing import Any

from llamita.commands import console
from llamita.errors import InputError, shown
from llamita.models.config import ModelConfig
from llamita.models.layer_kinds import describe_kinds
from llamita.numerics.intervals import Interval
from llamita.quantize.layer_choice import Goal, Selection
from llamita.text.printable import megabytes

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_SIZE = re.compile(rf"(\d+\.?\d*)\s*({'|'.join(_UNITS)})", re.IGNORECASE)
_LEAST_BYTES = 1000  # a smaller plain number lacks its unit


def parse_goal(max_size: str | None, max_loss: float | None, dry_run: bool) -> Goal | None:
    """Return the goal of the options, None without any.

    Raises:
        InputError: both are given, or one with `dry_run`, or a value is not a size or not a positive loss.
    """
    if max_size is None and max_loss is None:
        return None
    if dry_run:
        raise InputError("--dry-run", "without --max-size and --max-loss, which measure the model")
    return Goal(None if max_size is None else parse_size(max_size), max_loss)


def parse_size(text: str) -> int:
    """Return the bytes of "700MB", "1.2 GB", "640MiB" or a plain number.

    Raises:
        InputError: anything else.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or (not match[2] and float(match[1]) < _LEAST_BYTES):
        raise InputError("--max-size", "a size such as 700MB or 1.2GB", shown(text))
    return int(float(match[1]) * _UNITS[match[2].lower()])


def print_selection(config: ModelConfig, selection: Selection | None) -> None:
    """Print the kind of each layer, a block a row, and the expected and measured losses."""
    if selection is None:
        return
    names = list(config.linear_shapes())
    rows = [
        [str(block), *(selection.scheme.kind(f"model.layers.{block}.{name}").name for name in names)]
        for block in range(config.layers)
    ]
    short = [name.rpartition(".")[2].removesuffix("_proj") for name in names]
    console.print_table("how each layer is stored", ["block", *short], rows)
    head = [] if config.tied else [["head", selection.scheme.kind("lm_head").name]]
    uniform = selection.uniform
    rows = [
        ["linear layers", describe_kinds(config, selection.scheme)],
        *head,
        ["weight files", megabytes(selection.file_bytes)],
        ["loss predicted", f"{selection.predicted:.5f}"],
        ["loss measured, rounded to nearest", _text(selection.measured)],
    ]
    if selection.finished:  # slightly too good, because the method has seen this text
        rows.append(["loss of the finished model, on its calibration text", _text(selection.finished)])
    if uniform and selection.uniform_loss:
        name = f"groups of {uniform.group_size} alone, rounded to nearest"
        rows.append([name, _text(selection.uniform_loss)])
    console.print_table("loss: KL divergence from the float model, nats a token", ["what", "figure"], rows)


def _text(interval: Interval) -> str:
    return f"{interval.value:.5f} ({interval.low:.5f} to {interval.high:.5f})"


def selection_values(selection: Selection | None) -> dict[str, Any]:
    """Return the selection as JSON values under its key; nothing if nothing was chosen."""
    if selection is None:
        return {}
    schemes = {
        "scheme": selection.scheme.to_dict(),
        "uniform": selection.uniform.to_dict() if selection.uniform else None,
    }
    return {"selection": asdict(selection) | schemes}
