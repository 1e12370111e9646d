"""The forward pass of a Llama, over fused native operations.

One step takes several sequences, each with its cache and any number of new tokens: prompt chunks and single tokens
mixed. All tokens follow each other in every array, and only attention separates the sequences. A layer costs ten
native calls, whatever the number of tokens.
"""

import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from llamita import _native as ops
from llamita.engine.adapters import Span, add_adapters
from llamita.engine.kv_cache import SequenceCache
from llamita.engine.weights import BlockWeights, Linear, ModelWeights
from llamita.models.config import ModelConfig

LINEAR_INPUTS = ("qkv", "attention_out", "gate_up", "down")  # the fused linear layers; each reads one input
Step = Sequence[tuple[SequenceCache, np.ndarray]]  # the sequences with their new token ids, int32 (tokens,)


class _Operand(NamedTuple):
    """The input of a linear layer, float32 (tokens, columns) and its int8 codes, of which one or both are filled."""

    floats: np.ndarray
    codes: ops.Activations


class _Views(NamedTuple):
    """The buffers of a step, cut to its number of tokens."""

    x: np.ndarray  # the residual stream (tokens, hidden)
    qkv: np.ndarray  # (tokens, (heads + 2 * kv_heads) * head_dim)
    gate_up: np.ndarray  # (tokens, 2 * intermediate), used where the layer is not gated
    hidden: _Operand  # (tokens, hidden)
    attended: _Operand  # (tokens, heads * head_dim)
    inner: _Operand  # (tokens, intermediate)


class BlockView(NamedTuple):
    """The activations of a block, valid until the next block runs.

    `inputs` are those of the linear layers, by LINEAR_INPUTS and before rounding; there are none for the embedding.
    """

    stream: np.ndarray  # the residual stream after the block (tokens, hidden)
    inputs: dict[str, np.ndarray]  # float32 (tokens, columns)


