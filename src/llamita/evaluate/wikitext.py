"""Read WikiText-2's raw test split from a local file: the text and pages that published figures rest on.

LM Eval's task scores the 62 pages of the hub's EleutherAI/wikitext_document_level, which its script cut
out of the original `wiki.test.raw` (Merity et al., arXiv 1609.07843).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llamita.errors import InputError
from llamita.system.files import unreadable

ORIGINAL_SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
PAGES = 62


@dataclass(frozen=True)
class WikiText:
    """A text in WikiText's format, cut into pages as in LM Eval's task.

    Attributes:
        pages: the text of each page, with headings and spaced punctuation as in the file.
        text: the whole as the literature scores it: every line with its line end and two more (the rows of
            Salesforce/wikitext joined by blank lines); 341,469 tokens for Llama 2, 289,077 for Llama 3.
        is_original: whether this is WikiText-2's test split, so that figures compare with published ones.
        note: a remark for the user; "" for the original.
    """

    pages: tuple[str, ...]
    text: str
    is_original: bool
    note: str


def read(path: Path) -> WikiText:
    """Read a local `wiki.test.raw`; the note says if its SHA-256 is not the original's.

    Raises:
        InputError: there is no such file, or it is empty or not UTF-8.
        RunError: it cannot be read.
    """
    try:
        data = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        raise InputError("--wikitext", "the file wiki.test.raw", f"none at {path}") from None
    except OSError as error:
        raise unreadable(path, error) from None
    try:
        # Line ends of every system become "\n", as in the script that made the hub's data set.
        text = data.decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise InputError(str(path), "UTF-8", f"a stray byte at {error.start}") from None
    return parse(text, str(path))


def parse(text: str, name: str) -> WikiText:
    """Cut a text in WikiText's format into pages; messages call it `name`. See `read`."""
    is_original = hashlib.sha256(text.encode()).hexdigest() == ORIGINAL_SHA256
    pages = split_pages(text)
    if not pages:
        raise InputError(name, "WikiText's test split", "an empty file")
    assert not is_original or len(pages) == PAGES
    note = (
        ""
        if is_original
        else (
            f"{name}: not WikiText-2's test split (sha256 {ORIGINAL_SHA256[:8]}...), {len(pages)} pages; its figures "
            "compare only with each other; published ones need the original file, or --tasks wikitext from the hub"
        )
    )
    return WikiText(tuple(pages), _literature_text(text), is_original, note)


def from_pages(pages: Sequence[str], name: str) -> WikiText:
    """Join pages, as the hub has them, to the text that they were cut from, and return it as `parse` does."""
    return parse(" \n" + "\n".join(pages), name)


def split_pages(text: str) -> list[str]:
    """Cut a text into pages like the hub's script: a new one begins at every line that looks like a title."""
    pages: list[str] = []
    lines: list[str] = []
    for line in text.split("\n"):
        bare = line.replace("= = =", "===").replace("= =", "==").strip()
        if bare.startswith("= ") and bare.endswith(" ="):
            pages.append("\n".join(lines))
            lines = []
        lines.append(line)
    return [page for page in [*pages, "\n".join(lines)] if page.strip()]


def _literature_text(text: str) -> str:
    lines = text.removesuffix("\n").split("\n")
    return "\n\n".join(f"{line}\n" if line.strip() else "" for line in lines)
