"""Render a conversation as the one text that the model was trained to continue.

Chat templates are Jinja programs that come with a model, so they are untrusted. They run in Jinja's immutable
sandbox, with the few helpers that transformers gives them. No value that they compute may grow beyond
`_LARGEST_VALUE`, and no text beyond `_LARGEST_TEXT`. Their time is not limited.
"""

import json
import re
import string
from collections.abc import Callable, Iterable, Mapping, MappingView, Sequence
from datetime import datetime
from functools import wraps
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from llamita.errors import InputError, shown
from llamita.system.files import exists_in, read_bytes
from llamita.text.tokenizer import read_settings

Message = dict[str, Any]  # {"role": str, "content": str or [{"type": "text", "text": str}, ...]}
_LARGEST_TEMPLATE = 1 << 20  # characters; the longest real ones have about 20,000
_LARGEST_TEXT = 1 << 26  # characters of a rendered conversation; above any context
_LARGEST_VALUE = 1 << 23  # characters and items in one value; a context of a million tokens has fewer
_ITEM = 8  # the size of an item that is no text: the bytes of a reference; it also bounds the time of counting
_CONTAINERS = (list, tuple, set, frozenset, MappingView)
_LARGEST_BITS = 1 << 12  # of a whole number, as Python's own limit for printing one
_LARGEST_PADDING = 1 << 10  # width, tab or indent that a template may ask for
_LARGEST_INDENT = 16  # of each level of JSON
_REFUSED_METHODS = {"encode", "maketrans", "to_bytes", "translate"}  # make values whose size is not counted
_PADDED = {"center", "ljust", "rjust", "zfill", "expandtabs"}  # methods of a text that take a width
# Filters that multiply their input; no conversation needs them.
_REFUSED_FILTERS = ("batch", "center", "filesizeformat", "pprint", "slice", "urlize", "wordwrap", "xmlattr")
# A width of five digits or from an argument, in the style of printf.
_WIDE = re.compile(r"%(\([^)]*\))?[-+ #0]*(\*|\d{5,}|\d*\.(\*|\d{5,}))")


class ChatTemplate:
    """A compiled chat template with the special tokens that it may name."""

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        if len(source) > _LARGEST_TEMPLATE:
            raise InputError("chat template", f"at most {_LARGEST_TEMPLATE} characters", f"{len(source)}")
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        try:
            self._template = _environment().from_string(source)
        except Exception as error:  # the compiler fails in many ways, at depth or large numbers
            raise InputError("chat template", "a Jinja template", " ".join(str(error).split())) from None

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Return the conversation as one text, special tokens written out, open for the assistant's turn.

        Raises:
            InputError: a message is not a role with a text, or the template refuses the conversation.
        """
        values = {"messages": [_plain(m) for m in messages], "add_generation_prompt": add_generation_prompt}
        pieces, length = [], 0
        try:
            for piece in self._template.generate(**values, **self._tokens):
                pieces.append(piece)
                length += len(piece)
                if length > _LARGEST_TEXT:
                    raise jinja2.TemplateError(f"more than {_LARGEST_TEXT} characters")
        except Exception as error:  # a template can fail like any program
            text = " ".join(str(error).split())
            raise InputError(f"chat template: refused this conversation: {text}") from None
        return "".join(pieces)


def find_template(directory: Path) -> str | None:
    """Return the source of a model's chat template; None if it has none, like a base model.

    It is in `chat_template.jinja`, or else in `tokenizer_config.json`.

    Raises:
        InputError: the file is not UTF-8.
    """
    if exists_in(directory, "chat_template.jinja"):
        try:
            return read_bytes(directory, "chat_template.jinja", _LARGEST_TEMPLATE).decode()
        except UnicodeDecodeError as error:
            raise InputError("chat_template.jinja", "UTF-8", f"{error}") from None
    template = read_settings(directory, "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several, each named; the one for plain conversations is "default"
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def read_template(directory: Path) -> str:
    """Return the source of a model's chat template; see `find_template`.

    Raises:
        InputError: the model has none.
    """
    template = find_template(directory)
    if template is None:
        raise InputError(str(directory), "a chat template", "none, as in base models", "try `llamita generate`")
    return template


def _plain(message: Message) -> Message:
    """Return a copy whose content is one string, as templates of text models expect it."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise InputError("messages", "objects with a role and a content", shown(message))
    content = message.get("content")
    if isinstance(content, list):
        parts = [p.get("text") if isinstance(p, dict) and p.get("type") == "text" else None for p in content]
        content = "".join(parts) if all(isinstance(p, str) for p in parts) else None  # type: ignore[arg-type]
    if not isinstance(content, str):
        raise InputError("messages: content", "a text", shown(message.get("content")))
    return {**message, "content": content}


