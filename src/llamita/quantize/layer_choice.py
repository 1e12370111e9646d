"""Choose how each layer is stored: the least loss within a size, or the least size within a loss.

Each layer alone is stored in int4 in a model whose other layers are int8, and the engine measures the KL divergence
from the float model on calibration tokens. KL is quadratic in small errors, and errors of different layers are nearly
uncorrelated. So increases add up, and a layer's increase grows with its squared error (as in HAWQ-V2, arXiv
1911.03852, where the trace of a Hessian is the factor). The remaining knapsack is solved greedily over the lower
convex hull of each layer's sizes and losses, which is optimal except for the bytes left over.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from llamita.engine.kv_cache import SequenceCache
from llamita.engine.model import Model
from llamita.engine.prompt_budget import PREFILL_CHUNK
from llamita.engine.weights import ModelWeights, load_block, load_head, load_weights
from llamita.errors import InputError
from llamita.methods import rtn
from llamita.models.checkpoint import Checkpoint
from llamita.models.layer_kinds import usual_group_size, with_layers
from llamita.models.names import linear_names
from llamita.models.packed import layout, tensor_bytes
from llamita.models.sizes import Plan, make_plan
from llamita.models.weights import Int4Weight, Int8Weight, ModelSource
from llamita.numerics.intervals import Interval, mean_interval
from llamita.numerics.scheme import GROUP_SIZES, KINDS, QuantScheme
from llamita.quantize.rounded import RoundedSource
from llamita.system.progress import Progress

Rounding = Callable[[Checkpoint, QuantScheme], ModelSource]
FINEST, _MEASURED = "w8", "w4g128"
_WAYS = (*(f"w4g{group_size}" for group_size in sorted(GROUP_SIZES, reverse=True)), FINEST)  # smallest first
_REFERENCE_BYTES = 256 * 2**20  # of the float model's log-probabilities; above, every n-th token counts
_MOST_TOKENS = 8192  # for the measurement of each layer
_TOKENS_EACH = 4  # at most, for each token that counts: the others are its context
_HEADER_SLACK = 16  # bytes by which a layer's part of the header may grow; padding may grow by 64
_ROWS = 64  # of logits at a time


@dataclass(frozen=True)
class Option:
    """One way to store a layer: a key of `scheme.KINDS`, bytes, and what it adds to the KL divergence."""

    kind: str
    size: int
    loss: float


Options = Mapping[str, list[Option]]  # by module name


@dataclass(frozen=True)
class Goal:
    """A limit for the choice of layers: bytes of weight files, or KL divergence in nats a token.

    Raises:
        InputError: not exactly one of them, or a loss that is not positive.
    """

    max_size: int | None = None
    max_loss: float | None = None

    def __post_init__(self) -> None:
        if (self.max_size is None) == (self.max_loss is None):
            raise InputError("--max-size, --max-loss", "one of them", "none" if self.max_size is None else "both")
        if self.max_loss is not None and not 0 < self.max_loss < float("inf"):
            raise InputError("--max-loss", "nats a token above 0, such as 0.02", f"{self.max_loss}")


@dataclass(frozen=True)
class Selection:
    """A chosen scheme and its losses, as KL in nats a token on the given tokens.

    Attributes:
        scheme: with an override for each layer that is stored in another way than most.
        file_bytes: of its weight files.
        predicted: the loss of int8 plus the sum of what the layers add.
        measured: the loss of the whole.
        uniform: the scheme with one group size that loses least within the same bytes, None if none fits.
        uniform_loss: the measured loss of that one.
        finished: the loss of the finished model, if it is not rounded to nearest.
    """

    scheme: QuantScheme
    file_bytes: int
    predicted: float
    measured: Interval
    uniform: QuantScheme | None
    uniform_loss: Interval | None
    finished: Interval | None = None


def select(
    source: Checkpoint,
    scheme: QuantScheme,
    tokens: np.ndarray,
    goal: Goal,
    progress: Progress = None,
    rounding: Rounding = RoundedSource,
    added: int = 0,
) -> Selection:
    """Return the scheme that fits the goal best; each layer without an override gets its own kind.

    Args:
        scheme: decides everything but group sizes and bits of linear layers.
        tokens: int32 (samples, length) on which losses are measured.
        rounding: makes the model from which single layers are taken; losses of the whole are with round to nearest.
        added: bytes that the chain's transforms add to the weight files, the same for every scheme.

    Raises:
        InputError: no scheme is small enough, or loses little enough.
    """
    stride = _stride(source, tokens)
    least_size, overhead = size_bounds(source, scheme)
    meter = Meter(source, tokens[::stride])
    run = _Run(source, scheme, meter, least_size + added, overhead + added, added)
    if goal.max_size is not None:
        check_size(goal.max_size, run.least_size)
    least, options = measure_options(source, scheme, run.meter, progress, rounding)
    if goal.max_loss is not None:
        chosen = _smallest(run, options, goal.max_loss)
    else:
        assert goal.max_size is not None
        chosen = allocate(options, goal.max_size - run.overhead)
    mixed = mixed_scheme(scheme, chosen)
    if stride > 1:  # judge on samples that the choice has not seen
        run.meter = Meter(source, tokens[1::stride])
    size = run.file_bytes(mixed)
    uniform, uniform_loss = _best_uniform(run, goal.max_size or size)
    predicted = least + sum(option.loss for option in chosen.values())
    return Selection(mixed, size, predicted, run.loss(mixed), uniform, uniform_loss)


def check_size(size: int, least: int) -> None:
    """Raise InputError if no weight files are so small."""
    if size < least:
        raise InputError(
            "--max-size",
            f"at least {least:,} bytes, the smallest weight files of all",
            f"{size:,}",
            "try a preset with smaller tables, or less --keep-float",
        )


def _stride(source: ModelSource, tokens: np.ndarray) -> int:
    """Return n, where one of n samples is measured, so that time and memory stay bounded."""
    counted = _REFERENCE_BYTES // (4 * source.config.vocab_size)
    return -(-tokens.size // min(_MOST_TOKENS, _TOKENS_EACH * counted))


def finished_loss(source: Checkpoint, finished: ModelSource, tokens: np.ndarray) -> Interval:
    """Return the loss of a finished model on the samples on which a choice is judged."""
    stride = _stride(source, tokens)
    meter = Meter(source, tokens[1 if stride > 1 else 0 :: stride])
    return mean_interval(meter.divergence(load_weights(finished)))


@dataclass
class _Run:
    source: Checkpoint
    scheme: QuantScheme
    meter: "Meter"
    least_size: int  # bytes of weight files
    overhead: int  # most bytes that no choice changes
    added: int  # by transforms

    def loss(self, scheme: QuantScheme) -> Interval:
        return mean_interval(self.meter.divergence(load_weights(RoundedSource(self.source, scheme))))

    def file_bytes(self, scheme: QuantScheme) -> int:
        return _plan(self.source, scheme).file_bytes + self.added


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
        """Return KL(float || rounded) at each token that counts, in nats: float64 (tokens,)."""
        model = Model(self._config, weights)
        pairs = zip(self._reference, self._logits(model, "f16"), strict=True)
        return np.concatenate([_divergence(reference, logits) for reference, logits in pairs])

    def _logits(self, model: Model, kv_dtype: str) -> Iterator[np.ndarray]:
        """Yield the logits of each sample at the tokens that count: float32 (rows, vocab)."""
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
    """Return the KL divergence of each row, from log-probabilities and logits (rows, vocab)."""
    out = np.empty(len(logits))
    for start in range(0, len(logits), _ROWS):
        rows = slice(start, start + _ROWS)
        log_p, log_q = reference[rows], _log_softmax(logits[rows])
        out[rows] = (np.exp(log_p) * (log_p - log_q)).sum(axis=1, dtype=np.float64)
    return out


class _Swapped:
    """A rounded model with one module from another rounding of the same model."""

    def __init__(self, rest: ModelSource, name: str, other: ModelSource) -> None:
        self.path, self.config, self.scheme = rest.path, rest.config, rest.scheme
        self.rotations = rest.rotations
        self._rest, self._name, self._other = rest, name, other

    def weight(self, name: str) -> Int4Weight | Int8Weight | np.ndarray:
        return (self._other if name == self._name else self._rest).weight(name)

    def vector(self, name: str) -> np.ndarray:
        return self._rest.vector(name)

    def close(self) -> None:
        """Nothing is open."""


def candidates(source: Checkpoint, scheme: QuantScheme) -> dict[str, list[str]]:
    """Return the kinds in which each layer without an override can be stored, by its name, smallest first."""
    config = source.config
    shapes = dict(linear_names(config))
    if not config.tied and scheme.kind("lm_head").bits:
        shapes["lm_head"] = (config.vocab_size, config.hidden_size)
    return {
        name: [kind for kind in _WAYS if columns % (KINDS[kind].group_size or 1) == 0]
        for name, (_, columns) in shapes.items()
        if name not in scheme.layers
    }


def measure_options(
    source: Checkpoint, scheme: QuantScheme, meter: Meter, progress: Progress = None, rounding: Rounding = RoundedSource
) -> tuple[float, dict[str, list[Option]]]:
    """Return the loss with int8 everywhere, and the options of each layer with what each adds to that.

    The increase is measured for one int4 kind; the others follow from the squared errors of the rounded weights.
    """
    kinds = candidates(source, scheme)
    schemes = {kind: _all_at(scheme, kinds, kind) for kind in _WAYS}
    layouts = {k: layout(source.config, s, lambda name: source.info(name).dtype) for k, s in schemes.items()}
    rounders = {kind: rtn.rounder(source, schemes[kind]) for kind in schemes}
    measured = {n: _MEASURED if _MEASURED in ways else ways[0] for n, ways in kinds.items()}
    rounded: dict[str, ModelSource] = {
        kind: rounding(source, schemes[kind]) for kind in dict.fromkeys(measured.values())
    }
    rounded[FINEST] = RoundedSource(source, schemes[FINEST])
    weights = load_weights(rounded[FINEST])
    least = float(meter.divergence(weights).mean())
    options: dict[str, list[Option]] = {}
    for done, (name, ways) in enumerate(kinds.items()):
        if progress:
            progress(f"measuring {name}", done, len(kinds))
        errors = {kind: sum(piece.squared_error for piece in rounders[kind](name)) for kind in ways}
        reference = measured[name]
        swapped = _with_module(weights, name, _Swapped(rounded[FINEST], name, rounded[reference]))
        added = max(0.0, float(meter.divergence(swapped).mean()) - least)
        factor = added / errors[reference] if errors[reference] else 0.0
        options[name] = [
            Option(kind, tensor_bytes(layouts[kind][name]), 0.0 if kind == FINEST else factor * errors[kind])
            for kind in ways
        ]
    return least, options


def _all_at(scheme: QuantScheme, kinds: Mapping[str, list[str]], kind: str) -> QuantScheme:
    """Return the scheme with each layer stored in this way, or in int8 where it does not fit."""
    return with_layers(scheme, {n: kind if kind in ways else FINEST for n, ways in kinds.items()})


def _with_module(weights: ModelWeights, name: str, source: ModelSource) -> ModelWeights:
    if name == "lm_head":
        return replace(weights, head=load_head(source))
    place = int(name.split(".")[2])  # model.layers.N. ...
    blocks = list(weights.blocks)
    blocks[place] = load_block(source, place)
    return replace(weights, blocks=tuple(blocks))


def allocate(options: Options, budget: int) -> dict[str, Option]:
    """Return the options of least total loss whose sizes together stay within a budget of bytes.

    If even the smallest are too large, return them.
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
    """Return options from the smallest on; each next one is the one that gains most for a byte more."""
    hull = [min(ways, key=lambda option: (option.size, option.loss))]
    while better := [o for o in ways if o.size > hull[-1].size and o.loss < hull[-1].loss]:
        hull.append(max(better, key=lambda option: _gain(hull[-1], option)))
    return hull


