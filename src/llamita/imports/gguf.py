"""Convert a GGUF file: into a packed model with its codes, or into a float checkpoint.

llama.cpp's own Q4_0 has scales of both signs, which no other runtime here takes, so Q4_0 and Q8_0 are then multiplied
out: float32 holds every product of a code and a scale exactly. F32, F16 and BF16 stay as they are.
"""

import os
from collections.abc import Callable
from pathlib import Path

from llamita.formats.gguf_parts import GgufModel
from llamita.imports.detect import LINK
from llamita.imports.gguf_codes import GgufCodes
from llamita.imports.gguf_source import GgufTensors
from llamita.imports.gguf_tokenizer import convert_tokenizer
from llamita.imports.import_codes import CodesLostError, Imported, import_codes
from llamita.models.names import expected_tensors
from llamita.models.packed_writer import plan_shards, write_shards
from llamita.models.weights import STORED
from llamita.system.files import write_json
from llamita.system.progress import Progress

_SIGNED = "weights are multiplied out: llama.cpp's int4 scales have both signs, which no other runtime takes"
_OTHER = "weights are multiplied out: their blocks ({kinds}) have no counterpart among our codes"


def convert(source: Path, directory: Path, progress: Progress = None) -> Imported:
    """Write a packed directory where the file's int4 codes can be kept, else a float checkpoint.

    Args:
        directory: exists, empty.

    Raises:
        InputError: the file is damaged, or of no family that the engine knows.
        RunError: the file cannot be read.
    """
    return _converted(source, directory, progress, _write_weights)


def link(source: Path, directory: Path, progress: Progress = None) -> Imported:
    """Write the same, but in place of a float checkpoint's weights the name of the file; see `GgufCheckpoint`."""
    return _converted(source, directory, progress, _write_link)


def _converted(
    source: Path, directory: Path, progress: Progress, write: Callable[[GgufTensors, Path, Progress], None]
) -> Imported:
    file = GgufModel(source)
    try:
        tensors = GgufTensors(file)
        convert_tokenizer(file, directory)
        coded, note = GgufCodes(tensors), None
        if coded.is_int4():
            try:
                return Imported(import_codes(coded, directory, progress, keep_all=True))
            except CodesLostError:
                note = _SIGNED
        write(tensors, directory, progress)
        write_json(directory / "config.json", tensors.hf_config)
        return Imported(note=note or _multiplied_out(tensors))
    finally:
        file.close()


def _write_link(tensors: GgufTensors, directory: Path, progress: Progress) -> None:
    del progress
    # Not resolved: in the hub's cache, a link has the name that the other parts are found by.
    write_json(directory / LINK, {"gguf": os.path.abspath(tensors.file.path)})


def _multiplied_out(tensors: GgufTensors) -> str | None:
    """Say that the weights are not those of a float file, None if they are."""
    others = sorted(tensors.linear_kinds() - set(STORED))
    return _OTHER.format(kinds=", ".join(others)) if others else None


def _write_weights(tensors: GgufTensors, directory: Path, progress: Progress) -> None:
    shapes = expected_tensors(tensors.config)
    kinds = {tensor: tensors.kind(tensor) for tensor in shapes}
    order = sorted(shapes, key=lambda t: kinds[t] != "F32")  # so that each starts at a multiple of its element's size
    shards = plan_shards({t: {t: (kinds[t], shapes[t])} for t in order})
    write_shards(directory, shards, lambda tensor: [tensors.read(tensor)], progress)
