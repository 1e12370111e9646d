"""Kernels, packing and operations in C++. Arrays are C-contiguous NumPy; bf16 travels as uint16 bits.

Every function first checks dtypes, shapes and ranges and raises ValueError: `<argument>: expected X, got Y`.
The GIL is released during work. Results are bit-identical on every number of threads and, but for bf16 products, on
every instruction set.
"""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

I8 = npt.NDArray[np.int8]
I32 = npt.NDArray[np.int32]
F32 = npt.NDArray[np.float32]
Scales = npt.NDArray[np.float32] | npt.NDArray[np.uint16]
Floats = npt.NDArray[np.float32] | npt.NDArray[np.float16] | npt.NDArray[np.uint16] | npt.NDArray[Any]

def isa() -> str: ...
def available_isas() -> list[str]:
    """Instruction sets of this machine, best first; LLAMITA_ISA picks one at import."""

def set_isa(name: str) -> None: ...
def threads() -> int: ...
def set_threads(count: int) -> None:
    """Cores in use, 1 to 1024; on first use LLAMITA_THREADS, else every core that this process may use.

    RuntimeError, and nothing changed, if the system refuses to start so many. A forked child starts its own.
    """

def usable_cpus(root: str = "") -> int:
    """Threads to use by default: cores of this process's affinity, within the quotas of its cgroups.

    On Linux; elsewhere the processors. root: a directory in which /proc and /sys are looked for.
    """

def read_bandwidth(bytes: int) -> float:
    """Best read bandwidth over that much memory, all threads, in GB/s."""

def int8_rate(isa: str = "") -> float:
    """Best rate of int8 multiply-adds in registers, all threads, in 10^9 per second; by default of the chosen set."""

def check_products(isa: str, seconds: float, threads: int) -> tuple[int, int]:
    """Repeat two products on new threads, at least once each; how many were computed, and how many were wrong."""

def round_weights(
    w: Floats, bits: int, group_size: int, rule: str, importance: F32 | None = None
) -> tuple[I8, F32, npt.NDArray[np.float64]]:
    """The fast twin of `affine.round_weights`.

    Args:
        w: (rows, columns).
        bits: 4 or 8.
        group_size: divides columns; columns itself rounds per channel.
        rule: "torchao", "torchao_bf16" or "search".
        importance: (columns,) factors of the squared errors that the search minimizes.

    Returns:
        codes (rows, columns), scales (rows, columns / group_size), plain squared error (rows,).
    """

def codes_to_packed(codes: I8) -> I32:
    """(rows, columns) codes in [-8, 7] to (rows, columns / 8) words: eight codes + 8, lowest bits first."""

class Weights:
    """Weights as the kernels read them. Quantized ones are a copy; float ones stay where they are."""

    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def gated(self) -> bool: ...
    @property
    def group_size(self) -> int: ...
    @property
    def bf16_products(self) -> bool:
        """True for bf16 weights wrapped with it, on an instruction set that has such products."""
    @property
    def kind(self) -> Literal["w4", "w8", "f32", "f16", "bf16"]: ...
    @property
    def nbytes(self) -> int:
        """Memory of its own."""

def pack_w4(packed: list[I32], scales: list[Any], group_size: int, gated: bool = False) -> Weights:
    """Matrices (rows_i, columns / 8), scales (rows_i, columns / group_size), one above the other.

    Gated, there are two of the same shape, and their product gives silu(first) * second: rows / 2 outputs.
    """

def pack_w8(codes: I8, scales: Scales) -> Weights:
    """(rows, columns) codes and (rows,) scales."""

def wrap_float(arrays: list[Any], bf16_products: bool = False) -> Weights:
    """Matrices (rows_i, columns) of one float type, one above the other; keeps them alive, copies nothing.

    bf16_products: round the inputs of bf16 matrices to bf16, if this instruction set multiplies that.
    """

