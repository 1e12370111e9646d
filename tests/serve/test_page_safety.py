"""What a model writes stays text: no script, no handler, no address but the web's, no request, whatever it writes."""

import re
from typing import Any

import pytest
from browser import ask, ended
from page_server import PAGE, Answer, PageServer

IMG = "https://evil.invalid/x.png"
HOSTILE = [
    "<script>window.hacked = 1</script>",
    "<img src=x onerror=window.hacked=1>",
    f"<img src='{IMG}'>",
    f"![an image]({IMG})",
    f"[![inside]({IMG})](javascript:window.hacked=1)",
    f"![by reference][r]\n\n[r]: {IMG}",
    "[click](javascript:window.hacked=1)",
    "[click](JaVaScRiPt:window.hacked=1)",
    "[click](java\tscript:window.hacked=1)",
    "[click](&#106;avascript:window.hacked=1)",
    "[click](&#x6A;avascript&colon;window.hacked=1)",
    "[click](javascript&#58;window.hacked=1)",
    "[click](\x01javascript:window.hacked=1)",
    "[click](<javascript:window.hacked=1>)",
    "[click][j]\n\n[j]: javascript:window.hacked=1",
    "<javascript:window.hacked=1>",
    "[click](vbscript:x)",
    "[click](data:text/html;base64,PHNjcmlwdD53aW5kb3cuaGFja2VkPTE8L3NjcmlwdD4=)",
    "[click](file:///etc/passwd)",
    "[click](blob:https://evil.invalid/x)",
    "[click](//evil.invalid/x)",
    "[click](/v1/adapters)",
    '[click](https://example.org "x\\" onmouseover=window.hacked=1 ")',
    "[click](https://example.org/\" onclick=\"window.hacked=1)",
    "<a href='javascript:window.hacked=1'>click</a>",
    "<a href='https://example.org' onclick='window.hacked=1'>click</a>",
    "<svg onload=window.hacked=1><script>window.hacked=1</script></svg>",
    "<svg><a xlink:href='javascript:window.hacked=1'><text>x</text></a></svg>",
    "<iframe src='https://evil.invalid'></iframe>",
    "<iframe srcdoc='<script>parent.hacked=1</script>'></iframe>",
    "<object data='https://evil.invalid'></object><embed src='https://evil.invalid'>",
    "<link rel=stylesheet href='https://evil.invalid/x.css'>",
    "<style>@import 'https://evil.invalid/x.css'; * { background: url(https://evil.invalid/y) }</style>",
    "<base href='https://evil.invalid/'>",
    "<meta http-equiv=refresh content='0;url=https://evil.invalid'>",
    "<form action='https://evil.invalid'><input name=x autofocus onfocus=window.hacked=1></form>",
    "<video src='https://evil.invalid/v' onerror=window.hacked=1 autoplay></video>",
    "<details open ontoggle=window.hacked=1><summary>x</summary></details>",
    "<body onload=window.hacked=1>",
    "<math><mtext><table><mglyph><style><img src=x onerror=window.hacked=1></style></mglyph></table></mtext></math>",
    "```html\n<script>window.hacked = 1</script><img src=x onerror=window.hacked=1>\n```",
    "```\"onmouseover=window.hacked=1\n<img src=x onerror=window.hacked=1>\n```",
    "`<img src=x onerror=window.hacked=1>`",
    "| <script>window.hacked=1</script> | b |\n|---|---|\n| <img src=x onerror=window.hacked=1> | [c](javascript:x) |",
    "# <img src=x onerror=window.hacked=1>",
    "- [ ] <img src=x onerror=window.hacked=1>",
    "> <script>window.hacked=1</script>",
    "<!-- --><script>window.hacked=1</script><!-- -->",
    "<scr<script>ipt>window.hacked=1</scr</script>ipt>",
    "&lt;img src=x onerror=window.hacked=1&gt;",
    "javascript:window.hacked=1 and www.evil.invalid and evil@evil.invalid",
    ">" * 3000 + " deep",
    "- " * 1500 + "deep",
    "*" * 4000 + "a" + "_" * 4000,
    "[" * 3000 + "a" + "](b)" * 3000,
    "\u202etxt.exe \ufffd \U0001f600 \x00 \x1b[31m",
]  # fmt: skip

# Of what a message holds: elements that run or load something, attributes that do, and addresses.
AUDIT = """() => {
  const loads = ['script', 'img', 'iframe', 'object', 'embed', 'link', 'style', 'base', 'meta', 'video', 'form'];
  const found = [];
  for (const element of document.querySelectorAll('#messages *')) {
    const name = element.localName;
    if (loads.includes(name) && !element.matches('form.results')) found.push(name);
    if (name === 'svg' && !element.classList.contains('icon')) found.push(name);
    for (const { name: attribute, value } of element.attributes) {
      if (/^on|^style$|^src|^action$|^formaction$|^data$/.test(attribute)) found.push(`${name} ${attribute}`);
      if (/href$/.test(attribute) && !/^(https?:|mailto:|#i-)/.test(value)) found.push(`${attribute}=${value}`);
    }
    if (name === 'a' && element.rel !== 'noopener noreferrer') found.push('rel of ' + element.href);
  }
  return { found, hacked: window.hacked ?? null, address: location.pathname };
}"""


