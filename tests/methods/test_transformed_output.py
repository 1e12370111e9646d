"""Transformed models from end to end: command line, packed directory, engine, without Torch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import one_line, run
from tiny import make_checkpoint

from llamita.engine.llm import LLM
from llamita.errors import InputError
from llamita.imports.open import open_source
from llamita.loading import load
from llamita.methods.chain import parse_chain, transform
from llamita.methods.settings import check_settings
from llamita.methods.setup import Setup, parse_settings
from llamita.models.checkpoint import Checkpoint
from llamita.models.metadata import METADATA
from llamita.numerics.affine import to_f32
from llamita.numerics.scheme import make_scheme
from llamita.quantize.pipeline import quantize
from llamita.quantize.rounded import RoundedSource

PLAIN = {"spinquant.steps": 0, "spinquant.online": False}
TOKENS = np.arange(40, dtype=np.int32) * 7 % 300


def logits_of(model: LLM) -> np.ndarray:
    return np.concatenate([rows.copy() for rows in model.iter_logits(TOKENS)])


@pytest.mark.parametrize("method", ["equalize", "spinquant", "equalize+spinquant"])
@pytest.mark.parametrize("preset", ["arm", "llama3.2"])
def test_a_written_model_is_the_one_that_was_rounded(tmp_path: Path, method: str, preset: str) -> None:
    source = Checkpoint(make_checkpoint(tmp_path / "model", "llama32"))
    setup, scheme = Setup(settings=PLAIN), make_scheme(preset)
    quantize(source, "x", tmp_path / "out", scheme, method, setup)
    expected = logits_of(LLM(RoundedSource(source, scheme, method, setup)))
    np.testing.assert_array_equal(logits_of(load(tmp_path / "out")), expected)
    rounded = logits_of(LLM(RoundedSource(source, scheme)))
    assert not np.array_equal(rounded, expected)
    floats = logits_of(LLM(source))
    plain, transformed = (np.linalg.norm(logits - floats) for logits in (rounded, expected))
    assert transformed < 1.5 * plain  # random weights gain nothing, and lose nothing either


def test_float_tables_keep_their_dtype(tmp_path: Path) -> None:
    source = Checkpoint(make_checkpoint(tmp_path / "model", "llama32"))
    quantize(source, "x", tmp_path / "out", make_scheme("arm"), "spinquant", Setup(settings=PLAIN))
    packed = open_source(tmp_path / "out")
    changed = transform(source, parse_chain("spinquant"), Setup(settings=PLAIN))
    for name in ("model.embed_tokens", "lm_head"):
        table = packed.weight(name)
        assert isinstance(table, np.ndarray)
        assert table.dtype == np.uint16
        exact = changed.weight(name)
        np.testing.assert_allclose(to_f32(table), exact, rtol=2.0**-8)


def test_the_command_records_settings(tmp_path: Path, capsys: Any) -> None:
    source = make_checkpoint(tmp_path / "model", "llama32")
    assert run("quantize", source, "-o", tmp_path / "out", "--method", "equalize", "--json") == 0
    values = json.loads((tmp_path / "out" / METADATA).read_text())
    assert values["method"] == "equalize"
    assert run("verify", tmp_path / "out", "--json") == 0
    capsys.readouterr()
    assert run("quantize", source, "-o", tmp_path / "two", "--set", "equalize.rate=1", "--method", "equalize") == 2
    assert "equalize.rate: expected no settings" in one_line(capsys)
    assert run("quantize", source, "-o", tmp_path / "two", "--no-runtime-rotation") == 2
    assert "expected a method with spinquant, got rtn" in one_line(capsys)


def test_settings_as_users_write_them() -> None:
    texts = ["spinquant.steps=0", "spinquant.online=false", "spinquant.rotations=R1,R2", "spinquant.lr=1e-2"]
    assert parse_settings(texts) == {
        "spinquant.steps": 0, "spinquant.online": False, "spinquant.rotations": "R1,R2", "spinquant.lr": 0.01,
    }  # fmt: skip
    for text in ("steps=0", "spinquant.steps", "spinquant.=1"):
        with pytest.raises(InputError, match="--set"):
            parse_settings([text])
    with pytest.raises(InputError, match=r"tune.steps=1: expected a setting of spinquant, got one of tune"):
        check_settings(("spinquant",), parse_settings(["tune.steps=1"]))
