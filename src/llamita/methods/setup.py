"""What methods that look at activations begin with: text, seed, room, and settings of their own."""

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llamita.errors import InputError
from llamita.system.progress import Progress

BATCH_TOKENS = 2048  # in a forward pass at a time: the widest inputs of a 1B model then take 64 MB


@dataclass(frozen=True)
class Calibration:
    """Tokens on which a method measures what the layers see.

    Attributes:
        name: the text's, as the user called it.
        sha256: of the tokens' bytes, in hexadecimal.
        tokens: int32 (samples, length); samples do not see each other.
    """

    name: str
    sha256: str
    tokens: np.ndarray

    def record(self) -> dict[str, Any]:
        """What llamita.json says of it."""
        samples, length = self.tokens.shape
        return {"name": self.name, "sha256": self.sha256, "samples": samples, "length": length}


@dataclass(frozen=True)
class Setup:
    """What a chain of methods may use.

    Attributes:
        calibration: None where no method of the chain needs one.
        seed: of everything that a method draws.
        work: a directory where finished blocks are kept, so that a killed run can go on; None keeps nothing.
        memory: bytes that hidden states may take in RAM; above, they lie in mapped files.
        settings: of single methods, by names such as "tune.steps"; each has its defaults.
        progress: told what is being worked on, done and total.
    """

    calibration: Calibration | None = None
    seed: int = 0
    work: Path | None = None
    memory: int = 2**30
    settings: dict[str, Any] = field(default_factory=dict)
    progress: Progress = None


def parse_settings(texts: Iterable[str], methods: Collection[str]) -> dict[str, Any]:
    """Settings that a user wrote as METHOD.NAME=VALUE; a value that is no JSON is text.

    Raises:
        InputError: another form, or a method that is not among these.
    """
    settings = {}
    for text in texts:
        name, equals, value = text.partition("=")
        method, dot, rest = name.partition(".")
        if not (equals and dot and rest):
            raise InputError("--set", "METHOD.NAME=VALUE, such as spinquant.steps=0", f"{text!r}")
        if method not in methods:
            raise InputError(f"--set {text}", f"a setting of {', '.join(methods)}", f"one of {method}")
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value
    return settings
