"""Whether another runtime computes what our engine does: its integers, its logits, its text."""

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
from llamita.models.weights import Int4Weight, Int8Weight
from llamita.numerics.affine import f32_to_bf16, to_f32

_TOKENS = 256
_ADAPTER = "beside"  # what the engines call the adapter
_PROMPT, _NEW = 16, 64
_TIMES = 2.0  # the engine's own noise, beyond which something else is wrong; 1.1 on what was measured
_LEAST_NOISE = 1e-4  # of the logits' spread: less is the order of sums
_DEVIATIONS = 6.0  # of the noise, between two tokens of which either may be the likelier


@dataclass(frozen=True)
class Proof:
    """How close another runtime comes to our engine.

    Attributes:
        layers, equal_layers: rounded layers, and those whose codes and scales it holds bit by bit.
        tokens: that logits were compared for.
        kl, largest_kl: nats a token, of its distribution from ours; mean and largest.
        top_1: share of tokens where both find the same one likeliest.
        noise: standard deviation of its logits' difference from ours, as a share of our logits' own.
        own_noise: the same of our engine with keys and values in float16 from itself with them in float32:
            what activations make of a difference at the limit of float16, when they round the other way.
        greedy, same_greedy: tokens continued greedily, and how many are the same before the first other.
        gap: between our logits of the two tokens at the first other, in standard deviations of the
            difference; None without one.
        prefill: the noise of its last two logits where all tokens but one came in one pass; None where it was
            not asked apart.
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
        """Whether all integers are equal, and what differs is no more than rounded activations explain."""
        return (
            self.equal_layers == self.layers
            and max(self.noise, self.prefill or 0.0) <= max(_TIMES * self.own_noise, _LEAST_NOISE)
            and (self.gap is None or self.gap <= _DEVIATIONS)
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"holds": self.holds, **asdict(self)}


def engine_of(packed: PackedModel, adapter: Path | None = None) -> tuple[LLM, LLM]:
    """The engine with keys and values in float32, as other runtimes keep them, and in float16."""
    adapters = {} if adapter is None else {_ADAPTER: adapter}
    exact, usual = (LLM(packed, kv_dtype=dtype, adapters=open_adapters(packed, adapters)) for dtype in ("f32", "f16"))
    return exact, usual


def compare(engines: tuple[LLM, LLM], layers: tuple[int, int], tokens: list[int], ran: Any) -> Proof:
    """A proof from what another runtime has computed.

    Args:
        engines: as `engine_of` gives them.
        layers: rounded layers, and those found equal.
        tokens: that it was given.
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
    """Tokens that the model writes at temperature 1, how many of them are the prompt, and how many to add.

    Args:
        limit: that a sequence may have.
    """
    bos = llm.tokenizer.bos_token_id
    tokens, seed = [0 if bos is None else bos], 0
    room = min(_TOKENS, limit)
    while len(tokens) < room:
        made = llm.generate(list(tokens), max_tokens=room - len(tokens), temperature=1.0, top_p=1.0, top_k=0, seed=seed)
        tokens += made.token_ids or tokens[:1]
        seed += 1
    prompt = min(_PROMPT, room - 1)
    return tokens[:room], prompt, max(1, min(_NEW, limit - prompt - 1))


def rounded_hashes(packed: PackedModel) -> Iterator[tuple[str, str, str]]:
    """Of every rounded layer that is multiplied: its name, the SHA-256 of its codes, and of its scales.

    The bytes are those of runtimes that hold two int4 codes + 8 in a byte, the first in the low half, and
    scales of groups in bf16, of channels in float32.
    """
    for name in [*linear_names(packed.config), *table_names(packed.config)]:
        if name == EMBEDDING and not packed.config.tied:
            continue
        weight = packed.weight(name)
        if isinstance(weight, Int4Weight):
            codes, scales = np.asarray(weight.packed), _bf16(weight.scales)
        elif isinstance(weight, Int8Weight):
            codes, scales = np.asarray(weight.codes), to_f32(weight.scales)
        else:
            continue
        yield HEAD if name == EMBEDDING else name, _hash(codes), _hash(scales)


def _greedy(llm: LLM, adapter: str | None, prompt: list[int], theirs: list[int]) -> tuple[int, float | None]:
    """How many tokens both continue alike, and the gap of our logits where they part."""
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


def _bf16(scales: np.ndarray) -> np.ndarray:
    return scales if scales.dtype == np.uint16 else f32_to_bf16(np.asarray(scales))