class Model:
    """A Llama that computes logits. The state of a sequence is in its cache."""

    def __init__(self, config: ModelConfig, weights: ModelWeights) -> None:
        self.config = config
        self.weights = weights
        self._buffers = _Buffers(config, capacity=1)
        self._logits = np.empty((1, config.vocab_size), dtype=np.float32)
        self._lock = threading.Lock()  # one step at a time uses the buffers

    def step(self, sequences: Step, rows: np.ndarray | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """Compute new tokens; return the logits that follow some of them, float32 (rows, vocab).

        Args:
            sequences: at least one token each, with ids below the vocabulary size, and no more than the caches hold.
            rows: the step's tokens to return logits for, none if empty; by default the last of each sequence.
            out: where to write the logits; by default a buffer that the next step overwrites.
        """
        counts = [len(ids) for _, ids in sequences]
        if rows is None:
            rows = np.cumsum(counts) - 1
        with self._lock:
            x = self._hidden_states(sequences, counts)  # (tokens, hidden)
            for (cache, _), count in zip(sequences, counts, strict=True):
                cache.length += count
            return self._head(x[rows], out)

    def watch(self, sequences: Step) -> Iterator[BlockView]:
        """Compute new tokens, to the bit as `step` does, and yield a view after the embedding and after each block.

        Other steps wait until the iteration ends or is closed.
        """
        counts = [len(ids) for _, ids in sequences]
        with self._lock:
            batch, buffers = self._begin(sequences, counts)
            spans = _spans(sequences, counts)
            yield BlockView(buffers.x, {})
            for layer, block in enumerate(self.weights.blocks):
                before = buffers.x.copy()
                self._block(block, layer, batch, buffers, spans)
                yield BlockView(buffers.x, self._linear_inputs(block, layer, before, buffers, spans))
            for (cache, _), count in zip(sequences, counts, strict=True):
                cache.length += count

    def final_states(self, cache: SequenceCache, ids: np.ndarray) -> np.ndarray:
        """Compute new tokens of one sequence; return their states after the last norm, float32 (tokens, hidden).

        Those of a model under R1 are in its rotated space.
        """
        w = self.weights
        with self._lock:
            x = self._hidden_states([(cache, ids)], [len(ids)])
            cache.length += len(ids)
            states = self._buffers.first(len(ids)).hidden.floats
            ops.rmsnorm(x, w.norm, self.config.norm_eps, states)
            if w.head_transform is not None:
                ops.linear(w.head_transform, states, x)
                states = x
            return states.copy()

    def _hidden_states(self, sequences: Step, counts: list[int]) -> np.ndarray:
        """Run all blocks; return the residual stream (tokens, hidden)."""
        batch, buffers = self._begin(sequences, counts)
        spans = _spans(sequences, counts)
        for layer, block in enumerate(self.weights.blocks):
            self._block(block, layer, batch, buffers, spans)
        return buffers.x

    def _begin(self, sequences: Step, counts: list[int]) -> tuple[ops.Batch, _Views]:
        """Return the batch, and buffers with the embedding in the residual stream."""
        tokens = sum(counts)
        if tokens > self._buffers.capacity:
            self._buffers = _Buffers(self.config, capacity=tokens)
        buffers = self._buffers.first(tokens)
        batch = ops.Batch([(cache.native, cache.length, n) for (cache, _), n in zip(sequences, counts, strict=True)])
        ids = sequences[0][1] if len(sequences) == 1 else np.concatenate([ids for _, ids in sequences])
        ops.embed(self.weights.embedding, ids, buffers.x)
        return batch, buffers

    def _block(self, block: BlockWeights, layer: int, batch: ops.Batch, b: _Views, spans: Sequence[Span]) -> None:
        # T tokens, C hidden, Q = heads * head_dim, K = kv_heads * head_dim, I intermediate
        eps, heads = self.config.norm_eps, self.config.heads
        _norm(b.x, block.attention_norm, eps, block.qkv, b.hidden, bool(spans))  # x (T, C) -> hidden (T, C)
        _linear(block.qkv, b.hidden, b.qkv)  # (T, C) -> qkv (T, Q + 2 * K)
        add_adapters(spans, layer, "qkv", b.hidden.floats, b.qkv)
        if block.head_norms:
            ops.rmsnorm_heads(b.qkv, *block.head_norms, heads, eps)  # each head of q and k, in place
        # rotates q in place; k, v (T, kv_heads, head_dim) to the caches
        ops.rope_and_cache(batch, layer, b.qkv, heads, layer not in self.config.unrotated)
        # q and the caches -> attended (T, Q)
        ops.attention(batch, layer, b.qkv, heads, b.attended.floats, self.config.window_of(layer))
        if block.attention_out.takes_codes:
            ops.quantize(b.attended.floats, b.attended.codes)
        _linear(block.attention_out, b.attended, b.x, accumulate=True)  # x (T, C) += (T, Q) @ (Q, C)
        add_adapters(spans, layer, "attention_out", b.attended.floats, b.x)
        _norm(b.x, block.mlp_norm, eps, block.gate_up, b.hidden, bool(spans))  # x (T, C) -> hidden (T, C)
        _gate_up(block, layer, b, spans)  # (T, C) -> inner (T, I)
        add_adapters(spans, layer, "down", b.inner.floats, b.x)
        _rotate(block, self.weights.down_rotation, b.inner)  # (T, I) -> (T, I)
        _linear(block.down, b.inner, b.x, accumulate=True)  # x (T, C) += (T, I) @ (I, C)

    def _linear_inputs(
        self, block: BlockWeights, layer: int, x: np.ndarray, b: _Views, spans: Sequence[Span]
    ) -> dict[str, np.ndarray]:
        """Return the inputs of the linear layers of the block that has just run; x is the stream before it.

        Norms are computed again, because `_norm` may have written codes alone. x (tokens, hidden) is overwritten.
        """
        qkv, gate_up = np.empty_like(x), np.empty_like(x)
        ops.rmsnorm(x, block.attention_norm, self.config.norm_eps, qkv)
        _linear(block.attention_out, b.attended, x, accumulate=True)
        add_adapters(spans, layer, "attention_out", b.attended.floats, x)
        ops.rmsnorm(x, block.mlp_norm, self.config.norm_eps, gate_up)
        down = b.inner.floats
        if self.weights.down_rotation and block.down.takes_codes:  # else it was rotated in place
            down = np.empty_like(down)
            ops.hadamard(self.weights.down_rotation, b.inner.floats, down)
        inputs = (qkv, b.attended.floats, gate_up, down)
        return dict(zip(LINEAR_INPUTS, inputs, strict=True))

    def _head(self, x: np.ndarray, out: np.ndarray | None) -> np.ndarray:
        """Return the logits (rows, vocab) of final hidden states x (rows, hidden), which may be overwritten."""
        if out is None:
            if len(self._logits) < len(x):
                self._logits = np.empty((len(x), self.config.vocab_size), dtype=np.float32)
            out = self._logits[: len(x)]
        if not len(x):
            return out
        w, eps, hidden = self.weights, self.config.norm_eps, self._buffers.first(len(x)).hidden
        if w.head_transform is None:
            _norm(x, w.norm, eps, w.head, hidden)
        else:
            ops.rmsnorm(x, w.norm, eps, hidden.floats)
            ops.linear(w.head_transform, hidden.floats, x)
            hidden = _Operand(x, hidden.codes)
            if w.head.takes_codes:
                ops.quantize(x, hidden.codes)
        _linear(w.head, hidden, out)
        return out


def _spans(sequences: Step, counts: list[int]) -> list[Span]:
    """Return the tokens of a step that have adapters. Neighbouring sequences with the same one share a span."""
    spans: list[Span] = []
    start = 0
    for (cache, _), count in zip(sequences, counts, strict=True):
        stop = start + count
        if cache.adapter is not None:
            begins = start
            if spans and spans[-1][1] is cache.adapter and spans[-1][0].stop == start:
                begins = spans.pop()[0].start
            spans.append((slice(begins, stop), cache.adapter))
        start = stop
    return spans


def _norm(
    x: np.ndarray, gamma: np.ndarray, eps: float, reader: Linear, out: _Operand, keeps_floats: bool = False
) -> None:
    """Compute RMSNorm as floats, codes or both: as the layer `reader` takes it, and as floats if `keeps_floats`."""
    if not (reader.takes_floats or keeps_floats):
        ops.rmsnorm_quantize(x, gamma, eps, out.codes)
        return
    ops.rmsnorm(x, gamma, eps, out.floats)
    if reader.takes_codes:
        ops.quantize(out.floats, out.codes)


def _gate_up(block: BlockWeights, layer: int, b: _Views, spans: Sequence[Span]) -> None:
    """Compute silu(gate) · up, in floats."""
    if block.gate_up.is_gated:
        _linear(block.gate_up, b.hidden, b.inner.floats)
        return
    _linear(block.gate_up, b.hidden, b.gate_up)
    add_adapters(spans, layer, "gate_up", b.hidden.floats, b.gate_up)
    ops.swiglu(b.gate_up, b.inner.floats)


def _rotate(block: BlockWeights, rotation: ops.Hadamard | None, inner: _Operand) -> None:
    """Turn `inner` into what the down projection takes: rotated if there is a rotation, as floats or codes."""
    if not block.down.takes_codes:
        if rotation:
            ops.hadamard(rotation, inner.floats, inner.floats)
    elif rotation:
        ops.hadamard_quantize(rotation, inner.floats, inner.codes)
    else:
        ops.quantize(inner.floats, inner.codes)


def _linear(linear: Linear, x: _Operand, out: np.ndarray, accumulate: bool = False) -> None:
    """Compute out (tokens, rows) = x · Wᵀ + bias, or out += that with `accumulate`."""
    if len(linear.parts) == 1:
        part = linear.parts[0]
        ops.linear(part.weights, x.codes if part.is_quantized else x.floats, out, part.bias, accumulate)
        return
    for part in linear.parts:  # q, k, v of different kinds, each with its columns of `out`
        columns = out[:, part.start : part.stop]
        whole = columns if len(out) == 1 else np.empty(columns.shape, dtype=np.float32)
        ops.linear(part.weights, x.codes if part.is_quantized else x.floats, whole, part.bias, False)
        if whole is not columns:
            columns[:] = whole


class _Buffers:
    """Memory for steps of up to `capacity` tokens, taken once and used by every layer in turn.

    A buffer that a model never touches costs only addresses, because the system gives pages on first use.
    """

    def __init__(self, config: ModelConfig, capacity: int) -> None:
        self.capacity = capacity
        hidden, inner = config.hidden_size, config.intermediate_size
        queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
        streams = (hidden, queries + 2 * keys, 2 * inner)
        operands = (hidden, queries, inner)
        self._streams = [ops.new_buffer(capacity, width) for width in streams]
        self._floats = [ops.new_buffer(capacity, width) for width in operands]
        self._codes = [ops.Activations(capacity, width) for width in operands]

    def first(self, tokens: int) -> _Views:
        """Return the first rows of every buffer."""
        x, qkv, gate_up = (stream[:tokens] for stream in self._streams)
        pairs = zip(self._floats, self._codes, strict=True)
        return _Views(x, qkv, gate_up, *(_Operand(floats[:tokens], codes) for floats, codes in pairs))
