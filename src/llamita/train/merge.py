"""Merge an adapter into its model's weights, W + s·B·A.

Sums are in float64, rounded once to float32, then to what the base stores. That is its float dtype or, for a packed
model, whose weights are dequantized first, 4-bit codes again. New codes can lose part of the adapter's effect, and
all of it if it moves weights by less than half a step and they are rounded to nearest. So the loss is measured.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llamita import __version__
from llamita.errors import InputError
from llamita.evaluate.scores import Contender, score_tokens
from llamita.formats.safetensors import DTYPES
from llamita.loading import load
from llamita.methods.setup import Setup
from llamita.models.checkpoint import Checkpoint
from llamita.models.dequantized import DequantizedSource
from llamita.models.names import expected_tensors
from llamita.models.packed import PackedModel, Tensors
from llamita.models.packed_writer import (
    copy_companions,
    copy_config,
    find_companions,
    plan_shards,
    total_bytes,
    write_json,
    write_shards,
)
from llamita.models.peft import CONFIG, WEIGHTS, read_adapter
from llamita.models.transformed import TransformedSource
from llamita.models.weights import as_stored, check_finite, pieces_of, places_of
from llamita.numerics.affine import to_f32
from llamita.numerics.hadamard import fast_hadamard
from llamita.numerics.intervals import Interval, mean_interval
from llamita.numerics.scheme import GIVEN
from llamita.quantize.lineage import check_fits
from llamita.quantize.pipeline import SMALL_FILES, Summary, quantize
from llamita.quantize.records import source_names, source_record
from llamita.system.files import sha256_file
from llamita.system.progress import Progress
from llamita.system.staging import MERGED_MARK, check_space, check_target, staged

_UNMERGED = "unmerged"  # the adapter's name in the engine, when a merged model is measured
_TOKENS, _LENGTH = 2048, 128  # the model writes this many tokens to be measured on, in texts of this length
_MOST_TEXTS = 128  # a limit, because a text can end early


class MergedSource(TransformedSource):
    """A model with an adapter merged into its linear layers as they are read; a `FloatSource` and a `ModelSource`.

    Attributes:
        adapter: its directory.
        base_scheme, base_method: how a packed base was rounded; None for a float base.

    Raises:
        InputError: the adapter is not for this model or cannot be merged, or the model's channels are no longer those
            of its source.
        RunError: a file cannot be read.
    """

    def __init__(self, base: Checkpoint | PackedModel, adapter: Path) -> None:
        check_fits(base, [adapter])
        is_packed = isinstance(base, PackedModel)
        super().__init__(DequantizedSource(base) if is_packed else base, {})
        self.adapter, self.base_scheme = adapter, base.scheme
        self.base_method: str | None = base.metadata.method if is_packed else None
        self._stored = read_adapter(adapter, base.config)

    def weight(self, name: str) -> np.ndarray:
        """Return (rows, columns): float32 if the adapter changes this layer, else as the base stores it."""
        weight = super().weight(name)
        if name not in self._stored.pairs:
            return weight
        down, up = (to_f32(part).astype(np.float64) for part in self._stored.pairs[name])
        if self.rotations.r4_size and name.endswith(".down_proj"):
            down = fast_hadamard(down)  # the base holds W·Hᵀ; the adapter reads inputs before H
        merged = np.empty(weight.shape, np.float32)
        for start, piece in pieces_of(weight):
            rows = slice(start, start + len(piece))
            merged[rows] = to_f32(piece) + self._stored.scaling * (up[rows] @ down)
        return merged

    def record(self) -> dict[str, Any]:
        """Return the name and the files' hashes of the adapter."""
        files = {file: sha256_file(self.adapter / file) for file in (CONFIG, WEIGHTS)}
        return {"name": str(self.adapter.resolve()), "files": files}


@dataclass(frozen=True)
class MergeLoss:
    """The loss by merging on a text, in nats a token.

    Attributes:
        tokens: the number of predicted tokens.
        kl: KL(base with the unmerged adapter || merged model).
        alone: KL(base with the unmerged adapter || base): the whole effect of the adapter.
        losses: of the text's own tokens: base, base with the unmerged adapter, merged model.
    """

    tokens: int
    kl: Interval
    alone: Interval
    losses: tuple[float, float, float]


def check_targets(source: MergedSource, out: Path, overwrite: bool) -> None:
    """Raise InputError if `out` cannot be made, or holds the base or the adapter."""
    for kept in (*places_of(source), source.adapter):
        check_target(out, overwrite, kept)


