"""The forward pass of a Llama, over the fused native operations.

One step takes several sequences, each with its own cache and any number of new tokens: prompt chunks and
single tokens mixed. Their tokens stand one after the other in every array; only attention tells them
apart. A layer costs ten native calls, whatever the number of tokens.
"""

import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from llamita import _native as ops
from llamita.engine.adapters import Span, apply
from llamita.engine.kv_cache import SequenceCache
from llamita.engine.weights import Block, Linear, ModelWeights
from llamita.models.config import ModelConfig

LINEAR_INPUTS = ("qkv", "attention_out", "gate_up", "down")  # linear layers that read the same
Step = Sequence[tuple[SequenceCache, np.ndarray]]  # each sequence with its new token ids, int32 (tokens,)


class _Operand(NamedTuple):
    """What a linear layer reads: float32 (tokens, columns), or its int8 codes, or both."""

    floats: np.ndarray
    codes: ops.Activations


class _Views(NamedTuple):
    """The buffers of a step, cut to its number of tokens."""

    x: np.ndarray  # the residual stream (tokens, hidden)
    qkv: np.ndarray  # (tokens, (heads + 2 * kv_heads) * head_dim)
    gate_up: np.ndarray  # (tokens, 2 * intermediate), where their product does not come at once
    hidden: _Operand
    attended: _Operand
    inner: _Operand


class BlockView(NamedTuple):
    """What passed a block; the arrays hold until the next one is run.

    `inputs`, float32 (tokens, columns), are what its linear layers read, before that is rounded: by
    LINEAR_INPUTS, and none after the embedding.
    """

    stream: np.ndarray  # the residual stream after it (tokens, hidden)
    inputs: dict[str, np.ndarray]


