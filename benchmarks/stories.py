"""TinyStories as text: its files mark the end of a story by a word that no model reads in use."""

from pathlib import Path

_MARK = "<|endoftext|>"


def read_stories(path: Path) -> str:
    """The stories of a file, a blank line between them instead of the mark.

    Left in, the mark is eight tokens of markup after every story. The embedded model has never read it, so
    its own text lacks it, while a calibration on such a file learns it: that alone made own text look a
    fifth worse than real text.
    """
    stories = path.read_text("utf-8").split(_MARK)
    return "\n\n".join(story.strip() for story in stories if story.strip())
