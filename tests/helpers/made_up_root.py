"""A made-up root directory, with files in place of those of /proc and /sys."""

from pathlib import Path


def write_root(root: Path, *files: dict[str, str]) -> Path:
    """Write these texts by their paths under `root`; return the root."""
    for name, text in [pair for some in files for pair in some.items()]:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root
