"""Round a float model as it is read, with the codes and scales that `quantize` would write."""

import numpy as np

from llamita import _native
from llamita.methods import chain as chains
from llamita.methods.chain import parse_chain
from llamita.methods.setup import Setup
from llamita.models.packed_writer import stored_rotations
from llamita.models.sizes import make_plan
from llamita.models.weights import FloatSource, Int4Weight, Int8Weight, as_stored
from llamita.numerics.affine import f32_to_bf16
from llamita.numerics.scheme import QuantScheme


class RoundedSource:
    """A float model rounded as it is read. Methods that look at activations round all of it when it is made."""

    def __init__(
        self, source: FloatSource, scheme: QuantScheme, method: str = "rtn", setup: Setup | None = None
    ) -> None:
        chain, setup = parse_chain(method), setup or Setup()
        make_plan(source.config, scheme, lambda name: source.info(name).dtype)  # does it fit?
        self._source = chains.transform(source, chain, setup)
        self.path, self.config, self.scheme = source.path, self._source.config, scheme
        self.rotations = stored_rotations(self._source.rotations)
        self._round = chains.rounder(self._source, scheme, chain, setup)

    def weight(self, name: str) -> Int4Weight | Int8Weight | np.ndarray:
        """Return a linear layer or table as the scheme rounds it, or a float one as the source has it."""
        kind = self.scheme.kind(name)
        if not kind.bits:
            return as_stored(self._source.weight(name), self._source.info(f"{name}.weight").dtype)
        pieces = [
            (
                _native.codes_to_packed(piece.codes) if kind.group_size else piece.codes,
                stored_scales(piece.scales, self.scheme),
            )
            for piece in self._round(name)
        ]
        values, scales = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
        if kind.group_size:
            return Int4Weight(values, scales, kind.group_size)
        return Int8Weight(values, scales.reshape(-1))

    def vector(self, name: str) -> np.ndarray:
        """Return (length,) float32."""
        return self._source.vector(name)

    def close(self) -> None:
        """Unmap the files."""
        self._source.close()


def stored_scales(scales: np.ndarray, scheme: QuantScheme) -> np.ndarray:
    """Return scales as they are stored: float32, or the bits of bf16, on whose grid they already are."""
    return scales if scheme.scale_dtype == "float32" else f32_to_bf16(scales)
