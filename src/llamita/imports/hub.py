"""Download models by their Hugging Face name: the files that matter, into the hub's own cache.

This file alone imports huggingface_hub, and `open.resolve` imports this file on use, as that takes half a second.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants, errors, snapshot_download

from llamita.errors import LlamitaError, RunError, first_line
from llamita.system.files import COMPANIONS


def _any_case(pattern: str) -> str:
    """Return a pattern that matches in any case; the hub's client compares letters as they are."""
    return "".join(f"[{c}{c.upper()}]" if c.isalpha() else c for c in pattern)


# Older versions of the library lack these two; there, a more general error takes their place.
_NO_FILE = getattr(errors, "RemoteEntryNotFoundError", errors.EntryNotFoundError)
_NO_REVISION = getattr(errors, "RevisionResolutionError", errors.LocalEntryNotFoundError)
# Float weights and what travels with them; no other formats, and not the *.pth of Meta's repositories.
PATTERNS = (
    "config.json", "llamita.json", "model*.safetensors", "model.safetensors.index.json", "README.md",
    *map(_any_case, COMPANIONS),
)  # fmt: skip


def download(name: str, patterns: Sequence[str] = PATTERNS) -> Path:
    """Download all files of these patterns, and return the model's directory in the hub's cache.

    Raises:
        RunError: the model is gated or missing, or there is no network; one line that says what to try.
    """
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # the hub, its HTTP client and its downloader share no class
        raise _explain(name, error) from None


def download_file(name: str, file: str) -> Path:
    """Download one file of this model, and return its path; raises as `download` does."""
    # Not hf_hub_download: without a network it tries for half a minute, and prints each try.
    return download(name, [file]) / file


def _explain(name: str, error: Exception) -> LlamitaError:
    """Return the error of one line for an exception of the hub, whose own text has several."""
    page = f"{constants.ENDPOINT}/{name}"
    if isinstance(error, errors.GatedRepoError):
        return RunError(f"{name}: the model is gated", hint=f"accept its licence at {page}, then run `hf auth login`")
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        where = f"{name}: no such directory, and the hub has no such model that you may see"
        return RunError(where, hint="check the name, or run `hf auth login` if it is private")
    if isinstance(error, _NO_FILE) and not isinstance(error, errors.LocalEntryNotFoundError):
        return RunError(f"{name}: the hub's model lacks a file: {first_line(error)}")
    out_of_reach = errors.LocalEntryNotFoundError | _NO_REVISION | ConnectionError
    if isinstance(error, out_of_reach):
        offline = constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE")
        why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        where = f"{name}: no such directory, not in the hub's cache, and {why}"
        return RunError(where, hint="try a local directory")
    return RunError(f"{name}: download failed: {first_line(error)}", hint="try again")
