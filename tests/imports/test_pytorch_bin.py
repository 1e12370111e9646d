"""Checkpoints with pytorch_model.bin alone: the same model, whole or in shards, and nothing in a file is run."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import one_line, run
from foreign_models import as_bin
from tiny import make_checkpoint

from llamita.imports.detect import BIN, detect_format
from llamita.imports.open import open_source
from llamita.models.checkpoint import Checkpoint
from llamita.numerics.affine import to_f32

torch = pytest.importorskip("torch", reason="such files are read by torch.load")


def weights(path: Path) -> dict[str, np.ndarray]:
    source = open_source(path)
    assert isinstance(source, Checkpoint)
    return {name: np.array(to_f32(file.read(name))) for file in source.files.values() for name in file.tensors}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", ["llama2", "llama32"])
def test_it_is_the_same_model(
    tmp_path: Path, family: str, shards: int, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("LLAMITA_CACHE", str(tmp_path / "cache"))
    expected = weights(make_checkpoint(tmp_path / "model", family))
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    source = as_bin(tmp_path / "model", shards, **frequencies)
    assert detect_format(source) == BIN
    found = weights(source)
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    assert run("quantize", source, "-o", tmp_path / "packed") == 0
    assert run("import", source, "-o", tmp_path / "again") == 0
    assert (tmp_path / "again" / "tokenizer.json").exists()


def test_its_plan_needs_no_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMITA_CACHE", str(tmp_path / "cache"))
    source = as_bin(make_checkpoint(tmp_path / "model", "llama32"))
    assert run("plan", source) == 0
    assert run("quantize", source, "--dry-run") == 0
    assert not (tmp_path / "cache").exists()


def test_a_tied_head_under_its_second_name_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMITA_CACHE", str(tmp_path / "cache"))
    model = make_checkpoint(tmp_path / "model", "llama32")
    source = as_bin(model)
    state = torch.load(source / "pytorch_model.bin", weights_only=True)
    torch.save({**state, "lm_head.weight": state["model.embed_tokens.weight"]}, source / "pytorch_model.bin")
    assert "lm_head.weight" not in weights(source)


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def test_nothing_in_a_file_is_run(tmp_path: Path, capsys: Any) -> None:
    source = as_bin(make_checkpoint(tmp_path / "model", "llama2"))
    mark = tmp_path / "was_run"
    torch.save({"model.norm.weight": Hostile(mark)}, source / "pytorch_model.bin")
    assert run("import", source, "-o", tmp_path / "out") == 2
    assert "expected a file of torch.save with tensors alone" in one_line(capsys)
    torch.save({"a": Hostile(mark)}, source / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert run("import", source, "-o", tmp_path / "out") == 2
    assert "pytorch_model.bin: expected a file of torch.save" in one_line(capsys)
    assert not mark.exists()
    assert not (tmp_path / "out").exists()


def test_damage_is_one_line(tmp_path: Path, capsys: Any) -> None:
    source = as_bin(make_checkpoint(tmp_path / "model", "llama2"), **{"model.extra": torch.ones(3, dtype=torch.int8)})
    assert run("import", source, "-o", tmp_path / "out") == 2
    assert "model.extra: expected floats, got torch.int8" in one_line(capsys)
    whole = (source / "pytorch_model.bin").read_bytes()
    (source / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    assert run("import", source, "-o", tmp_path / "out") == 2
    assert "is it truncated?" in one_line(capsys)


def test_a_checkpoint_with_safetensors_is_taken_as_it_is(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", "llama2")
    torch.save({}, model / "pytorch_model.bin")
    assert detect_format(model) is None
    assert json.loads((model / "config.json").read_text())
