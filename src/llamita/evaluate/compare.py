"""Compare models: what each lost, which differences are noise, and where in model and text they arise.

The first model is the baseline, to which the others are compared; all run in the same engine on the same
tokens. Two contenders differ by the mean of their differences token by token, with its interval from the
block bootstrap (`numerics.intervals`): the text's own variance, which both share, cancels.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from llamita.errors import InputError
from llamita.evaluate.layers import (
    LAYER_TOKENS,
    LayerScores,
    Origin,
    first_tokens,
    has_same_shape,
    origin_of,
    rotation_between,
    watch_layers,
    weight_errors,
)
from llamita.evaluate.scores import CHUNK_TOKENS, Contender, TextScores, TokenScores, score_tokens, summarize
from llamita.models.weights import ModelSource
from llamita.numerics.intervals import Interval, paired_difference
from llamita.system.progress import Progress
from llamita.text.tokenizer import Tokenizer

_CONTEXT_TOKENS = 16  # shown before a token on which models differ


@dataclass(frozen=True)
class Continuation:
    """A prompt continued greedily; its first `same_tokens` tokens are the baseline's."""

    text: str
    tokens: int
    same_tokens: int
    finish_reason: str


@dataclass(frozen=True)
class Inside:
    """A contender's weights compared with the baseline's.

    Attributes:
        weight_errors: see `Report`.
        turn: the rotation by which its residual stream differs from the baseline's; None if by none.
        is_alike: whether the same vectors pass through both models, block by block.
        note: what could not be compared, and why.
    """

    origin: Origin
    weight_errors: dict[str, float] | None
    turn: np.ndarray | None
    is_alike: bool
    note: str | None


@dataclass(frozen=True)
class Report:
    """The results of one model. Those that need a baseline of its shape are None if the baseline has another.

    Attributes:
        weight_errors: by module; None if a transform changed its weights on purpose.
        is_turned: whether its residual stream was turned back before it was compared.
    """

    name: str
    path: Path
    is_baseline: bool
    scheme: dict[str, Any] | None
    origin: Origin
    kv_cache: str
    weight_bytes: int
    scores: TextScores
    weight_errors: dict[str, float] | None
    layers: LayerScores | None
    is_turned: bool
    continuation: Continuation | None


@dataclass(frozen=True)
class Difference:
    """Second model less first, token by token: KL in nats, perplexity as a fraction, share of agreement."""

    first: str
    second: str
    kl: Interval
    perplexity: Interval
    agreement: Interval


@dataclass(frozen=True)
class Opinion:
    """A model's prediction at one place in the text: its likeliest token, the probabilities of that one and
    of the right one, and KL(baseline || model) in nats."""

    said: str
    probability: float
    right_probability: float
    kl: float


@dataclass(frozen=True)
class Disagreement:
    """A place in the text: its number among all tokens, the text before it, its token, each model's opinion."""

    position: int
    context: str
    token: str
    opinions: list[Opinion]


@dataclass(frozen=True)
class Comparison:
    """The results of a comparison, the baseline first.

    Attributes:
        chunk_tokens: that a model saw at a time.
        layer_tokens: of the text on which the layers were watched.
        disagreements: the places where some model's KL is largest, largest first.
        notes: what could not be compared, and why.
    """

    chunk_tokens: int
    layer_tokens: int
    prompt: str
    models: list[Report]
    differences: list[Difference]
    disagreements: list[Disagreement]
    notes: list[str]