class Activations:
    """Int8 codes of up to max_tokens tokens, each with its scale and zero point."""

    def __init__(self, max_tokens: int, columns: int) -> None: ...
    @property
    def max_tokens(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def tokens(self) -> int:
        """How many the last operation wrote."""
    def set(self, codes: I8, scales: F32, zero_points: I32) -> None: ...
    def get(self) -> tuple[I8, F32, I32]:
        """codes (tokens, columns), scales (tokens,), zero points (tokens,)."""

def new_buffer(rows: int, columns: int) -> F32:
    """An array (rows, columns) of anything, in huge pages; what is not touched costs addresses alone."""

def quantize(x: F32, acts: Activations) -> None:
    """x (tokens, columns); the fast twin of `affine.quantize_activations`."""

def rmsnorm(x: F32, gamma: F32, eps: float, out: F32) -> None:
    """x, out (tokens, columns); gamma (columns,)."""

def rmsnorm_heads(qkv: F32, q_gamma: F32, k_gamma: F32, heads: int, eps: float) -> None:
    """RMSNorm of each query head and each key head, in place; values stay as they are.

    qkv (tokens, (heads + 2 * kv_heads) * head_dim); gammas (head_dim,). It has the bits of `rmsnorm`.
    """

def rmsnorm_quantize(x: F32, gamma: F32, eps: float, acts: Activations) -> None: ...

class Hadamard:
    """Multiplies rows of `columns` inputs by H_K ⊗ H_n / √columns, n a power of two, H_n in natural order."""

    def __init__(self, columns: int, signs: I8 | None = None) -> None:
        """signs: H_K as (K, K) of 1 and -1; by default K is 1."""
    @property
    def columns(self) -> int: ...

def hadamard(transform: Hadamard, x: F32, out: F32) -> None:
    """x, out (tokens, columns), which may be the same array."""

def hadamard_quantize(transform: Hadamard, x: F32, acts: Activations) -> None:
    """The transformed x (tokens, columns) in int8; x stays as it is."""

def swiglu(gate_up: F32, out: F32) -> None:
    """silu(gate) * up: gate_up (tokens, 2 * columns), gate first; out (tokens, columns)."""

def linear(weights: Weights, x: F32 | Activations, out: F32, bias: F32 | None = None, accumulate: bool = False) -> None:
    """out (tokens, rows) = x · weightsᵀ + bias, plus what out held if accumulate; gated: (tokens, rows / 2).

    Quantized weights take Activations, float weights an array (tokens, columns).
    """

class LowRank:
    """Adapters B_i·A_i of layers that read the same input, scaled: see `low_rank`. Keeps its arrays alive."""

    def __init__(self, downs: list[Any], ups: list[tuple[Any, int, int]], outputs: int, scaling: float) -> None:
        """downs: A_i (rank_i, columns), all of one float type.

        ups: (B_i, start, rows), B_i of outputs `start` to start + rows, in panels of 16 (rows / 16 rounded
        up, rank_i, 16), zeros behind the last row.
        """
    @property
    def scaling(self) -> float: ...

def low_rank(adapter: LowRank, x: F32, out: F32) -> None:
    """out[:, start : start + rows] += scaling * (x · A_iᵀ) · B_iᵀ for every part; x, out (tokens, …)."""

def embed(weights: Weights, ids: I32 | npt.NDArray[np.int64], out: F32) -> None:
    """Rows of 8-bit or float weights: ids (tokens,), out (tokens, columns)."""

class KVCache:
    """Keys and values of one sequence, up to `capacity` tokens; memory is taken as they are written."""

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        capacity: int,
        dtype: str,
        inv_freq: F32,
        rope_scaling: float = 1.0,
    ) -> None:
        """dtype "f32", "f16" or "int8"; inv_freq (head_dim / 2,); rope_scaling multiplies cos and sin."""
    def copy_prefix(self, source: KVCache, tokens: int) -> None:
        """Positions [0, tokens) of every layer and head, from a cache of this shape, dtype and rotation."""
    def read_block(self, index: int, out: np.ndarray) -> None:
        """Copy block `index`, 128 positions of every layer and head, to out uint8 (block_nbytes,)."""
    def write_block(self, index: int, block: np.ndarray) -> None:
        """Replace block `index` by what `read_block` gave of a cache of this shape and dtype."""
    @property
    def block_nbytes(self) -> int:
        """Bytes of a block: 128 positions of every layer and head."""
    @property
    def nbytes(self) -> int:
        """Memory of all `capacity` tokens: whole blocks of 128, in whole pages of the system."""
    @property
    def capacity(self) -> int: ...

class Batch:
    """One step: the tokens of several sequences (cache, start, count), one after the other."""

    def __init__(self, sequences: list[tuple[KVCache, int, int]]) -> None: ...
    @property
    def tokens(self) -> int: ...

def rope_and_cache(batch: Batch, layer: int, qkv: F32, heads: int, rotates: bool = True) -> None:
    """qkv (tokens, (heads + 2 * kv_heads) * head_dim): rotates q in place and k into the cache, copies v.

    rotates: False for a layer without rotary embedding. An int8 cache's Hadamard transform is done either way.
    """

def attention(batch: Batch, layer: int, qkv: F32, heads: int, out: F32, window: int = 0) -> None:
    """Causal attention of queries that `rope_and_cache` prepared, over the cache; out (tokens, heads * head_dim).

    window: the most keys that a query sees, the last ones, its own included; 0 for all.
    """
