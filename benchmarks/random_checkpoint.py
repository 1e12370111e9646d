"""Write a checkpoint with random weights in the exact shape of Llama 3.2 1B: bf16, tied, sharded, 2.47 GB.

    python benchmarks/random_checkpoint.py DIRECTORY [--layers 16]

Speed, memory and size do not depend on the values of weights, so this replaces the gated original.
It needs about 100 MB of memory. The tokenizer knows bytes and three special tokens.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from llamita.bench.shapes import SHAPES
from llamita.formats.safetensors import TensorWriter
from llamita.models.checkpoint import INDEX
from llamita.models.config import ModelConfig
from llamita.models.names import expected_tensors
from llamita.numerics.affine import f32_to_bf16

CONFIG = SHAPES["llama-3.2-1b"]
SPECIAL = {"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, "<|eot_id|>": 128009}
DEVIATION = 0.02  # the initializer range of Llama
SHARD_BYTES = 1_000_000_000
PIECE = 2**22  # weights made at a time


def write_checkpoint(directory: Path, layers: int, seed: int) -> None:
    """Write config, tokenizer and weight files into a new directory."""
    directory.mkdir(parents=True)
    values = {**CONFIG, "num_hidden_layers": layers}
    (directory / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    write_tokenizer(directory)
    shapes = expected_tensors(ModelConfig.from_hf(values))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if shards[-1] and 2 * sum(map(np.prod, [*shards[-1].values(), shape])) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    weight_map = {tensor: file for file, shard in zip(names, shards, strict=True) for tensor in shard}
    total = 2 * sum(int(np.prod(shape)) for shape in shapes.values())
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    rng = np.random.default_rng(seed)
    for file, shard in zip(names, shards, strict=True):
        write_shard(directory / file, shard, rng)
        print(f"{file}: {(directory / file).stat().st_size / 1e6:,.0f} MB")


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]], rng: np.random.Generator) -> None:
    """Yield normal weights in pieces of rows; norms are one."""
    writer = TensorWriter(path, {name: ("BF16", shape) for name, shape in shapes.items()})
    for name, shape in shapes.items():
        if len(shape) == 1:
            writer.write(name, f32_to_bf16(np.ones(shape, np.float32)))
            continue
        rows, columns = shape
        step = max(1, PIECE // columns)
        for start in range(0, rows, step):
            piece = rng.standard_normal((min(step, rows - start), columns), np.float32)
            writer.write(name, f32_to_bf16(np.float32(DEVIATION) * piece))
    writer.finish()


def write_tokenizer(directory: Path) -> None:
    """Write a tokenizer: ids 0 to 255 are bytes, special tokens have the ids of config.json, fillers are in between."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(alphabet)}
    vocab |= {f"<|filler_{i}|>": i for i in range(len(vocab), min(SPECIAL.values()))}
    by_id = {i: name for name, i in SPECIAL.items()}
    names = [by_id.get(i, f"<|reserved_{i}|>") for i in range(min(by_id), CONFIG["vocab_size"])]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(names)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>",
                "eos_token": "<|end_of_text|>",
                "chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}"}  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_checkpoint(arguments.directory, arguments.layers, arguments.seed)
