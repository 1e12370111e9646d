"""Convert Hugging Face checkpoints that have `pytorch_model.bin` alone, as most Llamas before 2024.

Such files are pickles. Torch reads them with `weights_only`, which runs nothing, in a process of its own whose memory
is limited, so a damaged or hostile file can end that process alone. It writes safetensors; lines of JSON on its stdout
report progress, [name, done, total], or the error, {"error": …, "exit_code": …}.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from llamita.errors import InputError, LlamitaError, RunError
from llamita.imports.detect import files_of
from llamita.imports.import_codes import Imported
from llamita.imports.torch_files import FLOATS, bits_of, load_tensors
from llamita.models.packed_writer import copy_companions, find_companions, plan_shards, write_shards
from llamita.system import child
from llamita.system.files import read_json, write_json
from llamita.system.progress import Progress

_SPARE = 12 << 30  # bytes of address space for Torch itself, besides the mapped files
_IGNORED = (".rotary_emb.inv_freq",)  # in old checkpoints; the engine computes it


def convert(source: Path, directory: Path, progress: Progress = None) -> Imported:
    """Write a float checkpoint; see `convert.convert`.

    Raises:
        InputError: a file is damaged, or has anything but plain tensors of floats.
        RunError: a file cannot be read, or there is too little memory.
    """
    command = [sys.executable, "-P", "-m", "llamita.imports.pytorch_bin", str(source), str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8", env=child.environment()) as process:
        assert process.stdout
        for line in process.stdout:
            values = json.loads(line)
            if isinstance(values, dict):
                raise (InputError if values["exit_code"] == InputError.exit_code else RunError)(values["error"])
            if progress:
                progress(*values)
    if process.returncode:
        raise RunError(f"{source}", "its weights to be read", f"exit code {process.returncode}", "is memory enough?")
    copy_companions(source, directory, find_companions(source))
    return Imported()


def main(source: Path, directory: Path) -> None:
    """Write config.json and the weights of `source`; report on stdout."""
    files = [path for path in files_of(source) if path.suffix == ".bin"]
    child.limit_memory(sum(path.stat().st_size for path in files) + _SPARE)
    replies = sys.stdout  # of this process alone: its parent reads them

    def report(values: Any) -> None:
        replies.write(json.dumps(values) + "\n")
        replies.flush()

    try:
        write_safetensors(source, files, directory, lambda *step: report(step))
    except LlamitaError as error:
        report({"error": str(error), "exit_code": error.exit_code})
    except MemoryError:
        report({"error": f"{source}: too little memory to read it", "exit_code": RunError.exit_code})


def write_safetensors(source: Path, files: list[Path], directory: Path, progress: Progress) -> None:
    """Write config.json and the tensors of `files` to a directory.

    Raises:
        InputError, RunError: see `convert`.
    """
    config = read_json(source, "config.json")
    tensors = {}
    for path in files:
        for name, tensor in load_tensors(path).items():
            if name in tensors:
                raise InputError(f"{path.name}: {name}", "in one file", "in two")
            if not name.endswith(_IGNORED):
                tensors[name] = tensor
    tied = config.get("tie_word_embeddings") is True and "lm_head.weight" in tensors
    if tied and tensors["lm_head.weight"].data_ptr() == tensors["model.embed_tokens.weight"].data_ptr():
        del tensors["lm_head.weight"]  # the same memory under a second name
    strange = [name for name, tensor in tensors.items() if tensor.dtype not in FLOATS]
    if strange:
        raise InputError(f"{strange[0]}", "floats", f"{tensors[strange[0]].dtype}")
    shards = plan_shards({n: {n: (FLOATS[t.dtype][0], tuple(t.shape))} for n, t in tensors.items()})
    write_shards(directory, shards, lambda name: [bits_of(tensors[name], name)], progress)
    write_json(directory / "config.json", config)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
