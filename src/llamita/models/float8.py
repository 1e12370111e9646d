"""Say how a float checkpoint in FP8 stores its weights: as codes, with scales that config.json describes.

Known are compressed-tensors (`float-quantized`), transformers' `fp8` (blocks as in DeepSeek, or a scale a matrix) and
`fbgemm_fp8`, as Meta has it. Without a quantization_config, a checkpoint was cast and has no scales.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from llamita.errors import InputError, shown
from llamita.formats.safetensors import TensorInfo
from llamita.models.layout import Layout
from llamita.models.weights import FLOAT_DTYPES
from llamita.numerics.float8 import FLOAT8

_WHERE = "config.json: quantization_config"
_FORMAT, _WEIGHTS_ALONE = "float-quantized", "naive-quantized"  # of compressed-tensors; the second holds integers too
_STRATEGIES = ("tensor", "channel", "block")
_WEIGHTS: dict[str, tuple[Any, ...]] = {"type": ("float",), "num_bits": (8,), "symmetric": (True, None),
                                        "dynamic": (False, None)}  # fmt: skip
# Scales of activations and of keys and values, which a float model does not round: names of compressed-tensors,
# transformers, AutoFP8 and vLLM.
_UNUSED = r".*\.(input_scale|activation_scale|output_scale|[qkv]_scale|kv_scale)$"
_LISTS = ("ignore", "modules_to_not_convert", "ignored_layers")  # of compressed-tensors, transformers, AutoFP8


@dataclass(frozen=True)
class Float8:
    """How FP8 weights are scaled.

    Attributes:
        parts: names of the tensor of scales next to `weight`; the first that is there counts.
        strategies: what has a scale of its own: a matrix ("tensor"), a row ("channel"), a block ("block").
        block: rows and columns of a block, if any.
        kept: names or beginnings of names of modules that are not in FP8.
    """

    parts: tuple[str, ...]
    strategies: frozenset[str]
    block: tuple[int, int] | None
    kept: tuple[str, ...]

    def is_kept(self, module: str) -> bool:
        """Return whether config.json lists a module as one that is not in FP8; patterns are not followed."""
        return any(module == name or module.startswith(f"{name}.") or module.endswith(f".{name}") for name in self.kept)


def is_float8(quantization: object) -> bool:
    """Return whether a quantization_config is one of FP8 weights, known or not."""
    if not isinstance(quantization, dict):
        return False
    method, form = quantization.get("quant_method"), quantization.get("format")
    if method != "compressed-tensors":
        return method in ("fp8", "fbgemm_fp8")
    types = [weights.get("type") for weights in _weights(quantization) if isinstance(weights, dict)]
    return form == _FORMAT or (form == _WEIGHTS_ALONE and "float" in types)


def read_float8(quantization: dict[str, Any]) -> Float8:
    """Return how FP8 weights are scaled, from a quantization_config for which `is_float8`.

    Raises:
        InputError: a setting that is not known, or that changes more than the scales.
    """
    lists = [quantization.get(key) for key in _LISTS]
    kept = tuple(name for names in lists if isinstance(names, list) for name in names if isinstance(name, str))
    if quantization["quant_method"] == "fbgemm_fp8":
        return Float8(("weight_scale",), frozenset(["channel"]), None, kept)
    if quantization["quant_method"] == "fp8":
        block = _block(quantization.get("weight_block_size"), "weight_block_size")
        strategies = ["block"] if block else ["tensor", "channel"]
        return Float8(("weight_scale_inv", "weight_scale"), frozenset(strategies), block, kept)
    return _of_compressed_tensors(quantization, kept)


def _of_compressed_tensors(quantization: dict[str, Any], kept: tuple[str, ...]) -> Float8:
    sparsity = quantization.get("sparsity_config") or {}  # some tools write one that says "dense"
    is_dense = isinstance(sparsity, dict) and sparsity.get("format", "dense") == "dense"
    if not is_dense or quantization.get("transform_config"):
        raise InputError(_WHERE, "scaled weights alone", "sparsity or transforms")
    groups = _weights(quantization)
    if not groups:
        raise InputError(f"{_WHERE}: config_groups", "groups by name", shown(quantization.get("config_groups"), 40))
    strategies, blocks = set[str](), set[tuple[int, int]]()
    for weights in groups:
        if not isinstance(weights, dict):
            raise InputError(f"{_WHERE}: weights", "settings", shown(weights, 40))
        for key, known in (*_WEIGHTS.items(), ("strategy", _STRATEGIES)):
            if weights.get(key) not in known:
                named = " or ".join(str(value) for value in known if value is not None)
                raise InputError(f"{_WHERE}: weights: {key}", named, shown(weights.get(key), 40))
        strategies.add(weights["strategy"])
        if weights["strategy"] == "block":
            structure = weights.get("block_structure")
            if isinstance(structure, str) and re.fullmatch(r"\d{1,9}x\d{1,9}", structure):  # how it once was written
                structure = [int(size) for size in structure.split("x")]
            block = _block(structure, "weights: block_structure")
            if block is None:
                raise InputError(f"{_WHERE}: weights: block_structure", "two sizes", "none")
            blocks.add(block)
    if len(blocks) > 1:
        raise InputError(f"{_WHERE}: weights: block_structure", "the same in all groups", "several")
    return Float8(("weight_scale",), frozenset(strategies), next(iter(blocks), None), kept)


def _weights(quantization: dict[str, Any]) -> list[Any]:
    """Return how compressed-tensors stores the weights of each group of layers."""
    groups = quantization.get("config_groups")
    found = groups.values() if isinstance(groups, dict) else []
    return [group.get("weights") if isinstance(group, dict) else None for group in found]


def _block(sizes: object, key: str) -> tuple[int, int] | None:
    """Return two sizes of config.json, None for null."""
    if sizes is None:
        return None
    if not isinstance(sizes, list) or len(sizes) != 2 or any(type(size) is not int or size < 1 for size in sizes):
        raise InputError(f"{_WHERE}: {key}", "two sizes", shown(sizes, 40))
    return sizes[0], sizes[1]


def add_scales(layout: Layout, tensors: Iterable[str], stored: Mapping[str, TensorInfo], float8: Float8) -> Layout:
    """Return a layout that has the scales of FP8 matrices, and ignores the scales of activations.

    Args:
        tensors: of the architecture.
        stored: what the files hold, by name.

    Raises:
        InputError: scales of another dtype or shape than config.json says. Missing ones are left to the caller.
    """
    pieces = dict(layout.pieces)
    for tensor in tensors:
        piece = layout.piece(tensor)
        info = stored.get(piece.stored)
        if info is not None and info.dtype in FLOAT8 and len(info.shape) == 2 and piece.stored.endswith(".weight"):
            names = [piece.stored.removesuffix("weight") + part for part in float8.parts]
            name = next((name for name in names if name in stored), names[0])
            block = _block_of(name, stored[name], info.shape, float8) if name in stored else None
            pieces[tensor] = replace(piece, scale=name, block=block)
    ignored = _UNUSED if layout.ignored is None else f"{layout.ignored.pattern}|{_UNUSED}"
    return Layout(pieces, re.compile(ignored))


def _block_of(name: str, scales: TensorInfo, shape: tuple[int, ...], float8: Float8) -> tuple[int, int]:
    """Return the rows and columns that share a scale of these; check their dtype and shape."""
    (rows, columns), known = shape, dict[tuple[int, ...], tuple[int, int]]()
    if "tensor" in float8.strategies:
        known |= dict.fromkeys([(1,), (), (1, 1)], (rows, columns))
    if "channel" in float8.strategies:
        known |= dict.fromkeys([(rows, 1), (rows,)], (1, columns))
    if float8.block is not None:
        known[-(-rows // float8.block[0]), -(-columns // float8.block[1])] = float8.block
    if scales.dtype not in FLOAT_DTYPES:
        raise InputError(f"{name}: dtype", f"one of {', '.join(FLOAT_DTYPES)}", scales.dtype)
    if scales.shape not in known:
        raise InputError(f"{name}: shape", " or ".join(map(str, known)), f"{scales.shape}")
    return known[scales.shape]
