"""Chat templates: where they are found, what they may do, and the same text as transformers renders."""

import json
from pathlib import Path

import pytest

from llamita.chat import ChatTemplate, read_template
from llamita.errors import InputError

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


@pytest.mark.parametrize("template", [LLAMA3, LLAMA2, HELPERS])
@pytest.mark.parametrize("is_open", [True, False])
def test_renders_as_transformers_does(template: str, is_open: bool) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils", reason="compares with transformers")
    expected, _ = utils.render_jinja_template(
        conversations=[CHAT],
        chat_template=template,
        add_generation_prompt=is_open,
        bos_token="<s>",
        eos_token="</s>",
    )
    ours = ChatTemplate(template, bos_token="<s>", eos_token="</s>")
    assert ours.render(CHAT, add_generation_prompt=is_open) == expected[0]


def test_llama3_text_in_full() -> None:
    text = ChatTemplate(LLAMA3, bos_token="<B>").render([{"role": "user", "content": " Hi "}])
    assert text == (
        "<B><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
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
                {
                    "chat_template": [
                        {"name": "tool_use", "template": "no"},
                        {"name": "default", "template": "yes"},
                    ]
                }
            )
        },
    ],
)
def test_where_a_template_is_found(tmp_path: Path, settings: dict[str, str]) -> None:
    for name, text in settings.items():
        (tmp_path / name).write_text(text)
    assert read_template(tmp_path) == "yes"


@pytest.mark.parametrize(
    "settings",
    [{}, {"tokenizer_config.json": "{}"}, {"tokenizer_config.json": '{"chat_template": [{"name": "rag"}]}'}],
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
