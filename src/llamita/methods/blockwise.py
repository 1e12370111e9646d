"""Round block by block on measured inputs: the loop that all methods with activations share.

Two streams of hidden states pass through the blocks: *quantized*, through the rounded layers with int8 activations,
and *float*, where a method compares with it. Within a block the four groups of layers that share an input are rounded
in order, each on inputs that already contain the errors of the groups before it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from llamita import _native
from llamita.errors import InputError
from llamita.methods import rtn
from llamita.methods.activations import quantize_activations
from llamita.methods.blocks import STEPS, Block, embed, rotary_tables
from llamita.methods.hidden_states import Store
from llamita.methods.rtn import RoundedRows, RoundModule
from llamita.methods.runtime_rotations import runtime_rotation
from llamita.methods.setup import BATCH_TOKENS, Setup
from llamita.models.names import linear_names
from llamita.models.weights import FloatSource, pieces_of
from llamita.numerics.affine import dequantize
from llamita.numerics.packing import unpack_int4
from llamita.numerics.scheme import QuantScheme
from llamita.system import torch_processes

_PANEL = 1024  # inputs of a Hessian in one product


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
        """Return the weights that they represent, float32 (outputs, inputs)."""
        return dequantize(self.codes, self.scales)


@dataclass
class Layers:
    """Linear layers that read the same input, and the measurements of that input. Means are over tokens.

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
        round_layers: returns codes and scales of each layer of the group, by name.
        needs_cross: whether it looks at `cross` and `residual`.
    """

    round_layers: Callable[[Layers, QuantScheme], dict[str, Rounded]]
    needs_cross: bool = False


@dataclass(frozen=True)
class RoundedBlock:
    """A block with rounded layers, for tuning.

    Attributes:
        index: its number.
        block: the quantized block, activations rounded; `block(inputs)` is what the model will compute.
        weights: its float weights, (outputs, inputs) float32, by full module name.
        rounded: codes and scales of its int4 layers, by full module name.
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
    """A function that returns codes and scales with block outputs nearer to the targets, by full module name."""

    def __call__(self, block: RoundedBlock, scheme: QuantScheme, setup: Setup) -> dict[str, Rounded]: ...


Streams = dict[str, Tensor]  # "quantized", and "float" where a method compares with it; (samples, length, hidden)


@dataclass
class _Run:
    source: FloatSource
    scheme: QuantScheme
    setup: Setup
    method: LayerMethod | None  # None rounds to nearest
    tune: TuneBlock | None
    to_nearest: RoundModule

    @property
    def kinds(self) -> tuple[str, ...]:
        """The streams that the methods look at."""
        compares = self.tune is not None or (self.method is not None and self.method.needs_cross)
        return ("quantized", "float") if compares else ("quantized",)


def rounder(
    source: FloatSource, scheme: QuantScheme, setup: Setup, method: LayerMethod | None, tune: TuneBlock | None
) -> RoundModule:
    """Round every block, then return the function that gives the rounded rows of a module; tables to nearest.

    Blocks that an earlier run with this work directory has finished are not rounded again.

    Args:
        method: None rounds to nearest, for tuning.

    Raises:
        InputError: no calibration, or weights that are not finite.
    """
    if setup.calibration is None:
        raise InputError("--calibration", "a text", "none", "try --calibration self")
    torch.set_num_threads(_native.threads())
    # Measured energies replace the expected ones, which would take a pass over all weights.
    expects = method is None or scheme.scale_rule != "weighted"
    to_nearest = rtn.rounder(source, scheme if expects else replace(scheme, scale_rule="search"))
    run = _Run(source, scheme, setup, method, tune, to_nearest)
    with torch.no_grad():
        store = _round_blocks(run, torch_processes.own_rows(torch.from_numpy(setup.calibration.tokens)).numpy())
    coarse = [name for name in linear_names(source.config) if scheme.kind(name).bits == 4]
    return lambda name: _rows(source, store, name) if name in coarse else to_nearest(name)