def check(page: Any) -> None:
    assert page.evaluate(AUDIT) == {"found": [], "hacked": None, "address": "/"}


@pytest.mark.parametrize("start", range(0, len(HOSTILE), 14))
def test_hostile_answers_stay_text(page: Any, stand_in: PageServer, start: int) -> None:
    """Each whole and in small pieces. The fixture sees that nothing was asked for elsewhere."""
    for text in HOSTILE[start : start + 14]:
        stand_in.say(Answer([text]), Answer([text[i : i + 7] for i in range(0, len(text), 7)]))
        for _ in range(2):
            ask(page, "hello")
            check(page)
        page.click("#new")


def test_hostile_text_of_the_user_and_of_files_stays_text(page: Any, stand_in: PageServer) -> None:
    text = "<img src=x onerror=window.hacked=1>"
    stand_in.say(Answer([], calls=[{"name": text, "arguments": text}], finish="tool_calls"))
    page.set_input_files("#file", {"name": f"{text}.txt", "mimeType": "text/plain", "buffer": text.encode()})
    page.wait_for_selector(".chip")
    ask(page, text)
    check(page)
    assert page.input_value("#title") == text
    assert page.locator("#chats .open").inner_text() == text
    assert text in page.locator(".call").inner_text()


def test_hostile_names_of_models_and_errors_stay_text(page: Any, stand_in: PageServer) -> None:
    text = "<img src=x onerror=window.hacked=1>"
    stand_in.models[0]["id"] = text
    page.reload()
    page.wait_for_selector("html[data-ready=yes]")
    stand_in.say(Answer(status=400, error={"message": text}), model=text)
    ask(page, "hello")
    assert text in page.locator(".message .error").inner_text()
    page.click("#show-compare")
    stand_in.say(Answer([text]), model=text)
    stand_in.say(Answer(["x"]), model="small:4bit")
    page.fill("#compare-prompt", "hello")
    page.click("#compare-run")
    page.wait_for_selector(".token.part")
    page.hover(".token.part >> nth=0")
    assert page.evaluate("document.querySelectorAll('#compare img, #tip img').length + (window.hacked ?? 0)") == 0


def test_links_that_may_be_followed_are_links(page: Any, stand_in: PageServer) -> None:
    stand_in.say(
        "[a](https://example.org/x?y=1&amp;z=2) <mailto:a@example.org> https://example.com ![pic](https://example.net/p.png)"
    )
    ask(page, "links")
    links = page.locator(".message.assistant a")
    assert links.evaluate_all("all => all.map(a => a.getAttribute('href'))") == [
        "https://example.org/x?y=1&z=2",
        "mailto:a@example.org",
        "https://example.com/",
        "https://example.net/p.png",
    ]
    assert links.last.inner_text() == "Image: pic"


def test_text_that_looks_like_markup_is_shown(page: Any, stand_in: PageServer) -> None:
    stand_in.say(
        "Write <b>bold</b> and 1 &lt; 2 &amp; 3 &copy; &#955; &#x3bb; &nonsense;.\n\n<div class=x>\nhi\n</div>"
    )
    ask(page, "markup")
    paragraphs = page.locator(".message.assistant .body > p").all_inner_texts()
    assert paragraphs == ["Write <b>bold</b> and 1 < 2 & 3 © λ λ &nonsense;.", "<div class=x>\nhi\n</div>"]


def test_a_growing_answer_does_not_freeze_the_page(page: Any, stand_in: PageServer) -> None:
    """Text that Markdown's rules read slowly is drawn less often: the page stays usable."""
    stand_in.say(Answer(["*a _b [c " * 20] * 200, delay=0.01))
    page.fill("#prompt", "slow")
    page.press("#prompt", "Enter")
    page.wait_for_selector(".running .body:has-text('[c')")
    page.fill("#search", "still here")
    ended(page)
    check(page)


def test_nothing_in_the_sources_parses_markup() -> None:
    """The policy forbids it; this finds it before a browser does."""
    forbidden = re.compile(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|eval\(|new Function|srcdoc\b"
    )
    sources = [path for path in PAGE.iterdir() if path.suffix in (".js", ".html")]
    assert len(sources) > 10
    assert not [(path.name, found) for path in sources for found in forbidden.findall(path.read_text("utf-8"))]
    html = (PAGE / "index.html").read_text("utf-8")
    assert not re.findall(r"\sstyle=|\son\w+=|<style|<script(?! src=| type=\"module\" src=)", html)
