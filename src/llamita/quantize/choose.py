"""Choose how each layer is stored, for the goal of a job, and measure afterwards what the finished model loses."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from llamita.imports.open import open_source
from llamita.methods.chain import Chain
from llamita.methods.setup import Calibration, Setup
from llamita.models.checkpoint import Checkpoint
from llamita.models.layer_kinds import fit_groups
from llamita.numerics.scheme import QuantScheme
from llamita.quantize.cost import plan_chain
from llamita.quantize.layer_choice import Goal, Selection, check_size, finished_loss, select, size_bounds
from llamita.quantize.rounded import RoundedSource
from llamita.system.progress import Progress


def check_goal(source: Checkpoint, scheme: QuantScheme, goal: Goal, chain: Chain, settings: dict[str, Any]) -> None:
    """Check that some scheme is small enough for the goal, before a text is written.

    Raises:
        InputError: none is.
    """
    if goal.max_size is not None:
        check_size(goal.max_size, size_bounds(source, scheme)[0] + _added_bytes(source, scheme, chain, settings))


def choose(
    source: Checkpoint, scheme: QuantScheme, goal: Goal, chain: Chain, setup: Setup, progress: Progress
) -> tuple[QuantScheme, Setup, Selection]:
    """Return the scheme that fits the goal, the setup with a record of it, and the losses.

    Raises:
        InputError: see `select`.
    """
    assert setup.calibration is not None

    def rounding(source: Checkpoint, scheme: QuantScheme) -> RoundedSource:
        return RoundedSource(source, scheme, chain.rounding, setup)  # without transforms and tuning

    added = _added_bytes(source, scheme, chain, setup.settings)
    selection = select(source, scheme, setup.calibration.tokens, goal, progress, rounding, added)
    record = _record(goal, selection, setup.calibration)
    return selection.scheme, replace(setup, settings=setup.settings | record), selection


def judge(selection: Selection, source: Checkpoint, out: Path, chain: Chain, text: Calibration | None) -> Selection:
    """Return the selection with the loss of the finished model; of one rounded to nearest it is already known."""
    if text is None or chain.names == ("rtn",):
        return selection
    finished = open_source(out)
    try:
        return replace(selection, finished=finished_loss(source, finished, text.tokens))
    finally:
        finished.close()


def _added_bytes(source: Checkpoint, scheme: QuantScheme, chain: Chain, settings: dict[str, Any]) -> int:
    """Return what the transforms add to the weight files: a table for the head, or a matrix before it."""
    fitted = fit_groups(source.config, scheme)  # the choice gives every layer a size that fits
    plain, changed = (
        plan_chain(source.config, fitted, lambda name: source.info(name).dtype, methods, settings).file_bytes
        for methods in (replace(chain, transforms=()), chain)
    )
    return changed - plain


def _record(goal: Goal, selection: Selection, text: Calibration) -> dict[str, Any]:
    """Return what llamita.json records of the choice; the measured loss is that of round to nearest."""
    asked = {f"auto.{key}": value for key, value in asdict(goal).items() if value is not None}
    losses = {"auto.predicted_loss": selection.predicted, "auto.measured_loss": selection.measured.value}
    return asked | losses | {"auto.measured_method": "rtn", "auto.calibration": text.record()}
