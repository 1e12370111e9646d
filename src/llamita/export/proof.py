"""Whether another runtime computes what our engine does: its integers, its logits, its text."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

import numpy as np

from llamita.affine import f32_to_bf16, to_f32
from llamita.checkpoint import Int4Weight, Int8Weight, linear_names, table_names
from llamita.engine.llm import LLM
from llamita.packed import EMBEDDING, HEAD, PackedModel

_TOKENS = 256
_PROMPT, _NEW = 16, 64
_LARGEST_KL = 0.01  # nats; activations that round the other way cost the embedded model 0.0004
_LARGEST_NOISE = 0.1  # of the logits' own spread
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
        greedy, same_greedy: tokens continued greedily, and how many are the same before the first other.
        gap: between our logits of the two tokens at the first other, in standard deviations of the
            difference; None without one.
        prefill: largest difference of logits from one pass and token by token, as a share of the spread.
        milliseconds: of a pass of one token.
    """

    layers: int
    equal_layers: int
    tokens: int
    kl: float
    largest_kl: float
    top_1: float
    noise: float
    greedy: int
    same_greedy: int
    gap: float | None
    prefill: float
    milliseconds: float

    @property
    def holds(self) -> bool:
        """Whether all integers are equal, and what differs is no more than rounded activations explain."""
        return (
            self.equal_layers == self.layers
            and self.kl <= _LARGEST_KL
            and self.noise <= _LARGEST_NOISE
            and (self.gap is None or self.gap <= _DEVIATIONS)
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"holds": self.holds, **asdict(self)}


def compare(
    llm: LLM, layers: tuple[int, int], tokens: list[int], ran: Any, adaptor: str | None = None
) -> Proof:
    """A proof from what another runtime has computed.

    Args:
        layers: rounded layers, and those found equal.
        tokens: that it was given.
        ran: see `runtime.Ran`.
        adaptor: of `llm`, by its name.
    """
    ours = llm.logits(tokens, adaptor).astype(np.float64)
    theirs = ran.logits.astype(np.float64)
    ours_log, theirs_log = _log_softmax(ours), _log_softmax(theirs)
    kl = (np.exp(ours_log) * (ours_log - theirs_log)).sum(-1)
    spread, difference = float(ours.std()), float((theirs - ours).std())
    same, gap = _greedy(llm, adaptor, tokens[:_PROMPT], [int(token) for token in ran.greedy])
    return Proof(
        layers=layers[0], equal_layers=layers[1], tokens=len(tokens), kl=float(kl.mean()),
        largest_kl=float(kl.max()), top_1=float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
        noise=difference / spread, greedy=len(ran.greedy), same_greedy=same,
        gap=None if gap is None else gap / difference if difference else np.inf,
        prefill=float(np.abs(ran.prefill - theirs[-1]).max()) / spread, milliseconds=1e3 * ran.seconds,
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
        made = llm.generate(list(tokens), max_tokens=room - len(tokens), temperature=1.0, top_p=1.0, top_k=0,
                            seed=seed)  # fmt: skip
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


def _greedy(llm: LLM, adaptor: str | None, prompt: list[int], theirs: list[int]) -> tuple[int, float | None]:
    """How many tokens both continue alike, and the gap of our logits where they part."""
    logits = llm.logits([*prompt, *theirs], adaptor)[len(prompt) - 1 : -1]
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
