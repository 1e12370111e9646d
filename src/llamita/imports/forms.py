"""Which forms of other tools are read, and by what."""

from collections.abc import Callable
from pathlib import Path

from llamita.errors import InputError
from llamita.files import has, member
from llamita.optional import load_optional

Progress = Callable[[str, int, int], None] | None
META, GGUF = "llamita.imports.meta:convert", "llamita.imports.gguf:convert"
_LACKING = (
    "{source}: Meta's checkpoints need the package {{package}} to be read, which is missing; try pip install "
    "'llamita[torch]' (in a checkout '.[torch]')"
)


def is_foreign(source: Path) -> bool:
    """Whether this is a GGUF file, or a directory with a model as Meta has them, and none of ours."""
    if source.suffix == ".gguf":
        return source.is_file()
    return source.is_dir() and has(source, "params.json") and not has(source, "config.json")


def files_of(source: Path) -> list[Path]:
    """The files that decide what a model of another form is."""
    if source.is_file():
        return [source]
    names = [
        *sorted(path.name for path in source.glob("consolidated.*.pth")),
        "params.json",
        "tokenizer.model",
    ]
    return [member(source, name) for name in names]


def convert(source: Path, directory: Path, progress: Progress = None) -> None:
    """Write a model of another form in Hugging Face's.

    Args:
        directory: exists, empty.

    Raises:
        InputError: no such form, or it is damaged.
        RunError: what reads it is not installed, or a file cannot be read.
    """
    if source.suffix == ".gguf" and source.is_file():
        load_optional(GGUF, "{package}")(source, directory, progress)
        return
    if not is_foreign(source) or not list(source.glob("consolidated.*.pth")):
        raise InputError(
            f"{source}: expected consolidated.*.pth beside params.json, as Meta has them, found none"
        )
    load_optional(META, _LACKING.format(source=source))(source, directory, progress)
