"""Models side by side: what each lost, which differences are noise, and where in model and text they show.

The first model is the baseline, to which the others are compared; all run in the same engine on the same
tokens. Two contenders differ by the mean of their differences token by token, with its interval from the
block bootstrap (`statistics`): the text's own variance, which both share, cancels.
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
from llamita.numerics.intervals import Interval, paired_difference
from llamita.system.progress import Progress
from llamita.text.tokenizer import Tokenizer

_CONTEXT_TOKENS = 16  # shown before a token on which models differ


@dataclass(frozen=True)
class Continuation:
    """A prompt continued greedily; `same_tokens` of it, from the first on, are the baseline's."""

    text: str
    tokens: int
    same_tokens: int
    finish_reason: str


@dataclass(frozen=True)
class Report:
    """What there is to say of one model. What needs a baseline of its shape is None where that is missing.

    Attributes:
        weight_errors: by module; None where a transform changed its weights on purpose.
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
    """What a model made of one place in the text: its likeliest token, that one's probability and the
    right one's, and KL(baseline || model) in nats."""

    said: str
    probability: float
    right_probability: float
    kl: float


@dataclass(frozen=True)
class Disagreement:
    """A place in the text: its number among all tokens, what came before and then, each model's opinion."""

    position: int
    context: str
    token: str
    opinions: list[Opinion]


@dataclass(frozen=True)
class Comparison:
    """Everything about models side by side, the baseline first.

    Attributes:
        chunk_tokens: that a model saw at a time.
        layer_tokens: of the text on which the layers were watched.
        disagreements: the places of the largest KL that any model has there, largest first.
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
        max_tokens: of each continuation; 0 for none.
        chunk_tokens, limit: as in `score_text`.
        places: in the text to show.

    Raises:
        InputError: fewer than two models, different tokens, or a text of fewer than two.
        RunError: NaN or infinity among a model's logits.
    """
    if len(contenders) < 2 or not contenders[0].is_baseline:
        raise InputError("compare", "two or more models", "one", "try --baseline SRC")
    tokens = score_tokens(contenders, text, chunk_tokens=chunk_tokens, limit=limit, progress=progress)
    watched = first_tokens(tokens.chunks, LAYER_TOKENS)
    reports, notes = _look_inside(contenders, summarize(contenders, tokens), watched, progress)
    continuations = _continue(contenders, prompt, max_tokens, progress)
    return Comparison(
        chunk_tokens=max(len(chunk) for chunk in tokens.chunks),
        layer_tokens=sum(len(chunk) for chunk in watched),
        prompt=prompt,
        models=[
            Report(**report, continuation=continuation)
            for report, continuation in zip(reports, continuations, strict=True)
        ],
        differences=_differences(contenders, tokens),
        disagreements=_disagreements(contenders, tokens, places),
        notes=notes,
    )


def is_noise(difference: Interval) -> bool:
    """Whether a difference's interval holds zero."""
    return difference.low <= 0 <= difference.high


def to_values(comparison: Comparison) -> dict[str, Any]:
    """A comparison as JSON values; of the channels' peaks, the largest and the median of each layer."""
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


def _look_inside(
    contenders: Sequence[Contender], scores: Sequence[TextScores], chunks: Sequence[np.ndarray], progress: Progress
) -> tuple[list[dict[str, Any]], list[str]]:
    """Every model's report but for its continuation, and what could not be compared."""
    sources = [contender.open() for contender in contenders]
    baseline, origins = sources[0], [origin_of(source) for source in sources]
    reports, turns, notes = [], [], []
    for i, (contender, source, origin) in enumerate(zip(contenders, sources, origins, strict=True)):
        errors, is_alike = None, has_same_shape(source, baseline)
        is_transformed = origin.is_transformed or origins[0].is_transformed
        if not is_alike:
            notes.append(f"{contender.name}: another shape than {contenders[0].name}: nothing inside it is compared")
        elif i and is_transformed:
            changed = origin if origin.is_transformed else origins[0]
            notes.append(f"{contender.name}: weights were changed before they were rounded "
                         f"({', '.join((changed.method or '', *changed.rotations))}): only its outputs are "
                         "compared")  # fmt: skip
        elif i:
            errors = weight_errors(source, baseline, progress)
        is_turned = i > 0 and is_alike and "R1" in (*origin.rotations, *origins[0].rotations)
        turns.append(rotation_between(baseline, source) if is_turned else None)
        reports.append({
            "name": contender.name, "path": contender.llm.path, "is_baseline": i == 0, "origin": origin,
            "scheme": contender.llm.scheme.to_dict() if contender.llm.scheme else None,
            "kv_cache": contender.llm.kv_dtype, "weight_bytes": contender.weight_bytes, "scores": scores[i],
            "weight_errors": errors, "layers": None, "is_turned": is_turned,
        })  # fmt: skip
    alike = [i for i, source in enumerate(sources) if has_same_shape(source, baseline)]
    watched = watch_layers([contenders[i] for i in alike], [turns[i] for i in alike], chunks, progress)
    for i, layers in zip(alike, watched, strict=True):
        reports[i]["layers"] = layers
        if layers.stream_errors[0] > 1:  # nothing at all would be as near
            notes.append(f"{contenders[i].name}: its embedding has nothing of {contenders[0].name}'s: "
                         "another model, or in another basis; only its outputs tell something")  # fmt: skip
    for source in sources:
        source.close()
    return reports, notes


def _differences(contenders: Sequence[Contender], tokens: TokenScores) -> list[Difference]:
    """Of every pair of models but the baseline."""
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
    """The places where some model's KL is largest."""
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
    """Tokens as text: special ones by name, bytes that are no character as \\xNN, a token of none as <id>."""
    pieces = (tokenizer.token_bytes(token, skip_special=False) or f"<{token}>".encode() for token in ids)
    return b"".join(pieces).decode(errors="backslashreplace")


def _continue(
    contenders: Sequence[Contender], prompt: str, max_tokens: int, progress: Progress
) -> list[Continuation | None]:
    """The prompt continued by each model, always with its likeliest token."""
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
