"""`llamita compare` as a user meets it: tables, JSON, a report, one-line errors."""

import io
import json
import os
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from command import one_line, run
from packed_models import write_base_and_packed
from tiny import make_checkpoint

from llamita import cli
from llamita.errors import InputError, RunError
from llamita.evaluate.report import check_target, write

SENTENCE = "The rain fell in torrents, except at occasional intervals. "
HOSTILE = "<script>alert(1)<script>&\"'\x1b[31m"  # a directory may have this name
VOID = {"meta", "line", "rect", "path"}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A float model, two quantized ones, one of them with a hostile name, and a text."""
    root = write_base_and_packed(tmp_path_factory.mktemp("compare"), "arm")
    shutil.copytree(root / "g32", root / HOSTILE)
    (root / "text.txt").write_text(SENTENCE * 10)
    return root


@pytest.fixture(autouse=True)
def _here(root, monkeypatch):
    monkeypatch.chdir(root)


def values_of(capsys, *arguments: object) -> dict:
    assert run("compare", *arguments, "--text", "text.txt", "--json") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return json.loads(captured.out)


def test_tables(root, capsys):
    assert run("compare", "g128", "g32", "--text", "text.txt", "--top", 2, "--prompt", "The \x1b[31mrain") == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    header = next(line for line in lines if "g128" in line)
    assert header.index("base") < header.index("g128") < header.index("g32")
    for label in ("scheme", "weight files", "token perplexity", "mean KL", "top-1 agreement", "g32 - g128",
                  "difference (second minus first)",
                  "block 0", "block 1", "Weights: ", "Residual stream, 590 tokens"):  # fmt: skip
        assert any(line.strip().startswith(label) for line in lines), label
    assert sum("model.layers." in line for line in lines) == 2
    assert sum(line.startswith("Token ") and ", where they differ most: …" in line for line in lines) == 2
    assert "Continued greedily: The \\x1b[31mrain" in captured.out
    assert f"{10 * len(SENTENCE) - 2:,} tokens" in captured.err  # two chunks: the context is 512
    assert "\x1b" not in captured.out


def test_json_has_every_number(capsys):
    values = values_of(capsys, "g128", "g32", "--top", "3", "--max-tokens", "7")
    base, g128, g32 = values["models"]
    assert [m["name"] for m in values["models"]] == ["base", "g128", "g32"]
    assert (base["scheme"], base["text"]["kl"], base["weight_errors"]) == (None, None, None)
    assert g32["text"]["kl"]["value"] < g128["text"]["kl"]["value"]
    assert g32["weight_bytes"] > g128["weight_bytes"]
    assert len(g32["weight_errors"]) == 2 * 7 + 1  # seven linear layers a block, and the table
    assert len(g32["stream_errors"]) == 3
    assert all(0 < row["median"] <= row["largest"] for rows in g32["activations"].values() for row in rows)
    (difference,) = values["differences"]
    assert (difference["first"], difference["second"]) == ("g128", "g32")
    kl = difference["kl"]
    assert kl["low"] < kl["value"] < kl["high"]
    assert kl["noise"] == (kl["high"] >= 0)
    assert len(values["disagreements"]) == 3
    assert len(values["disagreements"][0]["opinions"]) == 3
    assert values["prompt"] == " ".join((SENTENCE * 2).split()[:8])  # the text's first words
    assert all(m["continuation"]["tokens"] <= 7 for m in values["models"])
    assert values == values_of(capsys, "g128", "g32", "--top", "3", "--max-tokens", "7")


def test_the_first_float_model_is_the_baseline_unless_another_is_named(capsys):
    names = [m["name"] for m in values_of(capsys, "g32", "base", "--max-tokens", 0)["models"]]
    assert names == ["base", "g32"]
    values = values_of(capsys, "g32", "base", "--max-tokens", 0, "--baseline", "g128")
    assert [m["name"] for m in values["models"]] == ["g128", "g32", "base"]
    assert values["models"][2]["text"]["kl"]["value"] > 0
    assert values["models"][0]["continuation"] is None
    values = values_of(capsys, "base:arm", "--max-tokens", 0)
    assert [m["name"] for m in values["models"]] == ["base", "base:arm"]


def test_limit_length_cache_and_threads(capsys):
    options = ("--limit", 2, "--max-seq-len", 100, "--kv-cache", "int8", "--threads", 1, "--max-tokens", 0)
    values = values_of(capsys, "g32", *options)
    assert (values["chunk_tokens"], values["layer_tokens"]) == (100, 200)
    assert values["models"][0]["text"]["tokens"] == 198
    assert [m["kv_cache"] for m in values["models"]] == ["f32", "int8"]


def test_a_prompt_from_stdin(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"The rain")))
    assert values_of(capsys, "g32", "--prompt", "-", "--max-tokens", 3)["prompt"] == "The rain"


def test_the_embedded_text_is_the_default_for_models_with_its_tokenizer(capsys):
    arguments = ("embedded:arm", "embedded:llama3.2", "--limit", 1, "--max-seq-len", 64, "--max-tokens", 4, "--json")
    assert run("compare", *arguments) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["text"] == "embedded text"
    assert [m["name"] for m in values["models"]] == ["embedded", "embedded:arm", "embedded:llama3.2"]
    assert run("compare", "g32") == 2
    assert "--text: expected a file, got none, and the tokenizer of base is not the embedded" in one_line(capsys)


class Page(HTMLParser):
    """Parses a report strictly: every element is closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        assert tag in VOID
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.text.append(data)


