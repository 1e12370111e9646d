"""Block tuning on tiny blocks: begins at what it is given, ends no worse, on the scheme's grid."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packed_models import float_weight
from tiny import make_checkpoint

from llamita import _native
from llamita.errors import InputError
from llamita.methods.settings import TuneSettings, settings_of
from llamita.methods.setup import Calibration, Setup
from llamita.models.checkpoint import Checkpoint
from llamita.numerics.affine import bf16_to_f32, f32_to_bf16
from llamita.numerics.scheme import QuantScheme, make_scheme
from llamita.quantize.rounded import RoundedSource

torch = pytest.importorskip("torch", reason="calibrated methods are on the Torch side")
pytest.importorskip("transformers", reason="calibrated methods are on the Torch side")
blocks = pytest.importorskip("llamita.methods.blocks")
calibrated = pytest.importorskip("llamita.methods.blockwise")
fakequant = pytest.importorskip("llamita.methods.activations")
tune = pytest.importorskip("llamita.methods.tune")

SCHEME = make_scheme("llama3.2")
SAMPLES, LENGTH = 12, 24


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(make_checkpoint(tmp_path_factory.mktemp("tune"), num_hidden_layers=1))


def rounded_block(source: Checkpoint, scheme: QuantScheme = SCHEME, samples: int = SAMPLES) -> Any:
    """The first block rounded to nearest, as the loop over blocks hands it to tuning."""
    tokens = np.random.default_rng(0).integers(0, source.config.vocab_size, (samples, LENGTH))
    rotary = blocks.rotary_tables(source.config, LENGTH)
    block = blocks.Block(source, 0, rotary, fakequant.quantize_activations)
    floats = blocks.Block(source, 0, rotary)
    weights, rounded = {}, {}
    for name in block.linears:
        full = f"{block.name}.{name}"
        weights[full] = block.weight(name)
        codes, scales, _ = _native.round_weights(weights[full].numpy(), 4, scheme.group_size, "search", None)
        rounded[full] = calibrated.Rounded(codes, scales)
        block.set_weight(name, torch.from_numpy(rounded[full].values()))
    with torch.no_grad():
        targets = floats(blocks.embed(source, tokens, None))
    inputs = blocks.embed(source, tokens, scheme)
    return calibrated.RoundedBlock(0, block, weights, rounded, inputs, targets)


def loss(block: Any, rounded: dict[str, Any], part: slice) -> float:
    """Squared error of the block with these codes and scales on some of its samples."""
    for name, layer in rounded.items():
        block.block.set_weight(name.removeprefix(f"{block.block.name}."), torch.from_numpy(layer.values()))
    return tune.measure(block.block, block.inputs[part], block.targets[part])


def tuned(block: Any, seed: int = 0, scheme: QuantScheme = SCHEME, **settings: Any) -> dict[str, Any]:
    with torch.no_grad():  # as the loop over blocks calls it
        named = {f"tune.{name}": value for name, value in settings.items()}
        return tune.tune_block(block, scheme, Setup(seed=seed, settings=named))


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name].codes, other[name].codes)
        np.testing.assert_array_equal(one[name].scales, other[name].scales)


@pytest.mark.parametrize("spread", [0.0, 0.5, 1.0])
def test_it_begins_at_the_codes_and_scales_that_it_is_given(source: Checkpoint, spread: float) -> None:
    """Also where they are far from the weights, as after GPTQ, and at the ends of their range."""
    block = rounded_block(source)
    random = np.random.default_rng(0)
    for name, layer in block.rounded.items():
        codes = np.clip(layer.codes + random.integers(-2, 3, layer.codes.shape), -8, 7).astype(np.int8)
        block.rounded[name] = calibrated.Rounded(codes, layer.scales)
    settings = TuneSettings(spread=spread)
    for name, layer in block.rounded.items():
        start = tune._Layer(block, name, SCHEME, settings)
        assert_same({name: start.rounded()}, {name: layer})
        weight = block.block.weight(name.removeprefix(f"{block.block.name}."))
        np.testing.assert_array_equal(weight.numpy(), layer.values())


def test_without_rates_nothing_moves(source: Checkpoint) -> None:
    block = rounded_block(source)
    assert_same(tuned(block, steps=3, rate=0, scale_rate=0), block.rounded)


@pytest.mark.parametrize("what", [{}, {"rate": 0, "scale_rate": 0.1}, {"scale_rate": 0}])
def test_the_error_falls_on_samples_that_it_has_not_learned_from(source: Checkpoint, what: Any) -> None:
    block = rounded_block(source)
    start = block.rounded
    found = tuned(block, steps=40, held_out=3, **what)
    # Tuning is never worse on its held-out samples. With a rate for codes alone it may keep the start.
    may_keep_start = what == {"scale_rate": 0}
    for part in (slice(-SAMPLES // 3, None), slice(None)):
        before, after = loss(block, start, part), loss(block, found, part)
        assert after < before or (may_keep_start and after == before)


def test_codes_and_scales_are_valid(source: Checkpoint) -> None:
    block = rounded_block(source)
    found = tuned(block, steps=30)
    moved = 0
    for name, layer in found.items():
        start = block.rounded[name]
        assert layer.codes.dtype == np.int8
        assert layer.scales.dtype == np.float32
        assert layer.codes.min() >= -8
        assert layer.codes.max() <= 7
        assert np.abs(layer.codes.astype(int) - start.codes).max() <= 1
        assert np.isfinite(layer.scales).all()
        assert (layer.scales >= 2.0**-126).all()
        np.testing.assert_array_equal(bf16_to_f32(f32_to_bf16(layer.scales)), layer.scales)
        moved += int((layer.codes != start.codes).sum()) + int((layer.scales != start.scales).sum())
    assert moved


def test_scales_in_float32_stay_off_the_grid_of_bf16(source: Checkpoint) -> None:
    scheme = make_scheme("arm", 32)
    found = tuned(rounded_block(source, scheme), scheme=scheme, steps=20)
    scales = np.concatenate([layer.scales.ravel() for layer in found.values()])
    assert (bf16_to_f32(f32_to_bf16(scales)) != scales).any()


def test_what_makes_it_worse_is_not_kept(source: Checkpoint) -> None:
    block = rounded_block(source)
    assert_same(tuned(block, steps=1, rate=50, scale_rate=50), block.rounded)


def test_the_block_is_left_without_gradients(source: Checkpoint) -> None:
    block = rounded_block(source)
    tuned(block, steps=2)
    for linear in block.block.linears.values():
        assert not linear.weight.requires_grad
        assert linear.weight.grad is None


def test_the_same_seed_gives_the_same_bytes(source: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    descend, drawn = tune._descend, list[tuple[int, ...]]()

    def recording(block: Any, layers: Any, samples: np.ndarray, *rest: Any) -> None:
        drawn.append(tuple(samples))
        descend(block, layers, samples, *rest)

    monkeypatch.setattr(tune, "_descend", recording)
    first = tuned(rounded_block(source), seed=5, steps=10)
    assert_same(tuned(rounded_block(source), seed=5, steps=10), first)
    tuned(rounded_block(source), seed=6, steps=10)
    steps = len(drawn) // 3
    assert drawn[:steps] == drawn[steps : 2 * steps]
    assert drawn[:steps] != drawn[2 * steps :]  # the codes may be the same: of a start that no step betters


def test_a_single_sample_is_enough(source: Checkpoint) -> None:
    block = rounded_block(source, samples=1)
    assert loss(block, tuned(block, steps=10), slice(None)) < loss(block, block.rounded, slice(None))


def test_every_sample_is_seen_once_before_any_again() -> None:
    draws = tune._draws(7, 3, np.random.default_rng(0))
    seen = np.concatenate([next(draws) for _ in range(14)])
    assert sorted(seen[:3]) == sorted(set(seen[:3]))
    assert np.bincount(seen).tolist() == [6] * 7


def test_steps_are_those_of_adam() -> None:
    random = torch.Generator().manual_seed(0)
    ours = torch.randn(20, generator=random)
    theirs = torch.nn.Parameter(ours.clone())
    adam = torch.optim.Adam([theirs], lr=0.01, betas=tune._MOMENTS, eps=tune._TINY)
    moments = tune._Adam(ours)
    for step in range(5):
        theirs.grad = torch.randn(20, generator=random)
        moments.step(ours, theirs.grad, step, 0.01)
        adam.step()
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"speed": 1}, "tune.speed: expected one of steps"),
        ({"steps": 0}, "tune.steps: expected a whole number from 1, got 0"),
        ({"steps": 10.0}, "tune.steps"),
        ({"held_out": 1}, "tune.held_out"),
        ({"spread": 1.5}, "tune.spread: expected a number from 0 to 1, got 1.5"),
        ({"rate": float("nan")}, "tune.rate"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        settings_of(TuneSettings, "tune", {f"tune.{name}": value for name, value in settings.items()})


def test_settings_of_other_methods_are_left_to_them() -> None:
    assert settings_of(TuneSettings, "tune", {"gptq.damping": 0.1, "tune.steps": 7}).steps == 7


@pytest.mark.parametrize("method", ["tune", "gptq+tune"])
def test_a_chain_tunes_every_block(tmp_path: Path, method: str) -> None:
    source = Checkpoint(make_checkpoint(tmp_path))
    tokens = np.random.default_rng(0).integers(0, source.config.vocab_size, (8, LENGTH)).astype(np.int32)
    setup = Setup(Calibration("random", "0" * 64, tokens), settings={"tune.steps": 20})
    before = RoundedSource(source, SCHEME, method.removesuffix("tune").rstrip("+") or "rtn", setup)
    after = RoundedSource(source, SCHEME, method, setup)
    for layer in range(source.config.layers):
        name = f"model.layers.{layer}.mlp.down_proj"
        one, other = (float_weight(model.weight(name)) for model in (before, after))
        if method == "tune":  # after gptq its own result may stay the best
            assert (one != other).any()
        assert np.abs(one - other).max() < 0.1
