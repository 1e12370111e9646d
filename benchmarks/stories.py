"""TinyStories as text: its files mark the end of a story by a word that no model reads in use."""

from pathlib import Path

SCORED = slice(60_000, 120_000)  # characters of the validation split; those before chose defaults
_MARK = "<|endoftext|>"


def read_stories(path: Path) -> str:
    """The stories of a file, a blank line between them instead of the mark.

    Left in, the mark is eight tokens of markup after every story, which the embedded model has never read:
    a calibration on such a file learns it, own text lacks it. With it qronos lost 20 % more after own text
    than after such a file (groups of 32, scored on such a file); without it, in both, 6 %.
    """
    stories = path.read_text("utf-8").split(_MARK)
    return "\n\n".join(story.strip() for story in stories if story.strip())


def write_stories(path: Path, out: Path) -> Path:
    """`read_stories` in a file; one that is there already is left alone, as others may be reading it."""
    text = read_stories(path)
    if not out.exists() or out.read_text("utf-8") != text:
        partial = out.with_name(f"{out.name}.partial")
        partial.write_text(text, "utf-8")
        partial.replace(out)
    return out