def test_report(root, capsys, tmp_path):
    out = tmp_path / "report.html"
    code = run("compare", "g128", HOSTILE, "--text", "text.txt", "--prompt", "<img src=x>\x07", "--html", out)
    assert code == 0, capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    source = out.read_text("utf-8")
    page = Page(source)
    assert "script" not in page.tags
    assert "img" not in page.tags
    names = {name for name, _ in page.attributes}
    assert not names & {"src", "href", "srcset", "xlink:href", "onload", "data", "action"}
    assert not [name for name in names if name.startswith("on")]
    assert not [word for word in ("http:", "https:", "//", "url(", "@import") if word in source]
    assert all(c.isprintable() or c == "\n" for c in source)
    policy = dict(page.attributes)["content"] or ""
    assert any("default-src 'none'" in (value or "") for _, value in page.attributes), policy
    text = "".join(page.text)
    assert HOSTILE.replace("\x1b", "\\x1b") in text
    assert "<img src=x>\\x07" in text
    for words in ("Which differences are noise", "Where errors arise: outputs", "Where errors arise: weights",
                  "Activation ranges", "residual stream", "input of down_proj", "Where they differ most",
                  "Continued greedily", "mlp.down_proj", "model.embed_tokens"):  # fmt: skip
        assert words in text, words
    legends = re.findall(r'<i style="background:(#\w+)"></i>([^<]*)<', source)
    drawn = re.findall(r'<g><title>([^<]*)</title><path d="[^"]*" stroke="(#\w+)"', source)
    assert {(color, name) for name, color in drawn} == set(legends)
    # one bar chart; stream; seven kinds of weights; five places, each with one for all and one for each
    assert page.tags.count("svg") == 1 + 1 + 7 + 5 * (1 + 3)


def test_a_report_is_made_of_whatever_there_is_to_compare(root, capsys, tmp_path):
    deep = make_checkpoint(tmp_path / "deep", num_hidden_layers=3)
    out = tmp_path / "report.html"
    assert run("compare", "base", deep, "--text", "text.txt", "--max-tokens", 0, "--html", out) == 0
    captured = capsys.readouterr()
    assert "deep: another shape than base: nothing inside it is compared" in captured.err
    text = "".join(Page(out.read_text("utf-8")).text)
    assert "deep: another shape than base" in text
    for words in ("Which differences are noise", "Where errors arise", "Continued greedily"):
        assert words not in text, words


