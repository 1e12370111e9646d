"""What `--to gguf` writes, in llama.cpp itself: LLAMITA_LLAMACPP names a Python that has llama-cpp-python."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from command import run
from families import FAMILIES, make_family
from places import ROOT

import llamita

sys.path.insert(0, str(ROOT / "benchmarks"))
import formats

TOKENS = 400


@pytest.mark.peers
@pytest.mark.parametrize("group_size", [32, 128])
def test_llamacpp_has_the_engines_perplexity(tmp_path: Path, group_size: int) -> None:
    """Within 1 % on a text that the model wrote; its activations are rounded in another way."""
    python = os.environ.get("LLAMITA_LLAMACPP")
    if python is None:
        pytest.skip("LLAMITA_LLAMACPP: expected a Python with llama-cpp-python, got none")
    packed, out = tmp_path / "packed", tmp_path / "out"
    assert run("quantize", "embedded", "-o", packed, "--group-size", group_size) == 0
    assert run("export", packed, "--to", "gguf", "-o", out) == 0
    llm = llamita.load(packed)
    written = llm.generate("", max_tokens=TOKENS, temperature=1.0, seed=1)
    tokens = [llm.tokenizer.bos_token_id or 0, *written.token_ids]
    found = formats.in_llamacpp(python, str(packed), out, tokens)
    assert len(tokens) > 100
    assert abs(found["perplexity_in_llamacpp"] / found["perplexity"] - 1) < 0.01
    assert found["kl"] < 0.01


@pytest.mark.peers
@pytest.mark.parametrize("family", [name for name in FAMILIES if "longrope" not in name])
def test_llamacpp_computes_every_family(tmp_path: Path, family: str) -> None:
    """On random tokens, no more of them than a window has."""
    python = os.environ.get("LLAMITA_LLAMACPP")
    if python is None:
        pytest.skip("LLAMITA_LLAMACPP: expected a Python with llama-cpp-python, got none")
    pytest.importorskip("transformers", reason="makes the model")
    model, packed, out = make_family(tmp_path / "model", family), tmp_path / "packed", tmp_path / "out"
    assert run("quantize", model, "-o", packed) == 0
    assert run("export", packed, "--to", "gguf", "-o", out) == 0
    tokens = [256, *(int(i) for i in np.random.default_rng(1).integers(0, 256, 39))]
    assert formats.in_llamacpp(python, str(packed), out, tokens)["kl"] < 0.01
