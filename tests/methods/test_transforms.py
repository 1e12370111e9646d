"""Transforms keep the model's function: equalized and rotated weights give the logits that there were."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import make_checkpoint

pytest.importorskip("torch", reason="logits are computed with Torch")
pytest.importorskip("transformers", reason="logits are computed with transformers' layers")
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch_forward import logits_of

from llamita.errors import InputError
from llamita.imports.open import resolve
from llamita.methods import equalize, learn_rotations, spinquant
from llamita.methods.runtime_rotations import hadamard_transform
from llamita.methods.settings import SpinQuantSettings
from llamita.methods.setup import Calibration, Setup
from llamita.models.checkpoint import Checkpoint
from llamita.models.transformed import TransformedSource
from llamita.models.weights import FloatSource
from llamita.numerics.affine import to_f32
from llamita.numerics.hadamard import fast_hadamard

SAME = 1e-4  # relative, in float32
# Tied and not, biases, grouped heads, Hadamard matrices with K = 1, 12, 20, 44.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("llama32", {}),
    "untied": ("llama31", {}),
    "biases": ("llama2", {"attention_bias": True, "mlp_bias": True}),
    "K12": ("llama32", {"hidden_size": 96, "head_dim": 24, "intermediate_size": 192}),
    "K20 K44": ("llama3", {"hidden_size": 160, "head_dim": 40, "intermediate_size": 352}),
    "one kv head": ("tinyllama", {"intermediate_size": 224}),
}


def model(tmp_path: Path, name: str) -> Checkpoint:
    family, overrides = MODELS[name]
    return Checkpoint(make_checkpoint(tmp_path / "model", family, **overrides))


def setup_of(seed: int = 0, tokens: np.ndarray | None = None, **settings: Any) -> Setup:
    text = None if tokens is None else Calibration("test", "", tokens)
    return Setup(text, seed, settings={f"spinquant.{name}": value for name, value in settings.items()})


def tokens_of(source: FloatSource, samples: int = 2, length: int = 48) -> np.ndarray:
    rng = np.random.default_rng(5)
    return rng.integers(0, source.config.vocab_size, (samples, length)).astype(np.int32)


def assert_same_function(source: FloatSource, changed: FloatSource) -> None:
    tokens = tokens_of(source)
    before, after = logits_of(source, tokens), logits_of(changed, tokens)
    assert (after - before).norm() < SAME * before.norm()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rotations", ["R1", "R2", "R4", "R1,R2,R4"])
def test_rotations_keep_the_function(tmp_path: Path, name: str, rotations: str) -> None:
    source = model(tmp_path, name)
    rotated = spinquant.transform(source, setup_of(steps=0, rotations=rotations))
    assert rotated.rotations.names == tuple(rotations.split(","))
    down = "model.layers.0.mlp.down_proj"
    changed = not np.array_equal(to_f32(rotated.weight(down)), to_f32(source.weight(down)))
    assert changed == (rotations != "R2")
    assert_same_function(source, rotated)


@pytest.mark.parametrize("name", ["tied", "untied", "biases"])
def test_without_runtime_rotation_a_plain_llama_is_left(tmp_path: Path, name: str) -> None:
    source = model(tmp_path, name)
    rotated = spinquant.transform(source, setup_of(steps=0, online=False))
    assert not rotated.rotations.acts_at_run_time
    assert rotated.rotations.names == ("R1", "R2")
    assert not rotated.config.tied
    assert rotated.hf_config["tie_word_embeddings"] is False
    assert rotated.info("lm_head.weight").shape == source.info("model.embed_tokens.weight").shape
    assert_same_function(source, rotated)


def test_tied_tables_stay_tied(tmp_path: Path) -> None:
    source = model(tmp_path, "tied")
    rotated = spinquant.transform(source, setup_of(steps=0))
    assert rotated.config.tied
    transform = rotated.rotations.head_transform
    assert transform is not None
    np.testing.assert_allclose(transform, transform.T, atol=1e-6)
    gamma = source.vector("model.norm.weight")
    np.testing.assert_allclose(np.linalg.eigvalsh(transform), np.sort(gamma), atol=1e-5)
    assert (rotated.vector("model.norm.weight") == 1).all()


@pytest.mark.parametrize("name", MODELS)
def test_equalizing_keeps_the_function_and_stacks_with_rotations(tmp_path: Path, name: str) -> None:
    source = model(tmp_path, name)
    equalized = equalize.transform(source, Setup())
    assert_same_function(source, equalized)
    up = "model.layers.1.mlp.up_proj"
    assert not np.array_equal(equalized.weight(up), to_f32(source.weight(up)))
    assert_same_function(source, spinquant.transform(equalized, setup_of(steps=0)))


def test_pairs_out_of_balance_are_found(tmp_path: Path) -> None:
    """Scale channels of a pair against each other: equalizing brings back what it makes of the original."""
    source = Checkpoint(make_checkpoint(tmp_path / "model", "llama32"))
    stored, block = source.weight, "model.layers.0"
    factors = np.where(np.arange(256) % 31 == 3, 16.0, 1.0).astype(np.float32)
    values = factors[:64]  # of two key/value heads of 32

    def stressed(name: str) -> np.ndarray:
        weight = to_f32(stored(name))
        if name == f"{block}.mlp.up_proj":
            return weight * factors[:, None]
        if name == f"{block}.mlp.down_proj":
            return weight / factors
        if name == f"{block}.self_attn.v_proj":
            return weight * values[:, None]
        if name == f"{block}.self_attn.o_proj":
            return weight / values.reshape(2, 1, 32).repeat(2, axis=1).reshape(-1)
        return weight

    def equalized() -> list[np.ndarray]:
        changed = equalize.transform(source, Setup())
        names = ("mlp.up_proj", "mlp.down_proj", "self_attn.v_proj", "self_attn.o_proj")
        return [changed.weight(f"{block}.{name}") for name in names]

    plain = equalized()
    source.weight = stressed  # type: ignore[method-assign]
    # Each pair is balanced to the same proportions; only the channels' common factor may differ.
    for before, after in zip(plain, equalized(), strict=True):
        ratio = after / before
        np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-4)


def test_a_channel_that_nothing_feeds_keeps_its_scale() -> None:
    scales = equalize.pair_scales(np.array([0.0, 1.0, 4.0, 2.0]), np.array([1.0, 0.0, 9.0, 1.0]))
    assert (scales[:2] == 1).all()
    assert np.isfinite(scales).all()
    assert scales[2] > scales[3]


def test_unchanged_modules_are_those_of_the_source(tmp_path: Path) -> None:
    source = model(tmp_path, "tied")
    same = TransformedSource(source, {})
    for name in ("model.embed_tokens", "model.layers.0.self_attn.q_proj"):
        np.testing.assert_array_equal(same.weight(name), source.weight(name))
    assert same.stored_vector("model.norm.weight").dtype == np.uint16


def test_orders_that_would_change_the_function_are_refused(tmp_path: Path) -> None:
    rotated = spinquant.transform(model(tmp_path, "tied"), setup_of(steps=0))
    with pytest.raises(InputError, match=r"equalize\+spinquant"):
        equalize.transform(rotated, Setup())
    with pytest.raises(InputError, match="once"):
        spinquant.transform(rotated, setup_of(steps=0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rotations": "R3"}, "spinquant.rotations: expected some of R1,R2,R4"),
        ({"rotations": "R2,R1"}, "spinquant.rotations"),
        ({"rotations": "R4", "online": False}, "spinquant.rotations"),
        ({"rotations": 4}, "spinquant.rotations"),
        ({"steps": -1}, "spinquant.steps: expected a whole number from 0"),
        ({"steps": 1.5}, "spinquant.steps"),
        ({"batch": 0}, "spinquant.batch"),
        ({"lr": 0}, "spinquant.lr: expected a positive number"),
        ({"lr": float("nan")}, "spinquant.lr"),
        ({"dtype": "float16"}, "spinquant.dtype: expected one of float32, bfloat16, got 'float16'"),
        ({"loss": "mse"}, "spinquant.loss: expected one of kl, cross-entropy"),
        ({"online": 1}, "spinquant.online: expected true or false"),
        ({"rate": 1}, "spinquant.rate: expected one of rotations"),
        ({"steps": 1}, "expected calibration text"),
    ],
)
def test_settings_that_make_no_sense(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        spinquant.transform(model(tmp_path, "tied"), setup_of(**settings))


def test_sizes_without_a_hadamard_matrix_are_refused_by_name(tmp_path: Path) -> None:
    source = Checkpoint(make_checkpoint(tmp_path / "model", "llama32", intermediate_size=4 * 47))
    with pytest.raises(InputError, match="R4: expected a size with a known Hadamard matrix, got 188"):
        spinquant.transform(source, setup_of(steps=0))
    assert_same_function(source, spinquant.transform(source, setup_of(steps=0, rotations="R1,R2")))


# ---- learning ------------------------------------------------------------------------------------


def with_outliers(source: Checkpoint) -> Checkpoint:
    """Two channels of the residual stream that lie far off for every token, as large models have them."""
    stored = source.weight

    def weight(name: str) -> np.ndarray:
        values = to_f32(stored(name)).copy()
        if name == "model.embed_tokens":
            values[:, [3, 70]] += 12  # the others' deviation is 0.08
        return values

    source.weight = weight  # type: ignore[method-assign]
    return source


def unrotated(source: FloatSource) -> spinquant.RotationMatrices:
    config = source.config
    heads = np.tile(np.eye(config.head_dim), (config.layers, 1, 1))
    return spinquant.RotationMatrices(np.eye(config.hidden_size), heads, config.intermediate_size)


def learned_from(
    source: FloatSource, first: spinquant.RotationMatrices, tokens: np.ndarray, **settings: Any
) -> spinquant.RotationMatrices:
    setup = setup_of(tokens=tokens, **settings)
    return learn_rotations.learn(source, first, SpinQuantSettings(**settings), setup)


@pytest.mark.parametrize(("name", "dtype"), [("tied", "float32"), ("biases", "float32"), ("tied", "bfloat16")])
def test_learned_rotations_are_rotations_and_lower_the_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: str
) -> None:
    source, losses, mean_loss = with_outliers(model(tmp_path, name)), [], learn_rotations._mean_loss

    def kept(*arguments: Any) -> float:
        losses.append(mean_loss(*arguments))
        return losses[-1]

    monkeypatch.setattr(learn_rotations, "_mean_loss", kept)
    tokens = tokens_of(source, samples=4, length=32)
    learned = learned_from(source, unrotated(source), tokens, steps=10, batch=4, weights=0, dtype=dtype)
    assert learned.r1 is not None
    assert learned.r2 is not None
    np.testing.assert_allclose(learned.r1 @ learned.r1.T, np.eye(source.config.hidden_size), atol=1e-12)
    np.testing.assert_allclose(learned.r2[1].T @ learned.r2[1], np.eye(source.config.head_dim), atol=1e-12)
    before, after = losses
    assert after < 0.75 * before  # 0.26 to 0.57 over checkpoints, dtypes and two kinds of kernels
    assert_same_function(source, spinquant.rotated(source, learned))


@pytest.mark.parametrize(("after", "is_kept"), [(0.9, True), (1.0, False), (1.1, False), (np.nan, False)])
def test_what_was_learned_is_kept_if_it_lowers_the_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: float, is_kept: bool
) -> None:
    """Also by a run that finds it in the work directory."""
    source = model(tmp_path, "tied")
    first = spinquant.random_rotations(source, SpinQuantSettings(), 0)
    losses = iter([1.0, after])
    monkeypatch.setattr(learn_rotations, "_mean_loss", lambda *_: next(losses))
    setup = replace(setup_of(tokens=tokens_of(source)), work=tmp_path)
    settings = SpinQuantSettings(steps=1)
    found, again = (learn_rotations.learn(source, first, settings, setup) for _ in range(2))
    assert (found is not first) == (again is not first) == is_kept
    np.testing.assert_array_equal(found.r1, again.r1)  # type: ignore[arg-type]


class Dtypes(TorchDispatchMode):
    """Keeps what dtypes Torch's operations give, by their name, and by name and shape."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[Any, set[torch.dtype]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            name = func.overloadpacket.__name__
            for key in (name, (name, tuple(out.shape))):
                self.found.setdefault(key, set()).add(out.dtype)
        return out


