"""Find where in a model quantization shows: errors of weights and residual stream, ranges of activations.

The error of a matrix is Σ(w' - w)² / Σw², dequantized; that of the stream after a block is the mean over
tokens of ‖x' - x‖² / ‖x‖², because in large models the first tokens have a thousand times the energy of
others (arXiv 2402.17762). Weights that a transform changed on purpose are not compared. A rotated stream (R1)
is turned back by the orthogonal matrix that takes one embedding table nearest to the other (the Procrustes
problem, Schönemann 1966).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llamita.engine.llm import PREFILL_CHUNK
from llamita.engine.model import LINEAR_INPUTS, BlockView
from llamita.evaluate.scores import Contender
from llamita.methods.chain import TRANSFORMS
from llamita.models.names import linear_names, table_names
from llamita.models.packed import PackedModel
from llamita.models.weights import ModelSource, row_blocks
from llamita.system.progress import Progress

STREAM = "stream"
PLACES = (STREAM, *LINEAR_INPUTS)  # where activations are watched
LAYER_TOKENS = 8192  # of the text; fewer give the errors, which are means, to three figures


@dataclass(frozen=True)
class Origin:
    """The way a contender's weights were made.

    Attributes:
        method: of quantization, None for a float model.
        rotations: names of those in its weights or at run time: R1, R2, R4.
        is_transformed: whether other float weights than the source's were rounded.
    """

    method: str | None
    rotations: tuple[str, ...]
    is_transformed: bool


@dataclass(frozen=True)
class LayerScores:
    """Errors and peaks of what passed through a model.

    Attributes:
        stream_errors: of the residual stream after the embedding, then after each block.
        peaks: largest absolute value of each channel, float32 (layers, channels), by place: "stream" (a row
            more: after the embedding), and the inputs of the linear layers by LINEAR_INPUTS.
    """

    stream_errors: list[float]
    peaks: dict[str, np.ndarray]


def origin_of(source: ModelSource) -> Origin:
    """Read a packed model's method and rotations from its llamita.json."""
    if not isinstance(source, PackedModel):
        return Origin("rtn" if source.scheme else None, (), False)  # rounded as it was loaded
    method, rotations = source.metadata.method, source.metadata.rotations.names
    return Origin(method, rotations, bool(rotations) or not set(TRANSFORMS).isdisjoint(method.split("+")))


def has_same_shape(source: ModelSource, other: ModelSource) -> bool:
    """Return whether the same vectors pass through both models, block by block."""
    return source.config.hidden_size == other.config.hidden_size and (
        linear_names(source.config) == linear_names(other.config)
    )


def weight_errors(source: ModelSource, baseline: ModelSource, progress: Progress = None) -> dict[str, float]:
    """Return the relative squared error of every matrix that both have, dequantized, by module name."""
    ours, theirs = ({**table_names(s.config), **linear_names(s.config)} for s in (source, baseline))
    names = [name for name, shape in ours.items() if theirs.get(name) == shape]
    errors = {}
    for i, name in enumerate(names):
        if progress:
            progress("comparing weights", i, len(names))
        error = energy = 0.0
        for ours_part, part in zip(*(row_blocks(s.weight(name)) for s in (source, baseline)), strict=True):
            error += np.square(ours_part - part).sum(dtype=np.float64)
            energy += np.square(part).sum(dtype=np.float64)
        errors[name] = float(error / energy) if energy else 0.0
    return errors


def rotation_between(baseline: ModelSource, source: ModelSource) -> np.ndarray:
    """Return the orthogonal R, float32 (hidden, hidden), that takes the baseline's embedding nearest to ours."""
    size, table = baseline.config.hidden_size, "model.embed_tokens"
    product = np.zeros((size, size))
    for part, ours in zip(*(row_blocks(s.weight(table)) for s in (baseline, source)), strict=True):
        product += part.T @ ours
    left, _, right = np.linalg.svd(product)
    return (left @ right).astype(np.float32)


def watch_layers(
    contenders: Sequence[Contender],
    turns: Sequence[np.ndarray | None],
    chunks: Sequence[np.ndarray],
    progress: Progress = None,
) -> list[LayerScores]:
    """Measure what passes through models of one shape, the first of which is the baseline.

    Args:
        turns: the rotation (hidden, hidden) of each model's stream, or None.
        chunks: token ids; chunks do not see each other.
    """
    config, total = contenders[0].llm.config, sum(len(chunk) for chunk in chunks)
    sums = np.zeros((len(contenders), config.layers + 1))
    peaks: list[dict[str, np.ndarray]] = [{} for _ in contenders]
    done = 0
    for chunk in chunks:
        for layer, views in _side_by_side(contenders, chunk):
            base = views[0].stream
            energy = np.square(base).sum(axis=1, dtype=np.float64)
            for i, (view, turn) in enumerate(zip(views, turns, strict=True)):
                stream = view.stream if turn is None else view.stream @ turn.T
                error = np.square(stream - base).sum(axis=1, dtype=np.float64)
                sums[i, layer] += np.divide(error, energy, np.zeros(len(error)), where=energy > 0).sum()
                _raise_peaks(peaks[i], view, layer, config.layers)
        done += len(chunk)
        if progress:
            progress("watching the layers", done, total)
    return [LayerScores((row / total).tolist(), peak) for row, peak in zip(sums, peaks, strict=True)]


def first_tokens(chunks: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
    """Return the first `count` tokens of the chunks, as chunks."""
    taken = []
    for chunk in chunks:
        if count > 0:
            taken.append(chunk[:count])
            count -= len(chunk)
    return taken


def _side_by_side(contenders: Sequence[Contender], chunk: np.ndarray) -> Iterator[tuple[int, tuple[BlockView, ...]]]:
    """Run all models over a chunk, and yield the number of blocks passed with each model's view."""
    caches = [c.llm.new_sequence(len(chunk)) for c in contenders]
    for start in range(0, len(chunk), PREFILL_CHUNK):
        part = chunk[start : start + PREFILL_CHUNK]
        passes = (c.llm.model.watch([(cache, part)]) for c, cache in zip(contenders, caches, strict=True))
        yield from enumerate(zip(*passes, strict=True))


def _raise_peaks(peaks: dict[str, np.ndarray], view: BlockView, layer: int, layers: int) -> None:
    """Raise the peaks to the largest absolute values of a view; layer 0, the embedding, has no inputs."""
    rows = {STREAM: (layer, layers + 1, view.stream)}
    rows |= {place: (layer - 1, layers, x) for place, x in view.inputs.items()}
    for place, (row, count, x) in rows.items():
        if place not in peaks:
            peaks[place] = np.zeros((count, x.shape[1]), np.float32)
        np.maximum(peaks[place][row], np.abs(x).max(axis=0), out=peaks[place][row])
