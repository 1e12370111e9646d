"""Export a packed model as a `.pte` program, with the other files that an app needs, and a proof (`--to executorch`).

ExecuTorch's runner for text models reads its settings from constant methods of the file
(extension/llm/runner/constants.h of ExecuTorch 1.4).
"""

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from llamita.errors import InputError
from llamita.export.guide import guide
from llamita.export.job import ExportJob
from llamita.export.lowering import data_hashes, lower
from llamita.export.partitioners import BACKENDS, partitioners_of, quiet
from llamita.export.program import PER_TOKEN, make_program
from llamita.export.proof import Proof, compare, engine_of, own_tokens, rounded_hashes
from llamita.export.runtime import run
from llamita.export.source import adapter_of, check_grid
from llamita.models.packed import PackedModel
from llamita.models.packed_writer import copy_companions, find_companions
from llamita.system.files import write_bytes
from llamita.system.progress import Progress
from llamita.text.tokenizer import Tokenizer

PROGRAM = "model.pte"
_CONTEXT = 2048
_LEAST_CONTEXT = 8  # more than the tokens of the traced pass
_STEPS = ("tracing and lowering", "comparing integers", "running it in ExecuTorch", "running it here")


def write(job: ExportJob, directory: Path, progress: Progress) -> dict[str, Any]:
    """Fill a directory; the record has the proof and the seconds of each step.

    Raises:
        InputError: a context that the model cannot have, or an adapter that does not fit.
        RunError: a backend's SDK is missing, or the program does not run.
    """
    packed, options = job.packed, job.options
    context = _context_of(packed, options.get("context"))
    backend = options.get("backend") or "xnnpack"
    partitioners = partitioners_of(backend)
    adapter = adapter_of(packed, job.adapter)
    kind = BACKENDS[backend]
    grid = check_grid(packed, kind.grid, bool(options.get("round_scales")), "executorch")
    timer = _Timer(progress)
    timer.begin(_STEPS[0])
    program = make_program(
        packed, context, adapter, options.get("embedding") or 8,
        is_static=kind.is_static, activations=PER_TOKEN if kind.rounds else None,
    )  # fmt: skip
    metadata = metadata_of(packed, context, kind.is_static)
    with quiet() if backend == "coreml" else nullcontext():  # its converter shows progress bars
        lower(program, partitioners, metadata, directory / PROGRAM)
    del program
    copy_companions(packed.path, directory, find_companions(packed.path))
    write_bytes(directory / "README.md", guide(packed, context, backend, _exceptions(job)).encode())
    proof = _prove(job, directory / PROGRAM, context, timer) if backend == "xnnpack" else None
    return {
        "backend": backend, "context": context, "bytes": (directory / PROGRAM).stat().st_size,
        "scales": vars(grid), "other_arithmetic": options.get("embedding") == 4 or not kind.rounds,
        "embedding_bits": options.get("embedding") or 8, "adapter": job.adapter and job.adapter.name,
        "activations": "int8 per token" if kind.rounds else "float",
        "unchecked": f"the runtime of {backend} is on the device", "seconds": timer.end(),
        "proof": proof and proof.to_dict(),
    }  # fmt: skip


def _context_of(packed: PackedModel, context: int | None) -> int:
    """Return the tokens of a sequence at most; raise InputError if the model cannot have as many."""
    most, rope = packed.config.context, packed.config.rope
    context = context or min(_CONTEXT, rope.original_context if rope.depends_on_length else most)
    if not _LEAST_CONTEXT <= context <= most:
        raise InputError("--context", f"{_LEAST_CONTEXT} to {most} tokens, as the model itself takes", f"{context}")
    if rope.depends_on_length and context > rope.original_context:
        expected = f"at most {rope.original_context} tokens with {rope.kind} rotary embeddings, which a program fixes"
        raise InputError("--context", expected, f"{context}")
    return context


def _exceptions(job: ExportJob) -> str:
    """Say in sentences how the program differs from the packed model."""
    sentences = []
    if job.options.get("embedding") == 4:
        sentences.append(" Only its embedding is rounded further, to 4 bits in groups of 32.")
    if job.adapter is not None:
        sentences.append(f" It contains the adapter `{job.adapter.name}`, unmerged.")
    return "".join(sentences)


def metadata_of(packed: PackedModel, context: int, is_static: bool = False) -> dict[str, Any]:
    """Return the constant methods by name."""
    tokenizer = Tokenizer(packed.path, packed.config)
    found = {
        "get_max_seq_len": context, "get_max_context_len": context, "get_n_layers": packed.config.layers,
        "get_vocab_size": packed.config.vocab_size, "use_kv_cache": True,
        "use_sdpa_with_kv_cache": not is_static, "enable_dynamic_shape": not is_static,
        "get_eos_ids": list(tokenizer.eos_token_ids),
    }  # fmt: skip
    return found if tokenizer.bos_token_id is None else {**found, "get_bos_id": tokenizer.bos_token_id}


def _prove(job: ExportJob, pte: Path, context: int, timer: "_Timer") -> Proof:
    timer.begin(_STEPS[1])
    held, hashes = data_hashes(pte), list(rounded_hashes(job.packed))
    equal = sum(codes in held and scales in held for _, codes, scales in hashes)
    engines = engine_of(job.packed, job.adapter)
    tokens, prompt, new = own_tokens(engines[0], context)
    timer.begin(_STEPS[2])
    ran = run(pte, tokens, prompt, new)
    timer.begin(_STEPS[3])
    return compare(engines, (len(hashes), equal), tokens, ran)


class _Timer:
    """Measures the seconds of each step, and reports progress."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._seconds, self._now, self._began = progress, dict[str, float](), "", 0.0

    def begin(self, step: str) -> None:
        """End the last step, and begin this one."""
        self.end()
        self._now, self._began = step, time.perf_counter()
        if self._progress:
            self._progress(step, _STEPS.index(step), len(_STEPS))

    def end(self) -> dict[str, float]:
        """End the last step, and return the seconds of all by name."""
        if self._now:
            self._seconds[self._now] = time.perf_counter() - self._began
            self._now = ""
        return self._seconds
