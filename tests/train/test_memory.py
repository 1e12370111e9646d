"""Check the memory that training is expected to need."""

import pytest

from llamita.bench.shapes import find_shape
from llamita.models.config import ModelConfig
from llamita.train.memory import expected_memory
from llamita.train.recipe import Recipe, change, read_recipe


def gigabytes(shape: str, recipe: Recipe, on_gpu: bool = True, shards: int = 1) -> float:
    """Return the expected gigabytes for a published model's shape."""
    return expected_memory(ModelConfig.from_hf(find_shape(shape)[1]), recipe, on_gpu, shards) / 1e9


def test_weights_gradients_and_moments_are_sixteen_bytes_a_weight() -> None:
    tiny = change(read_recipe("sft"), ["length=2", "batch=1", "micro_batch=1"])
    assert gigabytes("llama-3.2-1b", tiny) == pytest.approx(1.2358 * 16, rel=0.01)
    assert gigabytes("llama-3.1-8b", tiny) == pytest.approx(8.0303 * 16, rel=0.01)
    assert gigabytes("llama-3.1-8b", tiny, shards=4) == pytest.approx(8.0303 * 4, rel=0.02)


def test_adapters_need_a_quarter_and_a_teacher_more() -> None:
    full, adapters = (change(read_recipe(name), ["length=2", "batch=1", "micro_batch=1"]) for name in ("sft", "lora"))
    assert 0.25 < gigabytes("llama-3.2-3b", adapters) / gigabytes("llama-3.2-3b", full) < 0.30
    alone, taught = (change(read_recipe("qat"), [f"distill={share}"]) for share in (0, 0.5))
    more = gigabytes("llama-3.2-3b", taught) - gigabytes("llama-3.2-3b", alone)
    assert more > 3.2 * 2  # the teacher in BF16, and its logits


def test_rounding_and_longer_rows_need_more() -> None:
    plain, rounded = read_recipe("sft"), change(read_recipe("qat"), ["distill=0"])
    assert gigabytes("llama-3.2-1b", rounded, on_gpu=False) > gigabytes("llama-3.2-1b", plain, on_gpu=False) + 4
    longer = change(plain, ["length=2048"])
    assert gigabytes("llama-3.2-1b", longer) > gigabytes("llama-3.2-1b", plain) + 6  # logits above all
