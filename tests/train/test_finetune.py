"""Check training with rounding in the loop: what its layers compute, what is kept, what is converted."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import make_checkpoint

import llamita
from llamita.errors import InputError
from llamita.methods.setup import Calibration, Setup
from llamita.models.checkpoint import Checkpoint
from llamita.models.packed import PackedModel
from llamita.models.weights import Int4Weight, Int8Weight
from llamita.numerics.affine import bf16_to_f32
from llamita.numerics.affine import dequantize as dequantized
from llamita.numerics.affine import quantize_activations as activations
from llamita.numerics.packing import unpack_int4
from llamita.numerics.scheme import make_scheme
from llamita.quantize.rounded import RoundedSource
from llamita.train.data import Data
from llamita.train.examples import IGNORED, Windows
from llamita.train.job import FinetuneJob
from llamita.train.recipe import Recipe, Stage, change, parse_recipe, read_recipe

torch = pytest.importorskip("torch", reason="training is on the Torch side")
pytest.importorskip("trl", reason="training is on the Torch side")

from layerwise import guided, linear_modules, watch  # noqa: E402

from llamita.methods.blocks import STEPS  # noqa: E402
from llamita.train import finetune  # noqa: E402
from llamita.train.fake_quant import FakeQuantEmbedding, FakeQuantLinear, SharedInput, Switch, codes_of  # noqa: E402
from llamita.train.load import load_float  # noqa: E402
from llamita.train.objective import loss_sum  # noqa: E402
from llamita.train.prepare import prepare  # noqa: E402
from llamita.train.save import save_float, save_packed  # noqa: E402

LINEARS = [name for step in STEPS for name in step]


def rows_of(count: int, length: int = 24, seed: int = 0) -> Windows:
    """Return random rows, two examples in each; all but their first tokens are learned."""
    ids = np.random.default_rng(seed).integers(0, 256, (count, length))
    positions = np.tile(np.concatenate([np.arange(length // 2)] * 2), (count, 1))
    return Windows(ids, np.where(positions == 0, IGNORED, ids), positions)


def recipe_of(**values: Any) -> Recipe:
    """Return a recipe of one stage of few steps."""
    stage = {"steps": 4, "batch": 4, "micro_batch": 2, "learning_rate": 1e-2, **values}
    return parse_recipe({"stages": [stage], "save_every": 2})


def data_of(rows: Windows, held_out: Windows) -> Data:
    """Return rows as if they came from a file."""
    return Data(rows, held_out, learned=len(rows.ids), measured=(), note=None, sha256="0" * 64)


def job_of(path: Path, work: Path, recipe: Recipe, data: Data | None = None, **values: Any) -> FinetuneJob:
    """Return a job on a tiny model, which trains in the directory `work`."""
    work.mkdir(exist_ok=True)
    return FinetuneJob(Checkpoint(path), recipe, data or data_of(rows_of(12), rows_of(3, seed=1)), work, **values)


def train(job: FinetuneJob) -> finetune.Trained:
    """Train in the directory that `job_of` has made."""
    return finetune.train(job, job.out)


def codes_and_scales(weight: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return codes, int8 (rows, columns), and scales, float32 (rows, groups)."""
    if isinstance(weight, Int8Weight):
        scales = weight.scales if weight.scales.dtype == np.float32 else bf16_to_f32(weight.scales)
        return np.asarray(weight.codes), scales.reshape(-1, 1)
    assert isinstance(weight, Int4Weight)
    scales = weight.scales if weight.scales.dtype == np.float32 else bf16_to_f32(weight.scales)
    return unpack_int4(np.asarray(weight.packed)), scales


# ---- layers ---------------------------------------------------------------------------------------


