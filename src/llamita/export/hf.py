"""Export an ordinary checkpoint in BF16, weights multiplied out, for tools that read nothing else (`--to hf`).

A code times its scale has more bits than BF16, so weights change a little. Activations are not rounded.
"""

from pathlib import Path
from typing import Any

from llamita.export.checkpoints import float_tensor, prove_in_transformers, vector_tensors, write_checkpoint
from llamita.export.job import ExportJob
from llamita.export.source import module_names, refuse_rotation, shape_of
from llamita.system.progress import Progress


def write(job: ExportJob, directory: Path, progress: Progress) -> dict[str, Any]:
    """Fill a directory.

    Raises:
        InputError: the model needs a rotation at run time.
    """
    packed = job.packed
    refuse_rotation(packed, "hf")
    changes: list[float] = []
    tensors = {}
    for name in module_names(packed):
        weight = packed.weight(name)
        tensors[f"{name}.weight"] = float_tensor(weight, shape_of(weight), changes)
    tensors |= vector_tensors(packed, "BF16")
    size = write_checkpoint(packed, directory, tensors, {"dtype": "bfloat16", "quantization_config": None}, progress)
    return {
        "bytes": size, "rounded_to_bf16": max(changes), "other_arithmetic": True,
        "unchecked": "transformers is not installed",
        "proof": prove_in_transformers(packed, directory, tuple(module_names(packed))),
    }  # fmt: skip
