"""Check preferences: pairs of answers as records, tokens and a stage of training."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import one_line, run
from jsonl import write_jsonl
from tiny import make_checkpoint

from llamita.errors import InputError
from llamita.models.checkpoint import Checkpoint
from llamita.text.chat_template import ChatTemplate
from llamita.text.tokenizer import Tokenizer
from llamita.train.preferences import Pair, read_pairs
from llamita.train.recipe import change, parse_recipe, read_recipe
from llamita.train.records import Record

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
BEFORE = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]


def said(text: str) -> list[dict[str, str]]:
    """Return a turn of the assistant."""
    return [{"role": "assistant", "content": text}]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Make a tiny base model; its tokens are bytes, BOS 256, end 257."""
    return make_checkpoint(tmp_path / "model")


@pytest.fixture
def tokenizer(model: Path) -> Tokenizer:
    """Return the tiny model's tokenizer."""
    return Tokenizer(model, Checkpoint(model).config)


def pair_of(tokenizer: Tokenizer, template: str | None, **values: Any) -> Pair:
    """Return the pair of one record."""
    chat = None if template is None else ChatTemplate(template, bos_token="", eos_token="")
    return read_pairs([Record("here", values)], tokenizer, chat, 1000)[0][0]


def test_texts_are_a_prompt_and_two_answers(tokenizer: Tokenizer) -> None:
    pair = pair_of(tokenizer, None, prompt="p", chosen="good", rejected="bad")
    assert pair.prompt == tokenizer.encode("p\n")
    assert [tokenizer.decode(ids[:-1]) for ids in (pair.chosen, pair.rejected)] == ["good", "bad"]
    assert {pair.chosen[-1], pair.rejected[-1]} == {tokenizer.eos_token_ids[0]}
    assert pair.length == len(pair.prompt) + 5


@pytest.mark.parametrize("has_prompt", [True, False])
def test_only_the_last_of_many_turns_is_compared(tokenizer: Tokenizer, has_prompt: bool) -> None:
    if has_prompt:
        values: dict[str, Any] = {"prompt": BEFORE, "chosen": said("good"), "rejected": said("bad")}
    else:
        values = {"chosen": [*BEFORE, *said("good")], "rejected": [*BEFORE, *said("bad")]}
    pair = pair_of(tokenizer, CHAT, **values)
    assert tokenizer.decode(pair.prompt) == "<user>hi</user><assistant>a</assistant><user>b</user><assistant>"
    assert tokenizer.decode(pair.chosen[:-1]) == "good</assistant>"
    assert tokenizer.decode(pair.rejected[:-1]) == "bad</assistant>"


