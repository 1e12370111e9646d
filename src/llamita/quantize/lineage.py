"""Whether an adapter was made for a model, by what `finetune` has recorded of both."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llamita.errors import InputError
from llamita.methods.chain import PRESET_METHODS
from llamita.models.packed import PackedModel
from llamita.models.weights import ModelSource
from llamita.system.files import exists_in, read_json
from llamita.system.staging import TRAINED_MARK

_TRAINING = ("data", "recipe", "seed")  # what makes a training what it is


def check_fits(source: ModelSource, adapters: Iterable[Path]) -> None:
    """See that this model reads and gives what the model did that adapters were trained on.

    Raises:
        InputError: it was rotated, or its channels were scaled, and some adapter knows nothing of that.
    """
    changed = changed_channels(source)
    if changed and not all(is_trained_beside(source, path) for path in adapters):
        raise InputError(
            "adapters",
            "a model whose channels are those of its source",
            f"one changed by {' and '.join(changed)}",
            "try quantize --method qronos+tune --set tune.rate=0",
        )


def changed_channels(source: ModelSource) -> list[str]:
    """What keeps adapters of a model's float source from fitting it, for people; nothing where they fit.

    R4 is undone where it acts, so adapters never see it.
    """
    rotated = [name for name in source.rotations.names if name != "R4"]
    if isinstance(source, PackedModel):  # an imported one, whose rotations are another tool's
        rotated += source.metadata.settings.get("rotated", [])
    return [*rotated, *(["equalize"] if "equalize" in _methods(source) else [])]


def is_made_for(source: ModelSource, adapter: Path) -> bool | None:
    """Whether an adapter was trained on this model or on its float source; None where nothing tells."""
    if not isinstance(source, PackedModel) or not exists_in(adapter, TRAINED_MARK):
        return None
    record = read_json(adapter, TRAINED_MARK)
    if _is_quantized(record):
        return is_trained_beside(source, adapter)
    base = record.get("base")
    return isinstance(base, dict) and base.get("files") == source.metadata.source.files


def is_trained_beside(source: ModelSource, adapter: Path) -> bool:
    """Whether an adapter was trained beside the very codes of this model."""
    if not isinstance(source, PackedModel) or not exists_in(adapter, TRAINED_MARK):
        return False
    record, settings = read_json(adapter, TRAINED_MARK), source.metadata.settings
    return _is_quantized(record) and all(record.get(key) == settings.get(key) for key in _TRAINING)


def _methods(source: ModelSource) -> list[str]:
    """All that made a packed model, what its training began with included."""
    if not isinstance(source, PackedModel):
        return []
    recipe = source.metadata.settings.get("recipe")
    start = recipe.get("start", "rtn") if isinstance(recipe, dict) else "rtn"
    chain, _ = PRESET_METHODS.get(start, (start, {}))
    return f"{source.metadata.method}+{chain}".split("+")


def _is_quantized(record: dict[str, Any]) -> bool:
    """Whether the training was that of a 4-bit model."""
    recipe = record.get("recipe")
    stages = recipe.get("stages") if isinstance(recipe, dict) else None
    return isinstance(stages, list) and any(isinstance(s, dict) and s.get("quantized") for s in stages)