def _gain(before: Option, after: Option) -> float:
    """Return the loss that one more byte saves."""
    return (before.loss - after.loss) / (after.size - before.size)


def _steps(hulls: Mapping[str, list[Option]]) -> list[tuple[str, Option, Option]]:
    """Return all steps up along all hulls, the one that gains most for a byte first."""
    steps = [(name, *pair) for name, hull in hulls.items() for pair in pairwise(hull)]
    return sorted(steps, key=lambda step: (-_gain(*step[1:]), step[0]))


def mixed_scheme(scheme: QuantScheme, chosen: Mapping[str, Option]) -> QuantScheme:
    """Return the scheme with these options; its group size is that of most layers."""
    most = usual_group_size(option.kind for option in chosen.values())
    fixed = {name: scheme.kind(name).name for name in scheme.layers}
    layers = fixed | {name: option.kind for name, option in chosen.items()}
    return replace(scheme, name="auto", group_size=most, layers=layers)


def _plan(source: Checkpoint, scheme: QuantScheme) -> Plan:
    return make_plan(source.config, scheme, lambda name: source.info(name).dtype)


def size_bounds(source: Checkpoint, scheme: QuantScheme) -> tuple[int, int]:
    """Return the size of the smallest weight files, and how many bytes of any are outside the chosen layers."""
    kinds = candidates(source, scheme)
    chosen = {name: Option(ways[0], 0, 0.0) for name, ways in kinds.items()}
    smallest = mixed_scheme(scheme, chosen)
    plan = _plan(source, smallest)
    modules = layout(source.config, smallest, lambda name: source.info(name).dtype)
    inside = sum(tensor_bytes(modules[name]) for name in kinds)
    return plan.file_bytes, plan.file_bytes - inside + _HEADER_SLACK * len(kinds) + 64


