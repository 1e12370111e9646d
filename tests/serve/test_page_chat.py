"""The page's chat: streaming, stop, continue, branches, edits, tools, schema, errors, against the stand-in."""

import json
from typing import Any

import pytest
from browser import ask, ended, texts
from page_server import Answer, PageServer, model_entry

LONG = """# Title

A *first* paragraph.

- one

- two

  of two

```python
print(1)

print(2)
```

The **end** of it."""


def last(page: Any) -> Any:
    return page.locator(".message").last


def do(page: Any, action: str) -> None:
    last(page).locator(f"[data-do={action}]").click()


def test_an_answer_streams_as_markdown(page: Any, stand_in: PageServer) -> None:
    stand_in.say(Answer([LONG[i : i + 3] for i in range(0, len(LONG), 3)], delay=0.002))
    ask(page, "hello")
    body = last(page).locator(".body")
    assert body.locator("h3").inner_text() == "Title"
    assert body.locator("li p").all_inner_texts() == ["one", "two", "of two"]
    assert body.locator("pre code").text_content() == "print(1)\n\nprint(2)"
    body.locator("pre .hl-number").nth(1).wait_for()  # colours come after the text
    assert body.locator("pre .hl-number").count() == 2
    assert body.locator("strong").inner_text() == "end"
    (body_sent,) = stand_in.bodies
    assert body_sent["messages"] == [{"role": "user", "content": "hello"}]
    assert body_sent["stream"]
    assert "temperature" not in body_sent  # the model's own default


def test_a_streamed_text_becomes_what_the_whole_would(page: Any, stand_in: PageServer) -> None:
    """In one piece or many, the same elements."""
    stand_in.say(Answer([LONG]), Answer(list(LONG), delay=0.0005))
    ask(page, "whole")
    ask(page, "in pieces")
    whole, pieces = page.locator(".message.assistant .body").all()
    assert pieces.inner_html() == whole.inner_html()


def test_figures_of_an_answer(page: Any) -> None:
    ask(page, "hello")
    figures = last(page).locator(".stats").inner_text()
    assert "42.5 tok/s" in figures
    assert "first token 120 ms" in figures
    assert "prompt of 24 (16 reused)" in figures


def test_stop_closes_the_connection_and_keeps_the_text(page: Any, stand_in: PageServer) -> None:
    stand_in.say(Answer(["One", " two", " three"], hold=2))
    page.fill("#prompt", "count")
    page.press("#prompt", "Enter")
    page.wait_for_selector(".message.assistant .body:has-text('One two')")
    page.keyboard.press("Escape")
    ended(page)
    assert texts(page) == ["count", "One two"]
    assert "stopped" in last(page).locator(".stats").inner_text()
    wait_for(page, lambda: stand_in.aborted == 1)


def wait_for(page: Any, condition: Any) -> None:
    """Wait until the stand-in, in its own thread, has come so far."""
    for _ in range(200):
        if condition():
            return
        page.wait_for_timeout(20)
    raise AssertionError("it did not come to that")


def test_continue_goes_on_with_the_same_message(page: Any, stand_in: PageServer) -> None:
    stand_in.say(Answer(["One two"], finish="length"), Answer([" three."]))
    ask(page, "count")
    do(page, "continue")
    ended(page)
    assert texts(page) == ["count", "One two three."]
    sent = stand_in.bodies[1]
    assert sent["continue_final_message"] is True
    assert sent["messages"][-1] == {"role": "assistant", "content": "One two"}


def test_regenerate_makes_branches(page: Any, stand_in: PageServer) -> None:
    stand_in.say("first answer", "second answer", "third answer")
    ask(page, "say")
    for _ in range(2):
        do(page, "regenerate")
        ended(page)
    assert texts(page) == ["say", "third answer"]
    assert last(page).locator(".branches").inner_text().strip() == "3/3"
    do(page, "before")
    assert texts(page) == ["say", "second answer"]
    do(page, "before")
    assert texts(page) == ["say", "first answer"]
    assert last(page).locator("[data-do=before]").is_disabled()
    assert all(body["messages"] == stand_in.bodies[0]["messages"] for body in stand_in.bodies)


def edit(page: Any, place: int, text: str) -> None:
    page.locator(".message").nth(place).locator("[data-do=edit]").click()
    page.get_by_label("Edit message").and_(page.locator("textarea")).fill(text)
    page.keyboard.press("Control+Enter")
    ended(page)


