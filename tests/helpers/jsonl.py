"""Files of JSON lines."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_jsonl(path: Path, records: Iterable[Any]) -> Path:
    """Write one record a line; return the path."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path
