"""Calibration text: tokens that show a method what the layers will see."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from llamita.errors import InputError
from llamita.methods.setup import Calibration
from llamita.tokenizer import Tokenizer


def load_calibration(
    name: str, source: Any, tokenizer: Tokenizer, samples: int, length: int, seed: int
) -> Calibration:
    """Tokens (samples, length) from a text file: whole chunks of it, drawn by the seed.

    Raises:
        InputError: no such file, or a text that is too short.
    """
    del source
    if name == "self":
        raise InputError("--calibration: expected a text file, got 'self'; try --calibration FILE")
    try:
        text = Path(name).read_bytes().decode()
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"--calibration: expected a text file, found none at {name}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: expected UTF-8, got a stray byte at {error.start}") from None
    ids = np.array(tokenizer.encode(text), np.int32)
    chunks = ids[: len(ids) // length * length].reshape(-1, length)
    if len(chunks) < samples:
        raise InputError(
            f"--calibration: expected {samples} samples of {length} tokens, got {len(ids)} tokens in {name}; "
            f"try --samples {max(1, len(chunks))}"
        )
    tokens = chunks[np.sort(np.random.default_rng(seed).permutation(len(chunks))[:samples])]
    return Calibration(name, hashlib.sha256(tokens.tobytes()).hexdigest(), tokens)
