"""Read the tensors of a file of torch.save, mapped. Nothing in the file is run: torch.load takes tensors alone."""

import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llamita.errors import InputError, RunError, shown

# Torch's float types: the name in safetensors, the type whose bits Torch shows, and NumPy's for these bits.
FLOATS = {torch.bfloat16: ("BF16", torch.int16, "<u2"), torch.float16: ("F16", torch.int16, "<f2"),
          torch.float32: ("F32", torch.int32, "<f4")}  # fmt: skip


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Return a file's tensors by name: floats and int8.

    Raises:
        InputError: the file is damaged, or has anything but plain tensors.
        RunError: the file cannot be read.
    """
    try:
        _check_archive(path)
        with warnings.catch_warnings():  # about damaged files, which the error below reports
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except InputError:
        raise
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # Torch's loader fails in a dozen ways
        why = " ".join(str(error).split())[:120]
        raise InputError(path.name, f"a file of torch.save with tensors alone: {why}") from None
    if not isinstance(state, dict) or not state:
        raise InputError(path.name, "tensors by name", type(state).__name__)
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or not _is_plain(tensor, path):
            raise InputError(f"{path.name}: {shown(str(name))}", "a plain tensor of floats, stored as it is")
    return state


def bits_of(tensor: Tensor, name: str) -> np.ndarray:
    """Return a tensor of floats as a NumPy array, bf16 as its bits; raise InputError for other types."""
    if tensor.dtype not in FLOATS:
        raise InputError(name, "floats", f"{tensor.dtype}")
    _, view, dtype = FLOATS[tensor.dtype]
    return tensor.contiguous().view(view).numpy().view(dtype)


def _is_plain(tensor: Tensor, path: Path) -> bool:
    """Return whether a tensor takes no more memory than the file, and has a type that is known."""
    if tensor.layout != torch.strided or tensor.dtype not in (*FLOATS, torch.int8) or not tensor.ndim:
        return False
    held = tensor.untyped_storage().nbytes()  # a view may have any order, but not repeat a value
    return 0 not in tensor.stride() and tensor.nbytes <= held <= path.stat().st_size


def _check_archive(path: Path) -> None:
    """Check that the members of a file take no more memory than the file."""
    if not zipfile.is_zipfile(path):  # Torch before 1.6 wrote others, whose tensors cannot be mapped
        raise InputError(path.name, "a file of torch.save", "another", "is it truncated?")
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if any(one.compress_type != zipfile.ZIP_STORED for one in members) or (
        sum(one.file_size for one in members) > path.stat().st_size
    ):
        raise InputError(path.name, "members stored as torch.save does", "something that was compressed")
