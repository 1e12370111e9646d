"""Describe one export: the packed model, its adapter, the options of the target."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamita.models.packed import PackedModel


@dataclass(frozen=True)
class ExportJob:
    """One export.

    Attributes:
        packed: the model.
        adapter: the directory of an adapter to go with it.
        options: of the target, by name; see its module.
    """

    packed: PackedModel
    adapter: Path | None
    options: dict[str, Any]
