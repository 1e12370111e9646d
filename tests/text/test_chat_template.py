"""Chat templates: where they are found, what they may do, and the same text as transformers renders."""

import json
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from llamita.errors import InputError, RunError
from llamita.text import chat_template
from llamita.text.chat_template import ChatTemplate, read_template

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <b>there</b> ünï"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "  Why?  "},
]
LLAMA3 = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
LLAMA2 = """{% if messages[0]['role'] == 'system' %}
{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}
{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}
{% for message in loop_messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must alternate') }}{% endif %}
{% if loop.index0 == 0 and system_message != false %}
{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}
{% else %}{% set content = message['content'] %}{% endif %}
{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}
{% endfor %}"""
HELPERS = """{% for m in messages %}{% if m.role == 'assistant' %}{% continue %}{% endif %}{{ m | tojson }}
{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}
{% generation %}inner{% endgeneration %}{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}"""


# The less common expressions of the Llama 3.1 and 3.2 templates.
LLAMA31 = """{{- bos_token }}
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not date_string is defined %}{%- if strftime_now is defined %}
{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- set system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
{{- "Today Date: " + date_string + "\\n\\n" }}{{- system_message }}
{%- for t in [{"name": "f", "parameters": {"x": [1, 2]}}] %}{{- t | tojson(indent=4) }}{%- endfor %}
{%- for name, value in {"k": "v"} | items %}{{- name + '="' + value + '"' }}
{%- if not loop.last %}{{- ", " }}{%- endif %}{%- endfor %}
{%- for message in messages %}{%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>' + message['content'] | trim }}
{%- elif message.content is mapping or message.content is iterable %}{{- message.content | tojson }}
{%- endif %}{%- endfor %}"""


@pytest.mark.parametrize("template", [LLAMA3, LLAMA2, LLAMA31, HELPERS])
@pytest.mark.parametrize("is_open", [True, False])
def test_renders_as_transformers_does(template: str, is_open: bool) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils", reason="compares with transformers")
    expected, _ = utils.render_jinja_template(
        conversations=[CHAT], chat_template=template, add_generation_prompt=is_open, bos_token="<s>", eos_token="</s>"
    )
    ours = ChatTemplate(template, bos_token="<s>", eos_token="</s>")
    assert ours.render(CHAT, add_generation_prompt=is_open) == expected[0]


