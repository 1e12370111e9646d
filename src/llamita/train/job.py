"""A fine-tuning as the user asks for it."""

from dataclasses import dataclass
from pathlib import Path

from llamita.methods.setup import Calibration
from llamita.models.checkpoint import Checkpoint
from llamita.system.progress import Progress
from llamita.train.data import Data
from llamita.train.recipe import Recipe

_CALIBRATION_ROWS = 128


@dataclass(frozen=True)
class FinetuneJob:
    """One fine-tuning: the model, the data, the recipe and the place of the result.

    Attributes:
        source: the float model.
        data: the records, tokenized and packed.
        out: the directory to make; `.OUT.work` next to it keeps what is finished.
        name, data_name: what the user called the model and the data.
        task: a key of `tasks.TASKS`, whose measure judges the result; None measures the loss alone.
        teacher: the float model whose answers distilling stages learn; None means the source.
        report_to: where transformers reports to: none, tensorboard, …
        shard: each of several processes holds only its part of the weights, gradients and moments.
    """

    source: Checkpoint
    recipe: Recipe
    data: Data
    out: Path
    name: str = ""
    data_name: str = ""
    task: str | None = None
    teacher: Path | None = None
    seed: int = 0
    report_to: str = "none"
    overwrite: bool = False
    shard: bool = False
    progress: Progress = None

    def calibration(self) -> Calibration:
        """Return the rows that methods measure which round the model where a quantized stage begins."""
        return self.data.calibration(self.data_name, _CALIBRATION_ROWS)
