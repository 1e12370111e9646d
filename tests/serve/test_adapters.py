"""Adapters as models: chosen by name, loaded and unloaded by an administrator, never from elsewhere on the disk."""

import json
import shutil
from pathlib import Path

import pytest
from adapter_files import make_adapter
from served import Served, serving
from tiny import make_checkpoint

from llamita.engine.llm import LLM
from llamita.loading import open_adapters, open_model
from llamita.serve.keys import Keys

KEY, ADMIN = "sk-user-key-1234", "sk-admin-key-1234"
BEARER = {"Authorization": f"Bearer {ADMIN}"}
BODY = {"prompt": [5, 6, 7, 8], "max_tokens": 12, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("base"), "llama32")


@pytest.fixture(scope="module")
def adapters(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("poet", "cook")):
        make_adapter(folder / name, directory, seed=seed)
    (folder / "broken").mkdir()
    (folder / "file").write_text("x")
    return folder


@pytest.fixture
def llm(directory: Path, adapters: Path) -> LLM:
    source = open_model(directory)
    return LLM(source, adapters=open_adapters(source, {"poet": adapters / "poet"}), takes_adapters=True)


@pytest.fixture
def server(llm: LLM, adapters: Path):
    with serving({"base": llm}, keys=Keys([KEY], [ADMIN]), adapters=adapters) as served:
        yield served


def ask(server: Served, model: str) -> str:
    status, _, data = server.ask("POST", "/v1/completions", {**BODY, "model": model}, BEARER)
    assert status == 200, data
    return json.loads(data)["choices"][0]["text"]


def test_an_adapter_is_a_model(server: Served, llm: LLM) -> None:
    for name, adapter in (("base", None), ("base:poet", "poet")):
        expected = llm.generate(BODY["prompt"], max_tokens=12, greedy=True, ignore_eos=True, adapter=adapter)
        assert ask(server, name) == expected.text
    status, error = server.refuse("/v1/completions", {**BODY, "model": "base:cook"}, BEARER)
    assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")


def test_an_administrator_loads_and_unloads(server: Served, llm: LLM) -> None:
    assert server.ask("POST", "/v1/adapters", {"name": "cook"}, BEARER)[0] == 200
    expected = llm.generate(BODY["prompt"], max_tokens=12, greedy=True, ignore_eos=True, adapter="cook")
    assert ask(server, "base:cook") == expected.text
    assert server.ask("POST", "/v1/adapters", {"name": "cook"}, BEARER)[0] == 200  # it is there already
    assert server.ask("DELETE", "/v1/adapters/base:cook", headers=BEARER)[0] == 200
    assert server.refuse("/v1/completions", {**BODY, "model": "base:cook"}, BEARER)[0] == 404
    assert server.ask("DELETE", "/v1/adapters/base:cook", headers=BEARER)[0] == 404


def test_a_whole_name_comes_before_a_short_one(directory: Path, adapters: Path) -> None:
    source = open_model(directory)
    paths = {"poet": adapters / "poet", "base:poet": adapters / "cook"}  # the second could be meant by the first's id
    llm = LLM(source, adapters=open_adapters(source, paths), takes_adapters=True)
    with serving({"base": llm}, keys=Keys([KEY], [ADMIN])) as server:
        for name, status, left in (
            ("base:poet", 200, ["base:poet"]),
            ("nothing", 404, ["base:poet"]),
            ("base", 404, ["base:poet"]),
            ("base:poet", 200, []),  # now a short name
            ("base:poet", 404, []),
        ):
            assert server.ask("DELETE", f"/v1/adapters/{name}", headers=BEARER)[0] == status
            assert list(llm.adapters) == left


@pytest.mark.parametrize("name", ["../poet", "..", ".", "", "/etc", "poet/..", "file", "nothing", "a\0b"])
def test_only_names_of_the_directory_are_taken(server: Served, name: str) -> None:
    status, error = server.refuse("/v1/adapters", {"name": name}, BEARER)
    assert (status, error["param"]) == (400, "name")


def test_a_damaged_adapter_is_refused_in_one_line(server: Served) -> None:
    status, error = server.refuse("/v1/adapters", {"name": "broken"}, BEARER)
    assert status == 400
    assert "\n" not in error["message"]


def test_users_may_not(server: Served, llm: LLM, adapters: Path) -> None:
    user = {"Authorization": f"Bearer {KEY}"}
    assert server.refuse("/v1/adapters", {"name": "cook"}, user)[0] == 403
    assert server.ask("DELETE", "/v1/adapters/base:poet", headers=user)[0] == 403
    with serving({"base": llm}, adapters=adapters) as without:  # no administrator at all
        assert without.refuse("/v1/adapters", {"name": "cook"})[0] == 403


def test_what_is_unloaded_goes_on_to_its_end(server: Served, llm: LLM, adapters: Path) -> None:
    shutil.copytree(adapters / "poet", adapters / "passing", dirs_exist_ok=True)
    server.ask("POST", "/v1/adapters", {"name": "passing"}, BEARER)
    mailbox = llm.sequence(llm.check(BODY["prompt"], max_tokens=12, greedy=True, ignore_eos=True, adapter="passing"))
    server.ask("DELETE", "/v1/adapters/base:passing", headers=BEARER)
    llm.scheduler.submit(mailbox)
    while llm.scheduler.step():
        pass
    text = "".join(event for event in mailbox.events if isinstance(event, str))
    assert text == ask(server, "base:poet")
