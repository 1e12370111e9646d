"""Read a GGUF file of a Llama: as a packed model with its codes, or as a float checkpoint.

llama.cpp's own Q4_0 has scales of both signs, which no other runtime here takes, so Q4_0 and Q8_0 are then multiplied
out: float32 holds every product of a code and a scale exactly. F32, F16 and BF16 stay as they are.
"""

from pathlib import Path
from typing import Any

import numpy as np

from llamita.errors import InputError, shown
from llamita.formats.gguf_blocks import floats_of
from llamita.formats.gguf_parts import GgufModel
from llamita.imports.gguf_codes import STORED, GgufCodes
from llamita.imports.gguf_tokenizer import convert_tokenizer
from llamita.imports.import_codes import CodesLostError, Imported, import_codes
from llamita.imports.tokenizers import LLAMA3_ENDS
from llamita.models.config import ModelConfig
from llamita.models.foreign_names import SCALED_ROPE, gguf_name, hf_order, rope_factors
from llamita.models.names import expected_tensors, linear_names
from llamita.models.packed_writer import plan_shards, write_shards
from llamita.system.files import write_json
from llamita.system.progress import Progress

_SIGNED = "weights are multiplied out: llama.cpp's int4 scales have both signs, which no other runtime takes"
_OTHER = "weights are multiplied out: their blocks ({kinds}) have no counterpart among our codes"
# Values that change the forward pass, with those that do not.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "logit_scale": (1.0, 0.0), "embedding_scale": (1.0, 0.0), "residual_scale": (1.0, 0.0),
    "attention.scale": (0.0,), "attention.sliding_window": (0,), "attention.clamp_kqv": (0.0,),
    "attention.causal": (True,), "rope.scale_linear": (1.0,), "rope.scaling.attn_factor": (1.0,),
    "expert_count": (0,), "use_parallel_residual": (False,),
}  # fmt: skip


def convert(source: Path, directory: Path, progress: Progress = None) -> Imported:
    """Write a packed directory where the file's int4 codes can be kept, else a float checkpoint.

    Args:
        directory: exists, empty.

    Raises:
        InputError: the file is damaged, or no Llama that the engine knows.
        RunError: the file cannot be read.
    """
    file = GgufModel(source)
    try:
        values = hf_config(file)
        config = ModelConfig.from_hf(values)
        _check_plain(file, config)
        _check_rope(file, config)
        _check_tensors(file, config)
        convert_tokenizer(file, directory)
        coded, note = GgufCodes(file, values), None
        if coded.is_int4():
            try:
                return Imported(import_codes(coded, directory, progress, keep_all=True))
            except CodesLostError:
                note = _SIGNED
        kinds = sorted({file.tensors[gguf_name(name + ".weight")].kind for name in linear_names(config)} - set(STORED))
        if kinds and note is None:
            note = _OTHER.format(kinds=", ".join(kinds))
        _write_weights(file, config, directory, progress)
        write_json(directory / "config.json", values)
        return Imported(note=note)
    finally:
        file.close()


def read_config(path: Path) -> dict[str, Any]:
    """Return config.json for a file, of which only the header is read.

    Raises:
        InputError, RunError: see `GgufModel` and `hf_config`.
    """
    file = GgufModel(path)
    try:
        return hf_config(file)
    finally:
        file.close()


def hf_config(file: GgufModel) -> dict[str, Any]:
    """Return config.json for the file's metadata.

    Raises:
        InputError: another architecture, or a value that is missing or of another type.
    """
    if (found := file.values.get("general.architecture")) != "llama":
        raise InputError(f"{file.path.name}: general.architecture", "llama", shown(found, 40))
    heads, hidden = _integer(file, "attention.head_count"), _integer(file, "embedding_length")
    tokens = file.values.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        raise InputError(f"{file.path.name}: tokenizer.ggml.tokens", "texts", "none")
    values: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": hidden, "intermediate_size": _integer(file, "feed_forward_length"),
        "num_hidden_layers": _integer(file, "block_count"), "num_attention_heads": heads,
        "num_key_value_heads": _integer(file, "attention.head_count_kv", heads),
        "head_dim": _integer(file, "attention.key_length", hidden // heads if heads else 0),
        "max_position_embeddings": _integer(file, "context_length"), "vocab_size": len(tokens),
        "rms_norm_eps": _number(file, "attention.layer_norm_rms_epsilon", 1e-5),
        "rope_theta": _number(file, "rope.freq_base", 10000.0), "dtype": "float32",
        "tie_word_embeddings": "output.weight" not in file.tensors, "mlp_bias": False,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "bos_token_id": file.values.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _ends(file, tokens),
    }  # fmt: skip
    return values | _scaling(file)