def test_the_report_is_written_though_the_tables_reader_went_away(root, tmp_path, monkeypatch):
    def broken(*_: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("llamita.commands.console.print_table", broken)
    monkeypatch.setattr(sys, "stderr", io.StringIO())  # which `cli` may close
    out = tmp_path / "report.html"
    run("compare", "g32", "--text", "text.txt", "--max-tokens", 0, "--html", out)
    Page(out.read_text("utf-8"))


def test_nothing_is_overwritten_unless_asked(root, capsys, tmp_path, monkeypatch):
    out, other = tmp_path / "report.html", tmp_path / "notes.txt"
    out.write_text("<!doctype html>\nold")
    other.write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr("llamita.commands.compare.open_contenders", None)  # refused before anything is loaded
        for arguments, message in (
            (["--html", out], "exists; try --overwrite or another name"),
            (["--html", other, "--overwrite"], "replaces only a page of HTML"),
            (["--html", tmp_path, "--overwrite"], "expected the name of a file"),
            (["--html", tmp_path / "none" / "r.html"], "expected a file in an existing directory"),
        ):
            assert run("compare", "g32", "--text", "text.txt", *arguments) == 2
            assert message in one_line(capsys)
    assert (out.read_text(), other.read_text()) == ("<!doctype html>\nold", "mine")
    assert run("compare", "g32", "--text", "text.txt", "--max-tokens", 0, "--html", out, "--overwrite") == 0
    Page(out.read_text("utf-8"))


def test_writing_leaves_nothing_behind_when_it_fails(tmp_path, monkeypatch):
    out = tmp_path / "report.html"
    out.write_text("<!doctype html>\nold")
    with pytest.raises(InputError, match="exists"):  # it came while the models ran
        write(out, "<!doctype html>", overwrite=False)
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(RunError, match="cannot be written: No space left"):
        write(out, "<!doctype html>", overwrite=True)
    assert os.listdir(tmp_path) == ["report.html"]
    assert out.read_text() == "<!doctype html>\nold"
    link = tmp_path / "link.html"
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="expected the name of a file"):
        check_target(link, overwrite=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "SRC"),
        (["base"], "expected two or more models, got one"),
        (["g32", "--baseline", "none"], "--baseline: expected a model, got 'none'"),
        (["g32", "--baseline", "no/such/model"], "expected a model directory"),
        (["base:nope", "g32"], "(SRC:SCHEME or SRC:SCHEME:GROUP): "),
        (["g32", "g32"], "expected every model once"),
        (["g32", "--text", "missing.txt"], "expected a text file, got none"),
        (["g32", "--text", "short.txt"], "expected at least 2 tokens, got 1"),
        (["g32", "--top", "0"], "--top"),
        (["g32", "--limit", "0"], "--limit"),
        (["g32", "--max-tokens", "-1"], "--max-tokens"),
        (["g32", "--max-seq-len", "1"], "--max-seq-len"),
        (["g32", "--threads", "0"], "threads: expected 1 to 1024, got 0"),
        (["g32", "--kv-cache", "int4"], "expected one of f32, f16, int8, got 'int4'"),
        (["g32", "--prompt", "x" * 600], "prompt: expected at most 512 tokens"),
        (["g32", "embedded"], "expected the tokens of"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(root, capsys, arguments, message):
    Path("short.txt").write_bytes(b"a")
    text = [] if "--text" in arguments else ["--text", "text.txt"]
    assert run("compare", *arguments, *text) == 2
    assert message in one_line(capsys)


def test_help_has_an_example(capsys):
    assert run("compare", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "llamita compare embedded:arm embedded:llamita --html report.html" in text
    assert "compare" in cli.COMMANDS