def compare(
    contenders: Sequence[Contender],
    text: str,
    *,
    prompt: str,
    max_tokens: int,
    chunk_tokens: int = CHUNK_TOKENS,
    limit: int | None = None,
    places: int = 5,
    progress: Progress = None,
) -> Comparison:
    """Compare models on a text and a prompt.

    Args:
        contenders: two or more, the first of them the baseline.
        max_tokens: most tokens of each continuation; 0 for none.
        chunk_tokens, limit: see `score_tokens`.
        places: how many disagreements to return.

    Raises:
        InputError: fewer than two models, different tokens, or a text of fewer than two.
        RunError: NaN or infinity among a model's logits.
    """
    if len(contenders) < 2 or not contenders[0].is_baseline:
        raise InputError("compare", "two or more models", "one", "try --baseline SRC")
    tokens = score_tokens(contenders, text, chunk_tokens=chunk_tokens, limit=limit, progress=progress)
    watched = first_tokens(tokens.chunks, LAYER_TOKENS)
    scores, insides = summarize(contenders, tokens), _inspect_all(contenders, progress)
    layers = _watch(contenders, insides, watched, progress)
    continuations = _continue(contenders, prompt, max_tokens, progress)
    parts = zip(contenders, scores, insides, layers, continuations, strict=True)
    return Comparison(
        chunk_tokens=max(len(chunk) for chunk in tokens.chunks),
        layer_tokens=sum(len(chunk) for chunk in watched),
        prompt=prompt,
        models=[_report(*part) for part in parts],
        differences=_differences(contenders, tokens),
        disagreements=_disagreements(contenders, tokens, places),
        notes=[inside.note for inside in insides if inside.note] + _stream_notes(contenders, layers),
    )


def is_noise(difference: Interval) -> bool:
    """Return whether a difference's interval holds zero."""
    return difference.low <= 0 <= difference.high


def to_values(comparison: Comparison) -> dict[str, Any]:
    """Return a comparison as JSON values, with only the largest and the median of each layer's peaks."""
    values = asdict(comparison)
    for model, report in zip(values["models"], comparison.models, strict=True):
        model["path"] = str(report.path)
        model["text"] = model.pop("scores")
        layers = model.pop("layers")
        model["stream_errors"] = layers and layers["stream_errors"]
        model["activations"] = layers and {
            place: [{"largest": float(row.max()), "median": float(np.median(row))} for row in peaks]
            for place, peaks in layers["peaks"].items()
        }
    for difference in values["differences"]:
        for interval in (difference[key] for key in ("kl", "perplexity", "agreement")):
            interval["noise"] = is_noise(Interval(**interval))
    return values


def _report(
    contender: Contender,
    scores: TextScores,
    inside: Inside,
    layers: LayerScores | None,
    continuation: Continuation | None,
) -> Report:
    return Report(
        name=contender.name,
        path=contender.llm.path,
        is_baseline=contender.is_baseline,
        scheme=contender.llm.scheme.to_dict() if contender.llm.scheme else None,
        origin=inside.origin,
        kv_cache=contender.llm.kv_dtype,
        weight_bytes=contender.weight_bytes,
        scores=scores,
        weight_errors=inside.weight_errors,
        layers=layers,
        is_turned=inside.turn is not None,
        continuation=continuation,
    )


def _inspect_all(contenders: Sequence[Contender], progress: Progress) -> list[Inside]:
    base = contenders[0].open()
    insides = []
    for contender in contenders:
        source = contender.open()
        insides.append(_inspect(contender, contenders[0], source, base, progress))
        source.close()
    base.close()
    return insides


def _inspect(contender: Contender, baseline: Contender, source: ModelSource, base: ModelSource,
             progress: Progress) -> Inside:  # fmt: skip
    """Compare the weights of a contender with the baseline's, and find how its stream is rotated against theirs."""
    origin, first = origin_of(source), origin_of(base)
    if contender is baseline:
        return Inside(origin, None, None, True, None)
    if not has_same_shape(source, base):
        note = f"{contender.name}: another shape than {baseline.name}: nothing inside it is compared"
        return Inside(origin, None, None, False, note)
    turn = rotation_between(base, source) if "R1" in (*origin.rotations, *first.rotations) else None
    changed = next((o for o in (origin, first) if o.is_transformed), None)
    if changed is None:
        return Inside(origin, weight_errors(source, base, progress), turn, True, None)
    changes = ", ".join((changed.method or "", *changed.rotations))
    note = f"{contender.name}: weights were changed before they were rounded ({changes}): only its outputs are compared"
    return Inside(origin, None, turn, True, note)


