"""What a chain of methods begins with: calibration text, seed, limits of memory, and settings."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llamita.errors import InputError, shown
from llamita.system.progress import Progress

BATCH_TOKENS = 2048  # tokens in a forward pass: the widest inputs of a 1B model then take 64 MB


@dataclass(frozen=True)
class Calibration:
    """Tokens on which a method measures what the layers see.

    Attributes:
        name: the text, as the user called it.
        sha256: of the tokens' bytes, in hexadecimal.
        tokens: int32 (samples, length); samples do not see each other.
    """

    name: str
    sha256: str
    tokens: np.ndarray

    def record(self) -> dict[str, Any]:
        """Return what llamita.json records of it."""
        samples, length = self.tokens.shape
        return {"name": self.name, "sha256": self.sha256, "samples": samples, "length": length}


@dataclass(frozen=True)
class Setup:
    """What a chain of methods may use.

    Attributes:
        calibration: None where no method of the chain needs it.
        seed: of everything that a method draws.
        work: a directory that keeps finished blocks, so that a killed run can resume; None keeps nothing.
        memory: bytes of RAM for hidden states; larger ones are in mapped files.
        settings: of single methods, by names such as "tune.steps"; those not given have their defaults.
        progress: called with what is being done, how many are done, and of how many.
    """

    calibration: Calibration | None = None
    seed: int = 0
    work: Path | None = None
    memory: int = 2**30
    settings: dict[str, Any] = field(default_factory=dict)
    progress: Progress = None


def parse_settings(texts: Iterable[str]) -> dict[str, Any]:
    """Return the settings that a user wrote as METHOD.NAME=VALUE; a value that is not JSON is text.

    Raises:
        InputError: another form.
    """
    settings = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (equals and name.partition(".")[2]):
            raise InputError("--set", "METHOD.NAME=VALUE, such as spinquant.steps=0", shown(text))
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value
    return settings
