"""The original wiki.test.raw from a copy of it without blank lines, which some data sets ship.

python tests/helpers/original_wikitext.py COPY ORIGINAL
"""

import re
import sys
from pathlib import Path

_HEADING = re.compile(r" (= )+.*( =)+ ")
# Two lines of running text that look like titles: what its formulas left of "Constant k filter".
_NOT_HEADINGS = (" = 1 rad / s and a nominal impedance k = ", " = 1 henry and capacitance C = ")
_LAST_TITLE = " = The Hustler ( film ) = "  # the one title with a single blank line before it


def original_wikitext(copy: bytes) -> bytes:
    """Put a blank line around every heading, and one more between articles; line ends become "\\n"."""
    lines: list[str] = []
    rows = [line for line in copy.decode().replace("\r\n", "\n").split("\n") if line.strip()]
    for line in rows:
        if not _HEADING.fullmatch(line) or line in _NOT_HEADINGS:
            lines.append(line)
            continue
        if lines and not line.startswith(" = = ") and line != _LAST_TITLE:
            lines.append(" ")
        lines += [" ", line, " "]
    return ("\n".join([*lines, " "]) + "\n").encode()


if __name__ == "__main__":
    Path(sys.argv[2]).write_bytes(original_wikitext(Path(sys.argv[1]).read_bytes()))