def test_a_layer_computes_what_its_codes_and_the_rounded_input_say() -> None:
    random = np.random.default_rng(0)
    linear = torch.nn.Linear(64, 8, bias=False)
    scales = np.exp2(random.integers(-6, -2, (8, 2))).astype(np.float32)
    layer = FakeQuantLinear(linear, 4, torch.from_numpy(scales), SharedInput(), Switch())
    x = random.standard_normal((3, 64)).astype(np.float32)
    codes = codes_of(layer.weight, layer.scales, 4)
    assert codes.min() >= -8
    assert codes.max() <= 7
    a, a_scales, zeros = activations(x)
    expected = dequantized(a, a_scales, zeros).astype(np.float64) @ dequantized(codes, scales).astype(np.float64).T
    found = layer(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_gradients_pass_as_if_nothing_were_rounded_but_beyond_the_last_code() -> None:
    linear = torch.nn.Linear(32, 1, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.linspace(-2.0, 2.0, 32)[None])
    scales = torch.full((1, 1), 0.125)
    layer = FakeQuantLinear(linear, 4, scales, SharedInput(), Switch())
    x = torch.linspace(-1.0, 1.0, 32).requires_grad_()
    layer(x).sum().backward()
    codes = codes_of(layer.weight, scales, 4)[0]
    steps = linear.weight.detach().numpy()[0] / 0.125
    is_inside = (np.rint(steps) >= -8) & (np.rint(steps) <= 7)
    assert 0 < is_inside.sum() < 32
    assert linear.weight.grad is not None
    assert x.grad is not None
    rounded = dequantized(*activations(x.detach().numpy()[None]))[0]
    np.testing.assert_array_equal(linear.weight.grad.numpy()[0], np.where(is_inside, rounded, 0))
    np.testing.assert_array_equal(x.grad.numpy(), codes * np.float32(0.125))


def test_a_switched_off_layer_is_the_float_one() -> None:
    linear, switch = torch.nn.Linear(32, 4, bias=False), Switch(on=False)
    layer = FakeQuantLinear(linear, 4, torch.full((4, 1), 0.1), SharedInput(), switch)
    x = torch.randn(2, 32)
    torch.testing.assert_close(layer(x), linear(x), rtol=0, atol=0)
    switch.on = True
    assert not torch.equal(layer(x), linear(x))


def test_an_embedding_rounds_the_rows_it_reads_and_passes_gradients() -> None:
    table, scales = torch.nn.Embedding(6, 16), torch.rand(6, 1) / 50 + 0.04
    layer = FakeQuantEmbedding(table, scales, Switch())
    found = layer(torch.tensor([[1, 4, 1]]))
    expected = dequantized(codes_of(table.weight, scales, 8), scales.numpy())[[1, 4, 1]]
    np.testing.assert_array_equal(found.detach().numpy()[0], expected)
    found.sum().backward()
    assert table.weight.grad is not None
    np.testing.assert_array_equal(table.weight.grad.numpy().sum(1), [0, 32, 0, 0, 16, 0])


@pytest.mark.parametrize("family", ["llama2", "llama32"])
@pytest.mark.parametrize("method", ["rtn", "qronos"])
def test_a_prepared_model_has_the_codes_it_was_given(tmp_path: Path, family: str, method: str) -> None:
    """Any method may have chosen them; weights stay where they are if their nearest code is theirs."""
    path = make_checkpoint(tmp_path / "model", family)
    tokens = rows_of(8, 64).ids.astype(np.int32)
    calibration = Calibration("rows", "0" * 64, tokens)
    setup = Setup(calibration) if method == "qronos" else None
    rounded = RoundedSource(Checkpoint(path), make_scheme("llama3.2"), method, setup)
    model = load_float(Checkpoint(path))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    prepare(model, rounded)
    modules = [f"model.layers.{i}.{name}" for i in range(2) for name in LINEARS]
    for name in [*modules, "model.embed_tokens", "lm_head"]:
        codes, scales = codes_and_scales(
            rounded.weight("model.embed_tokens" if name == "lm_head" and family == "llama32" else name)
        )
        layer = model.get_submodule(name)
        np.testing.assert_array_equal(layer.scales.numpy(), scales)
        np.testing.assert_array_equal(codes_of(layer.weight, layer.scales, layer.bits), codes, err_msg=name)
    if method == "rtn":
        moved = [(p.detach() != before[name]).float().mean().item() for name, p in model.named_parameters()]
        assert max(moved) < 0.05  # only those beyond the last code


# ---- the loss -------------------------------------------------------------------------------------


def test_the_loss_is_cross_entropy_and_the_teachers_kl_over_what_is_learned() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(2, 5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.tensor([[1, 2, IGNORED, 3, 4], [IGNORED, IGNORED, 6, 0, IGNORED]])
    log_p, log_t = logits[:, :-1].log_softmax(-1), teacher[:, :-1].log_softmax(-1)
    cross = kl = 0.0
    for row in range(2):
        for place in range(4):
            target = int(labels[row, place + 1])
            if target != IGNORED:
                cross -= log_p[row, place, target].item()
                kl += (log_t[row, place].exp() * (log_t[row, place] - log_p[row, place])).sum().item()
    loss, crossed = loss_sum(logits, labels, teacher, 0.75)
    assert loss.item() == pytest.approx(0.25 * cross + 0.75 * kl, rel=1e-6)
    assert crossed.item() == pytest.approx(cross, rel=1e-6)
    assert loss_sum(logits, labels, None, 0.0)[0].item() == pytest.approx(cross, rel=1e-6)
    nothing = loss_sum(logits, torch.full_like(labels, IGNORED), None, 0.0)
    assert nothing[0].item() == nothing[1].item() == 0


def test_the_loss_does_not_depend_on_how_it_is_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(3, 9, 11, requires_grad=True)
    labels = torch.randint(0, 11, (3, 9))
    whole = loss_sum(logits, labels, None, 0.0)[0]
    (gradient,) = torch.autograd.grad(whole, logits)
    monkeypatch.setattr("llamita.train.objective._CHUNK", 5)
    parts = loss_sum(logits, labels, None, 0.0)[0]
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts, logits)[0], gradient)