def merge_float(source: MergedSource, name: str, out: Path, overwrite: bool = False, progress: Progress = None) -> None:
    """Write a float checkpoint: every tensor in its base's dtype, and copies of the base's other files.

    It needs the memory of one tensor.

    Args:
        name: what the user called the base.
        overwrite: replace an `out` that llamita made.

    Raises:
        InputError: `out` exists, or weights are not finite.
        RunError: the disk is full, a permission is missing, or a file cannot be read.
    """
    check_targets(source, out, overwrite)
    layout = _layout(source)
    companions, shards = find_companions(source.path), plan_shards(layout)
    record = {"llamita": __version__, "adapter": source.record(),
              "source": asdict(source_record(source, source_names(source, name)[0], progress))}  # fmt: skip
    with staged(out, overwrite, source.path) as directory:
        check_space(out, total_bytes(shards) + SMALL_FILES)
        write_shards(directory, shards, lambda tensor: _pieces(source, tensor), progress)
        copy_config(source, directory)
        copy_companions(source.path, directory, companions)
        write_json(directory / MERGED_MARK, record)


def _layout(source: MergedSource) -> dict[str, Tensors]:
    """Return every tensor of the architecture, widest types first, so that each begins at a multiple of its size."""
    infos = {tensor: source.info(tensor) for tensor in expected_tensors(source.config)}
    order = sorted(infos, key=lambda tensor: -np.dtype(DTYPES[infos[tensor].dtype]).itemsize)
    return {tensor: {tensor: (infos[tensor].dtype, infos[tensor].shape)} for tensor in order}


def _pieces(source: MergedSource, tensor: str) -> Iterator[np.ndarray]:
    """Yield a tensor as it is stored, in pieces of rows."""
    info = source.info(tensor)
    if len(info.shape) == 1:
        yield source.stored_vector(tensor)
        return
    for start, piece in pieces_of(source.weight(tensor.removesuffix(".weight"))):
        with np.errstate(over="ignore"):  # check_finite refuses values beyond F16
            stored = as_stored(piece, info.dtype)
        check_finite(tensor, stored, start)
        yield stored


def merge_packed(
    source: MergedSource, name: str, out: Path, method: str = "rtn", setup: Setup | None = None,
    overwrite: bool = False, progress: Progress = None,
) -> Summary:  # fmt: skip
    """Write a packed model, rounded again by the scheme of its base; the rest as in `merge_float`.

    Args:
        method: of rounding, as `quantize` takes it.
        setup: the calibration text and seed, for methods that look at activations.
    """
    assert source.base_scheme is not None, "a float base is merged by merge_float"
    check_targets(source, out, overwrite)
    setup = setup or Setup()
    merged = {"adapter": source.record(), "base_method": source.base_method}
    setup, scheme = replace(setup, settings=setup.settings | {"merged": merged}), source.base_scheme
    if scheme.scale_rule == GIVEN:  # another tool chose the scales; here they are chosen anew
        scheme = replace(scheme, scale_rule="search", scale_dtype="bfloat16")
    return quantize(source, name, out, scheme, method, setup, overwrite, progress=progress)


def written_text(source: MergedSource, progress: Progress = None) -> str:
    """Return a text that the base with the unmerged adapter writes after its BOS token, at temperature 1.

    Raises:
        InputError: the model has no BOS token.
    """
    llm = load(source.path, adapters={_UNMERGED: source.adapter})
    if llm.tokenizer.bos_token_id is None:
        raise InputError(f"{source.path}: bos_token", "a token to begin a text with", hint="try --text FILE")
    length, texts, tokens = min(_LENGTH, llm.context - 1), list[str](), 0
    while tokens < _TOKENS and len(texts) < _MOST_TEXTS:
        if progress:
            progress("writing text to measure on", tokens, _TOKENS)
        generation = llm.generate("", max_tokens=length, temperature=1.0, top_p=1.0, top_k=0,
                                  seed=len(texts), adapter=_UNMERGED)  # fmt: skip
        texts.append(generation.text)
        tokens += len(generation.token_ids)
    return "\n".join(texts)


def measure(source: MergedSource, out: Path, text: str, progress: Progress = None) -> MergeLoss:
    """Compare the merged model at `out` with its base and the unmerged adapter, in the engine."""
    base, merged = load(source.path, adapters={_UNMERGED: source.adapter}), load(out)
    contenders = [
        Contender("base with the adapter", base, True, _UNMERGED),
        Contender("base", base, False),
        Contender("merged", merged, False),
    ]
    scores = score_tokens(contenders, text, progress=progress)
    unmerged, alone, merged_loss = (float(losses.mean()) for losses in scores.losses)
    kl, without = mean_interval(scores.kl[2]), mean_interval(scores.kl[1])
    return MergeLoss(scores.kl.shape[1], kl, without, (alone, unmerged, merged_loss))
