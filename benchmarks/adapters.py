"""Measure the time that adapters cost in the engine: prompts and decoding with and without them, in turn.

    python benchmarks/adapters.py MODEL --rank 16 --rounds 20

MODEL is any directory that `llamita.load` takes. The adapters are of every linear layer and random, because their
values do not change the time.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

import llamita
from llamita.engine.llm import LLM
from llamita.formats.safetensors import TensorWriter
from llamita.imports.open import open_source
from llamita.models.peft import CONFIG, WEIGHTS
from llamita.numerics.affine import f32_to_bf16

PROMPT_TOKENS = 256


def make_adapter(directory: Path, model: str, rank: int) -> Path:
    """Write random adapters in BF16, in PEFT's format."""
    config, random = open_source(model).config, np.random.default_rng(0)
    tensors = {}
    for layer in range(config.layers):
        for name, (rows, columns) in config.linear_shapes().items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            for part, shape in (("A", (rank, columns)), ("B", (rows, rank))):
                values = random.normal(0, 0.01, shape).astype(np.float32)
                tensors[f"{prefix}.lora_{part}.weight"] = f32_to_bf16(values)
    (directory / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}))
    writer = TensorWriter(directory / WEIGHTS, {name: ("BF16", t.shape) for name, t in tensors.items()})
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.finish()
    return directory


def seconds_of(llm: LLM, adapter: str | None, tokens: int) -> tuple[float, float]:
    """Return the seconds of a prompt, and of each token after it."""
    cache = llm.new_sequence(PROMPT_TOKENS + tokens)
    cache.adapter = llm.adapters[adapter] if adapter else None
    ids = np.arange(PROMPT_TOKENS, dtype=np.int32)
    began = time.perf_counter()
    llm.model.step([(cache, ids)])
    middle = time.perf_counter()
    for token in range(tokens):
        llm.model.step([(cache, ids[token : token + 1])])
    return middle - began, (time.perf_counter() - middle) / tokens


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=8, help="of each round")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = make_adapter(Path(folder), arguments.model, arguments.rank)
        kinds: dict[str, tuple[LLM, str | None]] = {
            "loaded without": (llamita.load(arguments.model, threads=arguments.threads), None),
            "loaded with, not asked for": (llamita.load(arguments.model, adapters={"a": path}), None),
        }
        kinds["asked for"] = (kinds["loaded with, not asked for"][0], "a")
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
        for _ in range(arguments.rounds):  # in turn, so that other work on the machine slows all alike
            for name, (llm, adapter) in kinds.items():
                times[name].append(seconds_of(llm, adapter, arguments.tokens))
    first = times["loaded without"]
    for name, found in times.items():
        prompt, token = (statistics.median(values) for values in zip(*found, strict=True))
        more = [statistics.median(b[i] / a[i] for a, b in zip(first, found, strict=True)) - 1 for i in range(2)]
        print(
            f"{name:28} prompt {prompt * 1e3:8.1f} ms ({more[0]:+.1%})   token {token * 1e3:7.2f} ms ({more[1]:+.1%})"
        )


if __name__ == "__main__":
    main()