def test_bf16_is_for_products_alone(tmp_path: Path) -> None:
    source = model(tmp_path, "tied")
    matrices = spinquant.random_rotations(source, SpinQuantSettings(), 0)
    learner = learn_rotations._Model(source, matrices, SpinQuantSettings(dtype="bfloat16"), torch.device("cpu"))
    rotations = {"r1": torch.from_numpy(matrices.r1).float(), "r2": torch.from_numpy(matrices.r2).float()}  # type: ignore[arg-type]
    rotations = {name: rotation.requires_grad_() for name, rotation in rotations.items()}
    tokens = torch.from_numpy(tokens_of(source).astype(np.int64))
    with Dtypes() as forward:
        loss = learner.loss(tokens, rotations)
    assert forward.found["mm"] == {torch.bfloat16}
    assert forward.found["round"] == forward.found["_log_softmax"] == {torch.float32}
    with Dtypes() as backward:
        torch.autograd.grad(loss, list(rotations.values()))
    for rotation in (rotations["r1"], rotations["r2"][0]):  # summed over all layers, or where it was used
        assert backward.found["add", tuple(rotation.shape)] == {torch.float32}
    with Dtypes() as compared, torch.no_grad():
        learner.loss(tokens, rotations, in_float32=True)
    assert compared.found["mm"] == compared.found["_log_softmax"] == {torch.float32}


