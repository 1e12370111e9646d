"""Saves kept caches in a file and finds them again. `docs/reference/engine.md`, "Saved prefixes", has its layout.

A cache may be used only if this model would compute the same bits. No hash of weight files says that, because the
engine's arithmetic counts, too. So the file holds a hash of what the model makes of a few tokens, which all layers
take part in, and each prefix a hash of its tokens' embeddings with its keys and values.
"""

import hashlib
import json
import os
import secrets
import stat
import struct
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from llamita import _native
from llamita.engine.adapters import Adapter
from llamita.engine.kv_cache import SequenceCache
from llamita.engine.model import Model
from llamita.engine.prefixes import BLOCK, SHORTEST, Owner, Prefix, SavedOwner, capacity_for, whole_blocks
from llamita.errors import InputError, RunError, shown
from llamita.system.files import LARGEST_JSON, parse_json, unreadable
from llamita.system.staging import private_file

VERSION = 1
_MAGIC = b"llamita-prefixes"
_PREAMBLE = struct.Struct("<16sQQ32s")  # the magic; offset, length and SHA-256 of the header, which is at the end
_PROBED = 64  # tokens of the probe: fewer could leave a small change of a weight unseen
_EMBEDDED = 1024  # embeddings hashed at a time
_SALT_BYTES = 16


class _Record(NamedTuple):
    """A prefix as the header describes it."""

    tokens: int
    declared_length: int
    adapter: tuple[str, str] | None  # its name and fingerprint
    owner: Owner
    sha256: str


def fingerprint(model: Model, kv_dtype: str, adapter: Adapter | None = None) -> str:
    """Return a hash of the architecture and of the keys, values and logits that the model makes of some tokens."""
    config = model.config
    cache = SequenceCache(config, BLOCK, kv_dtype, BLOCK)
    cache.adapter = adapter
    ids = (np.arange(_PROBED) * 7919 % config.vocab_size).astype(np.int32)  # a prime: all over the vocabulary
    logits = model.step([(cache, ids)], out=np.empty((1, config.vocab_size), dtype=np.float32))
    block = np.empty(cache.block_nbytes, dtype=np.uint8)
    cache.read_block(0, block)
    return hashlib.sha256(repr(_settings(config)).encode() + block.tobytes() + logits.tobytes()).hexdigest()


def save(path: Path, model: Model, kv_dtype: str, prefixes: Sequence[Prefix]) -> None:
    """Write prefixes, the least recently used first, to a file that its owner alone may read.

    Raises:
        RunError: it cannot be written; a file that was there is unchanged.
    """
    salt = secrets.token_bytes(_SALT_BYTES)
    adapters = {id(prefix.adapter): prefix.adapter for prefix in prefixes if prefix.adapter}
    prints = {key: fingerprint(model, kv_dtype, adapter) for key, adapter in adapters.items()}
    with private_file(path) as file:
        file.write(bytes(_PREAMBLE.size))
        records = []
        for prefix in prefixes:
            ids = prefix.ids.astype("<i4")
            digest = _embedding_hash(model, prefix.ids)
            for part in chain((ids.data,), _blocks(prefix.cache, len(ids))):  # one block in memory at a time
                digest.update(part)
                file.write(part)
            adapter = prefix.adapter and {"name": prefix.adapter.name, "fingerprint": prints[id(prefix.adapter)]}
            records.append({"tokens": len(ids), "declared_length": prefix.declared_length, "adapter": adapter,
                            "owner": _owner_json(prefix.owner, salt), "sha256": digest.hexdigest()})  # fmt: skip
        header = {"version": VERSION, "model": fingerprint(model, kv_dtype), "kv_dtype": kv_dtype,
                  "block_bytes": _block_bytes(model, kv_dtype), "prefixes": records}  # fmt: skip
        data, at = json.dumps(header).encode(), file.tell()
        file.write(data)
        file.seek(0)
        file.write(_PREAMBLE.pack(_MAGIC, at, len(data), hashlib.sha256(data).digest()))


