"""Load the models to evaluate, and the float model that they are measured against.

The baseline of a packed model is the model it was made from, as llamita.json records it: by name, and by
the SHA-256 of its files, because a divergence from any other model would mean nothing. A model may also be
SRC:SCHEME or SRC:SCHEME:GROUP, a float one that is rounded to nearest while it loads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llamita.engine.weights import FLOAT_MATHS
from llamita.errors import InputError, LlamitaError
from llamita.evaluate.scores import Contender
from llamita.imports.names import split_scheme
from llamita.imports.open import open_float, resolve
from llamita.loading import load
from llamita.models.metadata import METADATA, Metadata
from llamita.numerics.scheme import QuantScheme, make_scheme
from llamita.quantize.records import source_record
from llamita.system.files import exists_in
from llamita.system.progress import Progress

NO_BASELINE = "none"


@dataclass(frozen=True)
class _Model:
    """A model to load: its directory, how to round it on the way, the user's name for the unrounded one.

    Two are equal if their resolved directories and their schemes are.
    """

    path: Path = field(compare=False)
    real: Path
    scheme: QuantScheme | None
    source: str = field(compare=False)


def open_contenders(
    sources: Sequence[str],
    baseline: str | None = None,
    *,
    threads: int | None = None,
    kv_dtype: str | None = None,
    float_math: str = FLOAT_MATHS[0],
    progress: Progress = None,
) -> list[Contender]:
    """Load models, after the baseline that they are measured against.

    Args:
        sources: model directories, hub names or "embedded"; with a scheme after a colon, rounded first.
        baseline: one more of these, or "none" for no baseline; by default the recorded source of the packed
            models. Where no source is packed or rounded, there is none either.
        threads: of the kernels.
        kv_dtype: for keys and values of all models but the baseline; see `llamita.load`.
        float_math: for float layers of all models but the baseline, which stays the reference.

    Raises:
        InputError: a model given twice, an unknown scheme, different recorded sources, or one that has
            changed since.
        RunError, InputError: a model cannot be loaded; see `llamita.load`.
    """
    models = [_parse(source) for source in sources]
    for i, model in enumerate(models):
        if model in models[:i]:
            raise InputError(sources[i], "every model once", "it again")
    chosen = baseline or _source_of_all(sources, models, progress)
    has_baseline = chosen is not None and chosen != NO_BASELINE
    if chosen is not None and has_baseline:
        first = _parse(chosen)
        others = [(s, m) for s, m in zip(sources, models, strict=True) if m != first]
        sources, models = [chosen, *(s for s, _ in others)], [first, *(m for _, m in others)]
    contenders = []
    for i, (name, model) in enumerate(zip(_short_names(sources), models, strict=True)):
        is_baseline = has_baseline and i == 0
        dtype, math = (None, FLOAT_MATHS[0]) if is_baseline else (kv_dtype, float_math)
        llm = load(model.path, scheme=model.scheme, threads=threads, kv_dtype=dtype, float_math=math)
        contenders.append(Contender(name, llm, is_baseline))
    return contenders


def first_float(sources: Sequence[str]) -> str | None:
    """Return the first of these models that is float and stays so."""
    for source in sources:
        model = _parse(source)
        if model.scheme is None and not exists_in(model.path, METADATA):
            return source
    return None


def _parse(source: str) -> _Model:
    """Find a model by directory, hub name or "embedded", and the scheme that follows it, if any."""
    name, rest = split_scheme(source)
    if not rest:
        path = resolve(source)
        return _Model(path, path.resolve(), None, source)
    _, kind, *group = rest.split(":")
    try:
        scheme = make_scheme(kind, int(group[0]) if group else None)
    except InputError as error:
        raise error.at(f"{source} (SRC:SCHEME or SRC:SCHEME:GROUP)") from None
    path = resolve(name)
    if exists_in(path, METADATA):
        raise InputError(source, "a float model before the scheme", "one that is quantized")
    return _Model(path, path.resolve(), scheme, name)


def _source_of_all(sources: Sequence[str], models: Sequence[_Model], progress: Progress) -> str | None:
    """Return the name of the model that the packed and the rounded ones were made from, None if there are none."""
    packed = {s: m.path for s, m in zip(sources, models, strict=True) if exists_in(m.path, METADATA)}
    name = _recorded_source(packed, progress) if packed else None
    for source, model in zip(sources, models, strict=True):
        if model.scheme is None:
            continue
        name = name or model.source
        if model.real != resolve(name).resolve():
            hint = "try --baseline SRC, or each by itself"
            raise InputError(source, "models made from the same one", f"{name} and {model.source}", hint)
    return name


def _recorded_source(packed: dict[str, Path], progress: Progress) -> str:
    """Return the name of the model that one or more packed models were made from, after checking its files."""
    records = {source: Metadata.read(path).source for source, path in packed.items()}
    first, record = next(iter(records.items()))
    name = record.name
    for source, other in records.items():
        if other.files != record.files:
            raise InputError(
                source,
                f"one made from {name}, as {first} was",
                f"one from {other.name}",
                "try --baseline SRC, or each by itself",
            )
    try:
        path = resolve(name, progress)
    except LlamitaError as error:
        missing = error.within(f"{first}: its recorded source is missing")
        missing.hint = "try --baseline SRC, or none"
        raise missing from None
    source = open_float(path)
    found = source_record(source, name, progress).files
    source.close()
    for file, sha256 in record.files.items():
        if found.get(file) != sha256:
            where, expected = f"{name}: {file}", f"the file that {first} was made from"
            raise InputError(where, expected, "another", "try --baseline SRC, or none")
    return name


def _short_names(sources: Sequence[str]) -> list[str]:
    """Return the last part of each path, or the whole path where two would have the same name."""
    short = [Path(source).name or source for source in sources]
    return [s if short.count(s) == 1 else source for s, source in zip(short, sources, strict=True)]
