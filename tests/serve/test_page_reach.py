"""The page for everybody: by keyboard alone, by screen reader, on a phone, in the dark, without motion."""

import gzip
import sys
from typing import Any

import pytest
from browser import ask, ended, texts, watched_page
from page_server import PAGE, Answer, PageServer
from places import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import vendor_page

LARGEST = 300_000  # bytes, compressed
RICH = """# Title

Some `code` and a [link](https://example.org).

```python
x = 'a'  # b
```

| a | b |
|---|---|
| 1 | 2 |

- [x] done

> quoted"""
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True}
WIDEST = """() => {
  const scrolls = '.unseen, .skip, #tip, #toast, .scroll, pre, svg';
  const shown = [...document.querySelectorAll('body *')].filter(e => e.getClientRects().length && !e.closest(scrolls));
  const wide = shown.filter(e => e.getBoundingClientRect().right > innerWidth + 1);
  return { page: document.documentElement.scrollWidth - innerWidth, wide: wide.map(e => e.localName + '#' + e.id) };
}"""


def fits(page: Any) -> None:
    assert page.evaluate(WIDEST) == {"page": 0, "wide": []}


def fill_a_chat(page: Any, stand_in: PageServer) -> None:
    """Make a chat that shows what a chat can show."""
    call = {"name": "get_weather", "arguments": '{"city": "Oslo"}'}
    stand_in.say(
        RICH,
        RICH,
        Answer(["half"], error={"message": "The server broke off."}),
        Answer([], calls=[call], finish="tool_calls"),
    )
    page.set_input_files(
        "#file", {"name": "a-file-with-a-rather-long-name-for-a-phone.txt", "mimeType": "text/plain", "buffer": b"text"}
    )
    page.wait_for_selector(".chip")
    ask(page, "Tell me " + "everything" * 12)
    page.locator("[data-do=regenerate]").click()
    ended(page)
    ask(page, "and fail")
    ask(page, "and call")


def run_comparison(page: Any, stand_in: PageServer) -> None:
    stand_in.say(Answer(["a", " b", " c"]))
    stand_in.say(Answer(["a", " b", " d"]), model="small:4bit")
    page.click("#show-compare")
    page.fill("#compare-prompt", "go")
    page.click("#compare-run")
    page.wait_for_selector("#verdict:not(:empty)")


@pytest.fixture(scope="module")
def axe() -> str:
    """The source of axe-core; without npm and a registry the test is skipped."""
    try:
        return vendor_page.axe().read_text("utf-8")
    except SystemExit as reason:
        pytest.skip(f"axe-core cannot be fetched: {reason}")


