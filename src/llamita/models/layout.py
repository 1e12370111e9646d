"""Say how a float checkpoint stores each tensor of the architecture: under which name, in which rows, with what factor.

Most store them one by one, as they are. The families that are rewritten as a plain Llama (`models/families.py`) fuse
matrices, keep other models next to the text model, or scale at run time what a Llama has in its weights.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llamita.models.config import ModelConfig
from llamita.models.families import crossing_layers, granite_scales
from llamita.models.names import EMBEDDING, HEAD, expected_tensors
from llamita.numerics.affine import to_f32

_NORM = "model.norm.weight"
_MLLAMA_PREFIXES = ("language_model.model.", "model.language_model.", "language_model.")


@dataclass(frozen=True)
class Piece:
    """A tensor in its file.

    Attributes:
        stored: the tensor's name there.
        rows: first row and row behind the last, where it is part of a larger tensor; None for all.
        total: rows of that larger tensor, where they are known; 0 where there may be more.
        factor: by which the stored values are multiplied, in float32.
        scale: the name of the tensor of scales, where the stored tensor is in FP8 and has one (`models/float8.py`).
        block: rows and columns of the stored tensor that share a scale.
    """

    stored: str
    rows: tuple[int, int] | None = None
    total: int = 0
    factor: float = 1.0
    scale: str | None = None
    block: tuple[int, int] | None = None

    @property
    def needed(self) -> list[str]:
        """Names of the tensors that it is read from."""
        return [self.stored] if self.scale is None else [self.stored, self.scale]

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Return its shape, from that of the stored tensor; the latter itself if the rows do not fit it."""
        if self.rows is None or not stored or not self.rows[1] <= stored[0] == (self.total or stored[0]):
            return stored
        return (self.rows[1] - self.rows[0], *stored[1:])

    def scaled(self, values: np.ndarray) -> np.ndarray:
        """Return stored floats times the factor, in float32; as they are where there is none."""
        if self.factor == 1.0:
            return values
        with np.errstate(over="ignore", invalid="ignore"):  # of damaged weights; readers refuse what is not finite
            return to_f32(values) * np.float32(self.factor)


@dataclass(frozen=True)
class Layout:
    """How a checkpoint stores the tensors of the architecture; those that are not in `pieces` are stored as they are.

    Attributes:
        pieces: by our tensor name.
        ignored: matches the names of tensors that the text model does not use.
    """

    pieces: dict[str, Piece] = field(default_factory=dict)
    ignored: re.Pattern[str] | None = None

    def piece(self, tensor: str) -> Piece:
        """Return where a tensor is."""
        return self.pieces.get(tensor) or Piece(tensor)

    def is_ignored(self, stored: str) -> bool:
        """Return whether the text model does not use a stored tensor."""
        return self.ignored is not None and self.ignored.match(stored) is not None


def layout_of(values: dict[str, Any], stored: Collection[str]) -> Layout:
    """Return the layout of a checkpoint.

    Args:
        values: of its config.json, as it is on disk.
        stored: the names of its tensors.

    Raises:
        InputError: see `families.plain_config`.
    """
    found = _LAYOUTS.get(values.get("model_type", ""))
    return Layout() if found is None else found(values, ModelConfig.from_hf(values), stored)


def _of_granite(values: dict[str, Any], config: ModelConfig, stored: Collection[str]) -> Layout:
    del stored
    embedding, residual, _, logits = granite_scales(values)
    pieces = {f"{EMBEDDING}.weight": Piece(f"{EMBEDDING}.weight", factor=embedding / residual)}
    head = embedding / residual if config.tied else 1.0  # what the head's table is already multiplied by
    pieces[_NORM] = Piece(_NORM, factor=1 / (head * logits))
    for layer in range(config.layers):
        for kind in ("weight", *(["bias"] if config.has_bias("self_attn.q_proj") else [])):
            name = f"model.layers.{layer}.self_attn.q_proj.{kind}"
            pieces[name] = Piece(name, factor=config.query_factor)
    return Layout(pieces)


def _of_phi3(values: dict[str, Any], config: ModelConfig, stored: Collection[str]) -> Layout:
    del values, stored
    fused = {"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "mlp.gate_up_proj": ("gate_proj", "up_proj")}
    shapes, pieces = config.linear_shapes(), dict[str, Piece]()
    for layer in range(config.layers):
        for whole, parts in fused.items():
            room, start = whole.partition(".")[0], 0
            total = sum(shapes[f"{room}.{part}"][0] for part in parts)
            for part in parts:
                stop, stored = start + shapes[f"{room}.{part}"][0], f"model.layers.{layer}.{whole}.weight"
                pieces[f"model.layers.{layer}.{room}.{part}.weight"] = Piece(stored, (start, stop), total)
                start = stop
    return Layout(pieces)


def _of_mllama(values: dict[str, Any], config: ModelConfig, stored: Collection[str]) -> Layout:
    text = values.get("text_config", values)
    crossing = set(crossing_layers(text))
    numbers = [i for i in range(text["num_hidden_layers"]) if i not in crossing]
    names = ("embed_tokens.weight", "lm_head.weight")
    prefix = next((p for p in _MLLAMA_PREFIXES if p + names[0] in stored), "model.")
    head = next((p for p in ("language_model.", "") if p + names[1] in stored), "")
    pieces = {}
    for tensor in expected_tensors(config):
        name = re.sub(r"(?<=^model\.layers\.)\d+", lambda found: str(numbers[int(found[0])]), tensor)
        pieces[tensor] = Piece(prefix + name.removeprefix("model.") if tensor != f"{HEAD}.weight" else head + name)
    # The rows behind the vocabulary are for images.
    pieces[f"{EMBEDDING}.weight"] = Piece(prefix + names[0], (0, config.vocab_size))
    layers = "|".join(str(i) for i in sorted(crossing))
    others = rf"{re.escape(prefix)}layers\.({layers})\.|(model\.)?(vision_model|multi_modal_projector)\."
    return Layout(pieces, re.compile(others))


_LAYOUTS: dict[str, Callable[[dict[str, Any], ModelConfig, Collection[str]], Layout]] = {
    "granite": _of_granite,
    "phi3": _of_phi3,
    "mllama": _of_mllama,
    "mllama_text_model": _of_mllama,
}
