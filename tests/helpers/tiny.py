"""Tiny random Llama checkpoints in Hugging Face form, one configuration for each family."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from llamita.formats.safetensors import TensorWriter
from llamita.models.config import ModelConfig
from llamita.models.names import linear_names, table_names, vector_names
from llamita.numerics.affine import f32_to_bf16

_COMMON = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "vocab_size": 320,
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
    "bos_token_id": 256, "eos_token_id": 257, "initializer_range": 0.02, "use_cache": True,
}  # fmt: skip
_LLAMA3_ROPE = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llama2": {**_COMMON, "num_key_value_heads": 4, "rope_theta": 10000.0},
    "llama3": {**_COMMON, "eos_token_id": [257, 258]},
    "llama31": {**_COMMON, "rope_scaling": {**_LLAMA3_ROPE, "factor": 8.0}},
    "llama32": {**_COMMON, "rope_scaling": {**_LLAMA3_ROPE, "factor": 32.0}, "tie_word_embeddings": True},
    "tinyllama": {**_COMMON, "num_key_value_heads": 1, "rope_theta": 10000.0, "intermediate_size": 352},
}
# Options of `make_checkpoint` that make a model of one layer, for tests that read thousands of them
SMALL: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
                         "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
_CAST = {"BF16": f32_to_bf16, "F16": lambda x: x.astype(np.float16), "F32": lambda x: x}
_CONFIG_DTYPE = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def make_checkpoint(directory: Path, family: str = "llama32", *, dtype: str = "BF16", shards: int = 1,
                    seed: int = 0, **overrides: Any) -> Path:  # fmt: skip
    """Write a checkpoint of this family; `overrides` replace keys of its config.json.

    Weights are normal with deviation 0.08 (so that a two-layer model's logits are far from uniform), norms
    lie around 1, biases around 0. Returns the directory.
    """
    values = {**CONFIGS[family], "dtype": _CONFIG_DTYPE[dtype], **overrides}
    tensors = random_tensors(ModelConfig.from_hf(values), seed)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(values, indent=2))
    write_tensors(directory, {name: _CAST[dtype](x) for name, x in tensors.items()}, dtype, shards)
    write_tokenizer(directory)
    return directory


def random_tensors(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Every tensor of the architecture by its full name, float32."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in {**table_names(config), **linear_names(config)}.items():
        tensors[f"{name}.weight"] = rng.normal(0, 0.08, shape).astype(np.float32)
    for name, shape in vector_names(config).items():
        middle = 0.0 if name.endswith(".bias") else 1.0
        tensors[name] = rng.normal(middle, 0.1, shape).astype(np.float32)
    return tensors


def llama3_rope(factor: float) -> dict[str, Any]:
    """Return Llama 3's rope_scaling as it is published, with 8,192 positions before scaling.

    The families above have 64; other formats assume 8,192.
    """
    return {**_LLAMA3_ROPE, "factor": factor, "original_max_position_embeddings": 8192}


def write_tensors(directory: Path, tensors: dict[str, np.ndarray], dtype: str, shards: int = 1) -> None:
    """Write model.safetensors, or that many shards with their index."""
    names = list(tensors)
    if shards == 1:
        write_file(directory / "model.safetensors", tensors, dtype)
        return
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        write_file(directory / file, part, dtype)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def replace_tensors(directory: Path, tensors: dict[str, np.ndarray], dtype: str) -> None:
    """Write these tensors in place of the checkpoint's model.safetensors."""
    (directory / "model.safetensors").unlink()
    write_tensors(directory, tensors, dtype)


def write_file(path: Path, tensors: dict[str, np.ndarray], dtype: str) -> None:
    """One safetensors file."""
    writer = TensorWriter(path, {name: (dtype, x.shape) for name, x in tensors.items()})
    for name, x in tensors.items():
        writer.write(name, x)
    writer.finish()


def write_tokenizer(directory: Path, use_regex: bool = False) -> None:
    """A byte-level tokenizer without merges: ids 0 to 255 are bytes, then begin, end and a turn's end.

    Args:
        use_regex: split texts as GPT-2's does, which GGUF has a name for.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>",
                "eos_token": "<|end_of_text|>"}  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