def serious(page: Any, axe: str) -> list[Any]:
    """Return what axe finds serious or worse."""
    page.evaluate(axe + "\n;0")
    found = page.evaluate("axe.run(document, { resultTypes: ['violations'] }).then(r => r.violations)")
    return [
        (v["id"], [node["html"][:120] for node in v["nodes"]]) for v in found if v["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_axe_finds_nothing_serious(browser: Any, stand_in: PageServer, axe: str, colours: str) -> None:
    with watched_page(browser, stand_in.address, color_scheme=colours) as watched:
        page = watched.page
        found = {"empty": serious(page, axe)}
        fill_a_chat(page, stand_in)
        found["chat"] = serious(page, axe)
        page.click("#show-settings")
        page.locator("#settings summary").click()
        page.check("#schemaOn")
        found["settings"] = serious(page, axe)
        run = {"tokens": 300, "prompt_tokens": 100, "state": "decode"}
        rates = {
            "prefill_rate": 800.0,
            "decode_rate": 40.0,
            "waiting": 1,
            "waiting_tokens": 9,
            "used": 500,
            "room": 900,
            "kept": 9,
        }
        stand_in.load = {"models": [{"id": "small", "running": [run], **rates}], "uptime_s": 100}
        page.click("#show-load")
        page.wait_for_selector("#load section")
        found["load"] = serious(page, axe)
        run_comparison(page, stand_in)
        page.locator(".token >> nth=1").focus()
        found["compare"] = serious(page, axe)
        page.keyboard.press("Control+/")
        found["shortcuts"] = serious(page, axe)
        assert not {place: faults for place, faults in found.items() if faults}


def test_everything_fits_a_phone(browser: Any, stand_in: PageServer) -> None:
    with watched_page(browser, stand_in.address, **PHONE) as watched:
        page = watched.page
        fits(page)
        fill_a_chat(page, stand_in)
        fits(page)
        page.click("#toggle-sidebar")
        assert page.locator("#chats .open").is_visible()
        fits(page)
        page.mouse.click(350, 400)  # beside the list
        assert page.locator("#sidebar").is_hidden()
        page.click("#show-settings")
        fits(page)
        page.click("#pane-close")
        run_comparison(page, stand_in)
        fits(page)
        upper, lower = (column.bounding_box() for column in page.locator(".column").all())
        assert upper["y"] + upper["height"] <= lower["y"]  # below one another
        assert not watched.faults()


def test_long_words_and_wide_code_stay_inside(browser: Any, stand_in: PageServer) -> None:
    wide = "w" * 400
    table = "|" + "|".join(["column"] * 30) + "|\n|" + "---|" * 30 + "\n|" + "|".join(["cell"] * 30) + "|"
    with watched_page(browser, stand_in.address, **PHONE) as watched:
        stand_in.say(
            Answer(
                [
                    f"{wide}\n\n    {wide}\n\n# {wide}\n\n{table}\n\n`{wide}`\n\n- {wide}\n\n> {wide}\n\nhttps://example.org/{wide}"
                ]
            )
        )
        ask(watched.page, wide)
        fits(watched.page)


def focused(page: Any) -> str:
    return page.evaluate(
        "document.activeElement.id || document.activeElement.dataset.do || document.activeElement.className"
    )


def test_a_chat_by_keyboard_alone(page: Any, stand_in: PageServer) -> None:
    stand_in.say(Answer(["one"], finish="length"), " and more", "another", "edited")
    keys = page.keyboard
    assert focused(page) == "prompt"
    keys.type("hello? /n")  # keys of shortcuts are letters here
    keys.press("Shift+Enter")
    keys.type("second line")
    keys.press("Enter")
    page.wait_for_selector(".message.assistant footer")
    keys.press("Tab")
    page.locator("#help").focus()
    keys.press("c")
    page.wait_for_selector("text=one and more")
    ended(page)
    keys.press("r")
    page.wait_for_selector("text=another")
    ended(page)
    assert texts(page) == ["hello? /n\nsecond line", "another"]
    keys.press("[")
    assert texts(page)[1] == "one and more"
    keys.press("]")
    assert texts(page)[1] == "another"
    keys.press("k")
    keys.press("k")
    assert "user" in focused(page)
    keys.press("e")
    keys.press("Control+a")
    keys.type("other")
    keys.press("Control+Enter")
    page.wait_for_selector("text=edited")
    ended(page)
    assert texts(page) == ["other", "edited"]
    keys.press("n")
    assert focused(page) == "prompt"
    keys.press("Control+k")
    assert focused(page) == "search"
    keys.type("other")
    page.wait_for_timeout(300)
    keys.press("Tab")
    keys.press("Enter")
    page.wait_for_selector(".message")
    assert texts(page) == ["other", "edited"]


def test_panes_give_the_focus_back(page: Any) -> None:
    page.focus("#show-settings")
    page.keyboard.press("Enter")
    assert focused(page) == "pane-close"
    page.keyboard.press("Escape")
    assert focused(page) == "show-settings"
    page.keyboard.press("m")
    assert focused(page) == "compare-prompt"
    page.focus("#show-compare")
    page.keyboard.press("m")
    assert focused(page) == "prompt"


def test_the_list_of_shortcuts_and_letters_turned_off(page: Any) -> None:
    page.keyboard.type("?")
    assert page.input_value("#prompt") == "?"
    page.focus("#theme")
    page.keyboard.press("?")
    page.wait_for_selector("#shortcuts[open]")
    assert page.locator("#shortcuts dt").count() >= 15
    page.uncheck("#single-keys")
    page.keyboard.press("Escape")
    page.keyboard.press("m")
    assert page.locator("#compare").is_hidden()
    page.keyboard.press("Control+/")
    page.wait_for_selector("#shortcuts[open]")


LISTEN = """() => {
  window.said = [];
  const live = document.querySelector('#live');
  new MutationObserver(() => said.push(live.textContent)).observe(live, { childList: true });
}"""


def test_answers_are_announced_block_by_block(page: Any, stand_in: PageServer) -> None:
    page.evaluate(LISTEN)
    words = ["First ", "words.\n\n", "Second ", "words.\n\n", "Third ", "words."]
    stand_in.say(Answer(words, delay=0.05))
    ask(page, "talk")
    said = page.evaluate("window.said")
    assert said[-1] == "The answer is complete."
    assert [line for line in said if "First" in line] == ["First words."]
    assert len(said) <= 4


def test_colours_follow_the_system_or_the_choice(browser: Any, stand_in: PageServer) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    with watched_page(browser, stand_in.address, color_scheme="dark") as watched:
        page = watched.page
        dark = page.evaluate(ground)
        page.click("#theme")
        light = page.evaluate(ground)
        assert light != dark
        page.reload()
        page.wait_for_selector("html[data-ready=yes]")
        assert page.evaluate(ground) == light
        page.emulate_media(color_scheme="light")
        assert page.evaluate(ground) == light
        page.click("#theme")
        assert page.evaluate(ground) == dark


@pytest.mark.parametrize(("motion", "animated"), [("reduce", "none"), ("no-preference", "breathe")])
def test_reduced_motion(browser: Any, stand_in: PageServer, motion: str, animated: str) -> None:
    with watched_page(browser, stand_in.address, reduced_motion=motion) as watched:
        stand_in.say(Answer(["x"], hold=0))
        watched.page.fill("#prompt", "wait")
        watched.page.press("#prompt", "Enter")
        watched.page.wait_for_selector(".dots i")
        assert watched.page.evaluate("getComputedStyle(document.querySelector('.dots i')).animationName") == animated


def test_the_page_is_small() -> None:
    files = [path for path in PAGE.rglob("*") if path.suffix in (".html", ".js", ".css", ".svg")]
    size = sum(len(gzip.compress(path.read_bytes())) for path in files)
    assert size < LARGEST


def test_vendored_files_are_those_of_the_table() -> None:
    assert not vendor_page.faults(vendor_page.FILES, vendor_page.VENDOR)
    known = {file.name for file in vendor_page.FILES} | {"NOTICE.md"}
    assert {path.name for path in vendor_page.VENDOR.iterdir()} == known
    notice = (vendor_page.VENDOR / "NOTICE.md").read_text("utf-8")
    assert all(file.version in notice and file.name in notice for file in vendor_page.FILES)


LONGEST_FILE, LONGEST_LINE = 400, 120


def test_own_files_are_small() -> None:
    own = {
        path.name: path.read_text("utf-8").splitlines()
        for path in PAGE.iterdir()
        if path.suffix in (".html", ".js", ".css")
    }
    assert not {name: len(lines) for name, lines in own.items() if len(lines) >= LONGEST_FILE}
    assert not {(name, line) for name, lines in own.items() for line in lines if len(line) > 400}