@pytest.mark.parametrize("name", ["tied", "biases", "one kv head"])
def test_the_learner_computes_the_model(tmp_path: Path, name: str) -> None:
    """Float logits as transformers' layers give them, with and without rotations."""
    source = model(tmp_path, name)
    matrices = spinquant.random_rotations(source, SpinQuantSettings(), 0)
    learner = learn_rotations._Model(source, matrices, SpinQuantSettings(), torch.device("cpu"))
    tokens = tokens_of(source)
    expected = logits_of(source, tokens)
    rotations = {"r1": torch.from_numpy(matrices.r1).float(), "r2": torch.from_numpy(matrices.r2).float()}  # type: ignore[arg-type]
    for given in ({}, rotations):
        with torch.no_grad():
            logits = learner._logits(torch.from_numpy(tokens.astype(np.int64)), given, is_rounded=False)
        assert (logits - expected).norm() < SAME * expected.norm()


def test_the_same_seed_learns_the_same(tmp_path: Path) -> None:
    source = model(tmp_path, "tied")
    setup = setup_of(tokens=tokens_of(source), steps=2, batch=1)
    one, two = (spinquant.transform(source, setup).weight("model.layers.0.mlp.up_proj") for _ in range(2))
    np.testing.assert_array_equal(one, two)