def test_llama3_text_in_full() -> None:
    text = ChatTemplate(LLAMA3, bos_token="<B>").render([{"role": "user", "content": " Hi "}])
    assert text == (
        "<B><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_a_content_in_parts_is_one_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    template = ChatTemplate("{{ messages[0].content }}")
    assert template.render([{"role": "user", "content": parts}]) == "ab"
    with pytest.raises(InputError, match="content"):
        template.render([{"role": "user", "content": [{"type": "image", "url": "x"}]}])


def test_the_date_is_at_hand() -> None:
    assert len(ChatTemplate("{{ strftime_now('%Y') }}").render([])) == 4


@pytest.mark.parametrize(
    "settings",
    [
        {"tokenizer_config.json": json.dumps({"chat_template": "yes"})},
        {"chat_template.jinja": "yes", "tokenizer_config.json": json.dumps({"chat_template": "no"})},
        {
            "tokenizer_config.json": json.dumps(
                {"chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]}
            )
        },
    ],
)
def test_where_a_template_is_found(tmp_path: Path, settings: dict[str, str]) -> None:
    for name, text in settings.items():
        (tmp_path / name).write_text(text)
    assert read_template(tmp_path) == "yes"


@pytest.mark.parametrize(
    "settings", [{}, {"tokenizer_config.json": "{}"}, {"tokenizer_config.json": '{"chat_template": [{"name": "rag"}]}'}]
)
def test_a_base_model_without_a_template_is_refused(tmp_path: Path, settings: dict[str, str]) -> None:
    for name, text in settings.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match="chat template, got none"):
        read_template(tmp_path)


@pytest.mark.parametrize(
    "template",
    [
        "{% for %}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for i in range(100000000) %}x{% endfor %}",
        "{% for i in range(90000) %}{% for j in range(90000) %}xxxxxxxxxxxxxxxx{% endfor %}{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ messages[7].content }}",
    ],
)
def test_a_bad_template_is_one_clear_line(template: str) -> None:
    with pytest.raises(InputError, match="chat template") as error:
        ChatTemplate(template).render(CHAT)
    assert len(str(error.value).splitlines()) == 1


GROWING = [
    "{% set x = 'c' * 2000000000 %}",
    "{% set x = 600000000 * [1] %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(40) %}"
    "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
    "{% set x = 'a'|center(4000000000) %}",
    "{% set x = '%*d' % (2000000000, 1) %}",
    "{% set x = '{:>{}}'.format(1, 4000000000) %}",
    "{% set x = ('a' * 100000)|replace('a', 'b' * 100000) %}",
    "{% set x = (1).to_bytes(4000000000, 'big') %}",
    "{% set x = [1]|tojson(indent=4000000000) %}",
]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the memory of a process")
@pytest.mark.parametrize("template", GROWING)
def test_a_template_cannot_take_much_memory(template: str) -> None:
    with pytest.raises(InputError, match="it takes too much memory"):
        ChatTemplate(template).render(CHAT)


SLOW = [
    "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
    "{% set ns = namespace(x=9) %}{% for i in range(40) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "{{ (messages|length + 3) ** 100000000 }}",
]


@pytest.mark.parametrize("template", SLOW)
def test_a_template_cannot_take_long(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_SECONDS", 1)
    switched = ChatTemplate("{% if messages %}" + template + "{% endif %}fine")
    with pytest.raises(InputError, match="more than 1 seconds"):
        switched.render(CHAT)
    assert switched.render([]) == "fine"  # the next conversation is not the worse for it


def test_an_ended_process_is_started_again() -> None:
    template = ChatTemplate("{{ messages|length }}")
    process_of(template).kill()
    process_of(template).wait()
    assert template.render(CHAT) == "4"


def process_of(template: ChatTemplate) -> Any:
    (process,) = template._helpers._idle
    return process._popen


def test_the_process_ends_with_its_template() -> None:
    template = ChatTemplate("x")
    process = process_of(template)
    del template
    assert process.returncode is not None


def test_a_process_that_cannot_run_is_no_fault_of_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_PROGRAM", "/nowhere/program.py")
    with pytest.raises(RunError, match=r"a process that renders it, got exit code 2; .*No such file"):
        ChatTemplate("x")


def test_limits_hold_where_the_parent_ignores_their_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_SECONDS", 1)
    before = signal.signal(signal.SIGPROF, signal.SIG_IGN)
    try:
        with pytest.raises(InputError, match="more than 1 seconds"):
            ChatTemplate(SLOW[0]).render(CHAT)
    finally:
        signal.signal(signal.SIGPROF, before)


def test_forked_processes_render_their_own_conversations() -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    children = []
    for child in range(3):
        pid = os.fork()
        if pid == 0:
            texts = [f"{child} {i}" for i in range(50)]
            found = [template.render([{"role": "user", "content": text}]) for text in texts]
            os._exit(found != texts)
        children.append(pid)
    mine = [template.render([{"role": "user", "content": str(i)}]) for i in range(50)]
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0, 0]
    assert mine == [str(i) for i in range(50)]


def test_threads_share_a_template() -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    with ThreadPoolExecutor(8) as pool:
        texts = pool.map(lambda i: template.render([{"role": "user", "content": str(i)}]), range(200))
        assert list(texts) == [str(i) for i in range(200)]


def test_json_in_the_styles_of_transformers_and_no_other() -> None:
    styled = ChatTemplate("{{ {'b': 1, 'a': 'ü'}|tojson(indent=2, separators=(',', ':'), sort_keys=true) }}")
    assert styled.render([]) == '{\n  "a":"ü",\n  "b":1\n}'
    for style in ("cls=dict", "default=raise_exception", "object_pairs_hook=dict"):
        with pytest.raises(InputError, match="unexpected keyword"):
            ChatTemplate("{{ 1|tojson(" + style + ") }}").render([])


def test_ordinary_expressions_still_work() -> None:
    source = (
        "{{ 'a' ~ 1 ~ none }} {{ 'x' * 3 }} {{ 2 ** 10 }} {{ 7 % 3 }} {{ '%s-%03d' % ('k', 7) }} "
        "{{ '{:>4}|{}'.format('a', [1]) }} {{ 'ab'.replace('a', 'c') }} {{ ['a', 1]|join(', ') }} "
        "{{ 'a\\nb'|indent(2) }} {{ '%s'|format('f') }} {{ [1, 2]|sum + 1.5 }} {{ 'q'.center(3) }}"
        "{{ missing }}"
    )
    expected = "a1None xxx 1024 1 k-007    a|[1] cb a, 1 a\n  b f 4.5  q "
    assert ChatTemplate(source).render([]) == expected


def test_a_huge_template_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"x" * (2**20 + 1))
    with pytest.raises(InputError, match="at most"):
        read_template(tmp_path)
    with pytest.raises(InputError, match="at most"):
        ChatTemplate("x" * (2**20 + 1))


@pytest.mark.parametrize(
    "message", [{}, {"role": "user"}, {"role": 1, "content": "x"}, {"role": "user", "content": 1}, "x"]
)
def test_a_malformed_message_is_refused(message: object) -> None:
    with pytest.raises(InputError, match="messages"):
        ChatTemplate("x").render([message])  # type: ignore[list-item]


@pytest.mark.parametrize("extra", [{1: 2}, (1, 2), {1, 2}, float("nan")])
def test_values_that_json_would_change_are_refused(extra: object) -> None:
    with pytest.raises(InputError, match="messages: expected values that JSON has"):
        ChatTemplate("x").render([{"role": "user", "content": "x", "extra": extra}])


def test_messages_that_are_nested_too_deeply_are_refused() -> None:
    extra: list[Any] = []
    for _ in range(100_000):
        extra = [extra]
    with pytest.raises(InputError, match="messages"):
        ChatTemplate("x").render([{"role": "user", "content": "x", "extra": extra}])