def test_an_edit_of_the_users_message_is_a_branch_with_its_own_answer(page: Any, stand_in: PageServer) -> None:
    stand_in.say("about cats", "about dogs")
    ask(page, "cats?")
    edit(page, 0, "dogs?")
    assert texts(page) == ["dogs?", "about dogs"]
    assert page.locator(".message.user .branches").inner_text().strip() == "2/2"
    page.locator(".message.user [data-do=before]").click()
    assert texts(page) == ["cats?", "about cats"]


def test_an_edit_of_the_answer_is_a_branch_that_can_go_on(page: Any, stand_in: PageServer) -> None:
    stand_in.say("It is blue.", " as the sea.")
    ask(page, "colour?")
    edit(page, 1, "It is green")
    assert texts(page) == ["colour?", "It is green"]
    assert len(stand_in.bodies) == 1
    do(page, "continue")
    ended(page)
    assert texts(page) == ["colour?", "It is green as the sea."]
    assert last(page).locator(".branches").inner_text().strip() == "2/2"


def test_an_edit_can_be_given_up(page: Any) -> None:
    ask(page, "hello")
    page.locator(".message.user [data-do=edit]").click()
    page.keyboard.type("nonsense")
    page.keyboard.press("Escape")
    assert texts(page) == ["hello", "Hello there."]


def test_settings_go_into_the_request(page: Any, stand_in: PageServer) -> None:
    page.click("#show-settings")
    page.fill("#system", "Be brief.")
    assert page.get_attribute("#temperature", "placeholder") == "0.6"  # the model's own
    page.fill("#temperature", "0.2")
    page.fill("#max_tokens", "50")
    page.fill("#seed", "7")
    page.fill("#stop", "END\n###")
    ask(page, "hello")
    (body,) = stand_in.bodies
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (body["temperature"], body["max_tokens"], body["seed"]) == (0.2, 50, 7)
    assert body["stop"] == ["END", "###"]
    page.click("#new")
    assert page.input_value("#system") == ""  # settings are a chat's own
    page.locator("#chats .open").click()
    assert page.input_value("#system") == "Be brief."


def test_a_schema_holds_answers_to_json(page: Any, stand_in: PageServer) -> None:
    stand_in.say('{"name": "Max", "age": 3}')
    page.click("#show-settings")
    page.fill("#schema", "{nonsense")
    page.check("#schemaOn")
    assert "not JSON" in page.locator("#schema-fault").inner_text()
    page.fill("#schema", '{"type": "object"}')
    assert page.locator("#schema-fault").inner_text() == ""
    ask(page, "who?")
    wanted = {"name": "answer", "strict": True, "schema": {"type": "object"}}
    assert stand_in.bodies[0]["response_format"] == {"type": "json_schema", "json_schema": wanted}
    assert last(page).locator("pre code").text_content() == '{"name": "Max", "age": 3}'
    assert last(page).locator("[data-do=continue]").count() == 0  # a grammar begins at the beginning


def test_a_faulty_schema_is_said_where_the_answer_would_stand(page: Any, stand_in: PageServer) -> None:
    page.click("#show-settings")
    page.fill("#schema", "{nonsense")
    page.check("#schemaOn")
    ask(page, "who?")
    assert "not JSON" in last(page).locator(".error").inner_text()
    assert not stand_in.bodies


