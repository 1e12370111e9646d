"""The part of `llamita quantize` that chooses how each layer is stored: `--max-size`, `--max-loss`."""

import re
from dataclasses import asdict, replace
from typing import Any

from llamita.commands import console
from llamita.errors import InputError
from llamita.methods.chain import Chain
from llamita.methods.setup import Calibration, Setup
from llamita.models.checkpoint import Checkpoint
from llamita.models.config import ModelConfig
from llamita.models.layer_kinds import describe_kinds
from llamita.numerics.intervals import Interval
from llamita.numerics.scheme import QuantScheme
from llamita.quantize.chain_sizes import plan_chain
from llamita.quantize.layer_choice import Goal, Selection, check_size, select, size_bounds
from llamita.quantize.rounded import RoundedSource
from llamita.system.progress import Progress
from llamita.text.printable import megabytes

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_SIZE = re.compile(rf"(\d+\.?\d*)\s*({'|'.join(_UNITS)})", re.IGNORECASE)
_LEAST_BYTES = 1000  # below, a plain number is one whose unit was forgotten


def parse_goal(max_size: str | None, max_loss: float | None, dry_run: bool) -> Goal | None:
    """What the options ask for, None if nothing.

    Raises:
        InputError: both are given, or one with `dry_run`, or one is no size or no positive loss.
    """
    if dry_run and not (max_size is None and max_loss is None):
        raise InputError("--dry-run", "without --max-size and --max-loss, which measure the model")
    if max_size is not None and max_loss is not None:
        raise InputError("--max-size, --max-loss", "one of them", "both")
    if max_size is not None:
        return Goal(max_size=parse_size(max_size))
    if max_loss is not None:
        if not 0 < max_loss < float("inf"):
            raise InputError("--max-loss", "nats a token above 0, such as 0.02", f"{max_loss}")
        return Goal(max_loss=max_loss)
    return None


def parse_size(text: str) -> int:
    """Bytes from "700MB", "1.2 GB", "640MiB" or a plain number.

    Raises:
        InputError: something else.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or (not match[2] and float(match[1]) < _LEAST_BYTES):
        raise InputError("--max-size", "a size such as 700MB or 1.2GB", f"{text!r}")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def choose(
    source: Checkpoint, scheme: QuantScheme, goal: Goal | None, chain: Chain, setup: Setup, progress: Progress
) -> tuple[QuantScheme, Setup, Selection | None]:
    """The scheme that fits the goal, the setup with a record of it, what was found; errors as `select`."""
    if goal is None:
        return scheme, setup, None
    assert setup.calibration is not None

    def rounding(source: Checkpoint, scheme: QuantScheme) -> RoundedSource:
        return RoundedSource(source, scheme, chain.rounding, setup)  # transforms and tuning left out

    added = _added_bytes(source, scheme, chain, setup.settings)
    selection = select(source, scheme, setup.calibration.tokens, goal, progress, rounding, added)
    record = _record(goal, selection, setup.calibration)
    return selection.scheme, replace(setup, settings=setup.settings | record), selection


def check_goal(
    source: Checkpoint, scheme: QuantScheme, goal: Goal | None, chain: Chain, settings: dict[str, Any]
) -> None:
    """See that some scheme is so small, before a text is written.

    Raises:
        InputError: there is none.
    """
    if goal is None or goal.max_size is None:
        return
    check_size(goal.max_size, size_bounds(source, scheme)[0] + _added_bytes(source, scheme, chain, settings))


def _added_bytes(source: Checkpoint, scheme: QuantScheme, chain: Chain, settings: dict[str, Any]) -> int:
    """What the chain's transforms add to the weight files: a head of its own, or a matrix before it."""
    plain, changed = (
        plan_chain(source.config, scheme, lambda name: source.info(name).dtype, names, settings)
        for names in (replace(chain, transforms=()), chain)
    )
    return changed.file_bytes - plain.file_bytes


def print_selection(config: ModelConfig, selection: Selection | None) -> None:
    """The kind of every layer, a block a row; then what was expected and what came."""
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
    if selection.finished:  # flattered a little: the method has seen this text
        rows.append(["loss of the finished model, on its calibration text", _text(selection.finished)])
    if uniform and selection.uniform_loss:
        name = f"groups of {uniform.group_size} alone, rounded to nearest"
        rows.append([name, _text(selection.uniform_loss)])
    console.print_table("loss: KL divergence from the float model, nats a token", ["what", "figure"], rows)


def _text(interval: Interval) -> str:
    return f"{interval.value:.5f} ({interval.low:.5f} to {interval.high:.5f})"


def selection_values(selection: Selection | None) -> dict[str, Any]:
    """The selection as JSON values, under its key; nothing where nothing was chosen."""
    if selection is None:
        return {}
    schemes = {
        "scheme": selection.scheme.to_dict(),
        "uniform": selection.uniform.to_dict() if selection.uniform else None,
    }
    return {"selection": asdict(selection) | schemes}


def _record(goal: Goal, selection: Selection, calibration: Calibration) -> dict[str, Any]:
    """What llamita.json records of the choice; what was measured is the loss of round to nearest."""
    asked = {f"auto.{key}": value for key, value in asdict(goal).items() if value is not None}
    losses = {"auto.predicted_loss": selection.predicted, "auto.measured_loss": selection.measured.value}
    return asked | losses | {"auto.measured_method": "rtn", "auto.calibration": calibration.record()}
