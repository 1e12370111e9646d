"""Meta's tokenizer models as tokenizer.json, made on the fly from the development data."""

import os
from pathlib import Path

import pytest

from llamita.imports.tokenizers import FILE, convert_tokenizer

DATA = Path(os.environ.get("LLAMITA_DATA", Path(__file__).parents[2] / "shared" / "data")) / "tokenizers"


def model_file(name: str) -> Path:
    """The file of this name, or skip the test."""
    if not (DATA / name).exists():
        pytest.skip(f"needs {name}: set LLAMITA_DATA (looked in {DATA})")
    return DATA / name


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
