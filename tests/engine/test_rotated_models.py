"""Rotated models: the engine undoes what is in their weights, and their directories are read or refused."""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage import mutate_value, outcome
from distances import relative_error
from packed_models import assert_same_weight, pack_rotated, reseal
from rotated import RotatedCheckpoint
from tiny import make_checkpoint

from llamita.bench.plan import describe
from llamita.bench.work import count_work
from llamita.commands.inspect import facts
from llamita.engine.llm import LLM
from llamita.errors import InputError
from llamita.models.checkpoint import Checkpoint
from llamita.models.names import TRANSFORM, linear_names, table_names
from llamita.models.packed import PackedModel
from llamita.models.sizes import make_plan
from llamita.models.verify import verify
from llamita.numerics.affine import f32_to_bf16
from llamita.numerics.rotations import Rotations
from llamita.numerics.scheme import make_scheme
from llamita.quantize.rounded import RoundedSource

R1, R4, BOTH = ("R1",), ("R4",), ("R1", "R4")
IDS = np.random.default_rng(3).integers(0, 320, 90)
TOLERANCE = 1e-5  # of the largest logit: float32 sums in another order make 2e-6


def logits(source: Any, **options: Any) -> np.ndarray:
    return LLM(source, **options).logits(IDS)


# ---- the engine ----------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [R1, R4, BOTH])
@pytest.mark.parametrize(("family", "inputs"), [("llama32", 256), ("llama3", 256), ("llama32", 192), ("llama3", 352)])
def test_rotations_leave_the_function_as_it_was(
    tmp_path: Path, family: str, inputs: int, names: tuple[str, ...]
) -> None:
    make_checkpoint(tmp_path, family, dtype="F32", intermediate_size=inputs)
    rotated = RotatedCheckpoint(tmp_path, names)
    assert rotated.rotations.acts_at_run_time == ("R4" in names or family == "llama32")
    expected = logits(Checkpoint(tmp_path))
    assert relative_error(logits(rotated), expected) < TOLERANCE
    without = RotatedCheckpoint(tmp_path, names)
    without.rotations = Rotations()
    if rotated.rotations.acts_at_run_time:  # the test can fail
        assert relative_error(logits(without), expected) > 0.01


@pytest.mark.parametrize("preset", ["llama3.2", "arm"])
def test_quantized_they_stay_near(tmp_path: Path, preset: str) -> None:
    make_checkpoint(tmp_path, "llama32", dtype="F32")
    rotated, scheme = RotatedCheckpoint(tmp_path), make_scheme(preset)
    expected = logits(Checkpoint(tmp_path))
    plain = relative_error(logits(RoundedSource(Checkpoint(tmp_path), scheme)), expected)
    assert relative_error(logits(RoundedSource(rotated, scheme)), expected) < 2 * plain


