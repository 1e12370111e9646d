"""Names of models: what can be one of the hub, with a revision, a type of blocks or a file; SRC:SCHEME."""

import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest
from command import one_line, run

import llamita
from llamita.cli import COMMANDS
from llamita.errors import InputError
from llamita.imports.names import HubName, at_revision, is_hub_name, parse_hub_name, split_scheme
from llamita.imports.open import resolve


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("o/m", HubName("o/m")),
        ("o/m-1.5@v1.0", HubName("o/m-1.5", "v1.0")),
        ("o/m@feature/x", HubName("o/m", "feature/x")),
        ("o/m@refs%2Fpr%2F1", HubName("o/m", "refs/pr/1")),
        ("o/m:Q4_K_M", HubName("o/m", kind="Q4_K_M")),
        ("o/m:iq4_xs", HubName("o/m", kind="iq4_xs")),
        ("o/m:UD-Q4_K_XL", HubName("o/m", kind="UD-Q4_K_XL")),
        ("o/m@v1:bf16", HubName("o/m", "v1", "bf16")),
        ("o/m/a b.gguf", HubName("o/m", file="a b.gguf")),
        ("o/m@v1/sub/a.Q4_0.gguf", HubName("o/m", "v1", file="sub/a.Q4_0.gguf")),
        ("o/m@a%2Fb/c.gguf", HubName("o/m", "a/b", file="c.gguf")),
        *(
            (name, None)
            for name in ("m", "o/m/x", "o/m:arm", "o/m:llama3.2", "o/m@", "o/m:", "o/m@a b", "/o/m", "./o/m")
        ),
        ("o/m.gguf@v1", HubName("o/m.gguf", "v1")),
        *((name, None) for name in ("o/m.gguf", "o/M.GGUF", "o/m.gguf:Q4_0", "hf.co/o/m/a.gguf")),  # a file, an address
        *((name, None) for name in ("o/m:Q4_0:x", "embedded", "embedded:Q4_0", "", None, Path("o/m"))),
    ],
)
def test_names_of_the_hub(name: object, parts: HubName | None) -> None:
    assert parse_hub_name(name) == parts


def test_what_is_on_this_disk_is_not_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("o/m").mkdir(parents=True)
    assert not is_hub_name("o/m")
    assert not is_hub_name("o/m/x.gguf")  # a file that this directory lacks
    assert is_hub_name("o/m:Q4_0")
    for name in ("o/m/x.gguf", "o/x.gguf"):
        with pytest.raises(InputError, match=rf"{name}: expected a model directory, .* got no such file"):
            resolve(name)


@pytest.mark.parametrize(
    ("name", "result"),
    [
        ("o/m", "o/m@v1"),
        ("o/m:Q4_0", "o/m@v1:Q4_0"),
        ("o/m/a.gguf", "o/m@v1/a.gguf"),
        ("o/m:arm", "o/m@v1:arm"),
        ("o/m:Q4_0:arm:256", "o/m@v1:Q4_0:arm:256"),
    ],
)
def test_a_revision_is_added(name: str, result: str) -> None:
    assert at_revision(name, "v1") == result
    assert at_revision(name, None) == name


def test_a_slash_in_a_revision_does_not_begin_a_file() -> None:
    name = at_revision("o/m/a.gguf", "refs/pr/1")
    assert parse_hub_name(name) == HubName("o/m", "refs/pr/1", file="a.gguf")


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("embedded", "v1", "revision: expected a model's name on the hub, such as owner/model, got 'embedded'"),
        ("/tmp", "v1", "got '/tmp'"),
        (Path("o/m"), "v1", "got .o/m."),
        ("o/m@v1", "v2", "revision: expected one revision, got 'v1' and 'v2'"),
        ("o/m:Q4_0@v1", "v2", "a revision comes before the type: o/m@v1:Q4_0"),
        ("o/m", "", "a branch, a tag or a commit, got ''"),
        ("o/m", "a b", "got 'a b'"),
        ("o/m", "a:Q4_0:b", "got 'a:Q4_0:b'"),
    ],
)
def test_revisions_that_cannot_be(name: str | Path, revision: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        at_revision(name, revision)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("o/m", ("o/m", "")),
        ("o/m:arm", ("o/m", ":arm")),
        ("o/m:Q4_0", ("o/m:Q4_0", "")),
        ("o/m@v1:Q4_0:arm", ("o/m@v1:Q4_0", ":arm")),
        ("embedded:arm:256", ("embedded", ":arm:256")),
        ("embedded:256", ("embedded:256", "")),
        (".", (".", "")),
    ],
)
def test_a_scheme_follows_the_name(name: str, parts: tuple[str, str]) -> None:
    assert split_scheme(name) == parts


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("o/m:Q4_K_M@main", "a revision comes before the type: o/m@main:Q4_K_M"),
        ("o/m/a/b.gguf@refs/pr/1", "a revision comes before the file: o/m@refs%2Fpr%2F1/a/b.gguf"),
        *(
            (address, f"expected a name of the hub, got an address; write {right}")
            for address, right in (
                ("https://huggingface.co/o/m", "o/m"),
                ("https://huggingface.co/o/m/", "o/m"),
                ("https://huggingface.co/o/m/tree/main", "o/m"),
                ("http://www.huggingface.co/o/m/tree/v1?a=b", "o/m@v1"),
                ("https://huggingface.co/o/m/blob/main/a/x.gguf", "o/m/a/x.gguf"),
                ("https://huggingface.co/o/m/resolve/v1/x.gguf?download=true", "o/m@v1/x.gguf"),
                ("https://huggingface.co/o/m/blob/main/config.json", "o/m"),
                ("hf.co/o/m", "o/m"),
                ("hf.co/o/m:Q4_K_M", "o/m:Q4_K_M"),
                ("hf.co/o/m/x.gguf", "o/m/x.gguf"),
            )
        ),
    ],
)
def test_how_to_write_a_name_is_said(name: str, message: str) -> None:
    assert split_scheme(name) == (name, "")
    with pytest.raises(InputError) as caught:
        resolve(name)
    assert re.fullmatch(rf"{re.escape(name)}: {re.escape(message)}", str(caught.value))


def test_a_data_set_is_no_model() -> None:
    with pytest.raises(InputError, match="got no such file"):
        resolve("https://huggingface.co/datasets/o/m")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_a_revision(command: str) -> None:
    assert "revision" in inspect.signature(import_module(COMMANDS[command].module).command).parameters


def test_a_revision_of_a_model_on_this_disk_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (("plan", "embedded"), ("evaluate", "embedded", "embedded:arm"), ("inspect", tmp_path)):
        assert run(*arguments, "--revision", "v1") == 2
        assert "--revision: expected a model's name on the hub, such as owner/model, got" in one_line(capsys)
    assert run("plan", "--shape", "1b", "--revision", "v1") == 2
    assert one_line(capsys).endswith("--revision: expected a model's name on the hub, such as owner/model, got none\n")


@pytest.mark.parametrize(("command", "takes_gguf"), [("export", False), ("verify", False), ("generate", True)])
def test_help_names_a_gguf_where_one_is_taken(
    command: str, takes_gguf: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command, "--help") == 0
    assert (":Q4_K_M" in capsys.readouterr().out) is takes_gguf


def test_load_takes_a_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    embedded = resolve("embedded")
    monkeypatch.setattr("llamita.imports.hub.download", lambda name: asked.append(name) or embedded)
    llamita.load("o/m", revision="v1")
    assert asked == ["o/m@v1"]
    with pytest.raises(InputError, match="revision"):
        llamita.load("embedded", revision="v1")
