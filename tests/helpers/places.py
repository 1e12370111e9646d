"""The places that tests read from: the repository, its held-out text, the development data."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
HELPERS = Path(__file__).parent
HELD_OUT = ROOT / "src" / "llamita" / "embedded" / "heldout.txt"
# Real texts and tokenizers. They may be missing: then a test skips.
DATA = Path(os.environ.get("LLAMITA_DATA", ROOT.parent / "shared" / "data"))
