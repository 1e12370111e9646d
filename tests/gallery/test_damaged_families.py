"""Damaged checkpoints of the families that are rewritten or need more than a Llama: one typed error, or a model."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from damage import mutate_value, outcome, to_text
from families import make_family

from llamita.models.checkpoint import Checkpoint

pytest.importorskip("transformers", reason="makes the models")
SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1}  # fmt: skip
FAMILIES = ("granite", "phi3, window", "phi3, longrope", "mllama", "qwen2, window", "smollm3", "llama, yarn")


def read_all(path: Path) -> None:
    """Open a checkpoint and read every tensor."""
    source = Checkpoint(path)
    for name in source.config.linear_shapes():
        assert np.asarray(source.weight(f"model.layers.0.{name}")).ndim == 2
    source.close()


@pytest.mark.parametrize("cases", [250, pytest.param(5000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_damaged_config_is_one_typed_error(tmp_path: Path, family: str, cases: int) -> None:
    path = make_family(tmp_path / "model", family, **SMALL)
    config, refused = path / "config.json", 0
    good = config.read_bytes()
    read_all(path)
    for case in range(cases):
        rng = random.Random(case)
        config.write_bytes(to_text(mutate_value(json.loads(good), rng), rng))
        try:
            message = outcome(read_all, path)
        except Exception as problem:
            raise AssertionError(f"case {case}") from problem
        refused += message is not None
        assert "\n" not in (message or ""), f"case {case}"
    assert refused > cases // 10
