"""Names of models: what can be one of the hub, with a revision, a type of blocks or a file; SRC:SCHEME."""

import inspect
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
    with pytest.raises(InputError, match=r"o/m/x\.gguf: expected a model directory, .* got no such file"):
        resolve("o/m/x.gguf")


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
        ("o/m@v1", "v2", "also 'v1'"),
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


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_a_revision(command: str) -> None:
    assert "revision" in inspect.signature(import_module(COMMANDS[command].module).command).parameters


def test_a_revision_of_a_model_on_this_disk_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (("plan", "embedded"), ("evaluate", "embedded", "embedded:arm"), ("inspect", tmp_path)):
        assert run(*arguments, "--revision", "v1") == 2
        assert "--revision: expected a model's name on the hub, such as owner/model, got" in one_line(capsys)
    assert run("plan", "--shape", "1b", "--revision", "v1") == 2
    assert "--revision: expected a model's name" in one_line(capsys)


def test_load_takes_a_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    embedded = resolve("embedded")
    monkeypatch.setattr("llamita.imports.hub.download", lambda name: asked.append(name) or embedded)
    llamita.load("o/m", revision="v1")
    assert asked == ["o/m@v1"]
    with pytest.raises(InputError, match="revision"):
        llamita.load("embedded", revision="v1")
