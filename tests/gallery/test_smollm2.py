"""SmolLM2-135M-Instruct as people have it, a GGUF, through what they do with it."""

import io
import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from command import run
from places import DATA
from smollm2 import smollm2_file

import llamita
from llamita.formats.gguf import GgufFile, write_gguf
from llamita.formats.gguf_parts import GgufModel
from llamita.formats.gguf_words import SPLITS
from llamita.imports.gguf_tokenizer import convert_tokenizer

pytestmark = pytest.mark.real
LINES = 10_000
_IN_LLAMACPP = """
import json, sys
from llama_cpp import Llama
model = Llama(model_path=sys.argv[1], vocab_only=True, verbose=False)
lines = json.load(open(sys.argv[2]))
json.dump([model.tokenize(line.encode(), add_bos=False, special=True) for line in lines], open(sys.argv[3], "w"))
"""


@pytest.fixture(scope="module")
def gguf() -> Path:
    return smollm2_file()


def test_from_the_file_to_an_answer(gguf: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    assert run("quantize", gguf, "-o", tmp_path / "q") == 0
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"What is the capital of France?\n")))
    capsys.readouterr()
    assert run("chat", tmp_path / "q", "--greedy", "--max-tokens", "20") == 0
    assert "Paris" in capsys.readouterr().out


def test_logits_are_transformers(gguf: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="compares with transformers")
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    llm = llamita.load(gguf)
    ids = llm.tokenizer.encode("The capital of France is Paris, and that of Italy is Rome. 12345 naïve cafés.")
    assert run("import", gguf, "-o", tmp_path / "floats") == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "floats", dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(llm.logits(ids), expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("split", SPLITS)
def test_tokens_are_llamacpps(gguf: Path, tmp_path: Path, split: str) -> None:
    """With the file's own way to split texts, and with each other way that has a name."""
    python = os.environ.get("LLAMITA_LLAMACPP")
    if python is None or not DATA.is_dir():
        pytest.skip("LLAMITA_LLAMACPP: expected a Python with llama-cpp-python; and texts in LLAMITA_DATA")
    paths = sorted([*DATA.glob("**/*.txt"), *DATA.glob("**/*.raw"), *DATA.glob("**/*.tsv")])
    lines = [line for path in paths for line in path.read_text("utf-8", "replace").splitlines() if line]
    lines = lines[:: max(1, len(lines) // LINES)][:LINES]
    assert len(lines) == LINES
    if SPLITS[split].is_composed:  # llama.cpp composes no text
        lines = [unicodedata.normalize("NFC", line) for line in lines]
    (tmp_path / "lines.json").write_text(json.dumps(lines))
    file = GgufFile(gguf)
    write_gguf(tmp_path / "words.gguf", {**file.values, "tokenizer.ggml.pre": split}, {}, iter(()))
    program = [python, "-c", _IN_LLAMACPP, tmp_path / "words.gguf", tmp_path / "lines.json", tmp_path / "ids.json"]
    subprocess.run(program, check=True)
    (tmp_path / "made").mkdir()
    convert_tokenizer(GgufModel(tmp_path / "words.gguf"), tmp_path / "made")
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "made" / "tokenizer.json"))
    found = [one.ids for one in tokenizer.encode_batch(lines, add_special_tokens=False)]
    expected = json.loads((tmp_path / "ids.json").read_text())
    assert [line for line, one, other in zip(lines, found, expected, strict=True) if one != other] == []


def test_an_export_has_the_files_tokens(gguf: Path, tmp_path: Path) -> None:
    assert run("quantize", gguf, "-o", tmp_path / "q") == 0
    assert run("export", tmp_path / "q", "--to", "gguf", "-o", tmp_path / "out") == 0
    before, after = GgufFile(gguf).values, GgufFile(tmp_path / "out" / "model.gguf").values
    for key in ("model", "pre", "tokens", "merges", "token_type", "bos_token_id", "eos_token_id", "add_bos_token"):
        name = f"tokenizer.ggml.{key}"
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)