def _environment() -> jinja2.Environment:
    """Return Jinja as transformers sets it up for chat templates, with bounds."""
    environment = _Bounded(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _GenerationBlock],
        optimized=False,  # compute nothing at compile time, before there are bounds
        finalize=_bounded,  # of every value that is printed
    )
    environment.filters["tojson"] = _to_json
    for name in _REFUSED_FILTERS:
        del environment.filters[name]
    environment.filters = {name: _bounded_filter(name, f) for name, f in environment.filters.items()}
    del environment.globals["lipsum"]
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _Generator(CodeGenerator):
    """Make `~` join with the bounded function, because the sandbox does not intercept that operator."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat([str(part) for part in environment.bounded((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))])")

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: Any) -> str:
        """Let the compiler print nothing but plain text by itself, because it has no bounds."""
        if not isinstance(node, nodes.TemplateData):
            raise nodes.Impossible
        return super()._output_child_to_const(node, frame, finalize)


class _Bounded(ImmutableSandboxedEnvironment):
    """The sandbox, which also checks the size of a result before it is computed."""

    code_generator_class = _Generator
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """Join the pieces of `~`, macros, calls and blocks of `set`."""
        return "".join(_bounded(list(pieces)))

    @staticmethod
    def bounded(value: Any) -> Any:
        return _bounded(value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            _check_printf(left, right)
        elif operator == "+" and not (_is_number(left) and _is_number(right)):
            _check_size(_size(left) + _size(right))
        elif operator == "*":
            _check_product(left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * max(right, 0))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, /, *args: Any, **named: Any) -> Any:  # type: ignore[override]
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if isinstance(owner, str | int) and name in _REFUSED_METHODS:
            raise jinja2.TemplateError(f"{name}: not for chat templates")
        _bounded([*args, *named.values()])
        if isinstance(owner, str):
            args = _check_method(owner, name, args, named)
        return super().call(context, function, *args, **named)

    def getitem(self, obj: Any, argument: Any) -> Any:
        return super().getitem(obj, _bounded(argument))  # because an error would print it

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        @wraps(wrapped)
        def bounded(*args: Any, **named: Any) -> str:
            _check_format(value.__self__, [*args, *named.values()])
            return wrapped(*args, **named)

        return bounded


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter that checks its value and arguments first."""
    at = 1 if hasattr(function, "jinja_pass_arg") else 0  # the place of its value: after a context, if it takes one

    @wraps(function)  # copies that attribute too
    def bounded(*args: Any, **named: Any) -> Any:
        before, given = args[:at], list(_bounded(args[at:]))
        if name in ("join", "sum"):
            given[0] = _bounded(list(given[0]))  # it may have been an iterator, which has no size
        if name == "join":
            separator = [*given[1:2], named.get("d", "")][0]
            _check_size(_size(given[0]) + _size(separator) * len(given[0]))
        elif name == "replace":
            old, new = [*given[1:], *(named[k] for k in ("old", "s", "new") if k in named)][:2]
            _check_size(_size(given[0]) + str(given[0]).count(str(old)) * _size(new))
        elif name == "indent":
            width = [*given[1:2], named.get("width", 4)][0]
            _check_padding(width if isinstance(width, int) else len(width))
            _check_size(_size(given[0]) + len(str(given[0]).splitlines()) * _LARGEST_PADDING)
        elif name == "format":
            _check_printf(str(given[0]), [*given[1:], *named.values()])
        return function(*before, *given, **named)

    return bounded


