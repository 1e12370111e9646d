"""Which models are evaluated, and the float model that they are measured against.

The baseline of a quantized directory is the model it was made from, as llamita.json records it: by name,
and by the SHA-256 of its files, because a divergence from any other model would mean nothing.
"""

from collections.abc import Sequence
from pathlib import Path

from llamita.checkpoint import resolve
from llamita.engine.llm import load
from llamita.errors import InputError, LlamitaError
from llamita.evaluate import Contender, Progress
from llamita.files import has, member, sha256_file
from llamita.packed import METADATA, read_metadata

NO_BASELINE = "none"


def open_contenders(
    sources: Sequence[str],
    baseline: str | None = None,
    *,
    threads: int | None = None,
    kv_dtype: str | None = None,
    progress: Progress = None,
) -> list[Contender]:
    """Load models and what they are measured against, which comes first.

    Args:
        sources: model directories, hub names or "embedded".
        baseline: likewise; by default the recorded source of the quantized directories; "none" for no
            baseline. Where no source is quantized there is none either.
        threads: of the kernels.
        kv_dtype: for keys and values of all models but the baseline; see `llamita.load`.

    Raises:
        InputError: a model given twice, different recorded sources, or one that has changed since.
        RunError, InputError: a model cannot be loaded; see `llamita.load`.
    """
    paths = [resolve(source) for source in sources]
    for i, path in enumerate(paths):
        if path in paths[:i]:
            raise InputError(f"{sources[i]}: expected every model once, got it again")
    chosen = baseline or _recorded_source(sources, paths, progress)
    columns = list(zip(_short_names(sources), paths, strict=True))
    has_baseline = False
    if chosen is not None and chosen != NO_BASELINE:
        has_baseline, path = True, resolve(chosen)
        columns = [(_short_names([chosen])[0], path), *(c for c in columns if c[1] != path)]
    contenders = []
    for i, (name, path) in enumerate(columns):
        is_baseline = has_baseline and i == 0
        llm = load(path, threads=threads, kv_dtype=None if is_baseline else kv_dtype)
        contenders.append(Contender(name, llm, is_baseline))
    return contenders


def _recorded_source(sources: Sequence[str], paths: Sequence[Path], progress: Progress) -> str | None:
    """What the quantized directories were made from, by the name under which it is found."""
    quantized = [(source, path) for source, path in zip(sources, paths, strict=True) if has(path, METADATA)]
    if not quantized:
        return None
    records = {source: read_metadata(path)["source"] for source, path in quantized}
    first, record = next(iter(records.items()))
    name = record["name"]
    for source, other in records.items():
        if other["files"] != record["files"]:
            raise InputError(
                f"{source}: expected one made from {name}, as {first} was, got one from {other['name']}; "
                "try --baseline SRC, or each by itself"
            )
    try:
        path = resolve(name)
    except LlamitaError as error:
        message = f"{first}: its recorded source is missing ({error}); try --baseline SRC, or none"
        raise type(error)(message) from None
    for i, (file, sha256) in enumerate(record["files"].items()):
        if progress:
            progress(f"checking {name}", i, len(record["files"]))
        if not has(path, file) or sha256_file(member(path, file)) != sha256:
            raise InputError(
                f"{path / file}: expected the file that {first} was made from, got another; "
                "try --baseline SRC, or none"
            )
    return name


def _short_names(sources: Sequence[str]) -> list[str]:
    """The last part of each path, or the whole where that would name two alike."""
    short = [Path(source).name or source for source in sources]
    return [s if short.count(s) == 1 else source for s, source in zip(short, sources, strict=True)]
