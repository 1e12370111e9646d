"""Open an exported checkpoint in transformers, and compare its weights and logits with the engine's."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from llamita.export.partitioners import quiet
from llamita.export.proof import Proof, compare, engine_of, own_tokens
from llamita.export.runtime import Ran
from llamita.export.source import module_names
from llamita.models.names import EMBEDDING, HEAD
from llamita.models.packed import PackedModel
from llamita.models.weights import row_blocks
from llamita.numerics.affine import bf16_to_f32, f32_to_bf16


def prove(packed: PackedModel, directory: Path, in_bf16: tuple[str, ...] = ()) -> Proof:
    """Load a checkpoint as a user would, and compare it with the engine.

    Args:
        in_bf16: modules whose weights are rounded to bf16; all others have to be the same to the bit.
    """
    engines = engine_of(packed)
    tokens, prompt, new = own_tokens(engines[0], packed.config.context)
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
        ran = _run(model.eval(), tokens, prompt, new)  # the first pass multiplies compressed weights out
    names = module_names(packed)
    equal = sum(_is_equal(model, packed, name, name in in_bf16) for name in names)
    return compare(engines, (len(names), equal), tokens, ran)


def _is_equal(model: Any, packed: PackedModel, name: str, in_bf16: bool) -> bool:
    """Return whether a module's weights are those of the packed model; a tied head's, too."""
    modules = [name, HEAD] if name == EMBEDDING and packed.config.tied else [name]
    for module in modules:
        weight, done = model.get_submodule(module).weight.detach(), 0
        weight = weight.dequantize() if hasattr(weight, "dequantize") else weight
        for part in row_blocks(packed.weight(name)):
            expected = bf16_to_f32(f32_to_bf16(part)) if in_bf16 else part
            found = weight[done : done + len(part)].float().numpy()
            if not np.array_equal(found, expected):
                return False
            done += len(part)
    return True


def _run(model: Any, tokens: list[int], prompt: int, new: int) -> Ran:
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].float().numpy()
        state = model(torch.tensor([tokens[:prompt]]), use_cache=True)
        greedy, times = list[int](), list[float]()
        for _ in range(new):
            greedy.append(int(state.logits[0, -1].argmax()))
            began = time.perf_counter()
            state = model(torch.tensor([greedy[-1:]]), past_key_values=state.past_key_values, use_cache=True)
            times.append(time.perf_counter() - began)
    return Ran(logits, None, np.array(greedy, np.int64), float(np.median(times)))