def _check_method(text: str, name: str, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
    """Check the methods of a text that make a longer one; return the arguments, with lists for iterators."""
    if name in _PADDED:
        for width in (*args[:1], *named.values()):
            _check_padding(width)
        _check_size(len(text) + text.count("\t") * _LARGEST_PADDING if name == "expandtabs" else 0)
    elif name == "replace" and len(args) > 1:
        _check_size(len(text) + text.count(args[0]) * len(args[1]))
    elif name == "join" and args:
        args = (_bounded(list(args[0])), *args[1:])
        _check_size(_size(args[0]) + len(text) * len(args[0]))
    return args


def _check_printf(style: str, values: Any) -> None:
    if _WIDE.search(style):
        raise jinja2.TemplateError(f"a width of at most {_LARGEST_PADDING} expected in a format")
    _check_size(len(style) + style.count("%") * (_size(values) + _LARGEST_PADDING))


def _check_format(style: str, values: Any) -> None:
    fields = 0
    for _, field, width, _ in string.Formatter().parse(style):
        fields += field is not None
        if width and ("{" in width or re.search(r"\d{5}", width)):
            raise jinja2.TemplateError(f"a width of at most {_LARGEST_PADDING} expected in a format")
    _check_size(len(style) + fields * (_size(values) + _LARGEST_PADDING))


def _check_product(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
    for value, times in ((left, right), (right, left)):
        if isinstance(times, int) and not _is_number(value):
            _check_size(_size(value) * max(times, 0))


def _check_bits(bits: int) -> None:
    if bits > _LARGEST_BITS:
        raise jinja2.TemplateError(f"a whole number of more than {_LARGEST_BITS} bits")


def _check_padding(width: Any) -> None:
    if isinstance(width, int) and width > _LARGEST_PADDING:
        raise jinja2.TemplateError(f"a width of at most {_LARGEST_PADDING} expected, got {width}")


def _check_size(size: int) -> None:
    if size > _LARGEST_VALUE:
        raise jinja2.TemplateError(f"a value of more than {_LARGEST_VALUE} characters or items")


def _bounded(value: Any) -> Any:
    """Return the value itself; raise if it is too large."""
    _check_size(_size(value))
    return value


def _size(value: Any) -> int:
    """Count the characters and items of a value, those of shared parts as often as they would be printed."""
    size, waiting = 0, [value]
    while waiting and size + _ITEM * len(waiting) <= _LARGEST_VALUE:  # stop at the limit: sharing could make it endless
        part = waiting.pop()
        if isinstance(part, str):
            size += max(1, len(part))
            continue
        size += _ITEM
        if isinstance(part, _CONTAINERS):
            waiting.extend(part)  # type: ignore[arg-type] (a view of a dict can be walked through)
        elif isinstance(part, Mapping):
            waiting += [*part.keys(), *part.values()]
        elif isinstance(part, Namespace):  # it would print what cannot be counted
            raise jinja2.TemplateError("namespace: expected its attributes, got all of it")
    return size + _ITEM * len(waiting)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


class _GenerationBlock(Extension):
    """Accept `{% generation %}`, which marks the assistant's words for training, as plain template."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own interface)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return a value as JSON in the style that the template asks for; Jinja's own filter would escape HTML.

    The parameters are those of transformers. `json.dumps` takes more, among them functions to call.
    """
    style = [0 if indent is None else indent if isinstance(indent, int) else len(indent)]
    style += [len(part) for part in separators or ()]
    if max(style) > _LARGEST_INDENT:
        raise jinja2.TemplateError(f"tojson: expected at most {_LARGEST_INDENT} characters of indent")
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    pieces, length = [], 0
    for piece in encoder.iterencode(_bounded(value)):  # only here is known how much indents add
        pieces.append(piece)
        length += len(piece)
        _check_size(length)
    return "".join(pieces)


def _strftime_now(style: str) -> str:
    _check_padding(len(style))  # Python lets a date be 256 times as long as its format
    return datetime.now().strftime(style)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
