"""Options that several commands which make a directory have, each with what `--help` says of it."""

from pathlib import Path
from typing import Annotated

import typer

Out = Annotated[Path | None, typer.Option("--out", "-o", help="The directory to make.")]
GroupSize = Annotated[int | None, typer.Option(help="Weights that share a scale: 32, 64, 128 or 256.")]
Seed = Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if llamita made it.")]
Threads = Annotated[int | None, typer.Option(help="Threads to use; all cores by default.", min=1)]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
CalibrationText = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar="TEXT",
        help="What methods calibrate on: self (the default), self-fast, a file, a hub data set.",
    ),
]
Samples = Annotated[int, typer.Option(min=1, help="Pieces of calibration text.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens of each.")]
