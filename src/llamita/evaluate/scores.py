"""Measure what quantization cost on a text: perplexity, KL divergence from the float model, top-1 agreement.

All models see the same tokens in the same chunks at the same time, so that only a few rows of logits
are in memory whatever the vocabulary. Within a chunk of n tokens the last n - 1 are predicted; chunks do
not see each other, as in GPTQ's WikiText figures (arXiv 2210.17323). `docs/guide/evaluate.md` says more.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llamita.engine.llm import LLM
from llamita.engine.logprobs import exponentials
from llamita.errors import InputError, RunError
from llamita.imports.open import open_source, resolve
from llamita.models.checkpoint import Checkpoint
from llamita.models.packed import PackedModel
from llamita.models.sizes import make_plan
from llamita.models.weights import ModelSource
from llamita.numerics.intervals import Interval, mean_interval, paired_difference
from llamita.quantize.rounded import RoundedSource
from llamita.system.files import exists_in, read_bytes
from llamita.system.progress import Progress

CHUNK_TOKENS = 2048
_LOGIT_BYTES = 64 * 2**20  # of one model's logits in memory at a time
_VALUES_AT_ONCE = 2**20  # logits in the arithmetic at a time, so that intermediate values stay in the cache
_TOKENIZER = "tokenizer.json"
_LARGEST_LOSS = 100  # nats a token; guessing blindly among a million tokens costs 14


@dataclass(frozen=True)
class Contender:
    """A model to be evaluated, its name in tables, and which of its adapters is on."""

    name: str
    llm: LLM
    is_baseline: bool
    adapter: str | None = None

    @property
    def weight_bytes(self) -> int:
        """Size of its weight files; of those that `quantize` would write if it was rounded while it loaded."""
        source = open_source(self.llm.path)
        source.close()
        if isinstance(source, Checkpoint) and self.llm.scheme:
            plan = make_plan(source.config, self.llm.scheme, lambda name: source.info(name).dtype)
            return plan.file_bytes
        assert isinstance(source, Checkpoint | PackedModel)
        return sum(file.path.stat().st_size for file in source.files.values())

    def open(self) -> ModelSource:
        """Open its weights once more, as the engine reads them."""
        source = open_source(self.llm.path)
        if isinstance(source, Checkpoint) and self.llm.scheme:
            return RoundedSource(source, self.llm.scheme)
        return source


@dataclass(frozen=True)
class TokenScores:
    """The scores of every model on every predicted token of a text; arrays are (models, tokens).

    Attributes:
        chunks: the tokens of the text; the first of each chunk is not predicted.
        losses: negative log-likelihoods of the tokens in nats, float64.
        kl: KL(first model || model) in nats, float64.
        top: the likeliest tokens, int32.
        confidence: their probabilities, float64.
    """

    chunks: list[np.ndarray]
    losses: np.ndarray
    kl: np.ndarray
    top: np.ndarray
    confidence: np.ndarray

    @classmethod
    def empty(cls, chunks: list[np.ndarray], models: int) -> "TokenScores":
        """Return scores for so many models that are still to be filled in."""
        shape = (models, sum(len(chunk) - 1 for chunk in chunks))
        return cls(chunks, np.empty(shape), np.empty(shape), np.empty(shape, np.int32), np.empty(shape))

    def part(self, tokens: slice) -> "TokenScores":
        """Return views of the scores of these tokens, counted over all chunks."""
        arrays = (self.losses, self.kl, self.top, self.confidence)
        return TokenScores(self.chunks, *(array[:, tokens] for array in arrays))


@dataclass(frozen=True)
class TextScores:
    """The scores of one model on a text.

    Attributes:
        tokens: predicted tokens.
        perplexity: exp of the mean negative log-likelihood of a token.
        increase: by how much the perplexity exceeds the baseline's, as a fraction; None for the baseline.
        kl: mean KL(baseline || model) in nats a token; None for the baseline.
        agreement: share of tokens for which the likeliest next token is the baseline's; None for the baseline.
    """

    tokens: int
    perplexity: float
    increase: Interval | None
    kl: Interval | None
    agreement: Interval | None


def score_text(contenders: Sequence[Contender], text: str, **options: Any) -> list[TextScores]:
    """Score a text with every model; if the first is a baseline, measure the others against it.

    Options and errors as in `score_tokens`.
    """
    return summarize(contenders, score_tokens(contenders, text, **options))


def score_tokens(
    contenders: Sequence[Contender],
    text: str,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
    whole_chunks: bool = False,
    limit: int | None = None,
    progress: Progress = None,
) -> TokenScores:
    """Score every token of a text with every model, and measure each against the first.

    Args:
        chunk_tokens: most tokens of a chunk; the smallest context bounds it too.
        whole_chunks: leave out a shorter last chunk, as the literature does on WikiText.
        limit: score only so many chunks, the first ones.

    Raises:
        InputError: models with different tokens, or a text of fewer than two.
        RunError: NaN or infinity among a model's logits.
    """
    ids = _common_tokens(contenders, text)
    length = min(chunk_tokens, *(c.llm.context for c in contenders))
    chunks = split_chunks(ids, length, whole_chunks)[:limit]
    if not chunks:
        wanted = f"{length} tokens" if whole_chunks else "2 tokens"
        raise InputError("text", f"at least {wanted}", f"{len(ids)}", "try a longer one")
    scores = TokenScores.empty(chunks, len(contenders))
    done = 0
    for chunk in chunks:
        predicted = slice(done, done + len(chunk) - 1)
        _score_chunk(contenders, chunk, scores.part(predicted))
        done = predicted.stop
        if progress:
            progress("scoring the text", done, scores.losses.shape[1])
    return scores


def summarize(contenders: Sequence[Contender], tokens: TokenScores) -> list[TextScores]:
    """Return every model's means over the tokens, with intervals; raise RunError for a loss that no model has."""
    has_baseline = contenders[0].is_baseline
    return [_summarize(tokens, i, has_baseline and i > 0) for i in range(len(contenders))]


