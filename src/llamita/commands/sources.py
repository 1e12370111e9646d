"""Open what a command line names: models, with progress and notes that libraries never print, and texts on stdin."""

import os
import sys
from pathlib import Path
from typing import Any

from llamita.bench.plan import Described, describe
from llamita.commands import console
from llamita.engine.llm import LLM
from llamita.errors import InputError
from llamita.imports.detect import BIN, GGUF, detect_format
from llamita.imports.names import is_hub_name, split_scheme
from llamita.imports.open import open_source, resolve
from llamita.loading import load
from llamita.quantize.lineage import is_made_for
from llamita.system.threads import remark

ADAPTER = "adapter"  # the name that requests use for the one of --adapter


def convert_first(*names: str | None, quiet: bool = False) -> None:
    """Convert each model that is in another tool's format; later code finds the result in the cache.

    Args:
        names: models as users name them, "SRC:SCHEME" included; None is left out.
        quiet: show no progress bar.

    Raises:
        InputError, RunError: see `imports.open.resolve`.
    """
    for name in names:
        base = name and split_scheme(name)[0]
        if base and (is_hub_name(base) or (os.path.exists(base) and detect_format(Path(base)) is not None)):
            with console.progress(quiet) as progress:
                resolve(base, progress, console.note)


def describe_source(name: str, quiet: bool) -> Described:
    """Describe a model; one in a format whose config.json must be made is converted first."""
    if not is_hub_name(name) and not (os.path.exists(name) and detect_format(Path(name)) in (GGUF, BIN)):
        convert_first(name, quiet=quiet)
    return describe(name)


def load_with_adapter(model: str, adapter: Path | None, **options: Any) -> LLM:
    """Load a model with the adapter of --adapter, and say so if that was trained on another model."""
    convert_first(model)
    llm = load(model, adapters={} if adapter is None else {ADAPTER: adapter}, **options)
    if adapter is not None and is_made_for(open_source(llm.path), adapter) is False:
        console.note(f"--adapter {adapter}: was trained on another model; answers may be worse than without")
    if options.get("float_math", llm.float_math) != llm.float_math:
        console.note(f"--float-math: {llm.float_math}; bf16 needs bf16 weights, and a processor that multiplies them")
    console.note(remark())
    return llm


def read_prompt(prompt: str) -> str:
    """Return the prompt itself, or all of stdin for "-"; raise InputError where that is not UTF-8."""
    return decode(sys.stdin.buffer.read(), "--prompt") if prompt == "-" else prompt


def decode(data: bytes, where: str) -> str:
    """Return text from stdin; raise InputError, at `where`, for bytes that are not UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        found = f"0x{data[error.start]:02x} at byte {error.start}"
        raise InputError(where, "UTF-8 on stdin", found, "try iconv") from None
