"""`--to gguf`: Q4_0 and Q8_0 with the codes and scales as they are, for llama.cpp and what is built on it.

A block of Q4_0 is a scale in f16 and 32 codes + 8, the first 16 of them in the low halves of its bytes; of
Q8_0 a scale and 32 codes. A larger group's scale, or a channel's, is repeated. Weights are the same, to the
bit; activations are not: llama.cpp rounds them to int8 in blocks of 32, without a zero point.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llamita.errors import InputError
from llamita.export.gguf_tokenizer import tokenizer_values
from llamita.export.job import ExportJob
from llamita.export.source import RoundedScales, check_grid, module_names, refuse_online
from llamita.formats.gguf import BLOCK, GgufFile, write_gguf
from llamita.formats.gguf_blocks import floats_of
from llamita.models.foreign_names import gguf_name, heads_of, pair_order, rope_factors
from llamita.models.names import vector_names
from llamita.models.packed import PackedModel
from llamita.models.packed_writer import copy_companions, find_companions
from llamita.models.weights import Int4Weight, Int8Weight, row_blocks, stored_dtype
from llamita.numerics.affine import to_f32
from llamita.numerics.packing import unpack_int4
from llamita.system.progress import Progress
from llamita.text.chat_template import find_template

FILE = "model.gguf"
_MOSTLY_Q4_0 = 2  # general.file_type


def write(job: ExportJob, directory: Path, progress: Progress) -> dict[str, Any]:
    """Fill a directory; every weight is read back and compared.

    Raises:
        InputError: the form cannot hold the model.
    """
    packed: Any = job.packed
    refuse_online(packed, "gguf")
    if packed.config.rope.kind == "dynamic":
        raise InputError(
            "--to gguf",
            "rotary embeddings that do not depend on the length of a text",
            "dynamic ones, which llama.cpp has not",
        )
    may_round = bool(job.options.get("round_scales"))
    grid = check_grid(packed, "f16", may_round, "gguf")
    if grid.off:
        packed = RoundedScales(packed, "f16")
    modules = module_names(packed)
    path = directory / FILE
    vectors = {gguf_name(n): np.asarray(v) for n, v in _vectors(packed)}
    tensors = {gguf_name(f"{n}.weight"): _kind(packed, n) for n in modules}
    tensors |= {name: ("F32", vector.shape) for name, vector in vectors.items()}

    def data() -> Iterator[tuple[str, np.ndarray]]:
        for done, name in enumerate(modules):
            if progress:
                progress(name, done, len(modules))
            yield gguf_name(f"{name}.weight"), blocks_of(_ordered(packed, name))
        yield from vectors.items()

    write_gguf(path, _values(packed), tensors, data())
    copy_companions(job.packed.path, directory, find_companions(job.packed.path))
    equal = _equal(packed, path, modules, vectors)
    return {"bytes": path.stat().st_size, "scales": vars(grid), "proof": None, "equal_layers": equal,
            "layers": len(modules) + len(vectors),
            "unchecked": "llama.cpp is no part of llamita"}  # fmt: skip


def _equal(packed: Any, path: Path, modules: list[str], vectors: dict[str, np.ndarray]) -> int:
    """How many tensors of the file, read back, have the very values of the packed model."""
    file = GgufFile(path)
    try:
        equal = sum(np.array_equal(floats_of("F32", file.read(name)), value) for name, value in vectors.items())
        return equal + sum(_is_equal(packed, name, file) for name in modules)
    finally:
        file.close()


def blocks_of(weight: Int4Weight | Int8Weight | np.ndarray) -> np.ndarray:
    """A matrix as the file has it: uint8 (rows, bytes of a row), or floats as they are stored."""
    if isinstance(weight, np.ndarray):
        return weight
    if isinstance(weight, Int4Weight):
        codes = (unpack_int4(np.asarray(weight.packed)) + 8).astype(np.uint8)
    else:
        codes = np.asarray(weight.codes).view(np.uint8)
    rows, columns = codes.shape
    scales = to_f32(np.asarray(weight.scales)).reshape(rows, -1)
    scales = np.repeat(scales, columns // BLOCK // scales.shape[1], axis=1).astype("<f2")  # (rows, blocks)
    blocks = codes.reshape(rows, -1, BLOCK)
    if isinstance(weight, Int4Weight):
        half = BLOCK // 2
        blocks = blocks[..., :half] | blocks[..., half:] << 4
    return np.concatenate([scales[..., None].view(np.uint8), blocks], axis=-1).reshape(rows, -1)


def _ordered(packed: Any, name: str) -> Int4Weight | Int8Weight | np.ndarray:
    """A matrix with its rows as llama.cpp has them."""
    weight, heads = packed.weight(name), heads_of(name, packed.config)
    if heads is None:
        return weight
    if isinstance(weight, np.ndarray):
        return weight[pair_order(len(weight), heads)]
    if isinstance(weight, Int4Weight):
        order = pair_order(len(weight.packed), heads)
        return Int4Weight(weight.packed[order], weight.scales[order], weight.group_size)
    order = pair_order(len(weight.codes), heads)
    return Int8Weight(weight.codes[order], weight.scales[order])


def _kind(packed: Any, name: str) -> tuple[str, tuple[int, ...]]:
    weight = packed.weight(name)
    if isinstance(weight, np.ndarray):
        return stored_dtype(weight), weight.shape
    if isinstance(weight, Int4Weight):
        return "Q4_0", (len(weight.packed), weight.packed.shape[1] * 8)
    return "Q8_0", weight.codes.shape


def _vectors(packed: Any) -> Iterator[tuple[str, np.ndarray]]:
    for name in vector_names(packed.config):
        heads = heads_of(name.rpartition(".")[0], packed.config)
        values = packed.vector(name)
        yield name, values if heads is None else values[pair_order(len(values), heads)]
    if packed.config.rope.kind == "llama3":
        yield "rope_freqs.weight", rope_factors(packed.config)


def _values(packed: PackedModel) -> dict[str, Any]:
    config = packed.config
    name = packed.metadata.source.name.rsplit("/", 1)[-1]
    values: dict[str, Any] = {
        "general.architecture": "llama", "general.name": name, "general.file_type": _MOSTLY_Q4_0,
        "general.quantization_version": 2, "llama.block_count": config.layers,
        "llama.context_length": config.context, "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size, "llama.attention.head_count": config.heads,
        "llama.attention.head_count_kv": config.kv_heads, "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim, "llama.vocab_size": config.vocab_size,
        "llama.attention.layer_norm_rms_epsilon": config.norm_eps, "llama.rope.freq_base": config.rope.theta,
        "llama.rope.dimension_count": config.head_dim,
    }  # fmt: skip
    if config.rope.kind == "linear":
        values |= {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": config.rope.factor}
    values |= tokenizer_values(packed)
    template = find_template(packed.path)
    return values if template is None else values | {"tokenizer.chat_template": template}


def _is_equal(packed: Any, name: str, file: GgufFile) -> bool:
    """Whether the file's matrix has the very values of the packed one, some rows at a time."""
    found = gguf_name(f"{name}.weight")
    data, kind, heads = file.read(found), file.tensors[found].kind, heads_of(name, packed.config)
    back = np.argsort(pair_order(len(data), heads)) if heads is not None else None
    done = 0
    for part in row_blocks(packed.weight(name)):
        rows = np.arange(done, done + len(part))
        if not np.array_equal(floats_of(kind, data[rows if back is None else back[rows]]), part):
            return False
        done += len(part)
    return True