def split_chunks(token_ids: np.ndarray, length: int, whole: bool = False) -> list[np.ndarray]:
    """Split token ids into chunks of `length`; the last may be shorter unless all must be whole.

    A last chunk of one token predicts nothing and is left out. Raises InputError for a length below 2.
    """
    if length < 2:
        raise InputError("chunk length (--max-seq-len)", "at least 2 tokens", f"{length}")
    chunks = [token_ids[start : start + length] for start in range(0, len(token_ids), length)]
    return [chunk for chunk in chunks if len(chunk) >= (length if whole else 2)]


def token_losses(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return negative log-likelihoods in nats, float64 (rows,), of targets (rows,) under logits (rows, vocab)."""
    losses = np.empty(len(targets))
    for rows in _row_blocks(logits):
        shifted, _, total = exponentials(logits[rows])
        losses[rows] = np.log(total) - shifted[np.arange(len(shifted)), targets[rows]]
    return losses


def embedded_text() -> str:
    """Return the held-out text that ships with the embedded model, which wrote it."""
    path = Path(__file__).parents[1] / "embedded" / "heldout.txt"
    if not path.exists():
        raise RunError("embedded text: this installation has none; try --text FILE")
    return path.read_text("utf-8")


def default_text(contenders: Sequence[Contender]) -> str:
    """Return the text that ships; raise InputError for a model without the embedded model's tokenizer."""
    embedded = resolve("embedded")
    for contender in contenders:
        path = contender.llm.path
        if not exists_in(path, _TOKENIZER) or read_bytes(path, _TOKENIZER) != read_bytes(embedded, _TOKENIZER):
            raise InputError(
                "--text",
                "a file",
                f"none, and the tokenizer of {contender.name} is not the embedded model's",
                "try a text of the kind that the models are for",
            )
    return embedded_text()


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, line ends as they are; raise InputError if it is no such file."""
    try:
        return path.read_bytes().decode()
    except (FileNotFoundError, IsADirectoryError):
        raise InputError("--text", "a text file", f"none at {path}") from None
    except UnicodeDecodeError as error:
        raise InputError(str(path), "UTF-8", f"a stray byte at {error.start}") from None


def _common_tokens(contenders: Sequence[Contender], text: str) -> np.ndarray:
    """Return the text's tokens; raise InputError unless they are the same for all models."""
    first = contenders[0]
    ids = first.llm.tokenizer.encode(text)
    for other in contenders[1:]:
        same_size = other.llm.config.vocab_size == first.llm.config.vocab_size
        if not same_size or other.llm.tokenizer.encode(text) != ids:
            raise InputError(
                other.name,
                f"the tokens of {first.name}",
                "others for the same text",
                "try another --baseline, or each model by itself",
            )
    return np.array(ids, dtype=np.int32)


def _score_chunk(contenders: Sequence[Contender], chunk: np.ndarray, scores: TokenScores) -> None:
    """Fill in the scores of one chunk (tokens,), its first token aside, from the models' logits over it."""
    vocab = contenders[0].llm.config.vocab_size
    step = max(16, min(256, _LOGIT_BYTES // (4 * vocab)))  # rows: 4 bytes a logit
    streams = [c.llm.iter_logits(chunk[:-1], step, c.adapter) for c in contenders]
    targets, start = chunk[1:], 0
    for logits in zip(*streams, strict=True):  # each (rows, vocab)
        for rows in _row_blocks(logits[0]):
            part = slice(start + rows.start, start + rows.stop)
            _score_rows([block[rows] for block in logits], targets[part], scores.part(part))
        start += len(logits[0])
    finite = [np.isfinite(values) for values in (scores.losses, scores.kl, scores.confidence)]
    broken = np.argwhere(~np.logical_and.reduce(finite))
    if len(broken):
        model, token = broken[0]
        raise RunError(
            f"{contenders[model].name}: logits",
            "finite numbers",
            f"NaN or infinity {token + 1} tokens into a chunk",
            "the weights may be damaged",
        )


def _score_rows(logits: list[np.ndarray], targets: np.ndarray, scores: TokenScores) -> None:
    """Fill in the scores of some rows: KL(p || q) = sum p (log p - log q), with p from the first model's logits."""
    everywhere = np.arange(len(targets))
    base, weights, base_total = exponentials(logits[0])
    for model, own in enumerate(logits):
        shifted, _, total = exponentials(own) if model else (base, weights, base_total)
        scores.losses[model] = np.log(total) - shifted[everywhere, targets]
        # In float32 the products are off by 1e-7 of themselves, unbiased; their sum is in float64.
        expected = (weights * (base - shifted)).sum(axis=1, dtype=np.float64) / base_total
        scores.kl[model] = expected - np.log(base_total) + np.log(total)
        scores.top[model] = own.argmax(axis=1)
        scores.confidence[model] = 1 / total  # the likeliest token's logit is shifted to zero


def _row_blocks(logits: np.ndarray) -> list[slice]:
    step = max(1, _VALUES_AT_ONCE // logits.shape[1])
    return [slice(start, min(start + step, len(logits))) for start in range(0, len(logits), step)]


def _summarize(tokens: TokenScores, model: int, is_measured: bool) -> TextScores:
    """Return the means of one model, measured against the first or by itself."""
    losses = tokens.losses[model]
    if losses.mean() > _LARGEST_LOSS:
        raise RunError(
            "perplexity", f"at most exp({_LARGEST_LOSS})", f"exp({losses.mean():.0f})", "the weights may be damaged"
        )
    perplexity = math.exp(losses.mean())
    if not is_measured:
        return TextScores(losses.size, perplexity, None, None, None)
    difference = paired_difference(losses, tokens.losses[0])
    increase = Interval(*(math.expm1(x) for x in (difference.value, difference.low, difference.high)))
    kl, agreement = mean_interval(tokens.kl[model]), mean_interval(tokens.top[model] == tokens.top[0])
    return TextScores(losses.size, perplexity, increase, kl, agreement)