def test_tools_are_called_and_answered(page: Any, stand_in: PageServer) -> None:
    arguments = json.dumps({"city": "Oslo"})
    stand_in.say(Answer([], calls=[{"name": "get_weather", "arguments": arguments}], finish="tool_calls"), "Rain.")
    page.click("#show-settings")
    page.locator("section", has=page.locator("#toolsOn")).get_by_text("Example").click()
    assert page.is_checked("#toolsOn")
    ask(page, "weather in Oslo?")
    tool = stand_in.bodies[0]["tools"][0]
    assert (tool["type"], tool["function"]["name"]) == ("function", "get_weather")
    assert stand_in.bodies[0]["tool_choice"] == "auto"
    assert "Calls get_weather" in last(page).inner_text()
    page.get_by_label("Result of get_weather").fill("8 degrees, rain")
    page.get_by_role("button", name="Send result").click()
    page.wait_for_selector(".message.assistant >> nth=1")
    ended(page)
    call = {"id": "call_0", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    assert stand_in.bodies[1]["messages"][1:] == [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_0", "content": "8 degrees, rain"},
    ]
    assert texts(page)[-1] == "Rain."


TOO_LONG = {"message": "This model's maximum context length is 512 tokens.", "code": "context_length_exceeded"}
BUSY = Answer(status=429, error={"message": "The queue is full."}, headers={"Retry-After": "7"})
ERRORS = [
    (Answer(status=400, error=TOO_LONG), "512 tokens", "Shorten"),
    (BUSY, "The queue is full.", "in 7 seconds"),
    (Answer([], error={"message": "Out of memory."}), "Out of memory.", "log"),
]


@pytest.mark.parametrize(("answer", "message", "hint"), ERRORS, ids=["too long", "busy", "in the stream"])
def test_errors_are_said_in_place_and_can_be_tried_again(
    page: Any, stand_in: PageServer, answer: Answer, message: str, hint: str
) -> None:
    stand_in.say(answer, "It works.")
    ask(page, "hello")
    error = last(page).locator(".error")
    assert message in error.inner_text()
    assert hint in error.inner_text()
    error.get_by_role("button").click()
    page.wait_for_selector("text=It works.")
    ended(page)
    assert texts(page) == ["hello", "It works."]
    assert page.locator(".branches").count() == 0  # nothing was there to keep


def test_an_error_behind_a_part_of_the_answer_keeps_the_part(page: Any, stand_in: PageServer) -> None:
    stand_in.say(Answer(["A half"], error={"message": "The server broke off."}))
    ask(page, "hello")
    assert texts(page) == ["hello", "A half"]
    assert "broke off" in last(page).locator(".error").inner_text()


def test_a_key_is_asked_for_once(page: Any, stand_in: PageServer) -> None:
    stand_in.key = "secret"
    page.fill("#prompt", "hello")
    page.press("#prompt", "Enter")
    page.wait_for_selector("#ask-key[open]")
    page.fill("#key", "wrong")
    page.keyboard.press("Enter")
    page.wait_for_selector("#key-note:has-text('did not accept')")
    page.fill("#key", "secret")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=Hello there.")
    ended(page)
    ask(page, "again")
    assert page.evaluate("[sessionStorage.length, JSON.stringify(localStorage).includes('secret')]") == [1, False]


def test_a_base_model_continues_the_text(page: Any, stand_in: PageServer) -> None:
    stand_in.say(Answer([" there was", " a llama"], finish="length"), Answer([" named Max."]), model="teller")
    page.select_option("#model", "teller")
    assert page.is_visible("#base-note")
    page.fill("#prompt", "Once upon a time")
    page.press("#prompt", "Enter")
    page.wait_for_selector("text=a llama")
    ended(page)
    page.press("#prompt", "Enter")  # an empty box goes on
    page.wait_for_selector("text=named Max.")
    ended(page)
    assert [body["prompt"] for body in stand_in.bodies] == ["Once upon a time", "Once upon a time there was a llama"]
    assert "messages" not in stand_in.bodies[0]
    assert last(page).locator(".body").text_content() == " there was a llama named Max."


def test_the_meter_counts_before_sending(page: Any, stand_in: PageServer) -> None:
    page.fill("#prompt", "one two three")
    page.wait_for_selector("#meter:has-text('3 of 512 tokens')")
    page.fill("#prompt", "word " * 600)
    page.wait_for_selector("#meter.full")
    assert "Too long by 89 tokens" in page.locator("#note").inner_text()
    assert not stand_in.bodies


def test_adapters_are_models_to_choose(page: Any, stand_in: PageServer) -> None:
    stand_in.models.append(model_entry("small:tales", parent="small"))
    page.reload()
    page.wait_for_selector("html[data-ready=yes]")
    assert "↳ small:tales" in page.locator("#model option").all_inner_texts()
    page.select_option("#model", "small:tales")
    ask(page, "hello")
    assert stand_in.bodies[0]["model"] == "small:tales"


def test_an_answer_goes_on_while_another_chat_is_looked_at(page: Any, stand_in: PageServer) -> None:
    stand_in.say(Answer(["a"] * 20, delay=0.05))
    page.fill("#prompt", "slow")
    page.press("#prompt", "Enter")
    page.wait_for_selector(".running")
    page.click("#new")
    ask(page, "quick")
    assert texts(page) == ["quick", "Hello there."]
    page.locator("#chats .open", has_text="slow").click()
    ended(page)
    assert texts(page) == ["slow", "a" * 20]
