"""Make what a quantized stage begins with: transformed float weights, and their codes.

A calibrated chain's codes are kept for a run that resumes: its scales depend a little on the number of processes and
threads, and training can resume only with the scales that it began with.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llamita.errors import InputError
from llamita.methods import chain as chains
from llamita.methods.chain import PRESET_METHODS, Chain, parse_chain
from llamita.methods.setup import Setup
from llamita.models.checkpoint import Checkpoint
from llamita.models.packed import PackedModel
from llamita.models.weights import FloatSource, ModelSource
from llamita.numerics.scheme import QuantScheme
from llamita.quantize.pipeline import quantize, take_part
from llamita.quantize.rounded import RoundedSource
from llamita.system import collectives, processes


@dataclass(frozen=True)
class Start:
    """A model twice: rounded, and in float after the chain's transforms, which keep its function."""

    rounded: ModelSource
    floats: FloatSource


def parse_start(text: str) -> tuple[Chain, dict[str, Any]]:
    """Return the chain of a recipe's `start`, which is a chain or the name of a preset, with its settings.

    Raises:
        InputError: there is no such chain, or it learns rotations.
    """
    method, settings = PRESET_METHODS.get(text, (text, {}))
    try:
        chain = parse_chain(method)
    except InputError as error:
        raise error.at("start") from None
    if chain.learns(settings):
        raise InputError("start", "no learned rotations", text, "try --set start=llamita")
    return chain, settings


def start(source: Checkpoint, origin: Checkpoint, scheme: QuantScheme, method: str, setup: Setup, place: Path) -> Start:
    """Transform and round the source by a chain of methods; several processes do it together.

    Args:
        origin: the model that `source` was trained from; it has the tokenizer and the licence.
        method: as `parse_start` takes it.
        place: a directory that keeps the result of a calibrated chain, and is read if it exists.

    Raises:
        InputError: fewer rows to calibrate on than processes.
    """
    chain, settings = parse_start(method)
    setup = replace(setup, settings=settings)
    floats = chains.transform(source, chain, setup)
    rounding = str(replace(chain, transforms=()))
    if not chain.needs_calibration(settings):
        return Start(RoundedSource(floats, scheme, rounding, setup), floats)
    rows = 0 if setup.calibration is None else len(setup.calibration.tokens)
    if rows < processes.world():
        expected = f"a row for each of {processes.world()} processes, to begin with {method}"
        raise InputError("--data", expected, str(rows), "try fewer processes")
    packed = place / "packed"
    if not collectives.agreed(packed.exists()):
        if processes.rank() == 0:
            place.mkdir(exist_ok=True)
            quantize(floats, str(origin.path), packed, scheme, rounding, setup, origin=origin, progress=setup.progress)
        else:
            take_part(floats, scheme, rounding, setup)
        collectives.wait()
    return Start(PackedModel(packed), floats)
