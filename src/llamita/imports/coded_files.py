"""A quantized checkpoint in Hugging Face's format: config.json, safetensors, several tensors a module.

compressed-tensors, GPTQ and torchao share this; each of their modules says what the tensors mean.
"""

from pathlib import Path
from typing import Any

import numpy as np

from llamita.errors import InputError
from llamita.imports.codes import Coded
from llamita.imports.detect import quantization_of
from llamita.imports.import_codes import CodesLostError, Imported, import_codes
from llamita.models.checkpoint import INDEX, check_names, open_tensor_files
from llamita.models.config import ModelConfig
from llamita.models.names import EMBEDDING, HEAD, expected_tensors, linear_names, table_names, vector_names
from llamita.models.packed_writer import copy_companions, find_companions, plan_shards, write_shards
from llamita.models.weights import FLOAT_DTYPES, check_finite
from llamita.numerics.affine import to_f32
from llamita.numerics.rotations import Rotations
from llamita.system.files import exists_in, read_json, safe_path, write_json
from llamita.system.progress import Progress

_IGNORED = ".rotary_emb.inv_freq"  # in old checkpoints; the engine computes it
_NO_TOKENIZER = "the model has no tokenizer, so it takes token ids only; to add one, import again with tokenizer.json"


def import_files(model: "ModuleFiles", directory: Path, progress: Progress) -> Imported:
    """Write a packed model from an open checkpoint, with its tokenizer and companions."""
    companions = find_companions(model.path)
    copy_companions(model.path, directory, companions)
    note = None if any(name.startswith("tokenizer.") for name in companions) else _NO_TOKENIZER
    try:
        return Imported(import_codes(model, directory, progress), note=note)
    except CodesLostError as lost:
        _write_floats(model, directory, progress)
        return Imported(note=f"weights are multiplied out: {lost}")


def _write_floats(model: "ModuleFiles", directory: Path, progress: Progress) -> None:
    """Write a float checkpoint: what has codes in float32, all else as it is stored."""
    tensors = expected_tensors(model.config)

    def values(tensor: str) -> np.ndarray:
        name = tensor.removesuffix(".weight")
        return model.vector(tensor) if len(tensors[tensor]) == 1 else model.values(name)

    dtypes = {t: "F32" if model.is_coded(t.removesuffix(".weight")) else model.dtype(t) for t in tensors}
    modules = {t: {t: (dtypes[t], tensors[t])} for t in tensors}

    def piece(tensor: str) -> list[np.ndarray]:
        found = values(tensor)
        if found.shape != tensors[tensor]:
            raise InputError(tensor, f"{tensors[tensor]}", f"{found.shape}")
        check_finite(tensor, found)
        return [found]

    write_shards(directory, plan_shards(modules), piece, progress)
    write_json(directory / "config.json", {**model.hf_config, "dtype": "float32"})


