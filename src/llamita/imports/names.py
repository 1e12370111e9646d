"""Read the names by which users call models: those of the hub, with a revision and a file, and SRC:SCHEME.

owner/model, owner/model@REVISION, owner/model:Q4_K_M and owner/model/FILE.gguf; a revision comes before the others.
A "/" in a revision may be written as %2F, which a file after it makes necessary.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from llamita.errors import InputError, shown

# What a GGUF's name says of its blocks: Q4_K_M, IQ4_XS, F16, MXFP4, UD-Q4_K_XL.
KIND = r"(?:UD-)?(?:I?Q|TQ|B?F|FP|MXFP|NVFP)\d+(?:_[A-Za-z0-9]+)*"
_HUB_NAME = re.compile(rf"(\w[\w.-]*/\w[\w.-]*)(?:@([^:\s]+?))?(?::({KIND})|/([^:]+\.gguf))?", re.IGNORECASE)
_LATE = re.compile(rf"(\w[\w.-]*/\w[\w.-]*)(:{KIND}|/[^:@]+\.gguf)@([^:\s]+)", re.IGNORECASE)  # a revision at the end
_ADDRESS = re.compile(  # of a page or a file of the hub, or what follows its host
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?!datasets/|spaces/)(\w[\w.-]*/\w[\w.-]*)"
    rf"(?:/(?:tree|blob|resolve|raw)/([^/?#]+))?(?:/([^?#]+\.gguf)|(:{KIND}))?(?:[/?#].*)?",
    re.IGNORECASE,
)
_WITH_SCHEME = re.compile(r"(.+):([A-Za-z][^:/]*)(?::(\d+))?")  # SRC:SCHEME, SRC:SCHEME:GROUP


@dataclass(frozen=True)
class HubName:
    """The parts of a name on the hub; at most one of `kind` and `file` is there."""

    model: str
    revision: str | None = None  # a branch, a tag or a commit
    kind: str | None = None  # of a GGUF's blocks
    file: str | None = None  # of a GGUF

    @property
    def base(self) -> str:
        """The name without kind and file, as users write it."""
        return self.model if self.revision is None else f"{self.model}@{self.revision}"

    @property
    def whole(self) -> str:
        """The name with kind or file."""
        return self.base + (f":{self.kind}" if self.kind else f"/{self.file}" if self.file else "")


def parse_hub_name(name: object) -> HubName | None:
    """Return the parts of a name that a model of the hub can have; None if this disk has it, or no model can."""
    match = _HUB_NAME.fullmatch(name) if isinstance(name, str) else None
    if match is None or os.path.exists(str(name)) or _ADDRESS.fullmatch(str(name)):
        return None
    model, revision, kind, file = match.groups()
    if file and revision is None and os.path.exists(model):  # a file that this directory lacks
        return None
    if revision is None and model.lower().endswith(".gguf"):  # a file too
        return None
    return HubName(model, revision and revision.replace("%2F", "/"), kind, file)


def is_hub_name(name: object) -> bool:
    """Return whether this can be the name of a model of the hub, and nothing on this disk has it."""
    return parse_hub_name(name) is not None


def misspelt(name: object) -> InputError | None:
    """Return the error that says how to write a name whose parts are in another order, or the address of a model."""
    if not isinstance(name, str) or os.path.exists(name):
        return None
    if late := _LATE.fullmatch(name):
        model, rest, revision = late.groups()
        what = "type" if rest.startswith(":") else "file"
        return InputError(f"{name}: a revision comes before the {what}: {model}@{revision.replace('/', '%2F')}{rest}")
    if address := _ADDRESS.fullmatch(name):
        model, revision, file, kind = address.groups()
        pinned = f"@{revision}" if revision not in (None, "main") else ""
        right = f"{model}{pinned}{f'/{file}' if file else kind or ''}"
        return InputError(name, "a name of the hub", "an address", f"write {right}")
    return None


def at_revision(name: str | Path, revision: str | None) -> str | Path:
    """Return a model's name with a revision added to it; None adds nothing.

    Raises:
        InputError: the model is not the hub's, or already has a revision, or there can be no such revision.
    """
    if revision is None:
        return name
    base, scheme = split_scheme(name) if isinstance(name, str) else (name, "")
    found = parse_hub_name(base)
    if found is None:
        usual = InputError("revision", "a model's name on the hub, such as owner/model", shown(str(name)))
        raise misspelt(base) or usual
    if found.revision is not None:
        raise InputError("revision", "one revision", f"{shown(found.revision)} and {shown(revision)}")
    pinned = f"{found.model}@{revision.replace('/', '%2F')}{str(base)[len(found.model) :]}"
    if parse_hub_name(pinned) is None:
        raise InputError("revision", "a branch, a tag or a commit", shown(revision))
    return pinned + scheme


def split_scheme(name: str) -> tuple[str, str]:
    """Return the model's name and the rest of SRC:SCHEME or SRC:SCHEME:GROUP, which is "" where there is no scheme."""
    is_whole = os.path.exists(name) or is_hub_name(name) or misspelt(name) is not None
    match = None if is_whole else _WITH_SCHEME.fullmatch(name)
    return (name, "") if match is None else (match[1], name[len(match[1]) :])
