"""Damaged model directories, 2,000 in the slow set: each is read, or refused with a LlamitaError, without delay.

Mutations know the structure: safetensors headers, index, config.json and llamita.json are changed value by
value (and sealed again, so that the hash does not stop them at the door), data by bits, files as a whole.
"""

import hashlib
import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damage import WEIRD, mutate_value, outcome, to_text
from rotated import RotatedCheckpoint
from tiny import SMALL, make_checkpoint

from llamita.bench.plan import describe
from llamita.commands.inspect import facts
from llamita.imports.open import open_source
from llamita.models.checkpoint import Checkpoint
from llamita.models.metadata import sealed
from llamita.models.names import linear_names, table_names, vector_names
from llamita.models.packed import PackedModel
from llamita.models.sizes import make_plan
from llamita.models.verify import verify
from llamita.models.weights import bias_of
from llamita.numerics.scheme import make_scheme
from llamita.quantize.pipeline import quantize
from llamita.quantize.rounded import RoundedSource

CASES, QUICK_CASES = 2000, 320
BATCHES = 8
TINY: dict[str, Any] = {**SMALL, "vocab_size": 64}


# ---- mutations of files --------------------------------------------------------------------------


def read(path: Path) -> bytes:
    """The bytes of a regular file: an earlier mutation may have put a link to /dev/zero in its place."""
    if not path.is_file():
        raise FileNotFoundError(path)
    return path.read_bytes()


def mutate_config(directory: Path, rng: random.Random) -> None:
    path = directory / "config.json"
    path.write_bytes(to_text(mutate_value(json.loads(read(path)), rng), rng))


def mutate_header(directory: Path, rng: random.Random) -> None:
    path = rng.choice(sorted(directory.glob("*.safetensors")))
    data = read(path)
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    text = to_text(mutate_value(header, rng), rng)
    size = rng.choice([0, 1, len(text) - 1, len(text) + 1, 2**32, 2**63]) if rng.randrange(8) == 0 else len(text)
    path.write_bytes(struct.pack("<Q", size) + text + data[8 + length :])


def mutate_index(directory: Path, rng: random.Random) -> None:
    path = directory / "model.safetensors.index.json"
    if path.exists():
        path.write_bytes(to_text(mutate_value(json.loads(read(path)), rng), rng))
    else:
        path.write_bytes(to_text({"weight_map": rng.choice(WEIRD)}, rng))


def mutate_metadata(directory: Path, rng: random.Random) -> None:
    path = directory / "llamita.json"
    if not path.exists():
        return mutate_config(directory, rng)
    values = mutate_value(json.loads(read(path)), rng)
    path.unlink()
    if isinstance(values, dict) and rng.randrange(4):
        values.pop("self_sha256", None)
        path.write_bytes(sealed(json.loads(json.dumps(values).replace("\\ud800", "?"))))
    else:
        path.write_bytes(to_text(values, rng))
    return None


def mutate_bytes(directory: Path, rng: random.Random) -> None:
    path = rng.choice(sorted(p for p in directory.iterdir() if p.is_file()))
    data = bytearray(read(path))
    for _ in range(rng.choice([1, 1, 1, 8, 64])):
        if data:
            data[rng.randrange(len(data))] = rng.randrange(256)
    path.write_bytes(data)


def mutate_file(directory: Path, rng: random.Random) -> None:
    path = rng.choice(sorted(directory.iterdir()))
    kind = rng.randrange(6)
    size = path.stat().st_size
    if kind == 0:
        path.unlink()
    elif kind == 1:
        os.truncate(path, rng.randrange(size + 1))
    elif kind == 2:
        os.truncate(path, size + rng.choice([1, 64, 4096]))
    elif kind == 3:
        path.unlink()
        path.mkdir()
    elif kind == 4:
        path.unlink()
        path.symlink_to(rng.choice(["/etc/passwd", path.name, "config.json", "/dev/zero", "nowhere"]))
    else:
        path.rename(directory / rng.choice(["model.safetensors", "config.json", "x", "llamita.json"]))


MUTATIONS: list[Callable[[Path, random.Random], Any]] = [
    mutate_header, mutate_header, mutate_config, mutate_metadata, mutate_index, mutate_bytes, mutate_file,
]  # fmt: skip


def reseal(directory: Path) -> None:
    """Give llamita.json the size and hash of the files as they are now, so that reading goes on."""
    path = directory / "llamita.json"
    try:
        values = json.loads(read(path))
        for name, record in values["files"].items():
            data = read(directory / name)
            record.update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
        del values["self_sha256"]
        path.unlink()
        path.write_bytes(sealed(values))
    except Exception:  # it is damaged itself: then as it is
        return


# ---- the test ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Float and packed, in one file and in shards, tied and untied, with biases, rotated."""
    root = tmp_path_factory.mktemp("originals")
    single = make_checkpoint(root / "single", "llama32", **TINY)
    sharded = make_checkpoint(root / "sharded", "llama3", dtype="F16", shards=2, attention_bias=True, **TINY)
    for directory in (single, sharded):
        (directory / "tokenizer.json").unlink()
    quantize(Checkpoint(single), "single", root / "tables", make_scheme("llama3.2"))
    quantize(Checkpoint(sharded), "sharded", root / "arm", make_scheme("arm", 64), shard_bytes=20_000)
    quantize(RotatedCheckpoint(single), "single", root / "rotated", make_scheme("llama3.2"))
    return [single, sharded, root / "tables", root / "arm", root / "rotated"]


def use(directory: Path) -> None:
    """Everything that the library does with a directory, short of computing with it."""
    source = open_source(directory)
    for name in [*table_names(source.config), *linear_names(source.config)]:
        source.weight(name)
        bias_of(source, name)
    for name in vector_names(source.config):
        source.vector(name)
    if isinstance(source, Checkpoint):
        rounded = RoundedSource(source, make_scheme("llama3.2"))
        for name in [*table_names(source.config), *linear_names(source.config)]:
            rounded.weight(name)
    assert isinstance(source, Checkpoint | PackedModel)
    json.dumps(facts(source), allow_nan=False)
    source.close()


def look(directory: Path) -> None:
    model = describe(str(directory))
    scheme = model.scheme or make_scheme("llama3.2")
    make_plan(model.config, scheme, model.float_dtype, transform=model.transform)


@pytest.mark.parametrize("cases", [QUICK_CASES, pytest.param(CASES, marks=pytest.mark.slow)])
@pytest.mark.parametrize("batch", range(BATCHES))
def test_damaged_directories_are_read_or_refused(tmp_path: Path, originals: list[Path], batch: int, cases: int) -> None:
    refused = 0
    for case in range(batch, cases, BATCHES):
        rng = random.Random(case)
        original, directory = originals[case // BATCHES % len(originals)], tmp_path / "model"
        shutil.copytree(original, directory)
        mutations = rng.choices(MUTATIONS, k=rng.choice([1, 1, 1, 2, 3]))
        for mutation in mutations:
            try:
                mutation(directory, rng)
            except (OSError, ValueError, LookupError, TypeError, RecursionError):  # nothing left to mutate
                continue
        if rng.randrange(4):
            reseal(directory)
        for action in (use, look, verify):
            try:
                error = outcome(action, directory)
            except Exception as problem:
                raise AssertionError(f"case {case}: {action.__name__} after {mutations}") from problem
            refused += error is not None
            assert "\n" not in (error or ""), (case, error)
        shutil.rmtree(directory)
    assert refused > cases // BATCHES  # most are refused by one of the three
