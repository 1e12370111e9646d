"""Training data as records with their place: files in the forms that people have, data sets of the hub."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from llamita.errors import InputError
from llamita.system.extras import load_optional
from llamita.system.files import json_lines, read_text

LARGEST_FILE = 2**30  # bytes: what is read whole has to fit in memory, several times over
HUB = "llamita.text.hub_datasets:rows"  # imported on use: it needs the package datasets
_NO_DATASETS = (
    "--data: a data set of the hub needs the package {package}, which is missing; try pip install "
    "'llamita[torch]' (in a checkout '.[torch]'), or a file"
)
_FILES = (".jsonl", ".json", ".tsv", ".txt", ".md")
_HUB_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(:[\w.-]+)?")
UNANSWERABLE = "unanswerable"
_TABLES = (".csv", ".parquet", ".arrow", ".xlsx", ".gz", ".zip", ".zst")  # which are no plain text
_COLUMNS = ("source", "target")  # of a TSV whose first line does not name them


@dataclass(frozen=True)
class Record:
    """An object of the data, and where it stands, for messages."""

    place: str
    values: dict[str, Any]


def read_data(name: str, limit: int | None = None) -> Iterator[Record]:
    """The records of a file, as `read_records` has them, or of a data set of the hub.

    Args:
        name: a path; or owner/name or owner/name:configuration, of which the train split is read.
        limit: how many to read at most; all by default.

    Raises:
        InputError: no such file or data set, or what is in it cannot be learned from.
        RunError: it cannot be read, or the package that reads it is missing.
    """
    path = Path(name)
    if path.exists() or path.suffix in _FILES or not _HUB_NAME.fullmatch(name):
        if path.is_dir():
            raise InputError(f"{name}", "a file", "a directory", "try one of its files")
        records = read_records(path)
    else:
        rows = load_optional(HUB, _NO_DATASETS)(name)
        records = (Record(f"{name}: row {number}", row) for number, row in enumerate(rows, 1))
    return islice(records, limit)


def read_records(path: Path) -> Iterator[Record]:
    """The records of a file.

    Args:
        path: *.jsonl, an object a line; *.json, a list of objects or SQuAD's nested form; *.tsv, source
            and target, or columns that the first line names; any other is one document of plain text.

    Raises:
        InputError: no such file, not UTF-8, or a record that is no object, named by its line or number.
        RunError: it cannot be read.
    """
    if path.suffix in _TABLES:
        raise InputError(f"{path}", f"{', '.join(_FILES)}", f"{path.suffix}", "try saving it as JSON lines")
    text = read_text(path, LARGEST_FILE).removeprefix("\ufeff")  # which Windows puts before UTF-8
    if path.suffix == ".jsonl":
        yield from (Record(place, values) for place, values in json_lines(text, path.name))
    elif path.suffix == ".json":
        yield from _json_records(path, text)
    elif path.suffix == ".tsv":
        yield from _tsv_records(path, text)
    else:
        yield Record(path.name, {"text": text})


def _json_records(path: Path, text: str) -> Iterator[Record]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}", "JSON", f"{error}") from None
    if isinstance(values, dict) and isinstance(values.get("data"), list):
        yield from _squad_records(path, values["data"])
        return
    if not isinstance(values, list):
        raise InputError(f"{path}", "a list of objects", f"{type(values).__name__}")
    for number, value in enumerate(values, 1):
        if not isinstance(value, dict):
            raise InputError(f"{path}: item {number}", "an object", f"{type(value).__name__}")
        yield Record(f"{path.name}: item {number}", value)


def _squad_records(path: Path, articles: list[Any]) -> Iterator[Record]:
    """Context, question and answers (Rajpurkar et al. 2016, arXiv 1606.05250; 2.0: 2018, arXiv 1806.03822).

    A question that 2.0 marks as impossible has the answer that is none.
    """
    number = 0
    try:
        for article in articles:
            for paragraph in article["paragraphs"]:
                for item in paragraph["qas"]:
                    number += 1
                    answers = [str(answer["text"]) for answer in item["answers"]]
                    if item.get("is_impossible"):
                        answers = [UNANSWERABLE]
                    values = {"context": paragraph["context"], "question": item["question"], "answers": answers}
                    yield Record(f"{path.name}: question {number}", values | {"answer": answers[0]})
    except (KeyError, TypeError, IndexError) as error:
        raise InputError(
            f"{path}: question {number + 1}", "SQuAD's form (paragraphs, qas, answers)", f"{error!r}"
        ) from None


def _tsv_records(path: Path, text: str) -> Iterator[Record]:
    columns: tuple[str, ...] = _COLUMNS
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: other separators are text
        row = line.rstrip("\r").split("\t")
        if row == [""]:
            continue
        if number == 1 and {cell.strip().lower() for cell in row} >= set(_COLUMNS):
            columns = tuple(cell.strip().lower() for cell in row)
            continue
        if len(row) < len(_COLUMNS):
            raise InputError(f"{path}: line {number}", "two columns or more", f"{len(row)}")
        yield Record(f"{path.name}: line {number}", dict(zip(columns, row, strict=False)))
