"""Choosing how each layer is stored: the knapsack, the losses it rests on, and the command."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command import one_line, run
from places import HELD_OUT
from tiny import make_checkpoint

from llamita.commands.selection import parse_size
from llamita.engine.weights import load_weights
from llamita.errors import InputError
from llamita.imports.open import resolve
from llamita.models.checkpoint import Checkpoint
from llamita.models.layer_kinds import keep_float, with_layers
from llamita.models.names import linear_names
from llamita.models.packed import PackedModel
from llamita.models.sizes import make_plan
from llamita.models.verify import verify
from llamita.numerics.scheme import GROUP_SIZES, QuantScheme, make_scheme
from llamita.quantize.layer_choice import Goal, Meter, Option, allocate, candidates, measure_options, select
from llamita.quantize.rounded import RoundedSource
from llamita.text.tokenizer import Tokenizer


def tokens_of(source: Checkpoint, samples: int = 2, length: int = 64) -> np.ndarray:
    ids = np.array(Tokenizer(source.path, source.config).encode(HELD_OUT.read_text("utf-8")), np.int32)
    return ids[: samples * length].reshape(samples, length)


def file_bytes(source: Checkpoint, scheme: QuantScheme) -> int:
    return make_plan(source.config, scheme, lambda name: source.info(name).dtype).file_bytes


@pytest.fixture
def tiny(tmp_path: Path) -> Checkpoint:
    return Checkpoint(make_checkpoint(tmp_path / "src", "llama3"))


# ---- the knapsack --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_choices_are_near_the_best_of_all_and_within_the_budget(seed: int) -> None:
    rng = np.random.default_rng(seed)
    options = {}
    for layer in range(5):
        sizes = np.sort(rng.choice(np.arange(10, 100), 4, replace=False))
        losses = np.sort(rng.uniform(0, 1, 4))[::-1] + rng.normal(0, 0.05, 4)  # not always falling
        options[f"layer {layer}"] = [
            Option(f"{i}", int(s), float(x)) for i, (s, x) in enumerate(zip(sizes, losses, strict=True))
        ]
    smallest = sum(min(o.size for o in ways) for ways in options.values())
    for budget in range(smallest, smallest + 250, 10):
        chosen = allocate(options, budget)
        assert sum(option.size for option in chosen.values()) <= budget
        best = min(
            sum(option.loss for option in combination)
            for combination in itertools.product(*options.values())
            if sum(option.size for option in combination) <= budget
        )
        one_step = max(ways[0].loss - min(o.loss for o in ways) for ways in options.values())
        assert sum(option.loss for option in chosen.values()) <= best + one_step


def test_a_layer_that_counts_more_gets_more() -> None:
    options = {
        name: [Option("coarse", 10, 4 * weight), Option("fine", 20, weight)]
        for name, weight in (("a", 1.0), ("b", 2.0), ("c", 1.0))
    }
    assert {name: option.kind for name, option in allocate(options, 40).items()} == {
        "a": "coarse", "b": "fine", "c": "coarse"}  # fmt: skip
    assert {option.kind for option in allocate(options, 60).values()} == {"fine"}


# ---- losses --------------------------------------------------------------------------------------


def test_the_meter_measures_a_divergence(tiny: Checkpoint) -> None:
    tokens = tokens_of(tiny)
    meter = Meter(tiny, tokens)
    same = meter.divergence(load_weights(tiny))
    assert same.shape == (tokens.size,)
    assert abs(same.mean()) < 1e-6
    losses = [
        meter.divergence(load_weights(RoundedSource(tiny, make_scheme("llama3.2", group_size)))).mean()
        for group_size in (32, 128)
    ]
    assert 1e-4 < losses[0] < losses[1]


def test_layers_with_an_override_are_left_alone(tiny: Checkpoint) -> None:
    scheme = keep_float(tiny.config, make_scheme("llama3.2"), ["*.down_proj", "lm_head"])
    found = candidates(tiny, scheme)
    assert not [name for name in found if name.endswith("down_proj") or name == "lm_head"]
    assert found["model.layers.0.mlp.up_proj"] == ["w4g128", "w4g64", "w4g32", "w8"]  # 128 inputs
    assert "lm_head" in candidates(tiny, make_scheme("llama3.2"))
    assert "lm_head" not in candidates(tiny, make_scheme("arm"))
    _, options = measure_options(tiny, scheme, Meter(tiny, tokens_of(tiny, 1)))
    for name, ways in options.items():
        sizes, losses = [o.size for o in ways], [o.loss for o in ways]
        assert sizes == sorted(sizes), name
        assert losses == sorted(losses, reverse=True), name
        assert losses[-1] == 0


def test_the_choice_beats_one_group_size_of_the_same_bytes() -> None:
    source = Checkpoint(resolve("embedded"))
    scheme = make_scheme("llamita")
    size = file_bytes(source, replace(scheme, group_size=64))
    selection = select(source, scheme, tokens_of(source, 2, 256), Goal(max_size=size))
    assert selection.file_bytes == file_bytes(source, selection.scheme) <= size
    assert selection.scheme.name == "auto"
    assert selection.uniform is not None
    assert selection.uniform_loss is not None
    assert selection.uniform.group_size in GROUP_SIZES
    assert selection.measured.value < 0.9 * selection.uniform_loss.value
    assert 0.5 < selection.predicted / selection.measured.value < 2


def test_the_loss_asked_for_is_kept(tiny: Checkpoint) -> None:
    tokens = tokens_of(tiny)
    meter = Meter(tiny, tokens)
    scheme = make_scheme("llama3.2")
    coarse = meter.divergence(load_weights(RoundedSource(tiny, replace(scheme, group_size=128)))).mean()
    selection = select(tiny, scheme, tokens, Goal(max_loss=coarse / 2))
    assert selection.measured.value <= coarse / 2
    everywhere = with_layers(scheme, dict.fromkeys(linear_names(tiny.config), "w8"))
    assert selection.file_bytes < file_bytes(tiny, everywhere)


def test_goals_out_of_reach_are_refused(tiny: Checkpoint) -> None:
    with pytest.raises(InputError, match=r"--max-size: expected at least [\d,]+ bytes"):
        select(tiny, make_scheme("llama3.2"), tokens_of(tiny), Goal(max_size=1000))
    with pytest.raises(InputError, match="--max-loss: expected at least"):
        select(tiny, make_scheme("llama3.2"), tokens_of(tiny), Goal(max_loss=1e-9))


# ---- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [("700MB", 700_000_000), ("1.2 GB", 1_200_000_000), ("64KiB", 65536), ("1024", 1024), ("2gib", 2**31)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-3MB", "1,5GB", "3 bananas"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="such as 700MB"):
        parse_size(text)


def test_quantize_chooses_for_a_size(tmp_path: Path, tiny: Checkpoint, capsys: pytest.CaptureFixture) -> None:
    size = file_bytes(tiny, make_scheme("llama3.2", 64))
    (tmp_path / "text").write_text(HELD_OUT.read_text("utf-8")[:4000])
    text = ("--calibration", tmp_path / "text", "--samples", "2", "--length", "64")
    common = ("quantize", tmp_path / "src", "--preset", "llama3.2", *text, "--max-size", size)
    assert run(*common, "-o", tmp_path / "out", "--keep-float", "*.0.*.q_proj", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    packed = PackedModel(tmp_path / "out")
    assert verify(tmp_path / "out").problems == []
    assert told["file_bytes"] == told["selection"]["file_bytes"] <= size
    assert QuantScheme.from_dict(told["scheme"]) == packed.scheme
    assert packed.scheme.kind("model.layers.0.self_attn.q_proj").name == "float"
    assert len(packed.scheme.layers) > 1
    settings = packed.metadata.settings
    assert settings["auto.max_size"] == size
    assert settings["auto.calibration"]["samples"] == 2
    assert run(*common, "-o", tmp_path / "table") == 0  # for people
    shown = capsys.readouterr().out
    assert "how each layer is stored" in shown
    assert "loss measured" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-size", "1MB", "--max-loss", "0.1"), "expected one of them, got both"),
        (("--max-size", "big"), "such as 700MB"),
        (("--max-loss", "-1"), "above 0"),
        (("--max-loss", "nan"), "above 0"),
        (("--max-size", "1MB", "--dry-run"), "--dry-run: expected without"),
        (("--keep-float", "*.downproj"), "try *.down_proj"),
        (("--keep-float", "*.downproj", "--dry-run"), "try *.down_proj"),
        (("--keep-float", "*"), "leave something to round"),
    ],
)
def test_mistakes_take_one_line(
    tmp_path: Path, tiny: Checkpoint, capsys: pytest.CaptureFixture, options: tuple[str, ...], message: str
) -> None:
    assert run("quantize", tmp_path / "src", "-o", tmp_path / "out", *options) == 2
    assert message in one_line(capsys)
    assert not (tmp_path / "out").exists()


def test_a_plan_counts_what_stays_float(tmp_path: Path, tiny: Checkpoint, capsys: pytest.CaptureFixture) -> None:
    sizes = []
    for patterns in ((), ("--keep-float", "*.down_proj")):
        assert run("quantize", tmp_path / "src", "--dry-run", "--json", *patterns) == 0
        sizes.append(json.loads(capsys.readouterr().out)["tensor_bytes"])
    assert sizes[1] > sizes[0]


def test_inspect_and_evaluate_show_the_kinds(tmp_path: Path, tiny: Checkpoint, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    assert run("quantize", tmp_path / "src", "-o", out, "--keep-float", "*.down_proj") == 0
    capsys.readouterr()
    assert run("inspect", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["layers_by_kind"] == {"w4g32": 12, "float": 2}
    assert run("inspect", out, "--layers") == 0
    assert "w4g32" in capsys.readouterr().out
    (tmp_path / "text").write_text("A story about a dog. " * 20)
    assert run("evaluate", out, "--text", tmp_path / "text", "--baseline", tmp_path / "src") == 0
    assert "float (2)" in capsys.readouterr().out


def test_single_layers_are_measured_with_the_method(tmp_path: Path, tiny: Checkpoint) -> None:
    pytest.importorskip("torch")
    (tmp_path / "text").write_text(HELD_OUT.read_text("utf-8")[:4000])
    text = ("--calibration", tmp_path / "text", "--samples", "4", "--length", "64")
    size = file_bytes(tiny, make_scheme("llama3.2", 64))
    predicted = []
    for method in ("rtn", "gptq"):
        out = tmp_path / method
        assert run("quantize", tmp_path / "src", "-o", out, *text, "--max-size", size, "--method", method) == 0
        predicted.append(PackedModel(out).metadata.settings["auto.predicted_loss"])
    assert predicted[1] != predicted[0]
