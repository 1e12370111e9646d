"""Meta's two tokenizers after conversion, against the libraries that they were made for, on real text."""

import base64
from pathlib import Path

import pytest
from places import DATA
from real_tokenizers import model_file, write_llama2, write_llama3

from llamita.formats.gguf_words import LLAMA3 as WORDS
from llamita.text.tokenizer import Tokenizer

LINES = 10_000
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
           "<|eom_id|>", "<|python_tag|>", "<|finetune_right_pad_id|>"]  # fmt: skip


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """Lines of the development data, half of them stories and the like, half of them WikiText."""
    found = []
    for folder in ("text", "wikitext2"):
        files = sorted(path for path in (DATA / folder).glob("*") if path.suffix in (".txt", ".raw", ".tokens"))
        own = [line for path in files for line in path.read_text("utf-8").split("\n") if line.strip()]
        found += own[:: max(1, len(own) // (LINES // 2))][: LINES // 2]
    if len(found) < LINES:
        pytest.skip(f"needs {LINES} lines: set LLAMITA_DATA (looked in {DATA}, found {len(found)})")
    return found


def test_llama_3s_is_tiktokens(lines: list[str], tmp_path: Path) -> None:
    tiktoken = pytest.importorskip("tiktoken", reason="compares with tiktoken")
    raw = model_file("llama3_tokenizer.model").read_bytes().splitlines()
    ranks = {base64.b64decode(piece): int(rank) for piece, rank in (line.split() for line in raw)}
    ours = Tokenizer(write_llama3(tmp_path / "llama3"))
    special = {name: ours.encode(name, add_bos=False)[0] for name in SPECIAL}
    assert special["<|begin_of_text|>"] == 128000
    assert special["<|eot_id|>"] == 128009
    theirs = tiktoken.Encoding("llama3", pat_str=WORDS, mergeable_ranks=ranks, special_tokens=special)
    texts = [*lines, "".join(f"{name}a b" for name in SPECIAL)]
    expected = [theirs.encode(text, allowed_special="all") for text in texts]
    found = [ours.encode(text, add_bos=False) for text in texts]
    assert found == expected
    assert [ours.decode(ids) for ids in found[:-1]] == lines


def test_llama_2s_is_sentencepieces(lines: list[str], tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece", reason="compares with sentencepiece")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(model_file("llama2_tokenizer.model")))
    ours = Tokenizer(write_llama2(tmp_path / "llama2"))
    found = [ours.encode(line, add_bos=False) for line in lines]
    different = [line for line, ids in zip(lines, found, strict=True) if ids != theirs.encode(line)]
    assert different == []
    assert [ours.decode(ids) for ids in found] == [theirs.decode(ids) for ids in found]
    assert ours.encode("a") == [1, *theirs.encode("a")]
