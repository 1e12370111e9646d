"""Saved prefixes: found again to the bit by the model that made them, and by no other."""

import hashlib
import json
import os
import random
import shutil
import struct
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_files import make_adapter
from damage import alarm, mutate_value, outcome
from generations import RecordingSampler, endless, finish, ids_of, plain
from tiny import SMALL, make_checkpoint

from llamita.engine import sequence
from llamita.engine.kv_cache import SequenceCache
from llamita.engine.llm import LLM
from llamita.engine.prefix_file import fingerprint
from llamita.engine.prefixes import BLOCK
from llamita.engine.sampler import Sampling
from llamita.errors import InputError, RunError

PREAMBLE = struct.Struct("<16sQQ32s")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "llama32", eos_token_id=319)


def saved(llm: LLM, path: Path, *prompts: list[int], **options: Any) -> int:
    """Take prompts in and save what is kept of them."""
    for ids in prompts:
        chosen: Any = {"max_tokens": 1, "greedy": True, **options}
        llm.generate(ids, **chosen)
    return llm.scheduler.save_prefixes(path)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama32", {"scheme": "llama3.2"}),
        ("llama32", {"scheme": "llama3.2", "kv_dtype": "int8"}),
        ("tinyllama", {"kv_dtype": "f32"}),
    ],
)
def test_a_saved_prefix_is_found_with_the_same_bits(
    family: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, file = make_checkpoint(tmp_path / "model", family, eos_token_id=319), tmp_path / "prefixes"
    prompts = [ids_of(0, 300), ids_of(1, 40)]
    assert saved(endless(directory, **options), file, *prompts) == 2
    llm = endless(directory, **options)
    assert llm.scheduler.load_prefixes(file) == 2
    assert llm.scheduler.load.kept_positions == 4 * BLOCK
    monkeypatch.setattr(sequence, "Sampler", RecordingSampler)
    RecordingSampler.rows.clear()
    for ids in prompts:
        longer = ids + ids_of(7, 30)
        generation = llm.generate(longer, max_tokens=8, greedy=True)
        tokens, rows = plain(llm, longer, 8, Sampling(0.0))
        assert generation.timings.reused_tokens == len(ids)
        assert generation.token_ids == tokens
        np.testing.assert_array_equal(RecordingSampler.rows[np.array(longer, dtype=np.int32).tobytes()], rows)


def test_what_was_loaded_can_be_saved_again(directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "prefixes"
    saved(endless(directory), file, ids_of(0, 60), owner="key")
    for _ in range(2):
        scheduler = endless(directory).scheduler
        assert scheduler.load_prefixes(file) == 1
        assert scheduler.load_prefixes(file) == 0  # it is there already
        assert scheduler.save_prefixes(file) == 1
    llm = endless(directory)
    llm.scheduler.load_prefixes(file)
    assert llm.generate(ids_of(0, 61), max_tokens=1, owner="key").timings.reused_tokens == 60


def test_the_next_turn_after_a_restart_copies_nothing(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, ids = tmp_path / "prefixes", ids_of(0, 100)
    saved(endless(directory), file, ids)
    llm = endless(directory)
    llm.scheduler.load_prefixes(file)
    monkeypatch.setattr(SequenceCache, "copy_prefix", None)  # the cache itself is continued
    turn = [*ids, *ids_of(1, 4 * BLOCK - 101)]
    assert llm.generate(turn, max_tokens=1).timings.reused_tokens == 100


def test_owners_are_not_named_and_share_nothing(directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "prefixes"
    saved(endless(directory), file, ids_of(0, 60), owner="sk-secret")
    assert b"sk-secret" not in file.read_bytes()
    llm = endless(directory)
    llm.scheduler.load_prefixes(file)
    reused = [
        llm.generate(ids_of(0, 60), max_tokens=1, owner=owner).timings.reused_tokens
        for owner in (None, "sk-other", "sk-secret")
    ]
    assert reused == [0, 0, 59]


def test_adapters_are_known_by_what_they_do(directory: Path, tmp_path: Path) -> None:
    first, second = (make_adapter(tmp_path / name, directory, rank=rank) for name, rank in (("a", 2), ("b", 3)))
    file, ids = tmp_path / "prefixes", ids_of(0, 60)
    llm = endless(directory, adapters={"x": first})
    saved(llm, file, ids)
    assert saved(llm, file, ids, adapter="x") == 2
    for adapters, count, reused in (({"x": first}, 2, 59), ({"x": second}, 1, 0), ({"y": first}, 1, 0), ({}, 1, None)):
        llm = endless(directory, adapters=adapters)
        assert llm.scheduler.load_prefixes(file, llm.adapters) == count
        assert llm.generate(ids, max_tokens=1).timings.reused_tokens == 59
        for name in adapters:
            assert llm.generate(ids, max_tokens=1, adapter=name).timings.reused_tokens == reused


def test_the_most_recent_stay_where_memory_is_short(directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "prefixes"
    assert saved(endless(directory), file, *(ids_of(seed, 60) for seed in range(4))) == 4
    block = endless(directory).new_sequence(BLOCK).nbytes
    llm = endless(directory, cache_memory=3 * block, prefix_cache=3 * block)
    stream = llm.stream(ids_of(9, 60), max_tokens=60, greedy=True)
    next(stream)
    assert llm.scheduler.load_prefixes(file) == 2
    load = llm.scheduler.load
    assert (load.used_positions, load.kept_positions) == (BLOCK, 2 * BLOCK)
    assert finish(stream).token_ids == plain(llm, ids_of(9, 60), 60, Sampling(0.0))[0]
    assert llm.generate(ids_of(3, 60), max_tokens=1).timings.reused_tokens == 59


def test_a_context_that_shrank_leaves_longer_ones_out(directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "prefixes"
    assert saved(endless(directory), file, ids_of(0, 300), ids_of(1, 60)) == 2
    assert endless(directory, context=200).scheduler.load_prefixes(file) == 1


def test_other_models_are_refused(directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "prefixes"
    saved(endless(directory), file, ids_of(0, 60))
    for options, expected in (
        ({"kv_dtype": "int8"}, "prefixes: kv_dtype: expected int8, got 'f32'; try that"),
        ({"scheme": "llama3.2", "kv_dtype": "f32"}, "prefixes: model: expected the one that is loaded, got another"),
    ):
        with pytest.raises(InputError, match=expected):
            endless(directory, **options).scheduler.load_prefixes(file)
    other = make_checkpoint(tmp_path / "other", "llama32", seed=1)
    with pytest.raises(InputError, match="prefixes: model"):
        endless(other).scheduler.load_prefixes(file)


def test_a_small_change_of_any_matrix_is_another_model(tmp_path: Path) -> None:
    """The last block's matrices after its keys and values change the logits alone."""
    directory = make_checkpoint(tmp_path, "llama32", dtype="F32", tie_word_embeddings=False)
    before = fingerprint(endless(directory).model, "f32")
    file = directory / "model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name in ("__metadata__", "model.embed_tokens.weight"):  # a prefix's own hash has its embeddings
            continue
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        values = np.frombuffer(data[start:stop], dtype=np.float32).copy()
        values[len(values) // 2] *= 1.01
        file.write_bytes(data[:start] + values.tobytes() + data[stop:])
        assert fingerprint(endless(directory).model, "f32") != before, name


def test_other_embeddings_are_another_model(tmp_path: Path) -> None:
    """They are no part of the fingerprint where the probe has none of the tokens."""
    directory = make_checkpoint(tmp_path / "model", "llama32", tie_word_embeddings=False, eos_token_id=319)
    llm = endless(directory)
    probed = set((np.arange(64) * 7919 % 320).tolist())
    rare = next(token for token in range(256) if token not in probed)
    file = tmp_path / "prefixes"
    saved(llm, file, [*ids_of(0, 40), rare])
    weights = directory / "model.safetensors"
    data = bytearray(weights.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    entry = json.loads(data[8 : 8 + length])["model.embed_tokens.weight"]
    data[8 + length + entry["data_offsets"][0] + 2 * 128 * rare] ^= 1
    weights.write_bytes(data)
    with pytest.raises(InputError, match="damaged"):
        endless(directory).scheduler.load_prefixes(file)


def test_the_file_is_private_and_whole_or_not_there(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, llm = tmp_path / "prefixes", endless(directory)
    (tmp_path / ".prefixes.partial-1-00000000").write_text("of a killed run")
    saved(llm, file, ids_of(0, 60))
    assert [path.name for path in tmp_path.iterdir()] == ["prefixes"]
    assert file.stat().st_mode & 0o777 == 0o600
    before = file.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(RunError, match="prefixes: cannot be written: the disk is full; nothing was left behind"):
            llm.scheduler.save_prefixes(file)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["prefixes"]
    with pytest.raises(RunError, match="cannot be written"):
        llm.scheduler.save_prefixes(tmp_path / "nowhere" / "prefixes")


def test_what_is_no_such_file_is_said(directory: Path, tmp_path: Path) -> None:
    scheduler = endless(directory).scheduler
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "text").write_text("hello" * 100)
    (tmp_path / "empty").touch()
    for name, error, message in (
        ("none", InputError, "none: expected a file of saved prefixes, got none"),
        ("pipe", InputError, "pipe: expected a regular file"),
        ("text", InputError, "text: expected a file of saved prefixes, got 500 bytes of something else"),
        ("empty", InputError, "empty: expected a file of saved prefixes, got 0 bytes"),
        (".", (InputError, RunError), "directory|regular"),
    ):
        with alarm(), pytest.raises(error, match=message):
            scheduler.load_prefixes(tmp_path / name)


def test_steps_wait_while_prefixes_are_saved(directory: Path, tmp_path: Path) -> None:
    llm = endless(directory)
    prompts = [ids_of(seed, 50) for seed in range(6)]
    found: list[list[int]] = []

    def work() -> None:
        found.extend(llm.generate(ids, max_tokens=20, greedy=True).token_ids for ids in prompts)

    thread = threading.Thread(target=work)
    thread.start()
    for place in range(20):
        llm.scheduler.save_prefixes(tmp_path / f"{place}")
    thread.join()
    assert found == [plain(llm, ids, 20, Sampling(0.0))[0] for ids in prompts]


# Damage


def sign(header: bytes, data: bytes) -> bytes:
    """A file with this header, as if it had been written so."""
    digest = hashlib.sha256(header).digest()
    return PREAMBLE.pack(b"llamita-prefixes", PREAMBLE.size + len(data), len(header), digest) + data + header


def damaged(whole: bytes, rng: random.Random) -> bytes:
    """Change a byte, cut, add, exchange parts, or change a value of the header and sign that."""
    kind, place = rng.randrange(6), rng.randrange(len(whole))
    if kind == 0:
        return whole[:place] + bytes([whole[place] ^ (1 << rng.randrange(8))]) + whole[place + 1 :]
    if kind == 1:
        return whole[:place]
    if kind == 2:
        return whole[:place] + rng.randbytes(rng.randrange(1, 200)) + whole[place:]
    _, at, length, _ = PREAMBLE.unpack(whole[: PREAMBLE.size])
    if kind == 3:  # lies about where the header is
        return PREAMBLE.pack(b"llamita-prefixes", rng.choice([0, at, 2**63]), rng.choice([0, length, 2**64 - 1]),
                             rng.randbytes(32)) + whole[PREAMBLE.size :]  # fmt: skip
    header = mutate_value(json.loads(whole[at : at + length]), rng)
    return sign(json.dumps(header).encode(), whole[PREAMBLE.size : at])


def test_damaged_files_are_refused_in_one_line(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "model", "llama32", **SMALL)
    llm, file, rng = endless(directory), tmp_path / "prefixes", random.Random(5)
    saved(llm, file, ids_of(0, 20), ids_of(1, 140), owner="key")
    whole = file.read_bytes()
    refused = 0
    for _ in range(300):
        file.write_bytes(data := damaged(whole, rng))
        fresh = endless(directory)
        message = outcome(fresh.scheduler.load_prefixes, file)
        if message is None:  # a header that may be so, such as another owner
            assert data[:16] == whole[:16]
            assert data[PREAMBLE.size :][:1000] == whole[PREAMBLE.size :][:1000]
            check_kept(fresh)
        else:
            refused += 1
            assert "\n" not in message
            assert not fresh.scheduler.load.kept_positions
    assert refused > 200


def check_kept(llm: LLM) -> None:
    """What was loaded is what the model computes, whatever the header said."""
    for prefix in llm.scheduler._memory.kept.all():
        cache = llm.new_sequence(prefix.declared_length)
        cache.adapter = prefix.adapter
        llm.model.step([(cache, prefix.ids)])
        row = np.array([1], dtype=np.int32)
        expected = llm.model.step([(cache, row)]).copy()
        np.testing.assert_array_equal(llm.model.step([(prefix.cache, row)]), expected)


def test_every_byte_counts(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "model", "llama32", **SMALL)
    llm, file = endless(directory), tmp_path / "prefixes"
    saved(llm, file, ids_of(0, 20))
    whole = file.read_bytes()
    for place in [*range(PREAMBLE.size), *range(PREAMBLE.size, len(whole), len(whole) // 50), len(whole) - 1]:
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(InputError):
            llm.scheduler.load_prefixes(file)
    shutil.rmtree(directory)