def load(
    path: Path, model: Model, kv_dtype: str, context: int, positions: int, adapters: Mapping[str, Adapter]
) -> list[Prefix]:
    """Return the prefixes of a file, the least recently used first, all of them checked.

    Left out are those of adapters that are not loaded, or changed, those that were declared longer than `context`, and
    the least recently used beyond `positions` in all.

    Raises:
        InputError: the file is missing, damaged, or of another model, kv_dtype or version.
        RunError: it cannot be read, or memory is short.
    """
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:  # a pipe, too
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise InputError(str(path), "a regular file")
            return _Reader(file, path.name, model, kv_dtype).read(context, positions, adapters)
    except FileNotFoundError:
        raise InputError(str(path), "a file of saved prefixes", "none") from None
    except OSError as error:
        raise unreadable(path, error) from None
    except MemoryError:
        raise RunError("memory", f"room for the prefixes of {path}") from None


class _Reader:
    """Reads one file. Nothing of it is used before its hash is right, and sizes are checked before memory is taken."""

    def __init__(self, file: BinaryIO, name: str, model: Model, kv_dtype: str) -> None:
        self._file, self._name, self._model, self._kv_dtype = file, name, model, kv_dtype
        self._block = _block_bytes(model, kv_dtype)

    def read(self, context: int, positions: int, adapters: Mapping[str, Adapter]) -> list[Prefix]:
        """Return the prefixes as `load` does."""
        records = self._records(*self._header())
        names = {record.adapter[0] for record in records if record.adapter} & adapters.keys()
        known = {(name, fingerprint(self._model, self._kv_dtype, adapters[name])): adapters[name] for name in names}
        at, chosen = _PREAMBLE.size + sum(map(self._nbytes, records)), list[Prefix]()
        for record in reversed(records):
            at -= self._nbytes(record)
            if record.declared_length > context or (record.adapter and record.adapter not in known):
                continue
            positions -= whole_blocks(record.tokens)
            if positions < 0:
                break
            self._file.seek(at)
            chosen.append(self._prefix(record, context, known[record.adapter] if record.adapter else None))
        return chosen[::-1]

    def _header(self) -> tuple[dict[str, Any], int]:
        """Return the header and its offset, where the data ends."""
        size = os.fstat(self._file.fileno()).st_size
        preamble = self._file.read(_PREAMBLE.size)
        if len(preamble) < _PREAMBLE.size or preamble[: len(_MAGIC)] != _MAGIC:
            raise InputError(self._name, "a file of saved prefixes", f"{size} bytes of something else")
        _, at, length, digest = _PREAMBLE.unpack(preamble)
        if length > LARGEST_JSON or at < _PREAMBLE.size or at + length != size:
            raise self._damaged()
        self._file.seek(at)
        data = self._take(length)
        if hashlib.sha256(data).digest() != digest:
            raise self._damaged()
        return parse_json(data, self._name), at

    def _records(self, header: dict[str, Any], end: int) -> list[_Record]:
        """Return the records if the header is this model's and its sizes are those of the file."""
        self._expect(header, "version", VERSION, "try removing the file")
        self._expect(header, "kv_dtype", self._kv_dtype, "try that (--kv-cache), or remove the file")
        self._expect(header, "block_bytes", self._block, "try the model that it was saved from, or remove it")
        if header.get("model") != fingerprint(self._model, self._kv_dtype):
            raise InputError(
                f"{self._name}: model", "the one that is loaded", "another one", "try another file, or remove it"
            )
        values = header.get("prefixes")
        if not isinstance(values, list):
            raise self._damaged()
        try:
            records = [_record(value) for value in values]
        except (AttributeError, KeyError, TypeError, ValueError):
            raise self._damaged() from None
        if end != _PREAMBLE.size + sum(map(self._nbytes, records)):
            raise self._damaged()
        return records

    def _prefix(self, record: _Record, context: int, adapter: Adapter | None) -> Prefix:
        """Read the tokens, keys and values of a record, which are at the file's position."""
        stored = self._take(4 * record.tokens)
        ids = np.frombuffer(stored, dtype="<i4").astype(np.int32)
        if ids.min() < 0 or ids.max() >= self._model.config.vocab_size:
            raise self._damaged()
        digest = _embedding_hash(self._model, ids)
        digest.update(stored)
        capacity = capacity_for(record.declared_length, context)
        cache = SequenceCache(self._model.config, capacity, self._kv_dtype, record.declared_length)
        for index in range(whole_blocks(record.tokens) // BLOCK):
            block = self._take(self._block)
            digest.update(block)
            cache.write_block(index, np.frombuffer(block, dtype=np.uint8))
        if digest.hexdigest() != record.sha256:
            raise self._damaged()
        cache.length, cache.adapter = record.tokens, adapter
        return Prefix(ids, cache, record.declared_length, whole_blocks(record.tokens), record.owner)

    def _nbytes(self, record: _Record) -> int:
        return 4 * record.tokens + whole_blocks(record.tokens) // BLOCK * self._block

    def _expect(self, header: dict[str, Any], key: str, expected: object, hint: str) -> None:
        if header.get(key) != expected:
            raise InputError(f"{self._name}: {key}", f"{expected}", shown(header.get(key)), hint)

    def _take(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) < size:  # it became shorter meanwhile
            raise self._damaged()
        return data

    def _damaged(self) -> InputError:
        return InputError(self._name, "saved prefixes as they were written", "a damaged file", "try removing it")


def _record(value: Any) -> _Record:
    """Return a record of the header; raise AttributeError, KeyError, TypeError or ValueError if it is none."""
    tokens, declared, adapter, owner = (value[key] for key in ("tokens", "declared_length", "adapter", "owner"))
    if type(tokens) is not int or type(declared) is not int or not SHORTEST <= tokens <= declared:
        raise ValueError
    return _Record(
        tokens,
        declared,
        None if adapter is None else (str(adapter["name"]), str(adapter["fingerprint"])),
        None if owner is None else SavedOwner(bytes.fromhex(owner["salt"]), bytes.fromhex(owner["sha256"])),
        str(value["sha256"]),
    )


def _block_bytes(model: Model, kv_dtype: str) -> int:
    return SequenceCache(model.config, BLOCK, kv_dtype, BLOCK).block_nbytes


def _settings(config: Any) -> list[Any]:
    """Return the architecture's values in an order that does not change between runs, as that of sets does."""
    return [(name, sorted(v) if isinstance(v, frozenset) else v) for name, v in sorted(vars(config).items())]


def _embedding_hash(model: Model, ids: np.ndarray) -> Any:
    """Return a SHA-256 that has taken in the embeddings of ids."""
    digest = hashlib.sha256()
    for start in range(0, len(ids), _EMBEDDED):
        part = np.ascontiguousarray(ids[start : start + _EMBEDDED], dtype=np.int32)
        rows = np.empty((len(part), model.config.hidden_size), dtype=np.float32)
        _native.embed(model.weights.embedding, part, rows)
        digest.update(rows.data)
    return digest


def _blocks(cache: SequenceCache, tokens: int) -> Iterator[memoryview]:
    """Yield the blocks of the first tokens, each in the same buffer."""
    block = np.empty(cache.block_nbytes, dtype=np.uint8)
    for index in range(whole_blocks(tokens) // BLOCK):
        cache.read_block(index, block)
        yield block.data


def _owner_json(owner: Owner, salt: bytes) -> dict[str, str] | None:
    if owner is None:
        return None
    saved = owner if isinstance(owner, SavedOwner) else SavedOwner.of(owner, salt)
    return {"salt": saved.salt.hex(), "sha256": saved.digest.hex()}