class ModuleFiles:
    """The tensors of a quantized checkpoint by module; an `import_codes.CodedModel` once `coded` is added.

    Attributes:
        quantization: quantization_config of config.json.

    Raises:
        InputError: a file is damaged, or the model is no Llama.
        RunError: a file cannot be read.
    """

    format = ""

    def __init__(self, path: Path) -> None:
        values = read_json(path, "config.json")
        self.path, self.rotations, self.rotated = path, Rotations(), ()
        self.quantization: dict[str, Any] = quantization_of(path)
        values.pop("quantization_config", None)
        self.hf_config = values
        self.config = ModelConfig.from_hf(values)
        self._files, self._where = open_tensor_files(path)
        self.files = [safe_path(path, name) for name in ("config.json", *self._files)]
        self.files += [safe_path(path, INDEX)] if exists_in(path, INDEX) else []
        vectors = vector_names(self.config)
        self._parts: dict[str, dict[str, str]] = {}  # module to its tensors by their last names
        for tensor in self._where:
            module, _, part = tensor.rpartition(".")
            if tensor not in vectors and not tensor.endswith(_IGNORED):
                self._parts.setdefault(module, {})[part] = tensor
        if self.config.tied and HEAD in self._parts:
            self._drop_tied_head()
        modules = table_names(self.config) | linear_names(self.config)
        check_names(set(modules), set(self._parts), "is tie_word_embeddings right?")
        check_names(set(vectors), vectors.keys() & self._where.keys(), "is attention_bias right?")

    def _drop_tied_head(self) -> None:
        """Leave out a tied head that some tools write a second time; it must repeat the embedding."""
        head, table = self._parts.pop(HEAD), self._parts.get(EMBEDDING, {})
        if head.keys() != table.keys() or any(
            not np.array_equal(self.read(head[part]), self.read(table[part])) for part in head
        ):
            expected, hint = "the embedding again (tie_word_embeddings is true)", "try tie_word_embeddings: false"
            raise InputError(HEAD, expected, "other values", f"{hint} in config.json")

    def read(self, tensor: str) -> np.ndarray:
        """Return a tensor as it is stored, mapped."""
        return self._files[self._where[tensor]].read(tensor)

    def dtype(self, tensor: str) -> str:
        """Return the name of a tensor's type."""
        return self._files[self._where[tensor]].tensors[tensor].dtype

    def metadata(self, name: str) -> Any:
        """Return the first file's metadata of this name, None where no file has it."""
        return next((file.metadata[name] for file in self._files.values() if name in file.metadata), None)

    def part(self, module: str, part: str, dtypes: tuple[str, ...]) -> np.ndarray:
        """Return a tensor of a module; it must have one of these types."""
        tensor = self._parts[module].get(part)
        if tensor is None:
            raise InputError(f"{module}.{part}", f"in {self.path.name}", "none")
        if self.dtype(tensor) not in dtypes:
            raise InputError(f"{tensor}: dtype", " or ".join(dtypes), self.dtype(tensor))
        values = self.read(tensor)
        if not values.size or values.ndim > 2:
            raise InputError(tensor, "a matrix or a vector", f"{values.shape}")
        return values

    def scales(self, module: str, part: str) -> np.ndarray:
        """Return a module's scales in float32 (rows, groups); a file may have one a row without the second axis."""
        values = to_f32(np.atleast_1d(self.part(module, part, FLOAT_DTYPES)))
        return values.reshape(len(values), -1)

    def parts(self, module: str, known: set[str]) -> set[str]:
        """Return the names of a module's tensors; all must be among those that are known."""
        strange = sorted(self._parts[module].keys() - known)
        if strange:
            raise InputError(f"{module}.{strange[0]}", f"one of {', '.join(sorted(known))}")
        return set(self._parts[module])

    def matrix(self, name: str) -> Coded | np.ndarray:
        """See `import_codes.CodedModel`."""
        tensor = self._parts[name].get("weight")
        if self._parts[name].keys() == {"weight"} and tensor and self.dtype(tensor) in FLOAT_DTYPES:
            return self.read(tensor)
        return self.coded(name)

    def activations(self) -> str | None:
        """See `import_codes.CodedModel`."""
        raise NotImplementedError

    def coded(self, name: str) -> Coded:
        """Return a module that is quantized.

        Raises:
            CodesLostError: the module's codes cannot be kept, but `floats` gives its values.
        """
        raise NotImplementedError

    def floats(self, name: str) -> np.ndarray:
        """Return the values of a module that is quantized: float32 (rows, columns)."""
        return self.coded(name).floats()

    def is_coded(self, name: str) -> bool:
        """Return whether a module is quantized."""
        return name in self._parts and "weight" not in self._parts[name]

    def values(self, name: str) -> np.ndarray:
        """Return the values of a module, as they are stored if it is not quantized."""
        return self.floats(name) if self.is_coded(name) else self.read(self._parts[name]["weight"])

    def vector(self, name: str) -> np.ndarray:
        """See `import_codes.CodedModel`."""
        values, expected = self.read(name), vector_names(self.config)[name]
        if self.dtype(name) not in FLOAT_DTYPES or values.shape != expected:
            raise InputError(name, f"floats {expected}", f"{self.dtype(name)} {values.shape}")
        return values
