"""Read texts and rows from data sets of the Hugging Face hub, through its own package `datasets`.

`quantize.calibration` and `train.records` import this on use: the package comes with Torch's.
"""

import logging
from collections.abc import Iterator
from typing import Any

import datasets

from llamita.errors import InputError, RunError, first_line

WIKITEXT = ("Salesforce/wikitext", "wikitext-2-raw-v1")
_BUFFER = 1000  # documents from which the next one is drawn


def documents(name: str, seed: int) -> Iterator[str]:
    """Yield the texts of a data set's train split as they arrive, in an order drawn with `seed`.

    Args:
        name: owner/name or owner/name:configuration; "wikitext" is WikiText-2's raw train split as one
            document, its lines joined by blank lines as in GPTQ's code (arXiv 2210.17323).

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
    """Yield the rows of a data set's train split as they arrive, in their order.

    Args:
        name: owner/name or owner/name:configuration.

    Raises:
        InputError: no such configuration or split.
        RunError: the hub cannot be reached, or knows no such data set.
    """
    path, _, configuration = name.partition(":")
    yield from _rows(path, configuration or None, name, None, is_streamed=True)


def _read(path: str, configuration: str | None, name: str, seed: int | None) -> Iterator[str]:
    # Streaming downloads only what is read of a large data set.
    for row in _rows(path, configuration, name, seed, is_streamed=seed is not None):
        if not isinstance(row.get("text"), str):
            raise InputError(name, 'a column "text"', ", ".join(row), "try another data set")
        yield row["text"]


def _rows(
    path: str, configuration: str | None, name: str, seed: int | None, is_streamed: bool
) -> Iterator[dict[str, Any]]:
    datasets.disable_progress_bars()  # they would break into ours
    logging.getLogger("datasets").setLevel(logging.ERROR)
    try:
        found: Any = datasets.load_dataset(path, configuration, split="train", streaming=is_streamed)
        yield from found if seed is None else found.shuffle(seed=seed, buffer_size=_BUFFER)
    except ValueError as error:  # no such configuration or split; the message names those that exist
        raise InputError(f"{name}: {first_line(error)}") from None
    except OSError as error:  # the hub's own errors are among these
        raise RunError(name, "a data set that the hub or its cache has", first_line(error), "try a file") from None
