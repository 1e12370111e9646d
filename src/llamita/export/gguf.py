"""Export GGUF with the codes and scales as they are, in Q4_0 and Q8_0, for llama.cpp (`--to gguf`).

A block of Q4_0 is a scale in f16 and 32 codes + 8, the first 16 of them in the low halves of its bytes. A block of Q8_0
is a scale and 32 codes. A larger group's scale, or a channel's, is repeated. Weights are the same to the bit.
Activations are not: llama.cpp rounds them to int8 in blocks of 32, without a zero point.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llamita.errors import InputError
from llamita.export.gguf_tokenizer import tokenizer_values
from llamita.export.job import ExportJob
from llamita.export.source import RoundedScales, check_grid, module_names, refuse_rotation, shape_of, source_name
from llamita.formats.gguf import BLOCK, GgufFile, write_gguf
from llamita.formats.gguf_blocks import floats_of
from llamita.models.config import ModelConfig
from llamita.models.families import FAMILIES
from llamita.models.foreign_names import gguf_heads_of, gguf_name, pair_order, rope_factors
from llamita.models.names import vector_names
from llamita.models.packed import PackedModel
from llamita.models.packed_writer import copy_companions, find_companions
from llamita.models.rope import RopeConfig
from llamita.models.weights import Int4Weight, Int8Weight, ModelSource, Weight, row_blocks, stored_dtype
from llamita.numerics.affine import to_f32
from llamita.numerics.packing import unpack_int4
from llamita.system.progress import Progress
from llamita.text.chat_template import find_template

FILE = "model.gguf"
_MOSTLY_Q4_0 = 2  # general.file_type


def write(job: ExportJob, directory: Path, progress: Progress) -> dict[str, Any]:
    """Fill a directory; every weight is read back and compared.

    Raises:
        InputError: the format cannot hold the model.
    """
    refuse_rotation(job.packed, "gguf")
    config = job.packed.config
    _check_family(config)
    grid = check_grid(job.packed, "f16", bool(job.options.get("round_scales")), "gguf")
    model: ModelSource = RoundedScales(job.packed, "f16") if grid.off else job.packed
    modules, path = module_names(model), directory / FILE
    vectors = {gguf_name(n): np.asarray(v) for n, v in _vectors(model)}
    tensors = {gguf_name(f"{n}.weight"): _kind(model.weight(n)) for n in modules}
    tensors |= {name: ("F32", vector.shape) for name, vector in vectors.items()}

    def data() -> Iterator[tuple[str, np.ndarray]]:
        for done, name in enumerate(modules):
            if progress:
                progress(name, done, len(modules))
            yield gguf_name(f"{name}.weight"), blocks_of(_ordered(model, name))
        yield from vectors.items()

    write_gguf(path, _values(job.packed), tensors, data())
    copy_companions(model.path, directory, find_companions(model.path))
    equal = _count_equal(model, path, modules, vectors)
    return {"bytes": path.stat().st_size, "scales": vars(grid), "proof": None, "equal_layers": equal,
            "layers": len(modules) + len(vectors), "cut_context": config.window or None,
            "unchecked": "llama.cpp is not part of llamita"}  # fmt: skip


def _count_equal(model: ModelSource, path: Path, modules: list[str], vectors: dict[str, np.ndarray]) -> int:
    """Read the file back, and count the tensors that have the very values of the packed model."""
    file = GgufFile(path)
    try:
        equal = sum(np.array_equal(floats_of("F32", file.read(name)), value) for name, value in vectors.items())
        return equal + sum(_is_equal(model, name, file) for name in modules)
    finally:
        file.close()


def blocks_of(weight: Weight) -> np.ndarray:
    """Return a matrix as the file stores it: uint8 (rows, bytes of a row), or floats as they are."""
    if isinstance(weight, np.ndarray):
        return weight
    is_int4 = isinstance(weight, Int4Weight)
    codes = (unpack_int4(np.asarray(weight.packed)) + 8 if is_int4 else np.asarray(weight.codes)).view(np.uint8)
    rows, columns = codes.shape
    scales = to_f32(np.asarray(weight.scales)).reshape(rows, -1)
    scales = np.repeat(scales, columns // BLOCK // scales.shape[1], axis=1).astype("<f2")  # (rows, blocks)
    blocks = codes.reshape(rows, -1, BLOCK)
    if is_int4:
        half = BLOCK // 2
        blocks = blocks[..., :half] | blocks[..., half:] << 4
    return np.concatenate([scales[..., None].view(np.uint8), blocks], axis=-1).reshape(rows, -1)


def _ordered(model: ModelSource, name: str) -> Weight:
    """Return a matrix with its rows in llama.cpp's order."""
    weight, heads = model.weight(name), gguf_heads_of(name, model.config)
    if heads is None:
        return weight
    if isinstance(weight, np.ndarray):
        return weight[pair_order(len(weight), heads)]
    if isinstance(weight, Int4Weight):
        order = pair_order(len(weight.packed), heads)
        return Int4Weight(weight.packed[order], weight.scales[order], weight.group_size)
    order = pair_order(len(weight.codes), heads)
    return Int8Weight(weight.codes[order], weight.scales[order])


