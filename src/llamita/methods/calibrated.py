"""Rounding block by block on what calibration measures: the loop that all methods with activations share.

Two streams of hidden states pass through the blocks: *quantized*, through what is already rounded, with
int8 activations; and *float*, where a method compares with it. Within a block the four groups of layers
that share an input are rounded in order, each on inputs that the groups before it have already bent.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from llamita import _native
from llamita.affine import dequantize
from llamita.checkpoint import linear_names
from llamita.errors import InputError
from llamita.methods import rtn
from llamita.methods.blocks import STEPS, Block, embed, llama_config, rotary_tables
from llamita.methods.energy import pieces_of
from llamita.methods.fakequant import quantize_activations
from llamita.methods.rtn import RoundedRows
from llamita.methods.setup import Setup
from llamita.packing import unpack_int4
from llamita.scheme import QuantScheme

_BATCH_TOKENS = 2048  # in a forward pass at a time: the widest inputs of a 1B model then take 64 MB


@dataclass(frozen=True)
class Rounded:
    """A linear layer in int4.

    Attributes:
        codes: int8 (outputs, inputs).
        scales: float32 (outputs, groups), on the scheme's grid.
    """

    codes: np.ndarray
    scales: np.ndarray

    def values(self) -> np.ndarray:
        """The weights that they stand for, float32 (outputs, inputs)."""
        return dequantize(self.codes, self.scales)


@dataclass
class Layers:
    """Linear layers that read the same input, and what calibration measured there. Means are over tokens.

    Attributes:
        weights: (outputs, inputs) float32 by full module name.
        hessian: (inputs, inputs), mean of x_q x_qᵀ, x_q being the rounded inputs of the quantized stream.
        cross: (inputs, inputs), mean of (x_f - x_q) x_qᵀ, x_f being the inputs of the float stream.
        residual: (outputs, inputs), mean of (r_f - r_q) x_qᵀ, where the layer adds to the residual stream r.
        tokens: how many were measured.
    """

    weights: dict[str, Tensor]
    hessian: Tensor
    cross: Tensor | None = None
    residual: Tensor | None = None
    tokens: int = 0


@dataclass(frozen=True)
class LayerMethod:
    """A method that rounds a group of layers at a time.

    Attributes:
        round_layers: codes and scales of every layer of the group, by name.
        needs_cross: whether it looks at `cross` and `residual`.
    """

    round_layers: Callable[[Layers, QuantScheme], dict[str, Rounded]]
    needs_cross: bool = False


@dataclass(frozen=True)
class RoundedBlock:
    """A block whose layers have been rounded, for tuning.

    Attributes:
        index: its number.
        block: the quantized block, activations rounded; `block(inputs)` is what the model will compute.
        weights: its float weights, (outputs, inputs) float32, by full module name.
        rounded: codes and scales, by full module name.
        inputs: quantized stream in front of the block, (samples, length, hidden).
        targets: float stream behind it.
    """

    index: int
    block: Block
    weights: dict[str, Tensor]
    rounded: dict[str, Rounded]
    inputs: Tensor
    targets: Tensor


class TuneBlock(Protocol):
    """Codes and scales that bring the block's outputs nearer to the targets, by full module name."""

    def __call__(self, block: RoundedBlock, scheme: QuantScheme, setup: Setup) -> dict[str, Rounded]: ...


@dataclass
class _Streams:
    """Hidden states (samples, length, hidden): quantized, and float where a method compares with it."""

    quantized: Tensor
    floats: Tensor | None = None


@dataclass
class _Run:
    source: Any
    scheme: QuantScheme
    setup: Setup
    method: LayerMethod | None  # None rounds to nearest
    tune: TuneBlock | None
    results: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)  # packed codes, scales

    @property
    def needs_floats(self) -> bool:
        return self.tune is not None or (self.method is not None and self.method.needs_cross)


def begin(
    source: Any, scheme: QuantScheme, setup: Setup, method: LayerMethod | None, tune: TuneBlock | None
) -> rtn.RoundModule:
    """Round every block, then give the rounded rows of any module by its name; tables to nearest.

    Args:
        method: None rounds to nearest, for tuning.

    Raises:
        InputError: no calibration, or weights that are not finite.
    """
    if setup.calibration is None:
        raise InputError("--calibration: expected a text, got none; try --calibration self")
    run = _Run(source, scheme, setup, method, tune)
    to_nearest = rtn.begin(source, scheme)
    with torch.no_grad():
        _round_blocks(run, to_nearest)
    linears = linear_names(source.config)
    return lambda name: _rows(run, name) if name in linears else to_nearest(name)


def _round_blocks(run: _Run, to_nearest: rtn.RoundModule) -> None:
    assert run.setup.calibration is not None
    torch.set_num_threads(_native.threads())
    tokens = run.setup.calibration.tokens
    config = llama_config(run.source.config)
    rotary = rotary_tables(config, tokens.shape[1])
    streams = _Streams(embed(run.source, tokens, run.scheme))
    if run.needs_floats:
        streams.floats = embed(run.source, tokens, None)
    for index in range(run.source.config.layers):
        block = Block(run.source, config, index, rotary, quantize_activations)
        floats = Block(run.source, config, index, rotary) if run.needs_floats else None
        streams = _round_block(run, index, block, floats, streams, to_nearest)


