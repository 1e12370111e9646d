"""WikiText-2's raw test split from a local file: the text and pages that published figures rest on.

LM Eval's task scores the 62 pages of the hub's EleutherAI/wikitext_document_level, which its script cut
out of the original `wiki.test.raw` (Merity et al., arXiv 1609.07843). A copy without the original's blank
lines is as common as the original; it would score other bytes, so the blank lines are put back.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llamita.errors import InputError, RunError

ORIGINAL_SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
PAGES = 62
# The copy: rows of the hub's data set that are not blank, with line ends of either kind made "\n".
_STRIPPED_SHA256 = "bbf94c53a05abe9ee670d3b6343608095822c85e26de37c70b24fc571964574a"
_HEADING = re.compile(r" (= )+.*( =)+ ")
# Two lines of running text that look like titles: what its formulas left of "Constant k filter".
_NOT_HEADINGS = (" = 1 rad / s and a nominal impedance k = ", " = 1 henry and capacitance C = ")
_LAST_TITLE = " = The Hustler ( film ) = "  # the one title with a single blank line before it


@dataclass(frozen=True)
class WikiText:
    """A text in WikiText's form, cut into pages as LM Eval's task has them.

    Attributes:
        pages: one text a page, headings and spaced punctuation as in the file.
        text: the whole as the literature scores it: every line with its line end and two more (the rows of
            Salesforce/wikitext joined by blank lines); 341,469 tokens for Llama 2, 289,077 for Llama 3.
        is_original: whether this is WikiText-2's test split, so that figures compare with published ones.
        note: what was found or done, for the user; "" for the original file.
    """

    pages: tuple[str, ...]
    text: str
    is_original: bool
    note: str


def read(path: Path) -> WikiText:
    """Read a local `wiki.test.raw`; the original is known by its SHA-256, another file is reported.

    Raises:
        InputError: no such file, not UTF-8, or nothing in it.
        RunError: it cannot be read.
    """
    try:
        data = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        raise InputError("--wikitext", "the file wiki.test.raw", f"none at {path}") from None
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        # Line ends of every system become "\n", as in the script that made the hub's data set.
        text = data.decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}", "UTF-8", f"a stray byte at {error.start}") from None
    return parse(text, str(path))


def parse(text: str, name: str) -> WikiText:
    """A text in WikiText's form; `name` stands in messages. See `read`."""
    note = ""
    if _sha256(text) == _STRIPPED_SHA256:
        text = _restore_blank_lines(text)
        note = f"{name}: a copy without the original's blank lines, now put back"
    is_original = _sha256(text) == ORIGINAL_SHA256
    pages = split_pages(text)
    if not pages:
        raise InputError(f"{name}", "WikiText's test split", "an empty file")
    assert not is_original or len(pages) == PAGES
    if not is_original:
        note = (f"{name}: not WikiText-2's test split (sha256 {ORIGINAL_SHA256[:8]}...), {len(pages)} pages; "
                "its figures compare only with each other")  # fmt: skip
    return WikiText(tuple(pages), _literature_text(text), is_original, note)


def from_pages(pages: Sequence[str], name: str) -> WikiText:
    """WikiText from its pages, as the hub has them: they follow each other after one blank line."""
    return parse(" \n" + "\n".join(pages), name)


def split_pages(text: str) -> list[str]:
    """Pages as the hub's script cuts them: a new one at every line that looks like a title."""
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


def _restore_blank_lines(text: str) -> str:
    """The original from the copy: a blank line around every heading, one more between articles."""
    lines: list[str] = []
    for line in text.removesuffix("\n").split("\n"):
        if not _HEADING.fullmatch(line) or line in _NOT_HEADINGS:
            lines.append(line)
            continue
        if lines and not line.startswith(" = = ") and line != _LAST_TITLE:
            lines.append(" ")
        lines += [" ", line, " "]
    return "\n".join([*lines, " "]) + "\n"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
