"""Chats in the browser: they outlive a reload, are found, exported, imported and deleted; files become messages."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from browser import ask, ended, texts
from page_server import Answer, PageServer


def titles(page: Any) -> list[str]:
    return page.locator("#chats .open").all_inner_texts()


def exported(page: Any, selector: str) -> dict[str, Any]:
    with page.expect_download() as download:
        page.click(selector)
    return json.loads(Path(download.value.path()).read_text("utf-8"))


def imported(page: Any, data: object) -> str:
    """Import a file and return what the page says about it."""
    text = data if isinstance(data, str) else json.dumps(data)
    page.set_input_files("#import", {"name": "x.json", "mimeType": "application/json", "buffer": text.encode()})
    page.wait_for_selector("#toast.shown")
    said = page.locator("#toast").inner_text()
    page.evaluate("document.querySelector('#toast').classList.remove('shown')")
    return said


STORED = """async () => {
  const done = (request) => new Promise((resolve) => (request.onsuccess = () => resolve(request.result)));
  const database = await done(indexedDB.open("llamita"));
  const chats = await done(database.transaction("chats").objectStore("chats").getAll());
  database.close();
  return JSON.stringify(chats);
}"""  # all chats that are on the disk


def test_a_reload_keeps_chats_branches_and_what_was_open(page: Any, stand_in: PageServer) -> None:
    stand_in.say("one", "two")
    ask(page, "count")
    page.locator("[data-do=regenerate]").click()
    ended(page)
    before = page.evaluate(STORED)
    page.locator(".assistant [data-do=before]").click()
    while page.evaluate(STORED) == before:  # a reload in the same instant may come before the write
        page.wait_for_timeout(10)
    page.reload()
    page.wait_for_selector("html[data-ready=yes]")
    assert texts(page) == ["count", "one"]
    assert page.locator(".assistant .branches").inner_text().strip() == "1/2"
    assert titles(page) == ["count"]


def test_a_reload_amid_an_answer_keeps_what_had_come(page: Any, stand_in: PageServer) -> None:
    stand_in.say(Answer(["word "] * 40, delay=0.08, hold=39))  # it is stored every two seconds
    page.fill("#prompt", "talk")
    page.press("#prompt", "Enter")
    page.wait_for_selector("#chats .open")
    page.wait_for_selector(f".message.assistant .body:has-text('{'word ' * 35}')")
    page.reload()
    page.wait_for_selector("html[data-ready=yes]")
    assert texts(page)[1].count("word") >= 20
    page.locator("[data-do=continue]").click()
    ended(page)
    assert texts(page)[1].endswith("Hello there.")


def test_search_looks_into_every_branch_and_file(page: Any, stand_in: PageServer) -> None:
    stand_in.say("Alpacas hum.", "Llamas spit.", "Trains run.")
    ask(page, "animals")
    page.locator("[data-do=regenerate]").click()
    ended(page)
    page.click("#new")
    page.set_input_files("#file", {"name": "table.txt", "mimeType": "text/plain", "buffer": b"departure 9:15"})
    page.wait_for_selector(".chip")
    ask(page, "travel")
    for needle, found in {
        "alpacas": ["animals"],
        "9:15": ["travel"],
        "TRAINS": ["travel"],
        "": ["travel", "animals"],
    }.items():
        page.fill("#search", needle)
        page.wait_for_timeout(300)
        assert titles(page) == found, needle
    page.fill("#search", "nothing has this")
    page.wait_for_selector("text=No chat holds this.")


def test_export_and_import_bring_everything_back(page: Any, stand_in: PageServer) -> None:
    ask(page, "first")
    page.click("#new")
    ask(page, "second")
    page.locator(".assistant [data-do=regenerate]").click()
    ended(page)
    everything = exported(page, "#export-all")
    assert sorted(chat["title"] for chat in everything["chats"]) == ["first", "second"]
    page.click("#delete-all")
    page.click("#confirm-yes")
    page.wait_for_selector("#chats:has-text('Chats appear here')")
    assert imported(page, everything) == "Imported 2 chats."
    assert titles(page) == ["second", "first"]
    assert imported(page, everything) == "Imported 0 chats; 2 were here already."
    assert exported(page, "#export-all")["chats"] == everything["chats"]
    page.locator("#chats .open").first.click()
    assert page.locator(".assistant .branches").inner_text().strip() == "2/2"


def test_one_chat_is_exported_and_deleted(page: Any) -> None:
    ask(page, "first")
    page.click("#new")
    ask(page, "second")
    row = page.locator("#chats li", has_text="first")
    row.hover()
    with page.expect_download() as download:
        row.get_by_label("Export").click()
    assert download.value.suggested_filename == "first.json"
    row.get_by_label("Delete").click()
    page.keyboard.press("Escape")  # no
    assert titles(page) == ["second", "first"]
    row.get_by_label("Delete").click()
    page.click("#confirm-yes")
    page.wait_for_selector("#chats:not(:has-text('first'))")
    assert titles(page) == ["second"]
    assert texts(page)[0] == "second"


STORED = """new Promise(done => {
  const open = indexedDB.open('llamita');
  open.onsuccess = () => {
    const all = open.result.transaction('chats').objectStore('chats').getAll();
    all.onsuccess = () => done(JSON.stringify(all.result));
  };
})"""


def test_delete_all_leaves_nothing(page: Any) -> None:
    ask(page, "secret")
    page.click("#delete-all")
    page.click("#confirm-yes")
    page.wait_for_selector("#empty")
    page.reload()
    page.wait_for_selector("html[data-ready=yes]")
    assert titles(page) == []
    assert page.evaluate(STORED) == "[]"


def chat(**changes: Any) -> dict[str, Any]:
    """A sound chat of one message, with changes."""
    node = {"id": "a1", "parent": "", "role": "user", "content": "hi", "created": 1}
    sound = {"id": "c1", "title": "t", "created": 1, "updated": 1, "model": "", "settings": {"system": ""}}
    tree = {"nodes": {"a1": node}, "children": {"": ["a1"]}, "chosen": {"": "a1"}}
    return {**sound, **tree, **changes}


def file_of(*chats: object, **changes: Any) -> dict[str, Any]:
    return {"format": "llamita-chats", "version": 1, "chats": list(chats), **changes}


CIRCLE = {
    "a1": {"id": "a1", "parent": "b1", "role": "user", "content": "", "created": 1},
    "b1": {"id": "b1", "parent": "a1", "role": "user", "content": "", "created": 1},
}
PICKED = {"": "a1", "a1": "b1"}
TWO = {name: {"id": name, "parent": "", "role": "user", "content": "", "created": 1} for name in ("a1", "b1")}
DAMAGED = {
    "not JSON": "nonsense",
    "not an export": [1, 2],
    "another version": file_of(version=2),
    "no chat": file_of(None),
    "no id": file_of(chat(id=5)),
    "no dates": file_of(chat(updated="now")),
    "no tree": file_of(chat(children=None)),
    "a role that is none": file_of(chat(nodes={"a1": {"id": "a1", "parent": "", "role": "system", "content": ""}})),
    "content that is no text": file_of(chat(nodes={"a1": {"id": "a1", "parent": "", "role": "user", "content": {}}})),
    "a message of nowhere": file_of(chat(children={"": []}, chosen={})),
    "a child that is not there": file_of(chat(children={"": ["a1", "zz"]})),
    "a choice that is none": file_of(chat(chosen={"": "zz"})),
    "a circle": file_of(chat(nodes=CIRCLE, children={"a1": ["b1"], "b1": ["a1"]}, chosen={"a1": "b1", "b1": "a1"})),
    "a child of two": file_of(chat(nodes=TWO, children={"": ["a1", "b1"], "a1": ["b1"]}, chosen=PICKED)),
    "a file without a name": file_of(chat(nodes={"a1": {**TWO["a1"], "files": [1]}})),
}  # fmt: skip


def test_damaged_files_are_refused_whole(page: Any) -> None:
    for name, data in DAMAGED.items():
        assert "Imported" not in imported(page, data), name
    sound_and_damaged = file_of(chat(), chat(id=5))
    assert "Chat 2 of the file" in imported(page, sound_and_damaged)
    assert titles(page) == []
    assert imported(page, file_of(chat())) == "Imported 1 chat."


def test_a_text_file_becomes_part_of_the_message(page: Any, stand_in: PageServer) -> None:
    text = "line 1\n```\nfenced\n```\n"
    page.set_input_files("#file", {"name": "notes.md", "mimeType": "text/markdown", "buffer": text.encode()})
    page.wait_for_selector(".chip:has-text('notes.md')")
    ask(page, "What is in it?")
    sent = stand_in.bodies[0]["messages"][0]["content"]
    assert sent == f"File: notes.md\n````\n{text}\n````\n\nWhat is in it?"
    assert "notes.md" in page.locator(".message.user").inner_text()
    assert page.locator(".chip").count() == 0


DROP = """([name, bytes]) => {
  const data = new DataTransfer();
  data.items.add(new File([new Uint8Array(bytes)], name));
  const event = type => new DragEvent(type, { dataTransfer: data, bubbles: true, cancelable: true });
  for (const type of ['dragover', 'drop']) document.querySelector('main').dispatchEvent(event(type));
}"""


def test_files_are_dropped_in(page: Any, stand_in: PageServer) -> None:
    page.evaluate(DROP, ["data.csv", list(b"a,b\n1,2\n")])
    page.wait_for_selector(".chip:has-text('data.csv')")
    page.evaluate(DROP, ["other.csv", list(b"c\n")])
    page.get_by_label("Remove data.csv").click()
    page.wait_for_selector(".chip:has-text('other.csv')")
    ask(page, "")
    assert stand_in.bodies[0]["messages"][0]["content"].startswith("File: other.csv\n```\nc\n")
    assert page.input_value("#title") == "other.csv"


@pytest.mark.parametrize(
    ("data", "reason"), [(os.urandom(500) + b"\0\xff", "not a text file"), (b"a" * 2_000_001, "2 MB")]
)
def test_files_that_are_no_text_are_refused(page: Any, data: bytes, reason: str) -> None:
    page.set_input_files("#file", {"name": "x.bin", "mimeType": "text/plain", "buffer": data})
    page.wait_for_selector(f"#note:has-text('{reason}')")
    assert page.locator(".chip").count() == 0


def test_two_windows_show_the_same_chats(page: Any) -> None:
    ask(page, "first")
    other = page.context.new_page()
    other.goto(page.url)
    other.wait_for_selector("html[data-ready=yes]")
    assert texts(other) == ["first", "Hello there."]
    ask(other, "second")
    page.wait_for_selector(".message >> nth=3")
    assert texts(page) == texts(other)


def test_a_title_can_be_changed(page: Any) -> None:
    ask(page, "first")
    page.fill("#title", "My llamas")
    page.press("#title", "Tab")
    page.wait_for_selector("#chats .open:has-text('My llamas')")
    assert page.title() == "My llamas · llamita"


def test_back_and_forward_go_from_chat_to_chat(page: Any) -> None:
    ask(page, "first")
    page.click("#new")
    ask(page, "second")
    page.go_back()
    page.go_back()
    page.wait_for_selector(".message:has-text('first')")
    page.go_forward()
    page.go_forward()
    page.wait_for_selector(".message:has-text('second')")


def test_without_a_server_the_page_says_so(page: Any, stand_in: PageServer) -> None:
    ask(page, "first")
    page.route("**/v1/**", lambda route: route.fulfill(status=503, json={"error": {"message": "Loading the model."}}))
    page.reload()
    page.wait_for_selector("#offline:has-text('Loading the model.')")
    assert texts(page) == ["first", "Hello there."]
    page.unroute("**/v1/**")
    page.click("#offline button")
    page.wait_for_selector("#offline", state="hidden")
    ask(page, "again")