def test_a_transform_in_bf16_changes_little(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama32", dtype="F32")
    whole, halves = (logits(RotatedCheckpoint(tmp_path, R1, dtype)) for dtype in ("F32", "BF16"))
    assert 0 < relative_error(halves, whole) < 5e-3


def test_chunks_and_company_change_no_bit(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama32", intermediate_size=384)
    llm = LLM(RoundedSource(RotatedCheckpoint(tmp_path), make_scheme("llama3.2")))
    whole = llm.logits(IDS)
    one, two = llm.new_sequence(90), llm.new_sequence(90)
    found = []
    for start in range(0, 90, 9):
        part = IDS[start : start + 9].astype(np.int32)
        found.append(llm.model.step([(two, part[:1]), (one, part)], np.arange(1, 1 + len(part))).copy())
    np.testing.assert_array_equal(np.concatenate(found), whole)


def test_what_does_not_fit_the_model_is_refused(tmp_path: Path) -> None:
    source = RotatedCheckpoint(make_checkpoint(tmp_path))
    for rotations, message in [
        (Rotations(R4, 128), "R4: size: expected 256, the inputs of down_proj, got 128"),
        (Rotations(R1, None, np.eye(64, dtype=np.float32)), r"transform: expected shape \(128, 128\)"),
    ]:
        source.rotations = rotations
        with pytest.raises(InputError, match=message):
            LLM(source)


# ---- the packed directory ------------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "names"), [("llama3.2", BOTH), ("arm", R1), ("llama3.2", R4)])
def test_what_is_written_is_read(tmp_path: Path, preset: str, names: tuple[str, ...]) -> None:
    out = pack_rotated(tmp_path, names, preset)
    packed, checkpoint = PackedModel(out), RotatedCheckpoint(tmp_path / "src", names)
    rounded = RoundedSource(checkpoint, make_scheme(preset))
    assert packed.rotations == rounded.rotations == checkpoint.rotations
    found, expected = packed.rotations.head_transform, checkpoint.rotations.head_transform
    assert (found is None) == (expected is None) == ("R1" not in names)
    if found is not None and expected is not None:
        np.testing.assert_array_equal(found, f32_to_bf16(expected))
    for name in [*table_names(packed.config), *linear_names(packed.config)]:
        assert_same_weight(packed.weight(name), rounded.weight(name))
    np.testing.assert_array_equal(logits(packed), logits(rounded))
    assert verify(out).problems == []
    assert json.loads((out / "config.json").read_text())["model_type"] == "llamita"
    assert facts(packed)["rotations"] == checkpoint.rotations.to_list()


def test_a_transform_may_be_stored_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llamita.quantize.pipeline.stored_rotations", lambda rotations: rotations)
    found = PackedModel(pack_rotated(tmp_path, R1)).rotations.head_transform
    assert found is not None
    np.testing.assert_array_equal(found, RotatedCheckpoint(tmp_path / "src", R1).rotations.head_transform)
    assert found.dtype == np.float32


def test_merged_rotations_alone_leave_a_plain_llama(tmp_path: Path) -> None:
    out = pack_rotated(tmp_path, R1, "arm", "llama3")
    assert json.loads((out / "config.json").read_text())["model_type"] == "llama"
    assert PackedModel(out).rotations == Rotations(R1)
    assert TRANSFORM not in (out / "model.safetensors").read_bytes()[:20_000].decode("latin1")


def test_sizes_and_work_count_the_transform(tmp_path: Path) -> None:
    out = pack_rotated(tmp_path, R1)
    packed, model = PackedModel(out), describe(str(out))
    assert (model.transform, packed.scheme) == ("BF16", model.scheme)
    assert packed.scheme
    plan = make_plan(model.config, packed.scheme, model.float_dtype, transform=model.transform)
    assert plan.file_bytes == sum((out / name).stat().st_size for name in packed.files)
    plain = count_work(model.config, model.scheme, "f16", model.float_dtype)
    work = count_work(model.config, model.scheme, "f16", model.float_dtype, model.transform)
    assert work.weight_bytes - plain.weight_bytes == 2 * 128**2
    assert work.head - plain.head == 128**2


@pytest.mark.parametrize(
    ("rotations", "message"),
    [
        ([{"name": "R1"}, {"name": "R7"}, {"name": "R4", "size": 256}], "R7.*newer llamita"),
        ([{"name": "R1"}, {"name": "R3"}, {"name": "R4", "size": 256}], "R3.*newer llamita"),
        ([{"name": "R1"}, {"name": "R4", "size": 512}], "R4: size: expected 256, .* got 512"),
        ([{"name": "R4", "size": 256}], "lm_head.transform: unexpected"),
        ([], "lm_head.transform: unexpected"),
        ("R1", "rotations: expected a list"),
    ],
)
def test_rotations_that_cannot_be_run_are_refused_by_name(tmp_path: Path, rotations: Any, message: str) -> None:
    out = pack_rotated(tmp_path)
    reseal(out, rotations=rotations)
    with pytest.raises(InputError, match=message):
        PackedModel(out)
    assert verify(out).problems


def test_a_transform_is_expected_with_r1_and_tied_tables(tmp_path: Path) -> None:
    out = pack_rotated(tmp_path, R4)
    reseal(out, rotations=[{"name": "R1"}, {"name": "R4", "size": 256}])
    with pytest.raises(InputError, match=r"lm_head.transform: expected by .* missing"):
        PackedModel(out)


def test_a_size_without_a_matrix_is_refused(tmp_path: Path) -> None:
    out = pack_rotated(tmp_path, (), intermediate_size=32 * 9)  # 36 · 8
    reseal(out, rotations=[{"name": "R4", "size": 288}])
    assert PackedModel(out).rotations.r4_size == 288
    out = pack_rotated(tmp_path / "2", (), intermediate_size=32 * 257)  # 1028 · 8: a matrix too large
    reseal(out, rotations=[{"name": "R4", "size": 8224}])
    with pytest.raises(InputError, match="8224"):
        PackedModel(out)


@pytest.mark.parametrize("change", [('"BF16"', '"I32" '), ("[128,128]", "[64, 256]"), ("nan", "nan")])
def test_a_damaged_transform_is_refused(tmp_path: Path, change: tuple[str, str]) -> None:
    out = pack_rotated(tmp_path, R1)
    path = out / "model.safetensors"
    data = path.read_bytes()
    if change[0] == "nan":
        transform = PackedModel(out).rotations.head_transform
        assert transform is not None
        place = data.index(transform.tobytes())
        data = data[: place + 64] + b"\xff\x7f" + data[place + 66 :]
    else:
        place = data.index(b'"lm_head.transform"')
        head = data[place : place + 120].replace(b" ", b"")
        assert change[0].encode() in head
        changed = data[place : place + 120].replace(change[0].encode(), change[1].encode(), 1)
        data = data[:place] + changed + data[place + len(changed) :]
    path.write_bytes(data)
    values = json.loads((out / "llamita.json").read_text())
    files = values["files"] | {path.name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
    reseal(out, files=files)
    with pytest.raises(InputError, match=TRANSFORM):
        PackedModel(out)


def test_random_mutations_of_rotations_are_read_or_refused(tmp_path: Path) -> None:
    out, refused = pack_rotated(tmp_path), 0
    read: list[PackedModel] = []
    right = json.loads((out / "llamita.json").read_text())["rotations"]
    for case in range(200):
        rng = random.Random(case)
        mutated = mutate_value({"rotations": right}, rng)
        for _ in range(rng.randrange(3)):
            mutated = mutate_value(mutated, rng) if isinstance(mutated, dict) else {"rotations": mutated}
        rotations = mutated.get("rotations") if isinstance(mutated, dict) else mutated
        reseal(out, rotations=json.loads(json.dumps(rotations).replace("\\ud800", "?")))
        read.clear()
        error = outcome(lambda path: read.append(PackedModel(path)), out)
        assert error is not None or read[0].rotations.to_list() == rotations
        assert "\n" not in (error or "")
        refused += error is not None
    assert 150 < refused < 200
