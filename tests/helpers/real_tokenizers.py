"""Meta's tokenizer models as tokenizer.json, made on the fly from the development data."""

from pathlib import Path

import pytest
from places import DATA

from llamita.imports.tokenizers import FILE, convert_tokenizer

TOKENIZERS = DATA / "tokenizers"


def model_file(name: str) -> Path:
    """The file of this name, or skip the test."""
    if not (TOKENIZERS / name).exists():
        pytest.skip(f"needs {name}: set LLAMITA_DATA (looked in {TOKENIZERS})")
    return TOKENIZERS / name


def write_llama3(directory: Path) -> Path:
    """tokenizer.json and its settings from tiktoken's ranks."""
    return _write("llama3_tokenizer.model", directory)


def write_llama2(directory: Path) -> Path:
    """tokenizer.json and its settings from a SentencePiece model."""
    return _write("llama2_tokenizer.model", directory)


def _write(name: str, directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / FILE).write_bytes(model_file(name).read_bytes())
    convert_tokenizer(directory, directory)
    (directory / FILE).unlink()
    return directory