def _kind(weight: Weight) -> tuple[str, tuple[int, ...]]:
    """Return a matrix's type in the file, and its shape."""
    if isinstance(weight, np.ndarray):
        return stored_dtype(weight), weight.shape
    return "Q4_0" if isinstance(weight, Int4Weight) else "Q8_0", shape_of(weight)


def _vectors(model: ModelSource) -> Iterator[tuple[str, np.ndarray]]:
    """Yield norms and biases in llama.cpp's order, and the factors of scaled rotary embeddings, by our names."""
    for name in vector_names(model.config):
        heads = gguf_heads_of(name.rpartition(".")[0], model.config)
        values = model.vector(name)
        yield name, values if heads is None else values[pair_order(len(values), heads)]
    if model.config.rope.kind == "llama3":
        yield "rope_freqs.weight", rope_factors(model.config)


def _values(packed: PackedModel) -> dict[str, Any]:
    """Return the file's metadata."""
    config = packed.config
    name = FAMILIES[config.family].gguf
    own = {
        "block_count": config.layers, "context_length": _context(config), "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size, "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads, "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim, "vocab_size": config.vocab_size,
        "attention.layer_norm_rms_epsilon": config.norm_eps, "rope.freq_base": config.rope.theta,
        "rope.dimension_count": config.head_dim,
    }  # fmt: skip
    if config.rope.kind in ("linear", "yarn"):
        own |= {"rope.scaling.type": config.rope.kind, "rope.scaling.factor": config.rope.factor}
    if config.rope.kind == "yarn":
        own |= {"rope.scaling.original_context_length": config.rope.original_context,
                "rope.scaling.yarn_beta_fast": config.rope.beta_fast,
                "rope.scaling.yarn_beta_slow": config.rope.beta_slow}  # fmt: skip
    values: dict[str, Any] = {
        "general.architecture": name, "general.name": source_name(packed), "general.file_type": _MOSTLY_Q4_0,
        "general.quantization_version": 2, **{f"{name}.{key}": value for key, value in own.items()},
        **tokenizer_values(packed),
    }  # fmt: skip
    template = find_template(packed.path)
    return values if template is None else values | {"tokenizer.chat_template": template}


def _context(config: ModelConfig) -> int:
    """Return the tokens of a text at most: within the window, as llama.cpp has none for these architectures."""
    return min(config.context, config.window) if config.windowed else config.context


def _check_family(config: ModelConfig) -> None:
    """Raise InputError for what llama.cpp computes in another way than the engine."""
    rope = config.rope
    if rope.depends_on_length:
        expected = "rotary embeddings that do not depend on the length of a text"
        raise InputError("--to gguf", expected, f"{rope.kind} ones")
    plain = RopeConfig.yarn(rope.theta, rope.factor, rope.original_context)
    if rope.kind == "yarn" and rope != replace(plain, beta_fast=rope.beta_fast, beta_slow=rope.beta_slow):
        raise InputError("--to gguf", "yarn with the paper's attention factor, truncated", "another")
    fourth = frozenset(range(3, config.layers, 4))  # fixed in llama.cpp
    if FAMILIES[config.family].skips_rope and config.unrotated != fourth:
        raise InputError("--to gguf", "every fourth layer without rotary embedding", f"{sorted(config.unrotated)}")


def _is_equal(model: ModelSource, name: str, file: GgufFile) -> bool:
    """Return whether the file's matrix has the very values of the packed one; compare some rows at a time."""
    found = gguf_name(f"{name}.weight")
    data, kind, heads = file.read(found), file.tensors[found].kind, gguf_heads_of(name, model.config)
    back = np.argsort(pair_order(len(data), heads)) if heads is not None else None
    done = 0
    for part in row_blocks(model.weight(name)):
        rows = np.arange(done, done + len(part))
        if not np.array_equal(floats_of(kind, data[rows if back is None else back[rows]]), part):
            return False
        done += len(part)
    return True
