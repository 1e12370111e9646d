"""Check what training with rounding begins with: chains of methods and their transforms."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import make_checkpoint

from llamita.errors import InputError
from llamita.methods.setup import Calibration, Setup
from llamita.models.checkpoint import Checkpoint
from llamita.numerics.packing import unpack_int4
from llamita.numerics.scheme import make_scheme

torch = pytest.importorskip("torch", reason="training is on the Torch side")
pytest.importorskip("trl", reason="training is on the Torch side")

from llamita.train.fake_quant import FakeQuantLinear, codes_of  # noqa: E402
from llamita.train.load import load_float  # noqa: E402
from llamita.train.prepare import prepare  # noqa: E402
from llamita.train.start import Start, parse_start, start  # noqa: E402

IDS = np.random.default_rng(0).integers(0, 256, (8, 64))


def begun(path: Path, place: Path, method: str) -> Start:
    """Return the start of training on a tiny model."""
    source, calibration = Checkpoint(path), Calibration("rows", "0" * 64, IDS.astype(np.int32))
    return start(source, source, make_scheme("llama3.2"), method, Setup(calibration), place)


def logits(model: Any) -> Any:
    """Return the logits of two rows."""
    with torch.no_grad():
        return model.eval()(input_ids=torch.from_numpy(IDS[:2])).logits


@pytest.mark.parametrize("family", ["llama2", "llama3", "llama32"])
@pytest.mark.parametrize("method", ["equalize", "llamita"])
def test_transforms_keep_the_function_and_codes_are_those_of_the_start(
    tmp_path: Path, family: str, method: str
) -> None:
    path = make_checkpoint(tmp_path / "model", family)
    model = load_float(Checkpoint(path))
    before, weights = logits(model), model.model.layers[0].mlp.down_proj.weight.clone()
    found = begun(path, tmp_path / "place", method)
    switch = prepare(model, found.rounded, found.floats)
    rounded = logits(model)
    switch.on = False
    assert not torch.allclose(model.model.layers[0].mlp.down_proj.weight, weights, rtol=0.1)
    scale = before.abs().max()
    # weights beyond the last code, and weights whose code is not the nearest, have moved
    assert (logits(model) - before).abs().max() < 0.3 * scale
    assert 0 < (rounded - before).abs().mean() < 0.2 * scale
    layer = model.model.layers[1].mlp.down_proj
    assert isinstance(layer, FakeQuantLinear)
    assert bool(layer.rotation) == (method == "llamita")
    packed = found.rounded.weight("model.layers.1.mlp.down_proj").packed  # type: ignore[union-attr]
    np.testing.assert_array_equal(codes_of(layer.weight, layer.scales, 4), unpack_int4(np.asarray(packed)))


def test_what_was_measured_is_kept(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model")
    first = begun(path, tmp_path / "place", "llamita")
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "place").rglob("*")}
    again = begun(path, tmp_path / "place", "llamita")
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "place").rglob("*")} == files
    name = "model.layers.0.mlp.down_proj"
    np.testing.assert_array_equal(first.floats.weight(name), again.floats.weight(name))


def test_a_start_is_a_chain_or_a_presets() -> None:
    chain, settings = parse_start("llamita")
    assert chain.transforms == ("equalize", "spinquant")
    assert settings["spinquant.rotations"] == "R4"
    assert parse_start("equalize+qronos")[1] == {}
    with pytest.raises(InputError, match="start: expected no learned rotations, got spinquant"):
        parse_start("spinquant")
    with pytest.raises(InputError, match="start: expected one of"):
        parse_start("nothing")
