"""Convert other tools' models before a command opens them, with progress and a note; libraries never print."""

import os
from pathlib import Path

from llamita.commands import console
from llamita.imports.detect import detect_format
from llamita.imports.open import is_hub_name, resolve


def convert_first(*names: str | None, quiet: bool = False) -> None:
    """Convert each model that is in another tool's format; later code finds the result in the cache.

    Args:
        names: models as users name them, "SRC:SCHEME" included; None is left out.
        quiet: show no progress bar.

    Raises:
        InputError, RunError: see `imports.open.resolve`.
    """
    for name in names:
        base = name if name is None or os.path.exists(name) else name.partition(":")[0]
        if base and (is_hub_name(base) or (os.path.exists(base) and detect_format(Path(base)) is not None)):
            with console.progress(quiet) as progress:
                resolve(base, progress, console.note)
