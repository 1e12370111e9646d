"""Read a model that llama.cpp's `gguf-split` cut into files: NAME-00001-of-00003.gguf and so on.

The first file has the model's metadata, and each file has some of its tensors.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from llamita.errors import InputError, shown
from llamita.formats.gguf import GgufFile, GgufTensor

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")
_MOST_PARTS = 1000


class GgufModel:
    """A model in one GGUF file or in several parts, whichever of them is named.

    Attributes:
        path: the first file.
        files: all of them, in order.
        values: its metadata by key.
        tensors: those of all files, by name.

    Raises:
        InputError: a file is damaged, or a part is missing or of another model.
        RunError: a file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        paths = parts_of(path)
        self.path = paths[0]
        self.files = [GgufFile(part) for part in paths]
        try:
            self.values: dict[str, Any] = self.files[0].values
            self.tensors: dict[str, GgufTensor] = {}
            self._owner: dict[str, GgufFile] = {}
            self._join(len(paths))
        except InputError:
            self.close()
            raise

    def read(self, name: str) -> np.ndarray:
        """Return a tensor's bytes; see `GgufFile.read`."""
        return self._owner[name].read(name)

    def close(self) -> None:
        """Release the files; arrays from `read` keep them mapped until they are gone."""
        for file in self.files:
            file.close()

    def _join(self, parts: int) -> None:
        for number, file in enumerate(self.files):
            place = (file.values.get("split.no", 0), file.values.get("split.count", 0) or 1)
            if place != (number, parts):
                got = f"{shown(place[0], 20)} of {shown(place[1], 20)}"
                raise InputError(f"{file.path.name}: split.no", f"{number} of {parts} files", got)
            for name, tensor in file.tensors.items():
                if name in self.tensors:
                    raise InputError(f"{file.path.name}: {shown(name, 100)}", "in one file", "in two")
                self.tensors[name], self._owner[name] = tensor, file
        count = self.values.get("split.tensors.count", len(self.tensors))
        if count != len(self.tensors):
            raise InputError(f"{self.path.name}: split.tensors.count", shown(count, 20), f"{len(self.tensors)}")


def parts_of(path: Path) -> list[Path]:
    """Return the files of a model in order: the file itself, or all parts if its name is that of one.

    Raises:
        InputError: a part is missing.
    """
    paths = [path.with_name(name) for name in part_names(path.name)]
    missing = [part.name for part in paths if not part.exists()]
    if missing and len(paths) > 1:
        raise InputError(f"{path}", f"all {len(paths)} parts of the model", f"none named {missing[0]}")
    return paths


def part_names(name: str) -> list[str]:
    """Return the names of all parts of a model, in order, for the name of one; a name of another form is itself.

    Safetensors and pytorch_model.bin number their files in the same way.
    """
    match = _PART.fullmatch(name)
    if match is None or not 1 <= int(match[3]) <= _MOST_PARTS:
        return [name]
    return [f"{match[1]}-{number:05}-of-{match[3]}{match[4]}" for number in range(1, int(match[3]) + 1)]
