"""Two models side by side: where they part, each token's probability; and the scheduler's view."""

from typing import Any

from browser import ask
from page_server import Answer, PageServer

SAME = ["Once", " upon", " a", " time"]


def compare(page: Any, prompt: str = "Tell me a story") -> None:
    if page.locator("#compare").is_hidden():
        page.click("#show-compare")
    page.fill("#compare-prompt", prompt)
    page.press("#compare-prompt", "Enter")
    page.wait_for_selector("#compare-run:has-text('Compare')")


def parts(page: Any) -> list[str]:
    return page.locator(".token.part").all_inner_texts()


def tell_two_stories(stand_in: PageServer) -> None:
    left = {4: [(" there", 0.6), (" in", 0.3)]}
    right = {4: [(" in", 0.5), (" there", 0.4)]}
    stand_in.say(Answer([*SAME, " there", " was"], delay=0.02, alternatives=left))
    stand_in.say(Answer([*SAME, " in", " was"], delay=0.005, alternatives=right), model="small:4bit")


def test_the_token_at_which_they_part_is_marked_in_both(page: Any, stand_in: PageServer) -> None:
    tell_two_stories(stand_in)
    compare(page)
    assert parts(page) == [" there", " in"]
    assert (
        page.locator("#verdict").inner_text() == "The same for 4 tokens, then “␣there” (60.0 %) against “␣in” (50.0 %)."
    )
    bodies = {body["model"]: body for body in stand_in.bodies}
    assert set(bodies) == {"small", "small:4bit"}
    for body in bodies.values():
        assert body["messages"] == [{"role": "user", "content": "Tell me a story"}]
        assert (body["logprobs"], body["top_logprobs"], body["temperature"]) == (True, 5, 0)


def test_both_stream_at_once(page: Any, stand_in: PageServer) -> None:
    stand_in.say(Answer(["a", "b"], hold=1))
    stand_in.say(Answer(["a", "c"], hold=1), model="small:4bit")
    page.click("#show-compare")
    page.fill("#compare-prompt", "go")
    page.click("#compare-run")
    page.wait_for_selector(".column >> nth=0 >> .token")
    page.wait_for_selector(".column >> nth=1 >> .token")  # neither has ended
    page.keyboard.press("Escape")
    page.wait_for_selector("#compare-run:has-text('Compare')")
    assert page.locator(".column .error").all_inner_texts() == ["", ""]
    for _ in range(100):
        if stand_in.aborted == 2:
            break
        page.wait_for_timeout(20)
    assert stand_in.aborted == 2


def test_equal_answers_are_called_equal(page: Any, stand_in: PageServer) -> None:
    for model in ("small", "small:4bit"):
        stand_in.say(Answer(SAME), model=model)
    compare(page)
    assert parts(page) == []
    assert page.locator("#verdict").inner_text() == "The same to the end: 4 tokens."


def test_an_answer_that_ends_where_the_other_goes_on_parts_there(page: Any, stand_in: PageServer) -> None:
    stand_in.say(Answer(SAME, delay=0.01))
    stand_in.say(Answer([*SAME, " more"]), model="small:4bit")
    compare(page)
    assert parts(page) == [" more"]
    assert "then the end against “␣more”" in page.locator("#verdict").inner_text()


def test_hover_and_focus_show_probabilities(page: Any, stand_in: PageServer) -> None:
    tell_two_stories(stand_in)
    compare(page)
    tip = page.locator("#tip")
    page.hover(".column >> nth=0 >> .token.part")
    assert tip.locator("tr").all_inner_texts() == ["␣there\t60.0 %\t", "␣in\t30.0 %\t"]
    assert tip.locator(".tip-other").inner_text() == "small:4bit: ␣in 50.0 %"
    page.hover("#compare-prompt")
    assert tip.is_hidden()
    page.locator(".token >> nth=0").focus()
    assert "75.0 %" in tip.inner_text()
    page.keyboard.press("ArrowRight")
    assert "upon" in tip.inner_text()
    page.keyboard.press("Enter")  # to where they part
    assert "60.0 %" in tip.inner_text()
    assert page.locator(".token:focus").get_attribute("aria-describedby") == "tip"
    page.keyboard.press("End")
    assert tip.locator(".tip-other").count() == 0  # behind the parting the contexts differ
    page.keyboard.press("Escape")
    assert tip.is_hidden()
    assert page.locator(".tokens >> nth=0 >> [tabindex='0']").count() == 1


def test_likely_and_unlikely_tokens_are_shaded(page: Any, stand_in: PageServer) -> None:
    shades = {0: [("a", 0.95)], 1: [("b", 0.7)], 2: [("c", 0.05)]}
    for model in ("small", "small:4bit"):
        stand_in.say(Answer(["a", "b", "c"], alternatives=shades), model=model)
    compare(page)
    tokens = page.locator(".column >> nth=0 >> .token")
    assert [tokens.nth(place).get_attribute("class") for place in range(3)] == ["token p0", "token p1", "token p4"]


def test_a_base_model_beside_a_chat_model(page: Any, stand_in: PageServer) -> None:
    """Tokens of the two endpoints are compared by their bytes."""
    stand_in.say(Answer(["é", "b"]))
    stand_in.say(Answer(["é", "c"]), model="teller")
    page.click("#show-compare")
    page.select_option("#compare-model-1", "teller")
    compare(page, "go")
    assert parts(page) == ["b", "c"]
    body = next(body for body in stand_in.bodies if body["model"] == "teller")
    assert (body["prompt"], body["logprobs"]) == ("go", 5)


def test_the_open_chat_can_come_before(page: Any, stand_in: PageServer) -> None:
    ask(page, "My name is Max.")
    page.click("#show-compare")
    page.check("#history")
    compare(page, "What is it?")
    messages = [{"role": "user", "content": "My name is Max."}, {"role": "assistant", "content": "Hello there."}]
    assert [body["messages"][:2] for body in stand_in.bodies[1:]] == [messages, messages]


def test_an_error_of_one_leaves_the_other(page: Any, stand_in: PageServer) -> None:
    stand_in.say(Answer(status=400, error={"message": "top_logprobs is not served."}))
    stand_in.say(Answer(SAME), model="small:4bit")
    compare(page)
    assert "not served" in page.locator(".column >> nth=0 >> .error").inner_text()
    assert page.locator(".column >> nth=1 >> .token").count() == 4


def test_the_scheduler_is_shown_while_its_pane_is_open(page: Any, stand_in: PageServer) -> None:
    runs = [
        {"tokens": 300, "prompt_tokens": 100, "state": "decode"},
        {"tokens": 512, "prompt_tokens": 2048, "state": "prefill"},
    ]
    model = {
        "id": "small",
        "running": runs,
        "waiting": 3,
        "waiting_tokens": 4500,
        "used": 2560,
        "room": 8192,
        "kept": 1024,
    }
    stand_in.load = {"models": [{**model, "prefill_rate": 812.4, "decode_rate": 42.5}], "uptime_s": 7300}
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if request.url.endswith("/v1/load") else None)
    page.click("#show-load")
    page.wait_for_selector("#load section")
    text = page.locator("#load").inner_text()
    for part in (
        "2 running, 3 waiting (4,500 tokens)",
        "writing, 200 after 100",
        "reading 512 of 2,048",
        "42.5 tok/s written",
    ):
        assert part in text
    assert "2,560 of 8,192 positions in use, 1,024 kept" in text
    page.wait_for_timeout(1500)
    assert len(asked) >= 2
    page.click("#pane-close")
    page.wait_for_timeout(200)
    before = len(asked)
    page.wait_for_timeout(1500)
    assert len(asked) == before