def test_learning_that_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off at the second state that it writes, again and again, it ends at the same bits."""
    source = model(tmp_path, "tied")
    setup = setup_of(tokens=tokens_of(source), steps=33, batch=1)
    expected = spinquant.transform(source, setup).weight("model.layers.1.mlp.down_proj")
    write, written = learn_rotations.write_whole, [0]

    def cut_off(path: Path, fill: Any) -> None:
        written[0] += 1
        if written[0] == 2:
            raise KeyboardInterrupt
        write(path, fill)

    monkeypatch.setattr(learn_rotations, "write_whole", cut_off)
    setup = replace(setup, work=tmp_path)
    for _ in range(4):  # at steps 20, 30, 33, and with what it was compared with
        written[0] = 0
        with pytest.raises(KeyboardInterrupt):
            spinquant.transform(source, setup)
    written[0] = 0
    found = [spinquant.transform(source, setup).weight("model.layers.1.mlp.down_proj") for _ in range(2)]
    assert written[0] == 1  # the last of them had nothing left to do
    for weight in found:
        np.testing.assert_array_equal(weight, expected)


@pytest.mark.parametrize("size", [64, 192, 688])
def test_the_runtime_rotation_is_that_of_the_format(size: int) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, size)).astype(np.float32)
    np.testing.assert_allclose(hadamard_transform(torch.from_numpy(x)).numpy(), fast_hadamard(x), atol=2e-6)
    exact = x.astype(np.float64)
    found = hadamard_transform(torch.from_numpy(exact))  # float64 is left to Torch
    np.testing.assert_allclose(found.numpy(), fast_hadamard(exact), atol=1e-12)
    rounded = hadamard_transform(torch.from_numpy(x).bfloat16())
    assert rounded.dtype == torch.bfloat16
    np.testing.assert_allclose(rounded.float().numpy(), fast_hadamard(x), atol=0.05)


@pytest.mark.parametrize("size", [64, 192, 688])
def test_gradients_pass_the_runtime_rotation(size: int) -> None:
    """Hᵀ·g / √n, as Torch finds it in float64 from the sums themselves."""
    random = np.random.default_rng(0)
    x = torch.from_numpy(random.standard_normal((2, 3, size)).astype(np.float32)).requires_grad_()
    exact = x.detach().double().requires_grad_()
    weights = torch.from_numpy(random.standard_normal((2, 3, size)).astype(np.float32))
    (hadamard_transform(x) * weights).sum().backward()
    (hadamard_transform(exact) * weights.double()).sum().backward()
    assert x.grad is not None
    assert exact.grad is not None
    np.testing.assert_allclose(x.grad.numpy(), exact.grad.numpy(), atol=2e-6)


def test_rotations_of_the_embedded_model_keep_its_logits() -> None:
    source = Checkpoint(resolve("embedded"))
    assert_same_function(source, spinquant.transform(source, setup_of(steps=0)))
