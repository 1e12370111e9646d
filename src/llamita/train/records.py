"""Read training data as records that know their place, from files of several formats and from the hub."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from llamita.errors import InputError, shown
from llamita.system.extras import load_optional
from llamita.system.files import json_lines, parse_json, read_text

LARGEST_FILE = 2**30  # bytes: a file is read whole, and its records take several times as much memory
HUB = "llamita.text.hub_datasets:rows"  # imported on use: it needs the package datasets
_NO_DATASETS = (
    "--data: a data set of the hub needs the package {package}, which is missing; try pip install "
    "'llamita[torch]' (in a checkout '.[torch]'), or a file"
)
_FILES = (".jsonl", ".json", ".tsv", ".txt", ".md")
_HUB_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(:[\w.-]+)?")
UNANSWERABLE = "unanswerable"
_TABLES = (".csv", ".parquet", ".arrow", ".xlsx", ".gz", ".zip", ".zst")  # refused: they are not plain text
_COLUMNS = ("source", "target")  # of a TSV whose first line names none


@dataclass(frozen=True)
class Record:
    """One object of the data, with its place for messages, or what is wrong there."""

    place: str
    values: dict[str, Any]
    problem: InputError | None = None


def read_data(name: str, limit: int | None = None, with_problems: bool = False) -> Iterator[Record]:
    """Yield the records of a file (see `read_records`) or of the train split of a data set of the hub.

    Args:
        name: a path, or owner/name or owner/name:configuration on the hub.
        limit: read at most this many; all by default.

    Raises:
        InputError: there is no such file or data set, or it holds no records.
        RunError: it cannot be read, or the package that reads it is missing.
    """
    path = Path(name)
    if path.exists() or path.suffix in _FILES or not _HUB_NAME.fullmatch(name):
        if path.is_dir():
            raise InputError(name, "a file", "a directory", "try one of its files")
        records = read_records(path, with_problems)
    else:
        rows = load_optional(HUB, _NO_DATASETS)(name)
        records = (Record(f"{name}: row {number}", row) for number, row in enumerate(rows, 1))
    return islice(records, limit)


def read_records(path: Path, with_problems: bool = False) -> Iterator[Record]:
    """Yield the records of a file.

    Args:
        path: *.jsonl, an object a line; *.json, a list of objects or SQuAD's nested format; *.tsv, source and target,
            or columns that the first line names; any other file is one document of plain text.

    Raises:
        InputError: no such file, not UTF-8, or the record at a named line or number is not an object; with
            `with_problems`, such a record is returned with its problem.
        RunError: the file cannot be read.
    """
    if path.suffix in _TABLES:
        raise InputError(f"{path}", ", ".join(_FILES), path.suffix, "try saving it as JSON lines")
    text = read_text(path, LARGEST_FILE).removeprefix("\ufeff")  # Windows puts it before UTF-8
    read = {".jsonl": _json_lines, ".json": _json_records, ".tsv": _tsv_records}.get(path.suffix)
    for record in read(path, text) if read else [Record(path.name, {"text": text})]:
        if record.problem is not None and not with_problems:
            raise record.problem
        yield record


def _json_lines(path: Path, text: str) -> Iterator[Record]:
    for place, line in json_lines(text, path.name):
        try:
            yield Record(place, parse_json(line, place))
        except InputError as error:
            yield Record(place, {}, error)


def _json_records(path: Path, text: str) -> Iterator[Record]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}", "JSON", f"{error}") from None
    if isinstance(values, dict) and isinstance(values.get("data"), list):
        yield from _squad_records(path, values["data"])
        return
    if not isinstance(values, list):
        raise InputError(f"{path}", "a list of objects", type(values).__name__)
    for number, value in enumerate(values, 1):
        place = f"{path.name}: item {number}"
        if isinstance(value, dict):
            yield Record(place, value)
        else:
            yield Record(place, {}, InputError(f"{path}: item {number}", "an object", type(value).__name__))


def _squad_records(path: Path, articles: list[Any]) -> Iterator[Record]:
    """Yield context, question and answers of SQuAD (Rajpurkar et al. 2016, arXiv 1606.05250; 2.0: arXiv 1806.03822).

    The answer to a question that 2.0 marks as impossible is `UNANSWERABLE`.
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
        expected = "SQuAD's format (paragraphs, qas, answers)"
        raise InputError(f"{path}: question {number + 1}", expected, shown(error)) from None


def _tsv_records(path: Path, text: str) -> Iterator[Record]:
    columns: tuple[str, ...] = _COLUMNS
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines, which also divides at characters of the text
        row = line.rstrip("\r").split("\t")
        if row == [""]:
            continue
        if number == 1 and {cell.strip().lower() for cell in row} >= set(_COLUMNS):
            columns = tuple(cell.strip().lower() for cell in row)
            continue
        if len(row) < len(_COLUMNS):
            problem = InputError(f"{path}: line {number}", "two columns or more", f"{len(row)}")
            yield Record(f"{path.name}: line {number}", {}, problem)
            continue
        yield Record(f"{path.name}: line {number}", dict(zip(columns, row, strict=False)))
