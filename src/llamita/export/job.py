"""What an exporter is given: the packed model, its adapters, the target's own options."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamita.models.packed import PackedModel


@dataclass(frozen=True)
class ExportJob:
    """One export.

    Attributes:
        packed: the model.
        adapter: a directory of adapters to go with it.
        options: the target's own, by name; see its module.
    """

    packed: PackedModel
    adapter: Path | None
    options: dict[str, Any]
