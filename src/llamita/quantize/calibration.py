"""Load calibration text as windows of token ids: the model's own text, a file, or a data set of the hub.

Each window begins with the BOS token, if the model has one, because everything that the model reads in use does.
Documents are enclosed in BOS and end token. `own_text` writes the text that needs no data.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llamita import __version__
from llamita.errors import InputError, shown
from llamita.methods.setup import Calibration
from llamita.models.checkpoint import Checkpoint
from llamita.models.transformed import TransformedSource
from llamita.numerics.scheme import make_scheme
from llamita.quantize import own_text
from llamita.quantize.rounded import RoundedSource
from llamita.system import collectives, processes
from llamita.system.extras import load_optional
from llamita.system.files import json_lines, parse_json, read_text
from llamita.system.kept_work import kept_arrays, kept_work, write_whole
from llamita.system.progress import Progress
from llamita.text.tokenizer import Tokenizer

SELF, SELF_FAST = "self", "self-fast"
SAMPLES, LENGTH, SEED = 128, 512, 0
HUB = "llamita.text.hub_datasets:documents"  # imported on use, because it needs the package datasets
_NO_DATASETS = (
    "--calibration: a data set of the hub needs the package {package}, which is missing; try pip "
    "install 'llamita[torch]' (in a checkout '.[torch]'), a text file, or self, which need none"
)
LARGEST_FILE = 32 * 2**20  # bytes; tokenizing takes some 30 times as much memory
_FAST_SCHEME = "llamita"
_SPARE = 4  # times the tokens needed that are read of a data set without end, to draw windows from
_HUB_NAME = re.compile(r"wikitext|[\w][\w.-]*/[\w][\w.-]*(:[\w.-]+)?")
_FILE_NAMES = (".txt", ".jsonl", ".json", ".md", ".raw")


@dataclass(frozen=True)
class CalibrationSpec:
    """Which text to calibrate on.

    Attributes:
        name: as `load_calibration` takes it; None stands for "self", and for no text if none is needed.
        samples: windows.
        length: tokens of a window.
        seed: of all draws, those of the methods included.
    """

    name: str | None = None
    samples: int = SAMPLES
    length: int = LENGTH
    seed: int = SEED


@contextmanager
def calibrated(spec: CalibrationSpec, source: Checkpoint, out: Path, progress: Progress) -> Iterator[Calibration]:
    """Yield calibration text; text that the model writes is kept in a directory next to `out` until all ends well.

    Raises:
        InputError, RunError: see `load_calibration`.
    """
    name, kept = spec.name or SELF, nullcontext()
    if name in (SELF, SELF_FAST) and processes.world() == 1:
        stats = [(path.name, path.stat()) for path in sorted(source.path.iterdir())]  # weights, config, tokenizer
        files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        text = (name, spec.samples, spec.length, spec.seed)
        known = {"llamita": __version__, "source": str(source.path.resolve()), "files": files, "text": text}
        kept = kept_work(text_of(out), known)
    with kept as work:
        yield load_calibration(name, source, spec.samples, spec.length, spec.seed, progress, work)


def text_of(out: Path) -> Path:
    """Return the name under which the text that the model writes for `out` is kept."""
    return out.with_name(f"{out.name}.text")


def load_calibration(
    name: str,
    source: Checkpoint | TransformedSource,
    samples: int = SAMPLES,
    length: int = LENGTH,
    seed: int = SEED,
    progress: Progress = None,
    work: Path | None = None,
) -> Calibration:
    """Return calibration text for a float model.

    Args:
        name: "self", which the model writes from its BOS token, or "self-fast", which the model rounded to 4 bits
            writes several times faster. Or a UTF-8 text file; a file *.jsonl with an object with the document's
            "text" in each line; a data set of the hub with a column "text", as owner/name or
            owner/name:configuration; "wikitext", the train split of WikiText-2.
        source: the model; its weights are read only to write text.
        samples: windows.
        length: tokens of a window.
        seed: of the draws; the same name, data and seed give the same tokens.
        work: a directory that keeps rows that the model has written, so that a killed run can resume.

    Raises:
        InputError: no such text, too little of it, or a window that is longer than the context.
        RunError: the data set cannot be loaded, or the package that reads it is missing.
    """
    least_samples = processes.world()  # one for each process
    for option, value, least in (("--samples", samples, least_samples), ("--length", length, 2), ("--seed", seed, 0)):
        if value < least:
            raise InputError(option, f"at least {least}", f"{value}")
    if length > source.config.context:
        raise InputError("--length", f"at most {source.config.context} tokens, the model's context", f"{length}")
    if name in (SELF, SELF_FAST):
        tokens = _own_text(name, source, (samples, length), seed, progress, work)
    else:
        tokenizer = Tokenizer(source.path, source.config)
        stream = _token_stream(tokenizer, name, samples * length, seed, progress)
        tokens = draw_windows(stream, samples, length, seed, tokenizer.bos_token_id, name)
    recorded = os.path.basename(name) if os.path.isfile(name) else name
    return Calibration(recorded, hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest(), tokens)


def _own_text(
    name: str, source: Checkpoint | TransformedSource, shape: tuple[int, int], seed: int,
    progress: Progress, work: Path | None,
) -> np.ndarray:  # fmt: skip
    """Return the text that the model writes; each of several processes writes its part, and all get the whole."""
    samples, length = shape
    mine, writer = processes.share(samples), None
    tokens = np.zeros(shape, dtype=np.int32)
    for start in mine[:: own_text.ROWS_AT_ONCE]:
        rows = range(start, min(start + own_text.ROWS_AT_ONCE, mine.stop))
        kept = None if work is None else work / f"rows-{start:06}.npz"
        if kept is not None and kept.exists():
            found = kept_arrays(kept, ["ids"])
            if found is not None and found["ids"].shape == (len(rows), length):
                tokens[rows.start : rows.stop] = found["ids"]
                continue
        if writer is None:
            model = source if name == SELF else RoundedSource(source, make_scheme(_FAST_SCHEME))
            writer = own_text.Writer(model, length, seed)
        before = (start - mine.start) * length

        def report(count: int, before: int = before) -> None:
            if progress:
                progress("writing calibration text", before + count, len(mine) * length)

        tokens[rows.start : rows.stop] = written = writer.write(rows, report)
        if kept is not None:
            write_whole(kept, lambda file, written=written: np.savez(file, ids=written))
    return collectives.all_sum(tokens)


def draw_windows(stream: np.ndarray, samples: int, length: int, seed: int, bos: int | None, name: str) -> np.ndarray:
    """Return random windows that share no token, in the order of the text: int32 (samples, length).

    The stream (tokens,) is cut into pieces from a random offset, and `samples` of them are drawn. Each follows a BOS
    token, if there is one.

    Raises:
        InputError: the stream, which messages call `name`, has fewer tokens than the windows need.
    """
    piece = length - (bos is not None)
    spare = len(stream) - samples * piece
    if spare < 0:
        raise InputError(
            name,
            f"at least {samples * piece:,} tokens for {samples} windows of {length}",
            f"{len(stream):,}",
            "try a longer text, or fewer (--samples) or shorter ones (--length)",
        )
    random = np.random.default_rng(seed)
    offset = int(random.integers(min(piece, spare + 1)))
    count = (len(stream) - offset) // piece
    pieces = stream[offset : offset + count * piece].reshape(count, piece)
    windows = np.empty((samples, length), dtype=np.int32)
    windows[:, length - piece :] = pieces[np.sort(random.permutation(count)[:samples])]
    if bos is not None:
        windows[:, 0] = bos
    return windows


def _token_stream(tokenizer: Tokenizer, name: str, needed: int, seed: int, progress: Progress) -> np.ndarray:
    """Return all documents of a text, one after the other: int32 (tokens,)."""
    if progress:
        progress(f"reading {name}", 0, 1)
    if os.path.isdir(name):
        raise InputError("--calibration", "a text file", f"a directory at {name}")
    if os.path.exists(name):
        return _join(tokenizer, _file_documents(Path(name)), None)
    if _HUB_NAME.fullmatch(name) and not name.endswith(_FILE_NAMES):
        return _join(tokenizer, load_optional(HUB, _NO_DATASETS)(name, seed), needed * _SPARE)
    raise InputError(
        "--calibration",
        "'self', 'self-fast', a text file, or a data set's name like owner/name",
        shown(name),
        "there is no such file",
    )


def _join(tokenizer: Tokenizer, documents: Iterable[str], enough: int | None) -> np.ndarray:
    """Join documents, each enclosed in BOS and end token, until there are enough tokens."""
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = list(tokenizer.eos_token_ids[:1])
    stream: list[int] = []
    for text in documents:
        stream += [*begin, *tokenizer.encode(text, add_bos=False), *end]
        if enough is not None and len(stream) >= enough:
            break
    return np.array(stream, dtype=np.int32)


def _file_documents(path: Path) -> list[str]:
    text = read_text(path, LARGEST_FILE)
    if path.suffix != ".jsonl":
        return [text]
    return [_text_of(parse_json(line, place), place) for place, line in json_lines(text, str(path))]


def _text_of(values: dict[str, Any], where: str) -> str:
    text = values.get("text")
    if not isinstance(text, str):
        raise InputError(where, 'an object with a string "text"')
    return text
