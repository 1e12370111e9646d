"""`llamita evaluate` as a user meets it: tables, JSON, one-line errors."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from command import run as run_command
from packed_models import write_base_and_packed

from llamita.loading import load
from llamita.models.checkpoint import Checkpoint
from llamita.numerics.scheme import make_scheme
from llamita.quantize.pipeline import quantize

SENTENCE = "The rain fell in torrents, except at occasional intervals, when it was checked by a gust of wind. "


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A float model, two quantized ones and a text."""
    root = write_base_and_packed(tmp_path_factory.mktemp("evaluate"), "arm")
    (root / "text.txt").write_text(SENTENCE * 12)
    return root


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `llamita evaluate`."""
    code = run_command("evaluate", *arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_several_directories_give_one_table(root, capsys):
    code, out, err = run(capsys, root / "g128", root / "g32", "--text", root / "text.txt")
    assert code == 0, err
    header = next(line for line in out.splitlines() if "g128" in line)
    assert header.index("base (float)") < header.index("g128") < header.index("g32")
    for label in ("scheme", "weight files", "token perplexity", "mean KL", "top-1 agreement"):
        assert any(line.strip().startswith(label) for line in out.splitlines()), label
    chunks = 3  # of 512 tokens, the context, in a text of 12 sentences; each has one token not predicted
    assert f"{12 * len(SENTENCE) - chunks:,} tokens" in err


def test_the_table_says_what_was_done(root, capsys):
    few = root / "few.txt"
    few.write_text(SENTENCE)
    _, out, err = run(capsys, root / "g32", "--text", root / "text.txt", "--max-seq-len", 99999)
    assert "token perplexity, chunks of 512 " in out
    assert "  over the float model's" in out
    assert "few tokens" not in err
    _, out, err = run(capsys, root / "base", "--text", few, "--baseline", root / "g32", "--max-seq-len", 300)
    assert "token perplexity, chunks of 300 " in out
    assert "  over the baseline's" in out
    assert "few tokens: the figures mean little" in err


def test_json_has_every_number_and_nothing_else(root, capsys):
    arguments = (root / "g128", root / "g32", "--text", root / "text.txt", "--json")
    code, out, err = run(capsys, *arguments)
    assert (code, err) == (0, "")
    values = json.loads(out)
    base, g128, g32 = values["models"]
    assert [m["name"] for m in values["models"]] == ["base", "g128", "g32"]
    assert [m["is_baseline"] for m in values["models"]] == [True, False, False]
    assert (base["scheme"], g128["scheme"]["group_size"], g32["scheme"]["group_size"]) == (None, 128, 32)
    assert base["text"]["kl"] is None
    for model in (g128, g32):
        interval = model["text"]["kl"]
        assert 0 < interval["low"] < interval["value"] < interval["high"]
        assert 0.2 < model["text"]["agreement"]["value"] < 1
    assert json.loads(run(capsys, *arguments)[1]) == values  # the bootstrap's seed is fixed


def test_limit_and_length_bound_the_chunks(root, capsys):
    options = ("--text", root / "text.txt", "--limit", 2, "--max-seq-len", 100, "--json", "--baseline", "none")
    values = json.loads(run(capsys, root / "g128", *options)[1])
    assert [m["text"]["tokens"] for m in values["models"]] == [198]
    assert values["models"][0]["text"]["kl"] is None


def test_the_cache_is_for_all_but_the_baseline(root, capsys):
    arguments = (root / "g128", "--text", root / "text.txt", "--json")
    first, second = (json.loads(run(capsys, *arguments, *more)[1]) for more in ((), ("--kv-cache", "int8")))
    assert [model["kv_cache"] for model in first["models"]] == ["f32", "f16"]
    assert [model["kv_cache"] for model in second["models"]] == ["f32", "int8"]
    perplexities = [[m["text"]["perplexity"] for m in values["models"]] for values in (first, second)]
    assert perplexities[0][0] == perplexities[1][0]
    assert perplexities[0][1] != perplexities[1][1]
    fast = json.loads(run(capsys, *arguments, "--float-math", "bf16")[1])["models"]
    here = load(root / "g128", float_math="bf16").float_math  # its tables are BF16
    assert [model["float_math"] for model in fast] == ["f32", here]
    assert fast[0]["text"]["perplexity"] == perplexities[0][0]
    code, _, err = run(capsys, *arguments, "--float-math", "bf16x2")
    assert (code, "--float-math: expected one of f32, bf16, got 'bf16x2'" in err) == (2, True)
    code, _, err = run(capsys, *arguments, "--kv-cache", "int4")
    assert code == 2
    assert "expected one of f32, f16, int8, got 'int4'" in err


def test_the_embedded_text_is_the_default(capsys):
    values = json.loads(run(capsys, "embedded", "--limit", 1, "--json")[1])
    assert values["text"] == {"name": "embedded text", "whole_chunks": False}
    assert values["models"][0]["text"]["tokens"] == 2047


def test_the_embedded_text_is_refused_for_another_tokenizer(root, capsys):
    code, out, err = run(capsys, root / "base")
    assert (code, out) == (2, "")
    assert "--text: expected a file, got none, and the tokenizer of base is not the embedded model's" in err


def test_local_wikitext_through_lm_eval(root, capsys, tmp_path):
    pytest.importorskip("lm_eval", reason="needs LM Eval: pip install '.[torch]'")
    raw = tmp_path / "wiki.test.raw"
    raw.write_text("".join(f" \n = Page {i} = \n \n {SENTENCE * 4}\n \n" for i in range(3)))
    code, out, err = run(capsys, root / "g128", "--wikitext", raw, "--limit", 2)
    assert code == 0, err
    for label in ("word perplexity", "byte perplexity", "bits per byte", "token perplexity", "mean KL"):
        assert any(line.strip().startswith(label) for line in out.splitlines()), label
    assert "not WikiText-2's test split" in err
    code, out, err = run(capsys, root / "g128", "--wikitext", raw, "--limit", 2, "--json")
    values = json.loads(out)
    assert values["lm_eval"]
    for model in values["models"]:
        (task,) = model["tasks"]
        assert (task["task"], task["documents"]) == ("wikitext", 2)
        assert task["metrics"]["word_perplexity"] > task["metrics"]["byte_perplexity"] > 1
        assert model["text"]["perplexity"] > 1


def test_without_lm_eval_one_line_says_what_to_install(root, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "llamita.evaluate.lm_eval", raising=False)
    for name in ("lm_eval", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    code, out, err = run(capsys, root / "g128", "--tasks", "wikitext")
    assert (code, out) == (1, "")
    assert "pip install 'llamita[torch]'" in err
    assert len(err.strip().splitlines()) == 1


def test_a_file_that_is_missing_is_said_before_a_package_that_is(root, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "llamita.evaluate.lm_eval", raising=False)
    code, _, err = run(capsys, root / "base", "--wikitext", root / "nofile")
    assert code == 2
    assert "--wikitext: expected the file wiki.test.raw, got none" in err


def test_without_network_one_line_says_what_to_give(root, capsys, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval", reason="needs LM Eval: pip install '.[torch]'")
    harness = pytest.importorskip("llamita.evaluate.lm_eval")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    only_wikitext = lm_eval.tasks.TaskManager(  # the whole index takes seconds
        include_path=Path(lm_eval.__file__).parent / "tasks" / "wikitext", include_defaults=False
    )
    monkeypatch.setattr(harness, "TaskManager", lambda **_: only_wikitext)
    code, out, err = run(capsys, root / "g128", "--tasks", "wikitext")
    assert (code, out) == (1, "")
    assert "try --wikitext FILE with a local wiki.test.raw" in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/model"], "expected a model directory"),
        (["base", "--text", "missing.txt"], "expected a text file, got none"),
        (["base", "--text", "bytes.txt"], "expected UTF-8, got a stray byte at 3"),
        (["base", "--text", "short.txt"], "expected at least 2 tokens, got 1"),
        (["base", "--wikitext", "missing.raw"], "expected the file wiki.test.raw, got none"),
        (["g128", "--baseline", "nowhere", "--text", "text.txt"], "nowhere: expected a model directory"),
        (["base", "--limit", "0"], "limit"),
        (["base", "--max-seq-len", "1"], "max-seq-len"),
        (["base", "base"], "expected every model once"),
        ([], "SRC"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(root, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(root)
    Path("bytes.txt").write_bytes(b"abc\xff")
    Path("short.txt").write_bytes(b"a")
    if "--wikitext" in arguments:
        pytest.importorskip("lm_eval", reason="needs LM Eval: pip install '.[torch]'")
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_a_recorded_file_that_is_a_pipe_is_refused_without_waiting(root, capsys, tmp_path):
    source = Path(shutil.copytree(root / "base", tmp_path / "base"))
    quantize(Checkpoint(source), str(source), tmp_path / "out", make_scheme("arm"))
    (source / "config.json").unlink()
    os.mkfifo(source / "config.json")
    code, out, err = run(capsys, tmp_path / "out", "--text", root / "text.txt")
    assert (code, out) == (2, "")
    assert "expected a regular file" in err


def test_a_source_that_moved_is_not_looked_for_on_the_hub(root, capsys, tmp_path, monkeypatch):
    shutil.copytree(root / "base", tmp_path / "own" / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llamita.imports.hub.download", None)  # not reached
    quantize(Checkpoint(Path("own/model")), "own/model", tmp_path / "out", make_scheme("arm"))
    shutil.rmtree(tmp_path / "own")
    code, out, err = run(capsys, "out", "--text", root / "text.txt")
    assert (code, out) == (2, "")
    assert "its recorded source is missing" in err
