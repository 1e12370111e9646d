"""Prove that another runtime computes what the engine does: its integers, its logits, its text."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from llamita.engine.llm import LLM
from llamita.loading import open_adapters
from llamita.models.names import EMBEDDING, HEAD, linear_names, table_names
from llamita.models.packed import PackedModel
from llamita.models.weights import Int4Weight, Int8Weight, as_stored
from llamita.numerics.affine import to_f32

_TOKENS = 256
_ADAPTER = "exported"  # the adapter's name in the engines
_PROMPT, _NEW = 16, 64
_TIMES = 2.0  # largest noise allowed, in the engine's own; 1.1 at most was measured
_LEAST_NOISE = 1e-4  # of the logits' spread: the order of sums alone can make as much
_DEVIATIONS = 6.0  # of the noise: two logits no further apart may change places


@dataclass(frozen=True)
class Proof:
    """How close another runtime comes to the engine.

    Attributes:
        layers, equal_layers: rounded layers, and those whose codes and scales the runtime holds bit by bit.
        tokens: the number of tokens whose logits were compared.
        kl, largest_kl: KL divergence of the runtime from the engine in nats a token, mean and largest.
        top_1: share of tokens where both find the same one likeliest.
        noise: standard deviation of the difference of logits, as a share of that of the engine's logits.
        own_noise: the same between the engine with keys and values in float16 and in float32. It shows what activations
            that round the other way make of a difference at the limit of float16.
        greedy, same_greedy: tokens continued greedily, and how many are the same before the first that differs.
        gap: between the engine's logits of the two tokens that differ first, in standard deviations of the difference
            of logits; None if none differs.
        prefill: the noise of the last two logits after all tokens but one came in one pass; None if not measured.
        milliseconds: of a pass of one token.
    """

    layers: int
    equal_layers: int
    tokens: int
    kl: float
    largest_kl: float
    top_1: float
    noise: float
    own_noise: float
    greedy: int
    same_greedy: int
    gap: float | None
    prefill: float | None
    milliseconds: float

    @property
    def holds(self) -> bool:
        """Return whether all integers are equal, and rounded activations explain every other difference."""
        return (
            self.equal_layers == self.layers
            and max(self.noise, self.prefill or 0.0) <= max(_TIMES * self.own_noise, _LEAST_NOISE)
            and (self.gap is None or self.gap <= _DEVIATIONS)
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return {"holds": self.holds, **asdict(self)}


def engine_of(packed: PackedModel, adapter: Path | None = None) -> tuple[LLM, LLM]:
    """Return the engine with keys and values in float32, as other runtimes keep them, and in float16."""
    adapters = {} if adapter is None else {_ADAPTER: adapter}
    exact, usual = (LLM(packed, kv_dtype=dtype, adapters=open_adapters(packed, adapters)) for dtype in ("f32", "f16"))
    return exact, usual


def compare(engines: tuple[LLM, LLM], layers: tuple[int, int], tokens: list[int], ran: Any) -> Proof:
    """Return the proof for the results of another runtime.

    Args:
        engines: see `engine_of`.
        layers: the number of rounded layers, and of those that are equal.
        tokens: that the runtime got.
        ran: see `runtime.Ran`.
    """
    llm, usual = engines
    adapter = _ADAPTER if llm.adapters else None
    ours = llm.logits(tokens, adapter).astype(np.float64)
    theirs = ran.logits.astype(np.float64)
    ours_log, theirs_log = _log_softmax(ours), _log_softmax(theirs)
    kl = (np.exp(ours_log) * (ours_log - theirs_log)).sum(-1)
    spread, difference = float(ours.std()), float((theirs - ours).std())
    own = float((usual.logits(tokens, adapter) - ours).std())
    same, gap = _greedy(llm, adapter, tokens[:_PROMPT], [int(token) for token in ran.greedy])
    return Proof(
        layers=layers[0], equal_layers=layers[1], tokens=len(tokens), kl=float(kl.mean()),
        largest_kl=float(kl.max()), top_1=float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
        noise=difference / spread, own_noise=own / spread, greedy=len(ran.greedy), same_greedy=same,
        gap=None if gap is None else gap / max(difference, _LEAST_NOISE * spread),
        prefill=None if ran.prefill is None else float((ran.prefill - ours[-2:]).std()) / spread,
        milliseconds=1e3 * ran.seconds,
    )  # fmt: skip


def own_tokens(llm: LLM, limit: int) -> tuple[list[int], int, int]:
    """Return tokens that the model writes at temperature 1, how many of them are the prompt, and how many to add.

    Args:
        limit: the most tokens of a sequence.
    """
    rope, bos = llm.config.rope, llm.tokenizer.bos_token_id
    if rope.depends_on_length:  # beyond, tools differ in when they take other frequencies
        limit = min(limit, rope.original_context)
    tokens, seed = [0 if bos is None else bos], 0
    room = min(_TOKENS, limit)
    while len(tokens) < room:
        made = llm.generate(list(tokens), max_tokens=room - len(tokens), temperature=1.0, top_p=1.0, top_k=0, seed=seed)
        tokens += made.token_ids or tokens[:1]
        seed += 1
    prompt = min(_PROMPT, room - 1)
    return tokens[:room], prompt, max(1, min(_NEW, limit - prompt - 1))


def rounded_hashes(packed: PackedModel) -> Iterator[tuple[str, str, str]]:
    """Yield name, SHA-256 of codes and SHA-256 of scales of every rounded layer that activations are multiplied by.

    The bytes are those of runtimes that hold two int4 codes + 8 in a byte, the first in the low half, scales of groups
    in bf16, and scales of channels in float32.
    """
    for name in [*linear_names(packed.config), *table_names(packed.config)]:
        if name == EMBEDDING and not packed.config.tied:
            continue
        weight = packed.weight(name)
        if isinstance(weight, Int4Weight):
            codes, scales = np.asarray(weight.packed), as_stored(np.asarray(weight.scales), "BF16")
        elif isinstance(weight, Int8Weight):
            codes, scales = np.asarray(weight.codes), to_f32(weight.scales)
        else:
            continue
        yield HEAD if name == EMBEDDING else name, _hash(codes), _hash(scales)


def _greedy(llm: LLM, adapter: str | None, prompt: list[int], theirs: list[int]) -> tuple[int, float | None]:
    """Return how many tokens both continue alike, and the gap of the engine's logits where they differ."""
    logits = llm.logits([*prompt, *theirs], adapter)[len(prompt) - 1 : -1]
    for same, (row, token) in enumerate(zip(logits, theirs, strict=True)):
        if int(row.argmax()) != token:
            return same, float(row.max() - row[token])
    return len(theirs), None


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _hash(values: np.ndarray) -> str:
    return sha256(np.ascontiguousarray(values).data).hexdigest()
