"""Write a Llama checkpoint as GGUF in BF16, with its byte tokens and fillers, for llama.cpp's quantizer.

python benchmarks/server/make_float_gguf.py CHECKPOINT OUT.gguf     (of random_checkpoint.py)
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llamita.formats.gguf import write_gguf
from llamita.models.checkpoint import Checkpoint
from llamita.models.config import ModelConfig
from llamita.models.foreign_names import gguf_heads_of, gguf_name, pair_order, rope_factors
from llamita.models.names import expected_tensors

_MOSTLY_BF16 = 32  # general.file_type
_NORMAL, _CONTROL = 1, 3  # llama.cpp's kinds of tokens


def write(directory: Path, out: Path) -> None:
    """Write the file."""
    source = Checkpoint(directory)
    config, shapes = source.config, expected_tensors(source.config)
    tensors = {gguf_name(name): ("F32" if len(shape) == 1 else "BF16", shape) for name, shape in shapes.items()}
    tensors["rope_freqs.weight"] = ("F32", (config.head_dim // 2,))

    def data() -> Iterator[tuple[str, np.ndarray]]:
        for name, shape in shapes.items():
            module = name.removesuffix(".weight")
            if len(shape) == 1:
                yield gguf_name(name), np.asarray(source.vector(name), np.float32)
                continue
            bits, heads = np.asarray(source.weight(module)), gguf_heads_of(module, config)
            yield gguf_name(name), bits if heads is None else bits[pair_order(len(bits), heads)]
        yield "rope_freqs.weight", rope_factors(config)

    write_gguf(out, {**_shape(config), **_tokens(directory, config)}, tensors, data())


def _shape(config: ModelConfig) -> dict[str, Any]:
    own = {
        "block_count": config.layers, "context_length": config.context, "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size, "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads, "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim, "vocab_size": config.vocab_size,
        "attention.layer_norm_rms_epsilon": config.norm_eps, "rope.freq_base": config.rope.theta,
        "rope.dimension_count": config.head_dim,
    }  # fmt: skip
    common = {"general.architecture": "llama", "general.name": "random", "general.file_type": _MOSTLY_BF16}
    return {**common, **{f"llama.{name}": value for name, value in own.items()}}


def _tokens(directory: Path, config: ModelConfig) -> dict[str, Any]:
    """Return the tokenizer's metadata. The one merge is of no use, but llama.cpp wants some."""
    whole = json.loads((directory / "tokenizer.json").read_text("utf-8"))
    words = {number: word for word, number in whole["model"]["vocab"].items()}
    special = {token["id"]: token["content"] for token in whole["added_tokens"]}
    words |= special
    kinds = [_CONTROL if number in special else _NORMAL for number in range(config.vocab_size)]
    by_word = {word: number for number, word in special.items()}
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.tokens": [words[number] for number in range(config.vocab_size)],
        "tokenizer.ggml.token_type": np.array(kinds, np.int32), "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.bos_token_id": by_word["<|begin_of_text|>"],
        "tokenizer.ggml.eos_token_id": by_word["<|end_of_text|>"],
    }  # fmt: skip


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
