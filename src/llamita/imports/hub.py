"""Bring models from the Hugging Face hub by name: the files that matter, into the hub's own cache.

This file alone imports huggingface_hub, and others import this file on use, as that takes half a second. Without a
network, the same files are looked for in the cache.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import huggingface_hub
from huggingface_hub import HfApi, HfFileSystem, constants, errors, snapshot_download, try_to_load_from_cache

from llamita.errors import InputError, LlamitaError, RunError, first_line
from llamita.formats.gguf import GgufFile
from llamita.imports.gguf_config import ROPE_TENSORS
from llamita.imports.hub_files import BIN_INDEX, Choice, Files, choose, sized
from llamita.imports.names import HubName, parse_hub_name
from llamita.models.checkpoint import INDEX
from llamita.system.files import exists_in, read_json
from llamita.text.printable import printable

# Older versions of the library lack these two; there, a more general error takes their place.
_NO_FILE = getattr(errors, "RemoteEntryNotFoundError", errors.EntryNotFoundError)
_NO_REVISION = getattr(errors, "RevisionResolutionError", errors.LocalEntryNotFoundError)
_HEADER_STEP = 2 << 20  # bytes of a GGUF that are read first; the headers of the largest vocabularies take about 8 MB
_LARGEST_HEADER = 64 << 20
_LARGEST_FACTORS = 1 << 20  # bytes of a tensor of ROPE_TENSORS, which say how far a model's context was stretched
# Endings of the files without which a model does not open, or opens as another one.
_NEEDED = (".json", ".safetensors", ".bin", ".gguf", ".model", ".jinja")
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class _Listing:
    """The files of a repository at a commit.

    Attributes:
        snapshot: their place in the cache, if the hub is out of reach.
        is_whole: whether the repository has no others.
    """

    files: Files
    commit: str
    snapshot: Path | None = None
    is_whole: bool = True


def download(name: str) -> Path:
    """Download the model of a name on the hub; return its directory in the hub's cache, or its first GGUF there.

    Raises:
        InputError: no model of the repository fits the name, or several do.
        RunError: the model is gated or missing, there is no network, or too little space on the disk.
    """
    hub = _parse(name)
    try:
        listing = _list(hub)
        return _bring(hub, listing, _choose(hub, listing))
    except Exception as error:  # the hub, its HTTP client and its downloader share no class
        raise _explain(hub, error) from None


@contextmanager
def described(name: str) -> Iterator[Path]:
    """Yield a file that says what a model on the hub is: its config.json, or a GGUF of which only the header is there.

    Raises:
        InputError, RunError: see `download`.
    """
    hub = _parse(name)
    with TemporaryDirectory() as directory:
        try:
            listing = _list(hub)
            choice = _choose(hub, listing, or_config=True)
            if choice.gguf is None:
                file = _bring(hub, listing, Choice(["config.json"])) / "config.json"
            elif listing.snapshot is not None or _is_cached(hub, listing, choice):
                file = _bring(hub, listing, choice)
            else:
                file, *_ = [_header(hub, listing, part, Path(directory)) for part in choice.files]
        except Exception as error:
            raise _explain(hub, error) from None
        yield file


def _parse(name: str) -> HubName:
    hub = parse_hub_name(name)
    assert hub is not None, name
    return hub


def _list(hub: HubName) -> _Listing:
    """Return what the repository has; without a network, or access to it, what the cache knows of it."""
    try:
        info = HfApi().model_info(
            hub.model, revision=hub.revision, timeout=constants.HF_HUB_ETAG_TIMEOUT, files_metadata=True
        )
    except (errors.RevisionNotFoundError, errors.HFValidationError):
        raise
    except Exception as error:
        try:
            # No patterns: the client then needs no file to be there. Which are missing is found out later.
            place = snapshot_download(hub.model, revision=hub.revision, allow_patterns=[], local_files_only=True)
        except errors.LocalEntryNotFoundError:
            is_answer = isinstance(error, errors.HfHubHTTPError)
            raise (error if is_answer else ConnectionError(first_line(error))) from None
        return _cached(hub, Path(place))
    return _Listing({file.rfilename: file.size or 0 for file in info.siblings or []}, str(info.sha))


def _cached(hub: HubName, snapshot: Path) -> _Listing:
    """Return the files that the repository had, where the client has kept that, else those in the cache."""
    kept_tree = getattr(huggingface_hub, "get_cached_repo_tree", None)  # later versions have it
    if kept_tree is not None:
        try:
            tree = kept_tree(hub.model, revision=snapshot.name)
            return _Listing({file.path: file.size for file in tree}, snapshot.name, snapshot)
        except errors.CachedRepoTreeNotFoundError:
            pass
    return _Listing(_files_in(snapshot), snapshot.name, snapshot, is_whole=False)


def _choose(hub: HubName, listing: _Listing, or_config: bool = False) -> Choice:
    """Return the files that a name stands for; with `or_config`, config.json where no weights are known."""
    try:
        return choose(hub, listing.files)
    except InputError:
        has_gguf = listing.is_whole and any(file.endswith(".gguf") for file in listing.files)
        if or_config and hub.kind is hub.file is None and "config.json" in listing.files and not has_gguf:
            return Choice(["config.json"])
        if listing.is_whole:
            raise
        raise _incomplete(hub, "the model", listing.files) from None


def _bring(hub: HubName, listing: _Listing, choice: Choice) -> Path:
    """Return the model in the cache, downloaded unless `listing` comes from there.

    Raises:
        RunError: a file is missing.
    """
    place = listing.snapshot
    if place is None:
        if lacking := [file for file in choice.files if file not in listing.files]:
            raise RunError(f"{hub.base}: the hub's model lacks {printable(lacking[0])}")
        patterns = [escape(file) for file in choice.files]
        place = Path(snapshot_download(hub.model, revision=hub.revision, allow_patterns=patterns))
    if missing := _missing(place, choice):
        has_part = any((place / file).is_file() for file in choice.files)
        raise _incomplete(hub, missing, {} if has_part else _files_in(place))
    return place if choice.gguf is None else place / choice.gguf


def _incomplete(hub: HubName, missing: str, others: Files) -> RunError:
    """Return the error for a model that is not whole in the cache, which has these other files of the repository."""
    if others and hub.whole != hub.base:  # other types than the one that was asked for
        where = f"{hub.whole}: not in the hub's cache, which has {sized(others)}"
        return RunError(where, hint="run again with a network to download it")
    where = f"{hub.whole}: incomplete in the hub's cache: {printable(missing)} is missing"
    return RunError(where, hint="was the download interrupted? run again with a network to resume")


def _files_in(snapshot: Path) -> Files:
    found = [path for path in snapshot.rglob("*") if path.is_file()]
    return {path.relative_to(snapshot).as_posix(): path.stat().st_size for path in found}


def _missing(place: Path, choice: Choice) -> str | None:
    """Return the first file that a snapshot lacks of those that the model needs."""
    needed = [file for file in choice.files if file.endswith(_NEEDED)]
    for index in (INDEX, BIN_INDEX):
        if index in choice.files and exists_in(place, index):
            files = read_json(place, index).get("weight_map")
            needed += sorted({str(file) for file in files.values()}) if isinstance(files, dict) else []
    return next((file for file in needed if not (place / file).is_file()), None)


def _is_cached(hub: HubName, listing: _Listing, choice: Choice) -> bool:
    found = [try_to_load_from_cache(hub.model, file, revision=listing.commit) for file in choice.files]
    return all(isinstance(path, str) for path in found)


def _header(hub: HubName, listing: _Listing, name: str, directory: Path) -> Path:
    """Write the beginning of a GGUF to a file of its full length, whose rest is a hole.

    Raises:
        InputError: the file is no GGUF, or damaged.
    """
    files, size = HfFileSystem(), listing.files[name]
    remote, path = f"{hub.model}@{listing.commit}/{name}", directory / Path(name).name

    def fetch(start: int, stop: int) -> None:
        with path.open("r+b") as file:
            file.seek(start)
            file.write(cast(bytes, files.cat_file(remote, start, stop, cache_type="none")))

    path.touch()
    os.truncate(path, size)
    read, wanted = 0, min(size, _HEADER_STEP)
    while True:
        fetch(read, wanted)
        read = wanted
        try:
            header = GgufFile(path)
        except InputError:  # perhaps because it goes on in the hole
            if read >= min(size, _LARGEST_HEADER):
                raise
        else:
            factors = [header.tensors[name] for name in ROPE_TENSORS if name in header.tensors]
            header.close()
            if header.header_bytes <= read:
                break
            if read >= min(size, _LARGEST_HEADER):
                raise InputError(f"{name}: header", f"at most {_LARGEST_HEADER} bytes", f"{header.header_bytes}")
        wanted = min(size, 2 * read)
    for tensor in factors:
        fetch(tensor.start, min(tensor.stop, tensor.start + _LARGEST_FACTORS))
    return path


def _explain(hub: HubName, error: Exception) -> LlamitaError:
    """Return the error of one line for an exception of the hub, whose own text has several."""
    name = hub.base
    if isinstance(error, LlamitaError):
        return error
    if isinstance(error, errors.GatedRepoError):
        page = f"{constants.ENDPOINT}/{hub.model}"
        return RunError(f"{name}: the model is gated", hint=f"accept its licence at {page}, then run `hf auth login`")
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        where = f"{name}: no such directory, and the hub has no such model that you may see"
        return RunError(where, hint="check the name, or run `hf auth login` if it is private")
    if isinstance(error, errors.RevisionNotFoundError):
        return RunError(f"{name}: the hub's model has no such revision", hint="check the branch, tag or commit")
    if isinstance(error, _NO_FILE) and not isinstance(error, errors.LocalEntryNotFoundError):
        return RunError(f"{name}: the hub's model lacks a file: {first_line(error)}")
    if isinstance(error, OSError) and error.errno in _FULL:
        where = f"{name}: the disk is full: {constants.HF_HUB_CACHE}"
        return RunError(where, hint="free some space, or set HF_HOME to another disk; run again to resume")
    out_of_reach = errors.LocalEntryNotFoundError | _NO_REVISION | ConnectionError
    if isinstance(error, out_of_reach):
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        where = f"{hub.whole}: no such directory, not in the hub's cache, and {why}"
        return RunError(where, hint="try a local directory")
    return RunError(f"{name}: download failed: {first_line(error)}", hint="run again to resume")
