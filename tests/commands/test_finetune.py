"""Run `llamita finetune` as a user does: check what it makes, prints and refuses."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import one_line, run
from jsonl import write_jsonl
from tiny import make_checkpoint

import llamita
from llamita.models.checkpoint import Checkpoint
from llamita.models.layer_kinds import count_kinds
from llamita.models.packed import PackedModel

pytest.importorskip("trl", reason="training is on the Torch side")
FAST = ("--set", "steps=2", "--set", "batch=4", "--set", "micro_batch=2", "--set", "length=64")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny base model."""
    return make_checkpoint(tmp_path / "model")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Forty short examples, and one that is too long."""
    lines = [{"prompt": f"say {i}", "completion": f"{i} {i}"} for i in range(40)]
    lines.append({"prompt": "long " * 40, "completion": "x"})
    return write_jsonl(tmp_path / "data.jsonl", lines)


def test_qat_trains_in_groups_that_fit(data: Path, tmp_path: Path, capsys: Any) -> None:
    model = make_checkpoint(tmp_path / "other", "tinyllama")  # 352 inputs of down_proj: no multiple of 64
    command = ("finetune", model, "--data", data, "--method", "qat", "--group-size", "64", *FAST)
    assert run(*command, "-o", tmp_path / "out") == 2
    assert "down_proj: expected inputs in groups of 64, got 352; try --group-size 32, or" in capsys.readouterr().err
    assert run(*command, "-o", tmp_path / "out", "--fit-groups") == 0
    packed = PackedModel(tmp_path / "out")
    assert count_kinds(packed.config, packed.scheme) == {"w4g64": 12, "w4g32": 2}
    assert packed.metadata.settings["recipe"]["fit_groups"] is True
    assert np.isfinite(llamita.load(tmp_path / "out").logits([1, 2, 3])).all()


def test_a_dry_run_shows_data_and_steps(model: Path, data: Path, capsys: Any) -> None:
    options = ("--data", data, "--method", "qat", "--set", "length=64", "--json")
    assert run("finetune", model, *options, "--dry-run") == 0
    captured = capsys.readouterr()
    values = json.loads(captured.out)
    assert values["examples"] + values["held_out_examples"] == 40
    assert values["learned_tokens"] > 0
    assert values["recipe"]["stages"][0]["quantized"] is True
    assert "fit_groups" not in values["recipe"]
    assert "1 of 41 examples have more than 64 tokens: left out (data.jsonl: line 41)" in captured.err
    assert run("finetune", model, "--data", data, "--set", "length=64", "--dry-run") == 0
    shown = capsys.readouterr()
    assert re.search(r"\d steps of \d+, learning rate 0.0002", shown.out)
    assert "little may be learned; try --set steps=20, more epochs" in shown.err  # the rows are fewer than a batch


def test_what_more_steps_take_is_said(model: Path, data: Path, capsys: Any) -> None:
    options = ("finetune", model, "--data", data, "--set", "length=16", "--set", "epochs=1", "--dry-run")
    for settings, note, schedule in (
        (("batch=8",), r"only \d steps: .* try --set batch=4, more epochs", r" \d steps of 8,"),
        (("batch=4",), r"only \d+ steps: .* try --set steps=20, more epochs", r" \d+ steps of 4,"),
        (("batch=400",), r"only 1 step: .* try --set steps=20, more epochs", r" 1 step of \d+,"),
    ):
        assert run(*options, *(word for setting in settings for word in ("--set", setting))) == 0
        shown = capsys.readouterr()
        assert re.search(note, shown.err)
        assert re.search(schedule, shown.out)


def test_qat_makes_a_packed_model_that_says_how(model: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert run("finetune", model, "--data", data, "--method", "qat", "-o", out, *FAST, "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert len(values["losses"]) == 2
    assert [name for name, _, _ in values["scores"]] == ["base", "base, rounded to nearest", "tuned, 4-bit"]
    assert values["tokens_per_second"] > 0
    record = json.loads((out / "llamita.json").read_text("utf-8"))
    assert record["method"] == "trained"
    assert record["settings"]["recipe"]["stages"][0]["steps"] == 2
    assert record["source"]["name"] == str(model)
    assert "Trained on `data.jsonl` in 1 stage, its rounding" in (out / "README.md").read_text("utf-8")
    assert (out / "loss.svg").read_text("utf-8").startswith("<svg")
    assert run("verify", out) == 0
    assert run("evaluate", out, "--text", data, "--json") == 0  # compares with the model that it was trained from
    assert not list(tmp_path.glob(".out*"))


def test_full_makes_a_checkpoint_that_quantize_takes(model: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert run("finetune", model, "--data", data, "--method", "full", "-o", out, *FAST) == 0
    shown = capsys.readouterr()
    assert "a float checkpoint" in shown.out
    assert "model, on 2 examples" in shown.out
    assert "tokens/s" in shown.err
    assert f"try: llamita quantize {out}" in shown.err
    assert re.search(r"stage 1: training loss \d\.\d+ to \d\.\d+.*, held out \d", shown.err)
    made, given = Checkpoint(out), Checkpoint(model)
    assert made.hf_config == given.hf_config
    kinds = [{n: t.dtype for file in one.files.values() for n, t in file.tensors.items()} for one in (made, given)]
    assert kinds[0] == kinds[1]
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {(out / "loss.svg").stat().st_mode & 0o777}
    training = json.loads((out / "llamita_training.json").read_text("utf-8"))
    assert training["losses"][0] != training["losses"][1]
    assert (out / "loss.svg").read_text("utf-8").startswith("<svg")
    assert run("quantize", out, "-o", tmp_path / "packed") == 0
    assert run("finetune", model, "--data", data, "--method", "full", "-o", out, *FAST) == 2  # is there
    assert run("finetune", model, "--data", data, "--method", "full", "-o", out, "--overwrite", *FAST) == 0


def test_without_held_out_examples_nothing_is_measured(model: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    options = ("--data", data, *FAST, "--set", "held_out=0", "-o", tmp_path / "out")
    assert run("finetune", model, *options) == 0
    assert "Held-out" not in capsys.readouterr().out


def test_lora_makes_adapters_that_peft_reads(model: Path, data: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "out"
    assert run("finetune", model, "--data", data, "-o", out, *FAST) == 0
    config = json.loads((out / "adapter_config.json").read_text("utf-8"))
    assert (config["r"], config["lora_alpha"]) == (16, 32)
    base = transformers.LlamaForCausalLM.from_pretrained(model)
    loaded = peft.PeftModel.from_pretrained(base, out)
    assert sum("lora_A" in name for name, _ in loaded.named_parameters()) == 2 * 7


def test_qat_lora_makes_a_packed_model_and_adapters(model: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    options = ("--data", data, "--method", "qat-lora", *FAST, "--set", "2.learning_rate=1e-2")
    assert run("finetune", model, *options, "-o", out, "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert len(values["losses"]) == 3
    for directory in (out, tmp_path / "out-adapter"):
        assert "stage 2" in (directory / "loss.svg").read_text("utf-8")
    assert values["try"].endswith(f"--adapter {tmp_path / 'out-adapter'}")
    llm = llamita.load(out, adapters={"a": tmp_path / "out-adapter"})
    ids = list(range(2, 30))
    assert np.abs(llm.logits(ids, adapter="a") - llm.logits(ids)).max() > 1e-3
    assert run("finetune", model, *options, "-o", out, "--overwrite") == 0
    capsys.readouterr()
    assert run("finetune", model, "--data", data, "--method", "qat", "-o", out, "--overwrite", *FAST) == 2
    assert "out-adapter has the adapters of the out that would be replaced" in one_line(capsys)


def test_a_teacher_is_not_replaced(model: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    teacher = tmp_path / "teacher"
    options = ("--data", data, *FAST)
    assert run("finetune", model, *options, "--method", "full", "-o", teacher) == 0
    capsys.readouterr()
    taught = ("--method", "qat", "--teacher", teacher, "-o", teacher, "--overwrite")
    assert run("finetune", model, *options, *taught) == 2
    assert "holds the source" in one_line(capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "magic"), "--method: expected one of lora, full, qat, qat-lora"),
        (("--recipe", "nothing"), "--recipe: expected llama3.2-qat-lora, lora, qat, sft, or a YAML file"),
        (("--task", "cooking"), "--task: expected one of translation"),
        (("--task", "translation"), "data.jsonl: line 1: expected the column source or sentence"),
        (("--preset", "llama3.2"), "--preset, --group-size, --fit-groups: expected a method that makes a 4-bit model"),
        (("--fit-groups",), "--fit-groups: expected a method that makes a 4-bit model, such as qat"),
        (("--method", "qat", "--set", "fit_groups=1"), "fit_groups: expected true or false, got 1"),
        (("--set", "rank=0"), "rank: expected a whole number of at least 1, got 0"),
        (("--set", "length=100000"), "length: expected at most 512 tokens, the model's context"),
        (("--set", "length=4"), "expected examples to learn from, got none"),
        (("--teacher", "/nowhere", "--set", "distill=0.5"), "/nowhere"),
        (("--set", "evaluate_every=2", "--set", "held_out=0"), "evaluate_every: expected held_out above 0, got 0"),
        (("--teacher", "/nowhere"), "--teacher: expected a stage that distils, got none"),
        (("--report-to", "nobody"), "--report-to: expected what transformers can report to, got nobody"),
        (("--method", "qat", "--set", "start=magic"), "start: expected one of rtn"),
        (("--preset", "magic"), "--preset: expected one of arm"),
        (("--group-size", "100"), "--group-size: expected 32"),
        (("--set", "stepz=1"), "--set: expected settings among preset, group_size, start, length"),
        (("--method", "qat", "--recipe", "lora"), "--recipe: expected no --method, got both"),
        (("-o", "."), "--out: expected a directory to make, got ."),
    ],
)
def test_mistakes_give_one_line(
    model: Path, data: Path, tmp_path: Path, capsys: Any, options: tuple[str, ...], message: str
) -> None:
    assert run("finetune", model, "--data", data, "-o", tmp_path / "out", *options) == 2
    assert message in one_line(capsys)
    assert not (tmp_path / "out").exists()


def test_what_a_run_with_other_settings_has_kept_is_not_thrown_away(
    model: Path, data: Path, tmp_path: Path, capsys: Any
) -> None:
    out, work = tmp_path / "out", tmp_path / ".out.work"
    work.mkdir()
    (work / "settings.json").write_text("{}")
    (work / "stage-1").mkdir()
    options = ("--data", data, "-o", out, *FAST)
    assert run("finetune", model, *options) == 2
    assert "expected what a run with these settings and data left" in capsys.readouterr().err
    assert (work / "stage-1").is_dir()
    assert run("finetune", model, *options, "--overwrite") == 0
    assert not work.exists()


def test_an_adapter_of_another_model_gives_a_warning(model: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    assert run("finetune", model, "--data", data, "-o", tmp_path / "adapter", *FAST) == 0
    other = make_checkpoint(tmp_path / "other", seed=5)
    for name, source in (("own", model), ("others", other)):
        assert run("quantize", source, "-o", tmp_path / name) == 0
    capsys.readouterr()
    options = ("--prompt", "a", "--max-tokens", "1", "--adapter", tmp_path / "adapter")
    assert run("generate", tmp_path / "own", *options) == 0
    assert "another model" not in capsys.readouterr().err
    assert run("generate", tmp_path / "others", *options) == 0
    assert "was trained on another model" in capsys.readouterr().err


def test_adapters_fit_only_what_training_began_with(model: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    """Equalized channels fit only the adapters that were trained with them."""
    out = tmp_path / "out"
    options = ("--data", data, "--method", "qat-lora", *FAST, "--set", "start=equalize")
    assert run("finetune", model, *options, "-o", out) == 0
    assert run("finetune", model, "--data", data, "-o", tmp_path / "float", *FAST) == 0
    capsys.readouterr()
    prompt = ("--prompt", "a", "--max-tokens", "1", "--adapter")
    assert run("generate", out, *prompt, tmp_path / "out-adapter") == 0
    record = tmp_path / "out-adapter" / "llamita_training.json"
    text = record.read_text("utf-8")
    assert '"train": "adapters"' in text
    record.write_text(text.replace('"train": "adapters"', '"train": "adaptors"'), "utf-8")  # the former spelling
    assert run("generate", out, *prompt, tmp_path / "out-adapter") == 0
    capsys.readouterr()
    assert run("generate", out, *prompt, tmp_path / "float") == 2
    assert "expected a model whose channels are those of its source" in one_line(capsys)


def test_a_packed_model_is_refused(model: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    assert run("quantize", model, "-o", tmp_path / "packed") == 0
    capsys.readouterr()
    assert run("finetune", tmp_path / "packed", "--data", data, "-o", tmp_path / "out") == 2
    assert "expected a float model, got a packed one" in one_line(capsys)


def test_bad_rows_can_be_skipped_and_are_counted(model: Path, tmp_path: Path, capsys: Any) -> None:
    lines = [json.dumps({"prompt": f"say {i}", "completion": f"it is {i}"}) for i in range(30)]
    lines[3], lines[7], lines[9] = '{"prompt": "a", "completion": ""}', "{", "[1]"
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(lines))
    options = ("finetune", model, "--data", data, "--set", "length=64", "--dry-run")
    assert run(*options) == 2
    assert "rows.jsonl: line 4: completion: expected a text, got an empty text" in one_line(capsys)
    assert run(*options, "--skip-bad-rows", "--json") == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["examples"] + found["held_out_examples"] == 27
    assert "3 of 30 rows cannot be used: left out (rows.jsonl: line 4, " in captured.err
    table = tmp_path / "rows.tsv"
    table.write_text("\n".join(f"one {i}\tun {i}" for i in range(20)) + "\nalone\nempty\t\n")
    assert run("finetune", model, "--data", table, *options[4:], "--task", "translation", "--skip-bad-rows") == 0
    assert "2 of 22 rows cannot be used" in capsys.readouterr().err