def _round_blocks(run: _Run, tokens: np.ndarray) -> Store:
    source, count = run.source, run.source.config.layers
    store = Store(run.setup, (*tokens.shape, source.config.hidden_size), run.kinds)
    rotation, rotary = runtime_rotation(source.rotations), rotary_tables(source.config, tokens.shape[1])
    first = store.finished(count)
    if first == count:
        return store
    if first:
        streams = {kind: store.load(kind, first) for kind in run.kinds}
    else:
        streams = {kind: _embedded(run, store, kind, tokens) for kind in run.kinds}
    for index in range(first, count):
        floats = [name for names in STEPS for name in names if not _bits(run, index, name)]
        blocks = {"quantized": Block(source, index, rotary, quantize_activations, rotation, floats)}
        if "float" in streams:
            blocks["float"] = Block(source, index, rotary, rotation=rotation)
        after = {kind: store.new(kind, index + 1) for kind in streams}
        rounded = _round_block(run, index, blocks, streams, after)
        coarse = _int4(run.scheme, rounded)  # the others are rounded to nearest again when they are written
        layers = {name: (_native.codes_to_packed(r.codes), r.scales) for name, r in coarse.items()}
        store.keep(index, after, layers)
        streams = after
        for file in source.files.values():
            file.forget()  # else the pages of the whole float model would stay in memory
    return store


def _bits(run: _Run, index: int, name: str) -> int | None:
    return run.scheme.kind(f"model.layers.{index}.{name}").bits


def _embedded(run: _Run, store: Store, kind: str, tokens: np.ndarray) -> Tensor:
    """Return a stream in front of the first block."""
    states = store.new(kind, 0)
    for part in _batches(states):
        states[part] = embed(run.source, tokens[part], run.scheme if kind == "quantized" else None)
    return states


def _round_block(
    run: _Run, index: int, blocks: dict[str, Block], before: Streams, after: Streams
) -> dict[str, Rounded]:
    """Return codes and scales of a block's layers, and fill `after` with the streams behind it."""
    block, rounded = blocks["quantized"], {}
    weights = {f"{block.name}.{name}": block.weight(name) for names in STEPS for name in names}
    for step, names in enumerate(STEPS):
        _report(run, index, step, names[-1])
        if step == 2:
            _advance(blocks, Block.after_attention, before, after)
        group = {name: weights[name] for name in (f"{block.name}.{name}" for name in names)}
        new = _to_nearest(run, group)
        if run.method is not None and any(run.scheme.kind(name).bits == 4 for name in group):
            layers = _measure(step, blocks, before, after, group, run.method.needs_cross)
            new |= _by_method(run.method, layers, run.scheme)
        _set_weights(block, new)
        rounded |= new
    _advance(blocks, Block.after_mlp, after, after)
    if run.tune is not None:
        _report(run, index, len(STEPS), "tuning")
        coarse = _int4(run.scheme, rounded)
        whole = RoundedBlock(index, block, weights, coarse, before["quantized"], after["float"])
        rounded = run.tune(whole, run.scheme, run.setup)
        _set_weights(block, rounded)
        _advance({"quantized": block}, Block.__call__, before, after)
    return rounded


def _int4(scheme: QuantScheme, rounded: dict[str, Rounded]) -> dict[str, Rounded]:
    return {name: layer for name, layer in rounded.items() if scheme.kind(name).bits == 4}


def _to_nearest(run: _Run, group: dict[str, Tensor]) -> dict[str, Rounded]:
    """Round the layers of a group that no method rounds: int8 ones, or all if there is no method."""
    least = 8 if run.method else 4
    names = [name for name in group if (run.scheme.kind(name).bits or 0) >= least]
    return {name: _nearest(run.to_nearest, name) for name in names}


def _by_method(method: LayerMethod, layers: Layers, scheme: QuantScheme) -> dict[str, Rounded]:
    """Round the int4 layers of a group, those of one group size together, because a method takes one group size."""
    rounded: dict[str, Rounded] = {}
    group_sizes = [scheme.kind(name).group_size for name in layers.weights]
    for group_size in dict.fromkeys(size for size in group_sizes if size):
        alike = {n: w for n, w in layers.weights.items() if scheme.kind(n).group_size == group_size}
        uniform = replace(scheme, group_size=group_size, layers={})
        rounded |= _round_layers(method, replace(layers, weights=alike), uniform)
    return rounded


def _set_weights(block: Block, rounded: dict[str, Rounded]) -> None:
    for name, layer in rounded.items():
        block.set_weight(name.removeprefix(f"{block.name}."), torch.from_numpy(layer.values()))