def _round_block(
    run: _Run, index: int, block: Block, floats: Block | None, before: _Streams, to_nearest: rtn.RoundModule
) -> _Streams:
    """The streams behind the block; its codes and scales go to `run.results`."""
    rounded: dict[str, Rounded] = {}
    weights = {f"{block.name}.{name}": block.weight(name) for step in STEPS for name in step}
    middle = before
    for step, names in enumerate(STEPS):
        _report(run, index, step, names[-1])
        if step == 2:
            middle = _advance(block, floats, before, Block.after_attention)
        group = {f"{block.name}.{name}": weights[f"{block.name}.{name}"] for name in names}
        if run.method is None:
            new = {name: _nearest(to_nearest, name) for name in group}
        else:
            layers = _measure(run.method, step, block, floats, before, middle, group)
            new = run.method.round_layers(layers, run.scheme)
        for name, layer in new.items():
            block.set_weight(name.removeprefix(f"{block.name}."), torch.from_numpy(layer.values()))
        rounded |= new
    after = _advance(block, floats, middle, Block.after_mlp)
    if run.tune is not None:
        assert after.floats is not None
        rounded = run.tune(
            RoundedBlock(index, block, weights, rounded, before.quantized, after.floats),
            run.scheme, run.setup,
        )  # fmt: skip
        for name, layer in rounded.items():
            block.set_weight(name.removeprefix(f"{block.name}."), torch.from_numpy(layer.values()))
        after.quantized = _through(block, before.quantized)
    run.results |= {name: (_native.codes_to_packed(r.codes), r.scales) for name, r in rounded.items()}
    return after


def _measure(
    method: LayerMethod, step: int, block: Block, floats: Block | None, before: _Streams, middle: _Streams,
    weights: dict[str, Tensor],
) -> Layers:  # fmt: skip
    """What the layers of this step see, summed over batches."""
    outputs, inputs = next(iter(weights.values())).shape
    layers = Layers(weights, torch.zeros(inputs, inputs))
    adds_to_stream = step in (1, 3)
    if method.needs_cross:
        layers.cross = torch.zeros(inputs, inputs)
        layers.residual = torch.zeros(outputs, inputs) if adds_to_stream else None
    for part in _batches(before.quantized):
        x = block.inputs(step, before.quantized[part], middle.quantized[part]).flatten(0, 1)
        layers.hessian.addmm_(x.T, x)
        layers.tokens += len(x)
        if layers.cross is not None:
            assert floats is not None
            assert before.floats is not None
            assert middle.floats is not None
            x_f = floats.inputs(step, before.floats[part], middle.floats[part]).flatten(0, 1)
            layers.cross.addmm_((x_f - x).T, x)
            if layers.residual is not None:
                at = before if step == 1 else middle
                assert at.floats is not None
                lost = (at.floats[part] - at.quantized[part]).flatten(0, 1)
                layers.residual.addmm_(lost.T, x)
    for sums in (layers.hessian, layers.cross, layers.residual):
        if sums is not None:
            sums /= layers.tokens
    return layers


def _advance(
    block: Block, floats: Block | None, streams: _Streams, step: Callable[[Block, Tensor], Tensor]
) -> _Streams:
    """Both streams after `step` of their blocks."""
    after = _Streams(torch.empty_like(streams.quantized))
    for part in _batches(streams.quantized):
        after.quantized[part] = step(block, streams.quantized[part])
    if floats is not None and streams.floats is not None:
        after.floats = torch.empty_like(streams.floats)
        for part in _batches(streams.floats):
            after.floats[part] = step(floats, streams.floats[part])
    return after


def _through(block: Block, before: Tensor) -> Tensor:
    after = torch.empty_like(before)
    for part in _batches(before):
        after[part] = block(before[part])
    return after


def _batches(stream: Tensor) -> Iterator[slice]:
    samples, length, _ = stream.shape
    step = max(1, _BATCH_TOKENS // length)
    for start in range(0, samples, step):
        yield slice(start, start + step)


def _nearest(to_nearest: rtn.RoundModule, name: str) -> Rounded:
    pieces = list(to_nearest(name))
    return Rounded(np.concatenate([p.codes for p in pieces]), np.concatenate([p.scales for p in pieces]))


def _rows(run: _Run, name: str) -> Iterator[RoundedRows]:
    """A finished layer, with its error against the source's weights."""
    packed, scales = run.results[name]
    weights = run.source.weight(name)
    for start, piece in pieces_of(weights):
        rows = slice(start, start + len(piece))
        codes = unpack_int4(packed[rows])
        yield RoundedRows(codes, scales[rows], *rtn.errors_of(piece, codes, scales[rows]))


def _report(run: _Run, index: int, step: int, name: str) -> None:
    if run.setup.progress:
        layers = run.source.config.layers
        what = f"block {index + 1} of {layers}: {name.rpartition('.')[2]}"
        run.setup.progress(what, index * len(STEPS) + step, layers * len(STEPS))