# ---- training -------------------------------------------------------------------------------------


def test_packed_examples_do_not_see_each_other(tmp_path: Path) -> None:
    """The second example of a row has the logits it has alone."""
    model = load_float(Checkpoint(make_checkpoint(tmp_path / "model"))).eval()
    rows = rows_of(1)
    ids, positions = torch.from_numpy(rows.ids), torch.from_numpy(rows.positions)
    with torch.no_grad():
        together = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, 12:]
        alone = model(input_ids=ids[:, 12:], position_ids=positions[:, 12:], use_cache=False).logits[0]
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_training_in_float_lowers_the_loss_and_saves_a_checkpoint(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model")
    data = data_of(rows_of(12), rows_of(12))  # what is learned is measured: random rows have nothing in common
    job = job_of(path, tmp_path / "work", recipe_of(steps=8), data)
    trained = train(job)
    before, after = trained.held_out_losses
    assert after < before - 0.1
    (tmp_path / "out").mkdir()
    save_float(trained.model, job.source, tmp_path / "out")
    saved = Checkpoint(tmp_path / "out")
    assert saved.info("model.norm.weight").dtype == job.source.info("model.norm.weight").dtype == "BF16"
    name = "model.layers.1.mlp.down_proj"
    expected = dict(trained.model.named_parameters())[f"{name}.weight"].detach().bfloat16().float()
    np.testing.assert_array_equal(bf16_to_f32(saved.weight(name)), expected.numpy())
    assert (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("family", "start"), [("llama3", "rtn"), ("llama32", "rtn"), ("llama3", "llamita"), ("llama32", "llamita")]
)
def test_trained_codes_are_the_packed_models_and_both_compute_the_same(tmp_path: Path, family: str, start: str) -> None:
    path = make_checkpoint(tmp_path / "model", family)
    recipe = replace(recipe_of(quantized=True, distill=0.5), start=start)
    job = job_of(path, tmp_path / "work", recipe)
    trained = train(job)
    scheme = finetune.scheme_of(job.recipe, job.source.config)
    out = tmp_path / "out"
    save_packed(trained.model, job.source, "tiny", out, scheme, job.out, {}, overwrite=False)
    packed = PackedModel(out)
    assert packed.rotations.names == (("R4",) if start == "llamita" else ())
    changed = 0
    original = RoundedSource(job.source, scheme)
    names = [f"model.layers.{i}.{name}" for i in range(2) for name in LINEARS] + ["model.embed_tokens"]
    for name in names + ([] if family == "llama32" else ["lm_head"]):
        layer = trained.model.get_submodule(name)
        codes, scales = codes_and_scales(packed.weight(name))
        np.testing.assert_array_equal(codes, codes_of(layer.weight, layer.scales, layer.bits), err_msg=name)
        np.testing.assert_array_equal(scales, layer.scales.numpy())
        changed += int((codes != codes_and_scales(original.weight(name))[0]).sum())
    assert changed > 100  # training moved codes, so the comparison says something
    ids = torch.from_numpy(rows_of(1).ids[:, :12])
    passed = watch(llamita.load(out, kv_dtype="f32"), ids)
    with guided(linear_modules(trained.model, packed), packed, passed):
        trained.model.eval()(input_ids=ids)


def test_a_killed_run_goes_on_to_the_same_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_checkpoint(tmp_path / "model")
    recipe = replace(recipe_of(quantized=True, distill=0.5, steps=6), save_every=2)
    whole = train(job_of(path, tmp_path / "whole", recipe))

    def stop(what: str, done: int, total: int) -> None:
        del what, total
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(job_of(path, tmp_path / "killed", recipe, progress=stop))
    (tmp_path / "killed" / "stage-1" / "checkpoint-6").mkdir()  # cut short, without its state
    torn = tmp_path / "killed" / "stage-1" / "checkpoint-5"
    torn.mkdir()
    (torn / "trainer_state.json").write_text('{"epoch": ')
    again = train(job_of(path, tmp_path / "killed", recipe))
    assert again.held_out_losses[-1] == whole.held_out_losses[-1]
    for name, parameter in again.model.named_parameters():
        assert torch.equal(parameter, dict(whole.model.named_parameters())[name]), name
    done = train(job_of(path, tmp_path / "killed", recipe))  # nothing left to do
    assert done.held_out_losses == again.held_out_losses


def test_rounding_begins_after_the_given_steps(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model")
    late = train(job_of(path, tmp_path / "late", recipe_of(quantized=True, fake_quant_after=3)))
    plain = train(job_of(path, tmp_path / "plain", recipe_of()))
    losses = [[row["loss"] for row in run.history if "loss" in row] for run in (late, plain)]
    np.testing.assert_allclose(losses[0][:3], losses[1][:3], rtol=0.02)  # weights beyond the last code begin at it
    assert losses[0][3] != pytest.approx(losses[1][3], abs=1e-4)  # rounded
    with pytest.raises(InputError, match="fake_quant_after: expected less than its 4 steps, got 4"):
        train(job_of(path, tmp_path / "never", recipe_of(quantized=True, fake_quant_after=4)))


def test_adapters_learn_while_the_model_stays(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model")
    recipe = recipe_of(train="adapters", quantized=True, targets=["q_proj", "down_proj"], rank=4, alpha=8)
    job = job_of(path, tmp_path / "work", recipe)
    trained = train(job)
    moved = {n for n, p in trained.model.named_parameters() if p.requires_grad}
    assert len(moved) == 2 * 2 * 2
    assert all("lora_" in name for name in moved)
    layer = trained.model.base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(layer.base_layer, FakeQuantLinear)
    assert layer.lora_B["default"].weight.abs().sum() > 0


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(*arguments: Any) -> Any:
        total, crossed = loss_sum(*arguments)
        return total * float("nan"), crossed

    monkeypatch.setattr("llamita.train.trainer.loss_sum", poisoned)
    job = job_of(make_checkpoint(tmp_path / "model"), tmp_path / "work", recipe_of())
    with pytest.raises(InputError, match="expected a finite loss, got nan at step 1; try --set learning_rate="):
        train(job)


def test_a_stage_ends_when_nothing_is_gained_any_more(tmp_path: Path) -> None:
    """Random rows are learned by heart, so that others only get worse."""
    recipe = replace(recipe_of(steps=40), evaluate_every=1, patience=3)
    trained = train(job_of(make_checkpoint(tmp_path / "model"), tmp_path / "work", recipe))
    by_step = {row["step"]: row["eval_loss"] for row in trained.history if "eval_loss" in row and row["step"]}
    losses = list(by_step.values())
    assert list(by_step) == list(range(1, len(losses) + 1))
    assert 4 <= len(losses) < 40
    assert min(losses[-3:]) >= min(losses[:-3])
    assert all(min(losses[i - 3 : i]) < min(losses[: i - 3]) for i in range(4, len(losses)))  # and not before


def test_nothing_to_learn_is_refused(tmp_path: Path) -> None:
    nothing = data_of(rows_of(0), rows_of(3, seed=1))
    job = job_of(make_checkpoint(tmp_path / "model"), tmp_path / "work", recipe_of(), nothing)
    with pytest.raises(InputError, match="expected something to learn"):
        train(job)


# ---- recipes --------------------------------------------------------------------------------------


def test_settings_change_a_recipe() -> None:
    recipe = change(recipe_of(), ["learning_rate=3e-4", "1.batch=8", "length=64", "targets=[q_proj]"])
    assert recipe.stages[0].learning_rate == 3e-4
    assert recipe.stages[0].batch == 8
    assert recipe.length == 64
    assert recipe.stages[0].targets == ("q_proj",)
    assert parse_recipe(recipe.to_dict()) == recipe


@pytest.mark.parametrize(("rows", "expected"), [(4, 3), (16, 3), (17, 6), (32, 6)])
def test_every_epoch_ends_with_what_is_left(rows: int, expected: int) -> None:
    stage = Stage(epochs=3, batch=16, micro_batch=4)
    assert stage.count_steps(rows) == expected


def test_the_former_spelling_of_adapters_is_read(tmp_path: Path) -> None:
    stage = {"steps": 2, "rank": 4}
    expected = parse_recipe({"stages": [{"train": "adapters", **stage}]})
    assert parse_recipe({"stages": [{"train": "adaptors", **stage}]}) == expected
    (tmp_path / "mine.yaml").write_text("stages:\n  - train: adaptors\n    steps: 2\n    rank: 4\n")
    assert read_recipe(str(tmp_path / "mine.yaml")) == expected
    assert change(expected, ["train=adaptors"]) == expected
    assert expected.to_dict()["stages"][0]["train"] == "adapters"


def test_adapters_are_the_last_stage() -> None:
    for stages in (["adapters", "weights"], ["adapters", "adapters"]):
        with pytest.raises(InputError, match="expected adapters once and, except for preferences, last"):
            parse_recipe({"stages": [{"train": train} for train in stages]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch", "expected NAME=VALUE"),
        ("2.batch=4", "expected a stage from 1 to 1, got '2'"),
        ("batches=4", "expected settings among .*, got 'batches'; did you mean batch[?]"),
        ("zzz=4", "expected settings among .*, got 'zzz'$"),
        ("batch=5", "expected a multiple of micro_batch, 2, got 5; try --set micro_batch=1 too"),
        ("batch=1", "expected a multiple of micro_batch, 2, got 1; try --set micro_batch=1 too"),
        ("train=all", "train: expected weights, adapters, got 'all'"),
        ("learning_rate=fast", "learning_rate: expected a number"),
        ("targets=[head]", "targets: expected some of"),
        ("targets=5", "targets: expected some of"),
        ("group_size=64.0", "group_size: expected 32, 64, 128, 256, got 64.0"),
        ("preset=none", "preset: expected arm, llama3.2, llamita"),
        ("patience=2", "expected evaluate_every above 0, got 0"),
    ],
)
def test_a_wrong_setting_is_named(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        change(recipe_of(), [text])
