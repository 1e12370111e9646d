"""Keep hidden states and finished blocks: in RAM, in mapped files above a limit, and on disk for a run that resumes.

Files of a work directory: `float-N.npy` and `quantized-N.npy`, the streams in front of block N, and `block-N.npz`, its
codes and scales. A block counts once its last file is there, and each file appears whole.
"""

import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llamita.methods.setup import Setup
from llamita.system.files import flush_path
from llamita.system.kept_work import kept_arrays, partial_of, read_kept, write_whole

_FLOAT_BYTES = 4
_SUMS = "streams.crc32"  # in a block's file: a damaged stream would silently change the codes


class Store:
    """The hidden states of one or two streams in front of and behind a block, and the rounded layers.

    Attributes:
        spills: whether hidden states are in files.
    """

    def __init__(self, setup: Setup, shape: tuple[int, int, int], kinds: tuple[str, ...]) -> None:
        """Make room for hidden states of `shape` (samples, length, hidden) float32 for each kind of stream."""
        self._shape, self._kinds = shape, kinds
        bytes_of_all = 2 * len(kinds) * _FLOAT_BYTES * int(np.prod(shape))
        self.spills = bytes_of_all > setup.memory
        self._layers: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # if no directory keeps them
        self._temporary = None
        self._directory = setup.work
        if self.spills and setup.work is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="llamita-")
            self._directory = Path(self._temporary.name)

    def finished(self, blocks: int) -> int:
        """Return how many of the first blocks an earlier run has finished.

        If a file is damaged, all begins again with 0, because the streams behind earlier blocks are deleted.
        """
        if self._directory is None:
            return 0
        files = [self._file("block", i) for i in range(blocks)]
        count = next((i for i, path in enumerate(files) if not path.exists()), blocks)
        kept = [kept_arrays(path, [_SUMS]) for path in files[:count]]
        streams = [self._file(kind, count) for kind in self._kinds if 0 < count < blocks]
        found = [read_kept(path, lambda path: zlib.crc32(self._mapped(path).data)) for path in streams]
        last = kept[-1][_SUMS].tolist() if streams and kept[-1] else []
        if None not in kept and found == last:
            return count
        for path in (*files[:count], *streams):
            path.unlink(missing_ok=True)
        return 0

    def _mapped(self, path: Path) -> np.ndarray:
        """Return a stream of an earlier run as a private mapping, which nothing writes to."""
        values = np.load(path, mmap_mode="c")
        if values.shape != self._shape or values.dtype != np.float32:
            raise ValueError(f"expected float32 {self._shape}, got {values.dtype} {values.shape}")
        return values

    def new(self, kind: str, index: int) -> Tensor:
        """Return room for the hidden states in front of block `index`."""
        if not self.spills:
            return torch.empty(self._shape)
        path = partial_of(self._file(kind, index))
        return torch.from_numpy(np.lib.format.open_memmap(path, "w+", np.float32, self._shape))

    def load(self, kind: str, index: int) -> Tensor:
        """Return hidden states that an earlier run kept."""
        values = self._mapped(self._file(kind, index))
        if self.spills:
            return torch.from_numpy(values)
        return torch.empty(self._shape).copy_(torch.from_numpy(values))  # aligned as in the first run

    def keep(self, index: int, after: dict[str, Tensor], layers: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """Keep block `index`: the streams behind it, and packed codes and scales of its layers by name."""
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
        arrays[_SUMS] = np.array([zlib.crc32(after[kind].numpy().data) for kind in self._kinds], np.uint32)
        write_whole(self._file("block", index), lambda file: np.savez(file, **arrays))  # pyright: ignore[reportArgumentType]
        for kind in after:
            before = self._file(kind, index)
            for path in (before, partial_of(before)):  # the stream before block 0 stays partial, as it is not kept
                path.unlink(missing_ok=True)

    def layer(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return packed codes and scales of a finished layer, by its full name."""
        if self._directory is None:
            return self._layers[name]
        with np.load(self._file("block", int(name.split(".")[2]))) as arrays:
            return arrays[f"{name}.0"], arrays[f"{name}.1"]

    def _file(self, kind: str, index: int) -> Path:
        assert self._directory is not None
        return self._directory / f"{kind}-{index:04}.{'npz' if kind == 'block' else 'npy'}"
