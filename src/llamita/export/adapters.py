"""Export the adapter of a packed model in PEFT's format (`--to adapters`).

It fits the float model that DIR was made of, and what `--to hf` writes of DIR where the family is the same. Settings
that PEFT computes (rank-stabilized scaling, names with an adapter in them) come out plain.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from llamita.errors import InputError, RunError
from llamita.export.job import ExportJob
from llamita.export.source import adapter_of, source_name
from llamita.models.peft import WEIGHTS, StoredAdapter, unscaled, write_adapter
from llamita.numerics.affine import to_f32
from llamita.system.extras import load_optional
from llamita.system.progress import Progress


def write(job: ExportJob, directory: Path, progress: Progress) -> dict[str, Any]:
    """Fill a directory; if PEFT is installed, load it there with a model of this shape.

    Raises:
        InputError: there is no adapter, or it does not fit the model.
    """
    stored = adapter_of(job.packed, job.adapter)
    if stored is None:
        raise InputError("--to adapters", "--adapter ADAPTER", "none")
    if progress:
        progress("adapter", 0, 1)
    factor = job.packed.config.query_factor
    pairs = {name: (np.asarray(down), unscaled(name, up, factor)) for name, (down, up) in stored.pairs.items()}
    rank = len(next(iter(pairs.values()))[0])
    adapter, layers = StoredAdapter(pairs, rank, stored.scaling), job.packed.config.layers
    write_adapter(adapter, source_name(job.packed), layers, directory)
    record = {
        "bytes": (directory / WEIGHTS).stat().st_size, "rank": rank, "scale": stored.scaling,
        "proof": None, "unchecked": None,
    }  # fmt: skip
    try:
        load = load_optional("llamita.export.in_peft:load", "{package}")
    except RunError:
        return record | {"unchecked": "PEFT is not installed"}
    found, scales = load(job.packed, directory)
    equal = 0
    for name, (down, up) in pairs.items():
        if name in found and math.isclose(scales[name], stored.scaling, rel_tol=1e-12):
            same = np.array_equal(found[name][0], to_f32(down)) and np.array_equal(found[name][1], to_f32(up))
            equal += same
    return record | {"equal_layers": equal, "layers": len(pairs | found), "opened_by": "PEFT"}