def _watch(
    contenders: Sequence[Contender], insides: Sequence[Inside], chunks: Sequence[np.ndarray], progress: Progress
) -> list[LayerScores | None]:
    """Return what passes through each model of the baseline's shape, None for the others."""
    alike = [(c, inside.turn) for c, inside in zip(contenders, insides, strict=True) if inside.is_alike]
    watched = iter(watch_layers([c for c, _ in alike], [turn for _, turn in alike], chunks, progress))
    return [next(watched) if inside.is_alike else None for inside in insides]


def _stream_notes(contenders: Sequence[Contender], layers: Sequence[LayerScores | None]) -> list[str]:
    return [
        f"{contender.name}: its embedding has nothing of {contenders[0].name}'s: "
        "another model, or in another basis; only its outputs can be compared"
        for contender, own in zip(contenders, layers, strict=True)
        if own and own.stream_errors[0] > 1  # a stream of zeros would be as near
    ]


def _differences(contenders: Sequence[Contender], tokens: TokenScores) -> list[Difference]:
    """Return the difference of every pair of models, the baseline aside."""
    found = []
    for i, j in combinations(range(1, len(contenders)), 2):
        losses = paired_difference(tokens.losses[j], tokens.losses[i])
        agrees = tokens.top == tokens.top[0]
        found.append(
            Difference(
                first=contenders[i].name,
                second=contenders[j].name,
                kl=paired_difference(tokens.kl[j], tokens.kl[i]),
                perplexity=Interval(*(math.expm1(x) for x in (losses.value, losses.low, losses.high))),
                agreement=paired_difference(agrees[j], agrees[i]),
            )
        )
    return found


def _disagreements(contenders: Sequence[Contender], tokens: TokenScores, count: int) -> list[Disagreement]:
    """Return the places where some model's KL is largest."""
    tokenizer = contenders[0].llm.tokenizer
    starts = np.cumsum([0, *(len(chunk) for chunk in tokens.chunks)])
    chunk_of = np.repeat(np.arange(len(tokens.chunks)), [len(chunk) - 1 for chunk in tokens.chunks])
    found = []
    for place in np.argsort(-tokens.kl.max(axis=0), kind="stable")[:count]:
        number = chunk_of[place]
        chunk = tokens.chunks[number]
        offset = place - (starts[number] - number) + 1  # a chunk's first token is not predicted
        opinions = [
            Opinion(
                said=_text(tokenizer, [int(tokens.top[i, place])]),
                probability=float(tokens.confidence[i, place]),
                right_probability=math.exp(-tokens.losses[i, place]),
                kl=float(tokens.kl[i, place]),
            )
            for i in range(len(contenders))
        ]
        context = chunk[max(0, offset - _CONTEXT_TOKENS) : offset].tolist()
        found.append(
            Disagreement(
                position=int(starts[number] + offset),
                context=_text(tokenizer, context),
                token=_text(tokenizer, [int(chunk[offset])]),
                opinions=opinions,
            )
        )
    return found


def _text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Return tokens as text: special ones by name, stray bytes as \\xNN, a token without bytes as <id>."""
    pieces = (tokenizer.token_bytes(token, skip_special=False) or f"<{token}>".encode() for token in ids)
    return b"".join(pieces).decode(errors="backslashreplace")


def _continue(
    contenders: Sequence[Contender], prompt: str, max_tokens: int, progress: Progress
) -> list[Continuation | None]:
    """Let each model continue the prompt, always with its likeliest token."""
    if not max_tokens:
        return [None for _ in contenders]
    found, first = [], []
    for i, contender in enumerate(contenders):
        if progress:
            progress("continuing the prompt", i, len(contenders))
        generation = contender.llm.generate(prompt, max_tokens=max_tokens, greedy=True)
        ids = generation.token_ids
        first = first if i else ids
        pairs = enumerate(zip(ids, first, strict=False))
        same = next((at for at, (own, theirs) in pairs if own != theirs), min(len(ids), len(first)))
        found.append(Continuation(generation.text, len(ids), same, generation.finish_reason))
    return found
