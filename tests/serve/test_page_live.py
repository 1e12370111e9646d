"""The page against the real server and the embedded model: what the stand-in plays, the server does."""

import json
import shutil
import time
from collections.abc import Iterator
from typing import Any

import pytest
from browser import ask, ended, texts, watched_page
from page_server import PAGE, POLICY
from served import Served, serving

import llamita

PROMPT = "Once upon a time, there was a little llama"


# The embedded model's own template only joins what was said, so that the page takes it for a base model.
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] if m['role'] }}{% endfor %}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("model") / "chat"
    shutil.copytree(llamita.load("embedded").path, directory)
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    llms = {"float": llamita.load(directory), "4bit": llamita.load(directory, scheme="llama3.2")}
    with serving({**llms, "base": llamita.load("embedded")}) as served:
        yield served


@pytest.fixture
def live(browser: Any, server: Served) -> Iterator[Any]:
    with watched_page(browser, server.address) as watched:
        yield watched.page
        assert not watched.faults()


def loads(server: Served) -> list[dict[str, Any]]:
    return json.loads(server.ask("GET", "/v1/load")[2])["models"]


def test_every_file_is_served_under_the_policy(server: Served) -> None:
    names = [str(path.relative_to(PAGE)) for path in PAGE.rglob("*") if path.is_file()]
    assert "vendor/marked.esm.js" in names
    for name in names:
        status, headers, data = server.ask("GET", f"/page/{name}")
        assert (status, headers["content-security-policy"]) == (200, POLICY)
        assert data == (PAGE / name).read_bytes()
    assert server.ask("GET", "/")[2] == (PAGE / "index.html").read_bytes()


def test_a_chat_with_its_figures_and_its_meter(live: Any) -> None:
    live.click("#show-settings")
    live.fill("#max_tokens", "40")
    live.fill("#temperature", "0")
    ask(live, PROMPT)
    first = texts(live)[1]
    figures = live.locator(".message.assistant .stats").inner_text()
    for part in ("tok/s", "first token", "40 tokens", "cut at the limit", "float"):
        assert part in figures
    live.wait_for_selector("#meter:has-text('of 2,048 tokens')")
    live.locator("[data-do=continue]").click()
    ended(live)
    assert texts(live)[1].startswith(first)
    assert len(texts(live)[1]) > len(first)
    assert "reused" in live.locator(".message.assistant .stats").inner_text()
    assert live.locator(".message .error").count() == 0


def test_stop_frees_the_servers_place(live: Any, server: Served) -> None:
    live.fill("#prompt", PROMPT)
    live.press("#prompt", "Enter")
    live.wait_for_selector(".message.assistant .body p:not(.waiting)")
    live.keyboard.press("Escape")
    ended(live)
    end = time.monotonic() + 20
    while any(model["running"] or model["waiting"] for model in loads(server)):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_float_model_beside_the_four_bit_one(live: Any) -> None:
    live.click("#show-compare")
    live.fill("#compare-prompt", PROMPT)
    live.click("#compare-run")
    live.wait_for_selector("#compare-run:has-text('Compare')")
    left, right = ([t.text_content() for t in c.locator(".token").all()] for c in live.locator(".column").all())
    place = next(place for place, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)
    assert live.locator(".token.part").all_inner_texts() == [left[place], right[place]]
    assert f"The same for {place} tokens" in live.locator("#verdict").inner_text()
    live.locator(".token.part").first.focus()
    assert live.locator("#tip tr").count() == 5
    assert "4bit" in live.locator("#tip .tip-other").inner_text()


def test_a_schema_holds_the_answer(live: Any) -> None:
    live.click("#show-settings")
    live.fill("#max_tokens", "60")
    live.fill("#schema", json.dumps({"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"],
                                     "additionalProperties": False}))  # fmt: skip
    live.check("#schemaOn")
    ask(live, PROMPT)
    assert json.loads(live.locator(".message.assistant pre code").inner_text())["n"] in (1, 2)


def test_the_scheduler_is_shown(live: Any) -> None:
    live.click("#show-load")
    live.wait_for_selector("#load section >> nth=1")
    assert live.locator("#load h3").all_inner_texts() == ["float", "4bit", "base"]
    assert live.locator("#load .error").count() == 0


def test_a_base_model_goes_on_with_the_text(live: Any, server: Served) -> None:
    live.select_option("#model", "base")
    live.click("#show-settings")
    live.fill("#max_tokens", "20")
    live.fill("#temperature", "0")
    ask(live, PROMPT)
    expected = server.post("/v1/completions", model="base", prompt=PROMPT, max_tokens=20, temperature=0)
    assert expected["choices"][0]["text"].strip() in live.locator(".message").last.inner_text()
