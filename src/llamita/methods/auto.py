"""Choose how each layer is stored: the least loss under a size, or the least size under a loss.

Each layer alone is rounded in each way, in a model whose other layers are int8, and the KL divergence from
the float model is measured on calibration tokens by llamita's own engine. KL is quadratic in small errors and
errors of different layers are nearly uncorrelated, so increases add up (HAWQ-V2, arXiv 1911.03852, adds up
Hessian traces). The knapsack that is left is solved greedily over the lower convex hull of each layer's
sizes and losses, which is optimal but for what is left over at the end.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from llamita.checkpoint import (
    Checkpoint,
    Int4Weight,
    Int8Weight,
    ModelSource,
    linear_names,
)
from llamita.engine.cache import SequenceCache
from llamita.engine.model import Model
from llamita.engine.scheduler import PREFILL_CHUNK
from llamita.engine.weights import ModelWeights, load_block, load_head, load_weights
from llamita.errors import InputError
from llamita.mixed import with_layers
from llamita.packed import layout, tensor_bytes
from llamita.quantize import RoundedSource, make_plan
from llamita.scheme import GROUP_SIZES, KINDS, QuantScheme
from llamita.statistics import Interval, mean_interval

Progress = Callable[[str, int, int], None] | None
FINEST = "w8"
_REFERENCE_BYTES = 256 * 2**20  # of the float model's log-probabilities; beyond, every n-th token counts
_ROWS = 64  # of logits in the arithmetic at a time


@dataclass(frozen=True)
class Option:
    """One way to store a layer: a key of `scheme.KINDS`, bytes, and what it adds to the KL divergence."""

    kind: str
    size: int
    loss: float


Options = Mapping[str, list[Option]]  # by module name


@dataclass(frozen=True)
class Selection:
    """A scheme that was chosen, and what to expect of it. Losses in nats a token, on the calibration tokens.

    Attributes:
        scheme: with an override for each layer that is stored in another way than most.
        file_bytes: of its weight files.
        predicted: the sum of its layers' increases, and of what int8 costs.
        measured: the loss of the whole.
        uniform: the finest scheme with one group size that is no larger, None where none is.
        uniform_loss: what that one was measured to lose.
    """

    scheme: QuantScheme
    file_bytes: int
    predicted: float
    measured: Interval
    uniform: QuantScheme | None
    uniform_loss: Interval | None


class Meter:
    """The KL divergence of rounded weights from a float model, on the same tokens.

    Args:
        source: the float model.
        tokens: int32 (samples, length).
    """

    def __init__(self, source: ModelSource, tokens: np.ndarray) -> None:
        self._config, self._tokens = source.config, tokens
        needed = 4 * tokens.size * source.config.vocab_size  # float32
        stride = min(-(-needed // _REFERENCE_BYTES), tokens.shape[1])
        self._rows = np.arange(tokens.shape[1])[stride - 1 :: stride]
        model = Model(self._config, load_weights(source))
        self._reference = [_log_softmax(logits) for logits in self._logits(model, "f32")]

    def divergence(self, weights: ModelWeights) -> np.ndarray:
        """KL(float || rounded) at each token that counts, in nats: float64 (tokens,)."""
        model = Model(self._config, weights)
        pairs = zip(self._reference, self._logits(model, "f16"), strict=True)
        return np.concatenate([_divergence(reference, logits) for reference, logits in pairs])

    def _logits(self, model: Model, kv_dtype: str) -> Iterator[np.ndarray]:
        """Of each sample at the tokens that count: float32 (rows, vocab)."""
        length = self._tokens.shape[1]
        for ids in self._tokens:
            cache = SequenceCache(self._config, length, kv_dtype, length)
            logits = np.empty((len(self._rows), self._config.vocab_size), np.float32)
            for start in range(0, length, PREFILL_CHUNK):
                part = ids[start : start + PREFILL_CHUNK]
                first, stop = np.searchsorted(self._rows, [start, start + len(part)])
                model.step([(cache, part)], self._rows[first:stop] - start, out=logits[first:stop])
            yield logits


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    total = np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float64)
    return shifted - np.log(total).astype(np.float32)


def _divergence(reference: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """KL of each row, from log-probabilities and logits (rows, vocab)."""
    out = np.empty(len(logits))
    for start in range(0, len(logits), _ROWS):
        rows = slice(start, start + _ROWS)
        log_p, log_q = reference[rows], _log_softmax(logits[rows])
        out[rows] = (np.exp(log_p) * (log_p - log_q)).sum(axis=1, dtype=np.float64)
    return out


class _Swapped:
    """A rounded model but for one module, which another rounding of the same model has."""

    def __init__(self, rest: ModelSource, name: str, other: ModelSource) -> None:
        self.path, self.config, self.scheme = rest.path, rest.config, rest.scheme
        self._rest, self._name, self._other = rest, name, other

    def weight(self, name: str) -> Int4Weight | Int8Weight | np.ndarray:
        return (self._other if name == self._name else self._rest).weight(name)

    def vector(self, name: str) -> np.ndarray:
        return self._rest.vector(name)

    def bias(self, name: str) -> np.ndarray | None:
        return self._rest.bias(name)

    def close(self) -> None:
        """Nothing is open."""


def candidates(source: Checkpoint, scheme: QuantScheme) -> dict[str, list[str]]:
    """The ways to store each layer that has no override yet: kinds by name, smallest first."""
    config = source.config
    shapes = dict(linear_names(config))
    if not config.tied and scheme.kind("lm_head").bits:
        shapes["lm_head"] = (config.vocab_size, config.hidden_size)
    groups = sorted(GROUP_SIZES, reverse=True)
    return {
        name: [f"w4g{g}" for g in groups if columns % g == 0] + [FINEST]
        for name, (_, columns) in shapes.items()
        if name not in scheme.layers
    }


def measure_options(
    source: Checkpoint, scheme: QuantScheme, meter: Meter, progress: Progress = None
) -> tuple[float, dict[str, list[Option]]]:
    """The loss with int8 everywhere, and of each layer its options with what each adds to that."""
    kinds = candidates(source, scheme)
    rounded = {kind: _all_at(source, scheme, kinds, kind) for kind in KINDS if KINDS[kind].bits}
    layouts = {
        kind: layout(source.config, model.scheme, lambda name: source.info(name).dtype)
        for kind, model in rounded.items()
    }
    finest = load_weights(rounded[FINEST])
    least = float(meter.divergence(finest).mean())
    options: dict[str, list[Option]] = {name: [] for name in kinds}
    total, done = sum(len(ways) - 1 for ways in kinds.values()), 0
    for name, ways in kinds.items():
        for kind in ways:
            loss = 0.0
            if kind != FINEST:
                if progress:
                    progress(f"measuring {name} as {kind}", done, total)
                weights = _with_module(finest, name, _Swapped(rounded[FINEST], name, rounded[kind]))
                loss = max(0.0, float(meter.divergence(weights).mean()) - least)
                done += 1
            options[name].append(Option(kind, tensor_bytes(layouts[kind][name]), loss))
    return least, options


def _all_at(
    source: Checkpoint, scheme: QuantScheme, kinds: Mapping[str, list[str]], kind: str
) -> RoundedSource:
    """The model with every layer stored in this way, or int8 where it does not fit."""
    return RoundedSource(
        source, with_layers(scheme, {n: kind if kind in ways else FINEST for n, ways in kinds.items()})
    )


def _with_module(weights: ModelWeights, name: str, source: ModelSource) -> ModelWeights:
    if name == "lm_head":
        return replace(weights, head=load_head(source))
    place = int(name.split(".")[2])  # model.layers.N. ...
    blocks = list(weights.blocks)
    blocks[place] = load_block(source, place)
    return replace(weights, blocks=tuple(blocks))


def allocate(options: Options, budget: int) -> dict[str, Option]:
    """The options of least total loss whose sizes together stay within a budget of bytes.

    Where even the smallest do not, they are given.
    """
    hulls = {name: _hull(ways) for name, ways in options.items()}
    chosen = {name: hull[0] for name, hull in hulls.items()}
    left = budget - sum(option.size for option in chosen.values())
    for name, before, after in _steps(hulls):
        if chosen[name] is before and after.size - before.size <= left:
            chosen[name] = after
            left -= after.size - before.size
    return chosen


def _hull(ways: list[Option]) -> list[Option]:
    """From the smallest option on, each time the one that wins most for a byte more."""
    hull = [min(ways, key=lambda option: (option.size, option.loss))]
    while better := [o for o in ways if o.size > hull[-1].size and o.loss < hull[-1].loss]:
        hull.append(max(better, key=lambda option: _gain(hull[-1], option)))
    return hull


def _gain(before: Option, after: Option) -> float:
    """Loss that a byte more wins."""
    return (before.loss - after.loss) / (after.size - before.size)


def _steps(hulls: Mapping[str, list[Option]]) -> list[tuple[str, Option, Option]]:
    """Every step up along every hull, the best for a byte first."""
    steps = [(name, *pair) for name, hull in hulls.items() for pair in zip(hull, hull[1:], strict=False)]
    return sorted(steps, key=lambda step: (-_gain(*step[1:]), step[0]))
