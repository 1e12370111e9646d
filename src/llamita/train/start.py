"""The codes that a quantized stage begins with; where they were measured, they are kept for a next run.

Measured scales depend a little on the number of processes and threads, and training goes on only from the
scales that it began with.
"""

from pathlib import Path

from llamita import processes
from llamita.checkpoint import Checkpoint, ModelSource
from llamita.errors import InputError
from llamita.methods.chain import parse_chain
from llamita.methods.setup import Setup
from llamita.packed import PackedModel
from llamita.quantize import RoundedSource, quantize, take_part
from llamita.scheme import QuantScheme


def rounded(
    source: Checkpoint, origin: Checkpoint, scheme: QuantScheme, method: str, setup: Setup, place: Path
) -> ModelSource:
    """The source rounded by a chain of methods; several processes do it together.

    Args:
        origin: the model that `source` was trained from, which has its tokenizer and licence.
        place: a directory that keeps what a calibrated chain gives; used if it is there.

    Raises:
        InputError: fewer rows to calibrate on than processes.
    """
    if not parse_chain(method).needs_calibration(setup.settings):
        return RoundedSource(source, scheme, method, setup)
    rows = 0 if setup.calibration is None else len(setup.calibration.tokens)
    if rows < processes.world():
        raise InputError(f"--data: expected a row for each of {processes.world()} processes, "
                         f"to begin with {method}, got {rows}; try fewer processes")  # fmt: skip
    packed = place / "packed"
    if not processes.agreed(packed.exists()):
        if processes.rank() == 0:
            place.mkdir(exist_ok=True)
            quantize(source, str(origin.path), packed, scheme, method, setup, origin=origin,
                     progress=setup.progress)  # fmt: skip
        else:
            take_part(source, scheme, method, setup)
        processes.wait()
    return PackedModel(packed)
