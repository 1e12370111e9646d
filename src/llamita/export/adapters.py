"""`--to adapters`: the adapters of a packed model in PEFT's form, for whatever loads that.

They fit the float model that DIR was made of, and what `--to hf` writes of DIR. Settings that PEFT computes
(rank-stabilized scaling, names with an adapter in them) come out plain.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from llamita.errors import InputError, RunError
from llamita.export.job import ExportJob
from llamita.export.source import adapter_of
from llamita.models.peft import WEIGHTS, StoredAdapter, write_adapter
from llamita.numerics.affine import to_f32
from llamita.system.extras import load_optional
from llamita.system.progress import Progress


def write(job: ExportJob, directory: Path, progress: Progress) -> dict[str, Any]:
    """Fill a directory; PEFT, where it is installed, loads it beside a model of this shape.

    Raises:
        InputError: no adapters, or they do not fit the model.
    """
    stored = adapter_of(job.packed, job.adapter)
    if stored is None:
        raise InputError("--to adapters", "--adapter ADAPTER", "none")
    if progress:
        progress("adapters", 0, 1)
    pairs = {name: (np.asarray(down), np.asarray(up)) for name, (down, up) in stored.pairs.items()}
    rank = len(next(iter(pairs.values()))[0])
    base = job.packed.metadata.source.name.rsplit("/", 1)[-1]
    write_adapter(StoredAdapter(pairs, rank, stored.scaling), base, job.packed.config.layers, directory)
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
