"""Texts and rows from data sets of the Hugging Face hub, through its own package `datasets`.

`calibration` and `train.records` import this on use: the package belongs to the Torch side's dependencies.
"""

import logging
from collections.abc import Iterator
from typing import Any

import datasets

from llamita.errors import InputError, RunError

WIKITEXT = ("Salesforce/wikitext", "wikitext-2-raw-v1")
_BUFFER = 1000  # documents among which the next one is drawn


def documents(name: str, seed: int) -> Iterator[str]:
    """The texts of a data set's train split in an order drawn by `seed`, each as it arrives.

    Args:
        name: owner/name or owner/name:configuration; "wikitext" is WikiText-2's raw train split as one
            document, its lines joined by blank lines as GPTQ has it (arXiv 2210.17323).

    Raises:
        InputError: no column "text", or no such configuration or split.
        RunError: the hub cannot be reached, or knows no such data set.
    """
    if name == "wikitext":
        yield "\n\n".join(_read(*WIKITEXT, name, None))
        return
    path, _, configuration = name.partition(":")
    yield from _read(path, configuration or None, name, seed)


def rows(name: str) -> Iterator[dict[str, Any]]:
    """The rows of a data set's train split in their order, each as it arrives.

    Args:
        name: owner/name or owner/name:configuration.

    Raises:
        InputError: no such configuration or split.
        RunError: the hub cannot be reached, or knows no such data set.
    """
    path, _, configuration = name.partition(":")
    yield from _rows(path, configuration or None, name, None, is_streamed=True)


def _read(path: str, configuration: str | None, name: str, seed: int | None) -> Iterator[str]:
    # streamed unless it is read whole: of a large data set, only what is looked at is downloaded
    for row in _rows(path, configuration, name, seed, is_streamed=seed is not None):
        if not isinstance(row.get("text"), str):
            raise InputError(f"{name}", 'a column "text"', f"{', '.join(row)}", "try another data set")
        yield row["text"]


def _rows(
    path: str, configuration: str | None, name: str, seed: int | None, is_streamed: bool
) -> Iterator[dict[str, Any]]:
    datasets.disable_progress_bars()  # they would break into ours
    logging.getLogger("datasets").setLevel(logging.ERROR)
    try:
        found: Any = datasets.load_dataset(path, configuration, split="train", streaming=is_streamed)
        yield from found if seed is None else found.shuffle(seed=seed, buffer_size=_BUFFER)
    except ValueError as error:  # no such configuration or split; the message names those there are
        raise InputError(f"{name}: {_first_line(error)}") from None
    except OSError as error:  # the hub's own errors are among these
        raise RunError(
            f"{name}", f"a data set that the hub or its cache has: {_first_line(error)}", hint="try a file"
        ) from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
