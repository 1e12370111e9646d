"""Where hidden states and finished blocks lie: in RAM, in mapped files above a limit, and kept for a run
that goes on after this one was killed.

Files of a work directory: `float-N.npy` and `quantized-N.npy`, the streams in front of block N, and
`block-N.npz`, its codes and scales. A block counts once its last file is there, and each file appears whole.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llamita.files import flush_path
from llamita.methods.setup import Setup
from llamita.resume import partial_of, read_kept, write_whole

_FLOAT_BYTES = 4


class Store:
    """The hidden states of one or two streams in front of and behind a block, and what was rounded.

    Attributes:
        spills: whether hidden states lie in files.
    """

    def __init__(self, setup: Setup, shape: tuple[int, int, int], kinds: tuple[str, ...]) -> None:
        """Hidden states of `shape` (samples, length, hidden) float32 for each kind, "quantized", "float"."""
        self._shape, self._kinds = shape, kinds
        bytes_of_all = 2 * len(kinds) * _FLOAT_BYTES * int(np.prod(shape))
        self.spills = bytes_of_all > setup.memory
        self._layers: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # where no directory keeps them
        self._temporary = None
        self._directory = setup.work
        if self.spills and setup.work is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="llamita-")
            self._directory = Path(self._temporary.name)

    def finished(self) -> int:
        """Number of blocks that an earlier run has finished, the first ones; 0 if a file is damaged."""
        if self._directory is None:
            return 0
        count = 0
        while self._file("block", count).exists():
            count += 1
        blocks = [self._file("block", i) for i in range(count)]
        streams = [self._file(kind, count) for kind in self._kinds if count]
        whole = [read_kept(path, lambda path: dict(np.load(path))) is not None for path in blocks]
        whole += [read_kept(path, self._mapped) is not None for path in streams]
        if all(whole):
            return count
        for path in (*blocks, *streams):
            path.unlink(missing_ok=True)
        return 0

    def _mapped(self, path: Path) -> np.ndarray:
        """A stream of an earlier run, copied where it is written to, which nothing does."""
        values = np.load(path, mmap_mode="c")
        if values.shape != self._shape or values.dtype != np.float32:
            raise ValueError(f"expected float32 {self._shape}, got {values.dtype} {values.shape}")
        return values

    def new(self, kind: str, index: int) -> Tensor:
        """Room for the hidden states in front of block `index`."""
        if not self.spills:
            return torch.empty(self._shape)
        path = partial_of(self._file(kind, index))
        return torch.from_numpy(np.lib.format.open_memmap(path, "w+", np.float32, self._shape))

    def load(self, kind: str, index: int) -> Tensor:
        """Hidden states that an earlier run kept."""
        values = self._mapped(self._file(kind, index))
        if self.spills:
            return torch.from_numpy(values)
        return torch.empty(self._shape).copy_(torch.from_numpy(values))  # in memory aligned as ever

    def keep(
        self, index: int, after: dict[str, Tensor], layers: dict[str, tuple[np.ndarray, np.ndarray]]
    ) -> None:
        """Block `index` is done: the streams behind it, and packed codes and scales of its layers by name."""
        if self._directory is None:
            self._layers |= layers
            return
        for kind, values in after.items():
            path = self._file(kind, index + 1)
            if self.spills:
                flush_path(partial_of(path))
                partial_of(path).rename(path)
            else:
                write_whole(path, lambda file, values=values: np.save(file, values.numpy()))
        arrays = {f"{name}.{i}": array for name, pair in layers.items() for i, array in enumerate(pair)}
        write_whole(self._file("block", index), lambda file: np.savez(file, **arrays))  # pyright: ignore[reportArgumentType]
        for kind in after:
            before = self._file(kind, index)
            for path in (before, partial_of(before)):  # that of block 0 was never whole: it is made anew
                path.unlink(missing_ok=True)

    def layer(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Packed codes and scales of a finished layer, by its full name."""
        if self._directory is None:
            return self._layers[name]
        with np.load(self._file("block", int(name.split(".")[2]))) as arrays:
            return arrays[f"{name}.0"], arrays[f"{name}.1"]

    def _file(self, kind: str, index: int) -> Path:
        assert self._directory is not None
        return self._directory / f"{kind}-{index:04}.{'npz' if kind == 'block' else 'npy'}"