def _smallest(run: _Run, options: Options, max_loss: float) -> dict[str, Option]:
    """Return the first state from the smallest to the finest whose measured loss is small enough."""
    hulls = {name: _hull(ways) for name, ways in options.items()}
    sizes = [sum(hull[0].size for hull in hulls.values())]
    for _, before, after in _steps(hulls):
        sizes.append(sizes[-1] + after.size - before.size)
    finest = run.loss(mixed_scheme(run.scheme, allocate(options, sizes[-1]))).value
    if finest > max_loss:
        raise InputError("--max-loss", f"at least {finest:.2g}, what int8 loses on this text", f"{max_loss:g}")
    low, high = 0, len(sizes) - 1  # the state at `high` is small enough in loss
    while low < high:
        middle = (low + high) // 2
        loss = run.loss(mixed_scheme(run.scheme, allocate(options, sizes[middle]))).value
        low, high = (low, middle) if loss <= max_loss else (middle + 1, high)
    return allocate(options, sizes[high])


def _best_uniform(run: _Run, size: int) -> tuple[QuantScheme | None, Interval | None]:
    """Return the best scheme of these bytes with one group size for all layers without an override."""
    columns = [shape[1] for shape in linear_names(run.source.config).values()]
    found: list[tuple[Interval, QuantScheme]] = []
    for group_size in GROUP_SIZES:
        scheme = replace(run.scheme, group_size=group_size)
        if not any(count % group_size for count in columns) and run.file_bytes(scheme) <= size:
            found.append((run.loss(scheme), scheme))
    loss, scheme = min(found, key=lambda pair: pair[0].value, default=(None, None))
    return scheme, loss