class Model:
    """A Llama that computes logits; the state of sequences lives in their caches."""

    def __init__(self, config: ModelConfig, weights: ModelWeights) -> None:
        self.config = config
        self.weights = weights
        self._buffers = _Buffers(config, capacity=1)
        self._logits = np.empty((1, config.vocab_size), dtype=np.float32)
        self._lock = threading.Lock()  # the buffers serve one step at a time

    def step(self, sequences: Step, rows: np.ndarray | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """Take in new tokens and give the logits that follow some of them.

        Args:
            sequences: token ids below the vocabulary size, as many as fit the caches; at least one each.
            rows: which of the step's tokens to give logits for, none of them if empty; by default the
                last of each sequence.
            out: where to write, float32 (rows, vocab). By default a buffer that the next step overwrites.

        Returns:
            float32 (rows, vocab).
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
        """Take in new tokens as `step` does, and show what passes: after the embedding, after each block.

        The bits are those of `step`. Other steps wait until the iteration is over or closed.
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

    def _hidden_states(self, sequences: Step, counts: list[int]) -> np.ndarray:
        """Run the blocks; the residual stream (tokens, hidden) after the last one."""
        batch, buffers = self._begin(sequences, counts)
        spans = _spans(sequences, counts)
        for layer, block in enumerate(self.weights.blocks):
            self._block(block, layer, batch, buffers, spans)
        return buffers.x

    def _begin(self, sequences: Step, counts: list[int]) -> tuple[ops.Batch, _Views]:
        """What the blocks work on: the sequences, and buffers with the embedding in the residual stream."""
        tokens = sum(counts)
        if tokens > self._buffers.capacity:
            self._buffers = _Buffers(self.config, capacity=tokens)
        buffers = self._buffers.first(tokens)
        batch = ops.Batch([(cache.native, cache.length, n) for (cache, _), n in zip(sequences, counts, strict=True)])
        ids = sequences[0][1] if len(sequences) == 1 else np.concatenate([ids for _, ids in sequences])
        ops.embed(self.weights.embedding, ids, buffers.x)
        return batch, buffers

    def _block(self, block: Block, layer: int, batch: ops.Batch, b: _Views, spans: Sequence[Span]) -> None:
        eps, heads = self.config.norm_eps, self.config.heads
        _norm(b.x, block.attention_norm, eps, block.qkv, b.hidden, bool(spans))
        _linear(block.qkv, b.hidden, b.qkv)
        apply(spans, layer, "qkv", b.hidden.floats, b.qkv)
        ops.rope_and_cache(batch, layer, b.qkv, heads)
        ops.attention(batch, layer, b.qkv, heads, b.attended.floats)
        if block.attention_out.takes_codes:
            ops.quantize(b.attended.floats, b.attended.codes)
        _linear(block.attention_out, b.attended, b.x, accumulate=True)
        apply(spans, layer, "attention_out", b.attended.floats, b.x)
        _norm(b.x, block.mlp_norm, eps, block.gate_up, b.hidden, bool(spans))
        _gate_up(block, layer, b, spans)
        apply(spans, layer, "down", b.inner.floats, b.x)
        _rotate(block, self.weights.down_rotation, b.inner)
        _linear(block.down, b.inner, b.x, accumulate=True)

    def _linear_inputs(
        self, block: Block, layer: int, x: np.ndarray, b: _Views, spans: Sequence[Span]
    ) -> dict[str, np.ndarray]:
        """What the linear layers of a block read that has just run, from the stream x before it.

        Norms that went straight to codes are computed again; x (tokens, hidden) is overwritten.
        """
        qkv, gate_up = np.empty_like(x), np.empty_like(x)
        ops.rmsnorm(x, block.attention_norm, self.config.norm_eps, qkv)
        _linear(block.attention_out, b.attended, x, accumulate=True)
        apply(spans, layer, "attention_out", b.attended.floats, x)
        ops.rmsnorm(x, block.mlp_norm, self.config.norm_eps, gate_up)
        down = b.inner.floats
        if self.weights.down_rotation and block.down.takes_codes:  # else it was rotated where it lies
            down = np.empty_like(down)
            ops.hadamard(self.weights.down_rotation, b.inner.floats, down)
        inputs = (qkv, b.attended.floats, gate_up, down)
        return dict(zip(LINEAR_INPUTS, inputs, strict=True))

    def _head(self, x: np.ndarray, out: np.ndarray | None) -> np.ndarray:
        """Logits (rows, vocab) of final hidden states (rows, hidden), whose memory may be used on the way."""
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
    """The tokens of a step that have adapters; neighbours of the same one together."""
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
    """RMSNorm, in the form that the layer which reads it takes, and in floats if they are to be kept."""
    if not (reader.takes_floats or keeps_floats):
        ops.rmsnorm_quantize(x, gamma, eps, out.codes)
        return
    ops.rmsnorm(x, gamma, eps, out.floats)
    if reader.takes_codes:
        ops.quantize(out.floats, out.codes)


def _gate_up(block: Block, layer: int, b: _Views, spans: Sequence[Span]) -> None:
    """silu(gate) · up, in floats."""
    if block.gate_up.is_gated:
        _linear(block.gate_up, b.hidden, b.inner.floats)
        return
    _linear(block.gate_up, b.hidden, b.gate_up)
    apply(spans, layer, "gate_up", b.hidden.floats, b.gate_up)
    ops.swiglu(b.gate_up, b.inner.floats)


def _rotate(block: Block, rotation: ops.Hadamard | None, inner: _Operand) -> None:
    """What the down projection reads, rotated if it has to be, in the form that it takes."""
    if not block.down.takes_codes:
        if rotation:
            ops.hadamard(rotation, inner.floats, inner.floats)
    elif rotation:
        ops.hadamard_quantize(rotation, inner.floats, inner.codes)
    else:
        ops.quantize(inner.floats, inner.codes)


def _linear(linear: Linear, x: _Operand, out: np.ndarray, accumulate: bool = False) -> None:
    """out (tokens, rows) = x · Wᵀ + bias, or out += that."""
    if len(linear.parts) == 1:
        part = linear.parts[0]
        ops.linear(part.weights, x.codes if part.is_quantized else x.floats, out, part.bias, accumulate)
        return
    for part in linear.parts:  # q, k, v of different kinds: the columns of one token lie together
        columns = out[:, part.start : part.stop]
        whole = columns if len(out) == 1 else np.empty(columns.shape, dtype=np.float32)
        ops.linear(part.weights, x.codes if part.is_quantized else x.floats, whole, part.bias, False)
        if whole is not columns:
            columns[:] = whole


class _Buffers:
    """Memory for steps of up to `capacity` tokens, taken once and used by every layer in turn.

    A buffer that the model's kinds of weights never touch costs addresses alone: its pages never come.
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
        """The first rows of every buffer."""
        x, qkv, gate_up = (stream[:tokens] for stream in self._streams)
        pairs = zip(self._floats, self._codes, strict=True)
        return _Views(x, qkv, gate_up, *(_Operand(floats[:tokens], codes) for floats, codes in pairs))
