"""Read Meta's quantized releases of Llama 3.2, SpinQuant and QLoRA: codes, scales and adapters by llamita's names.

Codes are int8. Their `scales` are (outputs, groups) for linear layers, and one a row for embedding and head.
SpinQuant's weights contain R1 and R2, and expect R4 at run time, a Hadamard transform of `w2`'s input.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llamita.errors import InputError, shown
from llamita.imports.codes import Coded
from llamita.imports.torch_files import bits_of
from llamita.models.config import ModelConfig
from llamita.models.foreign_names import hf_order, meta_name
from llamita.models.names import EMBEDDING, HEAD, linear_names, table_names, vector_names
from llamita.models.peft import StoredAdapter
from llamita.numerics.affine import to_f32
from llamita.numerics.hadamard import factor
from llamita.numerics.rotations import Rotations

SCHEME = "int4_weight_int8_dynamic_activation"
KEYS = ("quantization_args", "lora_args")  # of params.json, besides those of every release
_ARGUMENTS = {"scheme", "group_size", "spinquant"}


class MetaQuantized:
    """A quantized release; an `import_codes.CodedModel`.

    Args:
        files: those that decide what the model is.
        hf_config: made by `meta.hf_config`.
        state: tensors by Meta's names.

    Raises:
        InputError: another scheme, a tensor that is not known, or a rotation of another size.
    """

    format = "Meta's quantized release"

    def __init__(
        self, path: Path, files: list[Path], params: dict[str, Any], hf_config: dict[str, Any], state: dict[str, Tensor]
    ) -> None:
        self.path, self.files, self._state, self._params = path, files, state, params
        self.hf_config = {**hf_config, "tie_word_embeddings": "output.weight" not in state}
        self.config = ModelConfig.from_hf(self.hf_config)
        self.rotations, self.rotated = self._rotations(params.get("quantization_args"))
        known = self._known()
        strange = sorted(name for name in state if name not in known)
        if strange:
            raise InputError(f"consolidated.00.pth: {shown(strange[0])}", "a Llama's tensors alone")

    def _rotations(self, arguments: Any) -> tuple[Rotations, tuple[str, ...]]:
        """Return the rotations for run time, and the names of those that are in the weights."""
        if not isinstance(arguments, dict) or arguments.get("scheme") != SCHEME or set(arguments) - _ARGUMENTS:
            expected = f"the scheme {SCHEME} and {', '.join(sorted(_ARGUMENTS))}"
            raise InputError("params.json: quantization_args", expected, shown(arguments))
        if not arguments.get("spinquant"):
            return Rotations(), ()
        size = self.config.intermediate_size
        if factor(size)[0] > 1:
            raise InputError("params.json: spinquant", "w2's inputs a power of two", f"{size}")
        if any(".adaptor." in name for name in self._state):  # adapters of `w2` would read what R4 has rotated
            raise InputError("params.json", "SpinQuant or adapters", "a release with both")
        return Rotations(("R4",), size), ("R1", "R2")

    def _known(self) -> set[str]:
        """Return the name of every tensor that the release may have."""
        found = {"rope.freqs", *(meta_name(name) for name in vector_names(self.config))}
        for name in {**table_names(self.config), **linear_names(self.config)}:
            base = base_name(name)
            found.add(f"{base}weight")
            if f"{base}weight" in self._state and self._state[f"{base}weight"].dtype == torch.int8:
                found |= {f"{base}scales", f"{base}zeros"}
            pair = {f"{base}adaptor.{part}.weight" for part in "AB"}
            if name in linear_names(self.config) and pair <= self._state.keys():
                found |= pair
        return found

    def activations(self) -> str | None:
        """See `import_codes.CodedModel`."""
        return None

    def matrix(self, name: str) -> Coded | np.ndarray:
        """See `import_codes.CodedModel`."""
        base = base_name(name)
        codes, order = self._tensor(f"{base}weight"), hf_order(f"{name}.weight", self.config)
        if codes.dtype != torch.int8:
            values = bits_of(codes, f"{base}weight")
            return values if order is None else values[order]
        scales = to_f32(bits_of(self._tensor(f"{base}scales"), f"{base}scales"))
        if f"{base}zeros" in self._state and bool(self._state[f"{base}zeros"].any()):
            raise InputError(f"{base}zeros", "symmetric weights", "zero points")
        if codes.ndim != 2 or len(scales) != len(codes):
            raise InputError(f"{base}weight", "a matrix with scales for its rows", f"{tuple(codes.shape)}")
        values, scales = codes.numpy(), scales.reshape(len(scales), -1)
        if order is not None and len(order) == len(values):
            values, scales = values[order], scales[order]
        return Coded(values, scales, 8 if name in (EMBEDDING, HEAD) else 4)

    def vector(self, name: str) -> np.ndarray:
        """See `import_codes.CodedModel`."""
        return bits_of(self._tensor(meta_name(name)), name)

    def adapter(self) -> StoredAdapter | None:
        """Return the release's adapters with rows in Hugging Face's order, None where it has none.

        Raises:
            InputError: a rank or shape does not fit, or the scale is missing.
        """
        names = [n for n in linear_names(self.config) if f"{base_name(n)}adaptor.A.weight" in self._state]
        arguments = self._params.get("lora_args")
        if not names and arguments is None:
            return None
        if not names:
            raise InputError("params.json: lora_args", "adapters among the weights", "none")
        scale = arguments.get("scale") if isinstance(arguments, dict) else None
        rank = arguments.get("rank") if isinstance(arguments, dict) else None
        if not isinstance(scale, int | float) or isinstance(scale, bool) or type(rank) is not int:
            raise InputError("params.json: lora_args", "rank and scale", shown(arguments))
        return StoredAdapter({name: self._pair(name, rank) for name in names}, rank, float(scale))

    def _pair(self, name: str, rank: int) -> tuple[np.ndarray, np.ndarray]:
        base = f"{base_name(name)}adaptor."
        down, up = (bits_of(self._tensor(f"{base}{part}.weight"), name) for part in "AB")
        rows, columns = linear_names(self.config)[name]
        if down.shape != (rank, columns) or up.shape != (rows, rank):
            raise InputError(f"{base}A", f"{(rank, columns)} and {(rows, rank)}", f"{down.shape} and {up.shape}")
        order = hf_order(f"{name}.weight", self.config)
        return down, up if order is None else up[order]

    def _tensor(self, name: str) -> Tensor:
        if name not in self._state:
            raise InputError("consolidated.00.pth", name, "none")
        return self._state[name]


def base_name(name: str) -> str:
    """Return the part that the names of all tensors of a module begin with, the last dot included."""
    return meta_name(f"{name}.weight").removesuffix("weight")