def test_a_prompt_that_the_conversations_begin_with_stands_there_once(tokenizer: Tokenizer) -> None:
    said_once = [{"role": "user", "content": "Hi?"}]
    pair = pair_of(
        tokenizer, CHAT, prompt="Hi?", chosen=[*said_once, *said("good")], rejected=[*said_once, *said("bad")]
    )
    assert tokenizer.decode(pair.prompt) == "<user>Hi?</user><assistant>"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": "p", "chosen": "a"}, "here: rejected: expected objects"),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "here: expected two answers that differ"),
        ({"chosen": "a", "rejected": "b"}, "here: chosen: expected the assistant's answer to a prompt"),
        ({"chosen": [*BEFORE, *said("a")], "rejected": [BEFORE[0], *said("b")]}, "the same conversation"),
        ({"prompt": "p", "chosen": "a", "rejected": BEFORE}, "here: rejected: expected an answer, or the turns"),
        ({"prompt": "p", "chosen": said(" "), "rejected": "a"}, "here: chosen: expected the assistant's"),
    ],
)
def test_a_record_that_is_no_pair_is_named(tokenizer: Tokenizer, values: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pair_of(tokenizer, None, **values)


def test_long_pairs_are_left_out_with_a_note(tokenizer: Tokenizer) -> None:
    records = [Record(f"line {i}", {"prompt": "p" * i, "chosen": "a", "rejected": "b"}) for i in (1, 50)]
    pairs, note = read_pairs(records, tokenizer, None, 20)
    assert [pair.place for pair in pairs] == ["line 1"]
    assert note == "1 of 2 pairs have more than 20 tokens: left out (line 50)"
    with pytest.raises(InputError, match="expected pairs of at most 2 tokens, got none of 2"):
        read_pairs(records, tokenizer, None, 2)


def test_stages_with_preferences_come_last_and_train_adapters() -> None:
    recipe = read_recipe("llama3.2-qat-lora")
    assert [stage.prefers for stage in recipe.stages] == [False, False, True]
    assert [stage.train for stage in recipe.without_preferences().stages] == ["weights", "adapters"]
    assert change(recipe, ["distill=0.3"]).stages[2].distill == 0
    with pytest.raises(InputError, match="no distill"):
        change(recipe, ["3.distill=0.3"])
    with pytest.raises(InputError, match="preferences: expected train: adapters"):
        parse_recipe({"stages": [{"objective": "preferences"}]})
    adapters, prefers = {"train": "adapters"}, {"train": "adapters", "objective": "preferences"}
    for stages in ([adapters, adapters], [prefers, adapters], [prefers, prefers]):
        with pytest.raises(InputError, match="expected adapters once"):
            parse_recipe({"stages": stages})


# ---- training -------------------------------------------------------------------------------------

FAST = ("--set", "steps=2", "--set", "batch=4", "--set", "micro_batch=2", "--set", "length=64")


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Write forty examples and forty pairs."""
    examples = [{"prompt": f"say {i}", "completion": f"{i} {i}"} for i in range(40)]
    pairs = [{"prompt": f"say {i}", "chosen": "yes", "rejected": "no"} for i in range(40)]
    return write_jsonl(tmp_path / "data.jsonl", examples), write_jsonl(tmp_path / "pairs.jsonl", pairs)


def test_three_stages_learn_what_is_preferred(
    model: Path, files: tuple[Path, Path], tmp_path: Path, capsys: Any
) -> None:
    pytest.importorskip("trl", reason="training is on the Torch side")
    out = tmp_path / "out"
    options = ("--data", files[0], "--preferences", files[1], "--recipe", "llama3.2-qat-lora", *FAST,
               "--set", "3.steps=12", "--set", "3.learning_rate=5e-3")  # fmt: skip
    assert run("finetune", model, *options, "-o", out, "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["losses"]) == 4
    assert run("verify", out) == 0
    record = json.loads((tmp_path / "out-adapter" / "llamita_training.json").read_text("utf-8"))
    logged = [row for row in record["history"] if row["stage"] == 3]
    losses = [row["loss"] for row in logged if "loss" in row]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-5)  # nothing differs from the reference yet
    assert losses[-1] < 0.5
    held_out = next(row for row in logged if "eval_rewards/accuracies" in row)
    assert held_out["eval_rewards/accuracies"] == 1.0
    saved = (tmp_path / "out-adapter" / "adapter_model.safetensors").read_bytes()
    assert b"ref" not in saved[: int.from_bytes(saved[:8], "little")].replace(b"pref", b"")


def test_a_killed_stage_goes_on_to_the_same_weights(
    model: Path, files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl", reason="training is on the Torch side")
    from llamita.train.preference_trainer import PairTrainer

    recipe = tmp_path / "dpo.yaml"
    recipe.write_text("{save_every: 2, stages: [{train: adapters, objective: preferences, steps: 4, batch: 4,"
                      " micro_batch: 2, learning_rate: 1e-2}]}", "utf-8")  # fmt: skip
    options = ("--data", files[0], "--preferences", files[1], "--recipe", recipe, "--set", "length=64")
    assert run("finetune", model, *options, "-o", tmp_path / "whole") == 0
    step = PairTrainer.training_step

    def killed(self: Any, *arguments: Any, **values: Any) -> Any:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *arguments, **values)

    monkeypatch.setattr(PairTrainer, "training_step", killed)
    assert run("finetune", model, *options, "-o", tmp_path / "again") == 130
    monkeypatch.undo()
    assert run("finetune", model, *options, "-o", tmp_path / "again") == 0
    name = "adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_scores_are_those_of_trl() -> None:
    torch = pytest.importorskip("torch", reason="training is on the Torch side")
    pytest.importorskip("trl", reason="training is on the Torch side")
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    from llamita.train.preference_trainer import label_scores

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                         num_attention_heads=2, vocab_size=50))  # fmt: skip
    ids = torch.randint(0, 50, (2, 9))
    labels = ids.masked_fill(torch.arange(9) < 4, -100)
    ours = label_scores(model(input_ids=ids).logits, labels)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    theirs = model(input_ids=ids, labels=labels, fused_lm_head=True)
    for name in ("log_probs", "entropy", "mean_logits"):
        torch.testing.assert_close(ours[name], getattr(theirs, name), rtol=1e-4, atol=1e-5)
    assert torch.equal(ours["is_top1"].bool(), theirs.is_top1.bool())


def test_preferences_and_recipe_have_to_go_together(
    model: Path, files: tuple[Path, Path], tmp_path: Path, capsys: Any
) -> None:
    data, pairs = files
    assert run("finetune", model, "--data", data, "--preferences", pairs, "-o", tmp_path / "o") == 2
    assert "--preferences: expected a recipe with a stage that learns from them" in one_line(capsys)
    options = ("--recipe", "llama3.2-qat-lora", *FAST, "--dry-run")
    assert run("finetune", model, "--data", data, *options) == 0
    assert "preferences" not in capsys.readouterr().out
    assert run("finetune", model, "--data", data, "--preferences", pairs, *options) == 0
    assert "stage 3: adapters, rounded, preferences" in capsys.readouterr().out