def _ends(file: GgufModel, tokens: list[str]) -> list[int]:
    """Return every token that ends an answer: those of the metadata, and Llama 3's by their names."""
    given = [file.values.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    named = [tokens.index(name) for name in LLAMA3_ENDS if name in tokens]
    return list(dict.fromkeys([*(number for number in given if type(number) is int), *named]))


def _check_plain(file: GgufModel, config: ModelConfig) -> None:
    """Raise InputError at the first value that asks for more than a Llama's forward pass."""
    width = (config.head_dim,)
    for key, plain in {"rope.dimension_count": width, "attention.value_length": width, **_PLAIN}.items():
        value = file.values.get(f"llama.{key}", plain[0])
        if isinstance(value, np.ndarray | list) or value not in plain:
            raise InputError(f"{file.path.name}: llama.{key}", f"{plain[0]}", f"{shown(value, 40)}: not a plain Llama")


def _scaling(file: GgufModel) -> dict[str, Any]:
    """Return the keys of config.json that say how rotary embeddings are stretched."""
    kind = file.values.get("llama.rope.scaling.type")
    if kind == "linear":
        factor = _number(file, "rope.scaling.factor", 1.0)
        return {"rope_scaling": {"rope_type": "linear", "factor": factor}}
    if kind not in (None, "none"):
        raise InputError(f"{file.path.name}: rope.scaling.type", "linear or none", shown(kind, 40))
    if "rope_freqs.weight" not in file.tensors:
        return {}
    if file.tensors["rope_freqs.weight"].kind != "F32":
        raise InputError(f"{file.path.name}: rope_freqs.weight", "F32")
    factors = floats_of("F32", file.read("rope_freqs.weight"))
    return {"rope_scaling": {**SCALED_ROPE, "factor": float(np.round(factors.max(), 3))}}


def _check_rope(file: GgufModel, config: ModelConfig) -> None:
    """Check that frequencies are divided as in Llama 3.1; the file has the factors, not the rule behind them."""
    if config.rope.kind == "llama3":
        found = floats_of("F32", file.read("rope_freqs.weight"))
        expected = rope_factors(config)
        if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-3):
            raise InputError(f"{file.path.name}: rope_freqs.weight", "the factors of Llama 3.1 and 3.2")


def _check_tensors(file: GgufModel, config: ModelConfig) -> None:
    """Check that the file has a Llama's tensors, and nothing else."""
    tensors = expected_tensors(config)
    for tensor, shape in tensors.items():
        found = file.tensors.get(gguf_name(tensor))
        if found is None or found.shape != shape:
            got = "none" if found is None else f"{found.shape}"
            raise InputError(f"{file.path.name}: {gguf_name(tensor)}", f"{shape}", got)
        if len(shape) == 1 and found.kind not in STORED:
            raise InputError(f"{file.path.name}: {gguf_name(tensor)}", "floats", found.kind)
    known = {gguf_name(tensor) for tensor in tensors} | {"rope_freqs.weight"}
    for name in file.tensors:
        if name not in known:
            raise InputError(f"{file.path.name}: {shown(name)}", "a Llama's tensors alone")


def _write_weights(file: GgufModel, config: ModelConfig, directory: Path, progress: Progress) -> None:
    tensors = expected_tensors(config)
    kinds = {t: kind if (kind := file.tensors[gguf_name(t)].kind) in STORED else "F32" for t in tensors}
    order = sorted(tensors, key=lambda t: kinds[t] != "F32")  # so that each starts at a multiple of its element's size
    shards = plan_shards({t: {t: (kinds[t], tensors[t])} for t in order})
    write_shards(directory, shards, lambda t: [_read(file, t, tensors[t], kinds[t], config)], progress)


def _read(file: GgufModel, tensor: str, shape: tuple[int, ...], kind: str, config: ModelConfig) -> np.ndarray:
    """Return a tensor as it is stored, with its rows in transformers' order."""
    stored, data = file.tensors[gguf_name(tensor)].kind, file.read(gguf_name(tensor))
    is_same = stored == kind
    values = data.view(STORED[kind]).reshape(shape) if is_same else floats_of(stored, data)
    order = hf_order(tensor, config)
    return values if order is None else values[order]


def _integer(file: GgufModel, key: str, default: int | None = None) -> int:
    value = file.values.get(f"llama.{key}", default)
    if type(value) is not int or value < 1:
        raise InputError(f"{file.path.name}: llama.{key}", "a whole number", shown(value, 40))
    return value


def _number(file: GgufModel, key: str, default: float) -> float:
    value = file.values.get(f"llama.{key}", default)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InputError(f"{file.path.name}: llama.{key}", "a number", shown(value, 40))
    # the shortest decimal of the float32 is what config.json had
    return float(str(np.float32(value)))
