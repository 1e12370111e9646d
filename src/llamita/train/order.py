"""A fine-tuning as the user asks for it."""

from dataclasses import dataclass
from pathlib import Path

from llamita.models.checkpoint import Checkpoint
from llamita.train.data import Data
from llamita.train.recipe import Recipe


@dataclass(frozen=True)
class Order:
    """What is trained, on what, and where to.

    Attributes:
        name, data_name: what the user called the model and the data.
        source: the float model.
        data: records read, tokenized and packed.
        task: a key of `tasks.TASKS`, by whose measure the result is judged, where it has one.
        teacher: a float model whose answers distilling stages learn; the source by default.
        out: the directory to make; `.OUT.work` beside it keeps what is finished.
        report_to: as transformers takes it: none, tensorboard, …
        shard: whether each of several processes holds only its part of what is trained.
    """

    name: str
    source: Checkpoint
    data_name: str
    data: Data
    task: str | None
    recipe: Recipe
    teacher: Path | None
    out: Path
    seed: int
    report_to: str
    overwrite: bool
    shard: bool = False