def _measure(
    step: int, blocks: dict[str, Block], before: Streams, middle: Streams, weights: dict[str, Tensor], needs_cross: bool
) -> Layers:
    """Measure what the layers of this step read; `middle` is used from step 2 on."""
    outputs, inputs = next(iter(weights.values())).shape
    layers = Layers(weights, torch.zeros(inputs, inputs))
    at = before if step < 2 else middle  # the residual stream to which the step adds
    if needs_cross:
        layers.cross = torch.zeros(inputs, inputs)
        layers.residual = torch.zeros(outputs, inputs) if len(weights) == 1 else None
    for part in _batches(before["quantized"]):
        x = _inputs(blocks, "quantized", step, at, part)
        add_products(layers.hessian, x)
        layers.tokens += len(x)
        if layers.cross is not None:
            layers.cross.addmm_((_inputs(blocks, "float", step, at, part) - x).T, x)
        if layers.residual is not None:
            lost = at["float"][part] - at["quantized"][part]
            layers.residual.addmm_(lost.flatten(0, 1).T, x)
    layers.hessian.triu_().add_(layers.hessian.triu(1).T)
    layers.tokens = int(torch_processes.all_sum(torch.tensor(layers.tokens)))
    for sums in (layers.hessian, layers.cross, layers.residual):
        if sums is not None:
            torch_processes.all_sum(sums).div_(layers.tokens)
    return layers


def _round_layers(method: LayerMethod, layers: Layers, scheme: QuantScheme) -> dict[str, Rounded]:
    """Return codes and scales of a group; each of several processes rounds its part of every layer's outputs."""
    residual = None if layers.residual is None else torch_processes.own_rows(layers.residual)
    own = {name: torch_processes.own_rows(weight) for name, weight in layers.weights.items()}
    try:
        found = method.round_layers(replace(layers, weights=own, residual=residual), scheme)
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        raise InputError(
            f"{next(iter(layers.weights))}",
            "inputs whose products can be factored",
            hint="try more samples, or a larger gptq.damping or qronos.ridge",
        ) from None

    def whole(rows: np.ndarray, name: str) -> np.ndarray:
        return torch_processes.gather_rows(torch.from_numpy(rows), len(layers.weights[name])).numpy()

    return {name: Rounded(whole(r.codes, name), whole(r.scales, name)) for name, r in found.items()}


def _inputs(blocks: dict[str, Block], kind: str, step: int, at: Streams, part: slice) -> Tensor:
    """Return the inputs of a step: (tokens, inputs)."""
    return blocks[kind].inputs(step, at[kind][part]).flatten(0, 1)


def add_products(hessian: Tensor, x: Tensor) -> None:
    """Add xᵀx of x (tokens, inputs) to the upper triangle of `hessian`, in panels: half the products."""
    for start in range(0, len(hessian), _PANEL):
        stop = start + _PANEL
        hessian[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])


def _advance(
    blocks: dict[str, Block], step: Callable[[Block, Tensor], Tensor], streams: Streams, after: Streams
) -> None:
    """Fill `after` with what `step` returns for the streams; both may be the same."""
    for kind, block in blocks.items():
        for part in _batches(streams[kind]):
            after[kind][part] = step(block, streams[kind][part])


def _batches(states: Tensor) -> Iterator[slice]:
    samples, length, _ = states.shape
    step = max(1, BATCH_TOKENS // length)
    for start in range(0, samples, step):
        yield slice(start, start + step)


def _nearest(to_nearest: RoundModule, name: str) -> Rounded:
    pieces = list(to_nearest(name))
    return Rounded(np.concatenate([p.codes for p in pieces]), np.concatenate([p.scales for p in pieces]))


def _rows(source: FloatSource, store: Store, name: str) -> Iterator[RoundedRows]:
    """Yield a finished layer in pieces, with its error against the source's weights."""
    packed, scales = store.layer(name)
    for start, piece in pieces_of(source.weight(name)):
        rows = slice(start, start + len(piece))
        codes = unpack_int4(packed[rows])
        yield RoundedRows(codes, scales[rows], *rtn.errors_of(piece, codes, scales[rows]))


def _report(run: _Run, index: int, step: int, name: str) -> None:
    if run.setup.progress:
        count, steps = run.source.config.layers, len(STEPS) + (run.tune is not None)
        what = f"block {index + 1} of {count}: {name.rpartition('.')[2]}"
        run.setup.progress(what, index * steps + step, count * steps)
