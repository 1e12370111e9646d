"""Check whether an adapter was made for a model, by what `finetune` has recorded of both."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llamita.errors import InputError
from llamita.methods.chain import PRESET_METHODS
from llamita.models.packed import PackedModel
from llamita.models.weights import ModelSource
from llamita.system.files import exists_in, read_json
from llamita.system.staging import TRAINED_MARK

_TRAINING = ("data", "recipe", "seed")  # records that identify a training


def check_fits(source: ModelSource, adapters: Iterable[Path]) -> None:
    """Check that this model's channels are those of the model that adapters were trained on.

    Raises:
        InputError: the model was rotated, or its channels were scaled, and an adapter was trained without that.
    """
    changed = _changed_channels(source)
    if changed and not all(_is_trained_with(source, path) for path in adapters):
        whose = "" if changed[0] == "equalize" else "spinquant's "
        raise InputError(
            "adapters",
            "a model whose channels are those of its source",
            f"one changed by {' and '.join(changed)}",
            f"try quantizing without {whose}{' and '.join(changed)}",
        )


def _changed_channels(source: ModelSource) -> list[str]:
    """Return what keeps adapters of a model's float source from fitting it; nothing if they fit.

    R4 is undone where it acts, so it does not matter to adapters.
    """
    rotated = [name for name in source.rotations.names if name != "R4"]
    if isinstance(source, PackedModel):  # an imported one, whose rotations are another tool's
        rotated += source.metadata.settings.get("rotated", [])
    return [*rotated, *(["equalize"] if "equalize" in _methods(source) else [])]


def is_made_for(source: ModelSource, adapter: Path) -> bool | None:
    """Return whether an adapter was trained on this model or on its float source; None if nothing records it."""
    if not isinstance(source, PackedModel) or not exists_in(adapter, TRAINED_MARK):
        return None
    record = read_json(adapter, TRAINED_MARK)
    if _is_quantized(record):
        return _is_trained_with(source, adapter)
    base = record.get("base")
    return isinstance(base, dict) and base.get("files") == source.metadata.source.files


def _is_trained_with(source: ModelSource, adapter: Path) -> bool:
    """Return whether an adapter was trained together with the codes of this model."""
    if not isinstance(source, PackedModel) or not exists_in(adapter, TRAINED_MARK):
        return False
    record, settings = read_json(adapter, TRAINED_MARK), source.metadata.settings
    return _is_quantized(record) and all(
        _respelled(record.get(key)) == _respelled(settings.get(key)) for key in _TRAINING
    )


def _methods(source: ModelSource) -> list[str]:
    """Return the methods that made a packed model, those at the start of its training included."""
    if not isinstance(source, PackedModel):
        return []
    recipe = source.metadata.settings.get("recipe")
    start = recipe.get("start", "rtn") if isinstance(recipe, dict) else "rtn"
    chain, _ = PRESET_METHODS.get(start, (start, {}))
    return f"{source.metadata.method}+{chain}".split("+")


def _is_quantized(record: dict[str, Any]) -> bool:
    """Return whether the training was that of a 4-bit model."""
    recipe = record.get("recipe")
    stages = recipe.get("stages") if isinstance(recipe, dict) else None
    return isinstance(stages, list) and any(isinstance(s, dict) and s.get("quantized") for s in stages)


def _respelled(part: Any) -> Any:
    """Return a part of a record; "adaptors", which earlier versions wrote in a recipe's stages, is "adapters"."""
    stages = part.get("stages") if isinstance(part, dict) else None
    if not isinstance(stages, list):
        return part
    is_former = [isinstance(stage, dict) and stage.get("train") == "adaptors" for stage in stages]
    present = [s | {"train": "adapters"} if former else s for s, former in zip(stages, is_former, strict=True)]
    return part | {"stages": present}
