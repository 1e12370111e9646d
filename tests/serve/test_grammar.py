"""Grammars: every answer that ends is valid, nothing is ever generated without its grammar, and limits hold."""

import json
import re
import resource
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from real_tokenizers import write_llama2, write_llama3
from schemas import random_schema, valid
from smollm2 import smollm2_file

import llamita
from llamita.engine.constraint import Constraint
from llamita.engine.llm import LLM
from llamita.engine.speculation import StepTimes
from llamita.errors import InputError, RunError
from llamita.serve import grammar
from llamita.serve.grammar import GrammarConstraint, Grammars
from llamita.serve.tool_calls import CallBegin, ToolCallParser
from llamita.serve.tools import HERMES, LLAMA, CallForm, check_tools
from llamita.text.tokenizer import Tokenizer

pytest.importorskip("llguidance", reason="the extra serve is not installed")
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
}
TOOLS = check_tools([
    {"type": "function", "function": {"name": "find", "parameters": PERSON}},
    {"type": "function", "function": {"name": "stop-it"}},
], "required").tools  # fmt: skip


@pytest.fixture(scope="module")
def llm() -> LLM:
    return llamita.load("embedded", scheme="llama3.2")


@pytest.fixture(scope="module")
def grammars(llm: LLM) -> Grammars:
    return grammars_of(llm)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify every draft, whatever it costs."""
    monkeypatch.setattr(StepTimes, "best_length", lambda *_: 100)


def grammars_of(llm: LLM) -> Grammars:
    return Grammars((llm.path / "tokenizer.json").read_text(), llm.config.vocab_size, llm.tokenizer.eos_token_ids)


def walk(constraint: Constraint, tokenizer: Tokenizer, text: str) -> bool:
    """Return whether a grammar accepts the tokens of a text; `forced` has to agree with `allowed`."""
    for token in tokenizer.encode(text, add_bos=False):
        allowed, forced = constraint.allowed(), constraint.forced(3)
        assert not forced or np.flatnonzero(allowed).tolist() == forced[:1]
        if not allowed[token]:
            return False
        constraint.accept(token)
    return bool(constraint.allowed()[list(tokenizer.eos_token_ids)].all())


# Answers


def check_answers(llm: LLM, prompt: Any, seeds: range, **options: Any) -> None:
    """Answer by random schemas: each that ends is valid, and most do end."""
    made, ended, drafted = grammars_of(llm), 0, 0
    for seed in seeds:
        schema = random_schema(seed)
        answer = llm.generate(prompt, max_tokens=400, seed=seed, constraint=made.json_schema(schema), **options)
        drafted += answer.timings.accepted_tokens
        if answer.finish_reason == "stop":
            ended += 1
            assert valid(json.loads(answer.text), schema), (seed, answer.text)
    assert ended > len(seeds) / 2
    assert drafted > 0


@pytest.mark.usefixtures("always")
def test_answers_by_200_random_schemas_are_valid(llm: LLM) -> None:
    check_answers(llm, "Once upon a time", range(200))


@pytest.mark.real
def test_answers_of_smollm2_by_random_schemas_are_valid() -> None:
    smol = llamita.load(smollm2_file())
    check_answers(smol, [{"role": "user", "content": "Describe a person as JSON."}], range(500))


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("how", [{"greedy": True}, {"seed": 4, "temperature": 1.2}], ids=str)
def test_drafts_change_no_answer(llm: LLM, grammars: Grammars, how: dict[str, Any]) -> None:
    for schema in map(random_schema, range(300, 310)):
        constraint = grammars.json_schema(schema)
        found = [llm.generate("A dog", max_tokens=80, speculate=n, constraint=constraint, **how) for n in (0, 4, 8)]
        assert found[0].token_ids == found[1].token_ids == found[2].token_ids
        assert found[0].timings.drafted_tokens == 0


def test_objects_patterns_and_grammars(llm: LLM, grammars: Grammars) -> None:
    options: dict[str, Any] = {"max_tokens": 60, "seed": 1}
    answer = llm.generate("x", constraint=grammars.regex("[a-c]{3}(d|ee)"), **options)
    assert re.fullmatch("[a-c]{3}(d|ee)", answer.text)
    assert answer.finish_reason == "stop"
    answer = llm.generate("x", constraint=grammars.lark('start: "go" place{2}\nplace: " north" | " south"'), **options)
    assert re.fullmatch("go( north| south){2}", answer.text)
    anything = grammars.json_schema({"type": "object"})
    assert walk(anything.copy(), llm.tokenizer, '{"a": [1, {"b": null}], "c":"d"}')
    assert not walk(anything.copy(), llm.tokenizer, "[1]")
    assert not walk(anything.copy(), llm.tokenizer, '{\n  "a": 1}')  # one space at most, so that none is endless


@pytest.mark.parametrize(("form", "name", "parallel"), list(product([LLAMA, HERMES], [None, "stop-it"], [True, False])))
def test_calls_are_right_and_found_again(
    llm: LLM, grammars: Grammars, form: CallForm, name: str | None, parallel: bool
) -> None:
    constraint = grammars.tool_calls(TOOLS, form, name=name, parallel=parallel)
    for seed in range(5):
        answer = llm.generate("x", max_tokens=200, seed=seed, constraint=constraint)
        parser = ToolCallParser(TOOLS, is_sure=True)
        events = parser.add(answer.text) + parser.finish()
        names = [event.name for event in events if isinstance(event, CallBegin)]
        assert names
        assert set(names) <= ({name} if name else {"find", "stop-it"})
        assert parallel or len(names) == 1


@pytest.mark.parametrize("form", [LLAMA, HERMES])
def test_calls_or_an_answer_by_a_schema(llm: LLM, grammars: Grammars, form: CallForm) -> None:
    either = grammars.tool_calls(TOOLS, form, otherwise=PERSON)
    call = form.begin("stop-it") + "{}" + form.end
    assert walk(grammars.tool_calls(TOOLS, form), llm.tokenizer, call)
    for right in (call, call + form.between + call, '{"name": "A", "age": 1}'):
        assert walk(either.copy(), llm.tokenizer, right)
    for wrong in ('{"name": "A", "age": "old"}', "Hello", form.begin("other") + "{}" + form.end):
        assert not walk(either.copy(), llm.tokenizer, wrong)


@pytest.mark.parametrize(
    ("reference", "right"), [("#/$defs/P", '{"name": "A", "age": 1}'), ("#/properties/q", "7"), ("#", '{"q": 3}')]
)
def test_parameters_may_refer_to_their_parts(llm: LLM, grammars: Grammars, reference: str, right: str) -> None:
    properties = {"q": {"type": "integer", "default": {"$ref": "#/x"}}, "p": {"$ref": reference}}
    parameters = {"type": "object", "properties": properties, "$defs": {"P": PERSON}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    either = grammars.tool_calls(tools, LLAMA, otherwise={"type": "object", "properties": {"x": {"type": "null"}}})
    assert walk(either.copy(), llm.tokenizer, '{"name": "f", "parameters": {"q": 1, "p": ' + right + "}}")
    assert not walk(either.copy(), llm.tokenizer, '{"name": "f", "parameters": {"q": 1, "p": true}}')


def test_other_properties_are_closed_unless_asked_for(llm: LLM, grammars: Grammars) -> None:
    more = '{"name": "A", "age": 1, "x": 1}'
    assert not walk(grammars.json_schema(PERSON), llm.tokenizer, more)
    assert walk(grammars.json_schema(PERSON | {"additionalProperties": True}), llm.tokenizer, more)
    open_parts = {"allOf": [PERSON, {"properties": {"x": {"type": "integer"}}, "required": ["x"]}]}
    assert walk(grammars.json_schema(open_parts), llm.tokenizer, more)


def test_the_end_may_be_any_end_token(llm: LLM) -> None:
    ends = (llm.tokenizer.eos_token_ids[0], 5, 9)
    made = Grammars((llm.path / "tokenizer.json").read_text(), llm.config.vocab_size, ends).regex("ab*")
    start = made.copy()
    assert not start.allowed()[list(ends)].any()
    for token in llm.tokenizer.encode("ab", add_bos=False):
        start.accept(token)
    for end in ends:
        constraint = start.copy()
        assert constraint.allowed()[end]
        constraint.accept(end)
        assert np.flatnonzero(constraint.allowed()).tolist() == sorted(ends)
    with pytest.raises(InputError, match="a token after or before its end"):
        made.copy().accept(5)


@pytest.mark.parametrize("write", [write_llama2, write_llama3])
def test_tokenizers_of_both_kinds(write: Any, tmp_path: Path) -> None:
    """The logits may have more rows than the tokenizer has tokens: those never come."""
    tokenizer = Tokenizer(write(tmp_path))
    rows = tokenizer.vocab_size + 64
    made = Grammars((tmp_path / "tokenizer.json").read_text(), rows, tokenizer.eos_token_ids)
    text = '{"name": "Jürgen", "age": 41}'
    constraint = made.json_schema(PERSON)
    assert len(constraint.allowed()) == rows
    found = b""
    while len(found) < len(text.encode()):  # the likeliest token is any that goes on with the text
        allowed, rest = np.flatnonzero(constraint.allowed()).tolist(), text.encode()[len(found) :]
        assert max(allowed) < tokenizer.vocab_size
        fitting = [token for token in allowed if rest.startswith(tokenizer.token_bytes(token) or b"\0")]
        best = max(fitting, key=lambda token: len(tokenizer.token_bytes(token)))
        found += tokenizer.token_bytes(best)
        constraint.accept(best)
    assert constraint.allowed()[list(tokenizer.eos_token_ids)].all()


# Limits and errors


def deep(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(("schema", "message"), [
    (5, "expected a JSON schema"), ({"type": {1}}, "expected a JSON schema"), ({"items": 7}, "expected a JSON schema"),
    (deep(40), "at most 32 deep"), ({"enum": ["x" * 70_000]}, "at most 65536 bytes"),
    ({"type": "strin"}, "Invalid type"), ({"type": "array", "uniqueItems": True}, "uniqueItems"), ({"not": {}}, "not"),
    ({"type": "string", "format": "?"}, "format"), ({"$ref": "http://localhost/x"}, "not present"),
    ({"$ref": "#/$defs/x"}, "response_format"), ({"type": "string", "pattern": "(?=a)"}, "look"),
    ({"type": "integer", "minimum": 2, "maximum": 1}, "Unsatisfiable"),
    ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf"),
    ({"patternProperties": {"a": {}}, "properties": {"ab": {}}}, "one pattern property alone"),
    ({"patternProperties": {"a": {}, "b": {}}}, "one pattern property alone"),
    ({"patternProperties": {"a": {}}, "additionalProperties": {}}, "one pattern property alone"),
])  # fmt: skip
def test_what_a_grammar_could_not_keep_to_is_refused(grammars: Grammars, schema: Any, message: str) -> None:
    with pytest.raises(InputError, match=r"response_format: expected") as error:
        grammars.json_schema(schema)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_errors_quote_no_grammar(grammars: Grammars) -> None:
    with pytest.raises(InputError, match="Invalid type: strin") as error:
        grammars.lark('start: a\na: %json {"type": "strin"}')
    assert "start:" not in str(error.value)


@pytest.mark.parametrize("pattern", ["(", "(?=a)b", "", "a" * 70_000, 5, "\\"])
def test_wrong_patterns_are_refused(grammars: Grammars, pattern: Any) -> None:
    with pytest.raises(InputError, match="regex: expected"):
        grammars.regex(pattern)
    with pytest.raises(InputError, match="grammar: expected"):
        grammars.lark("start: nothing" if isinstance(pattern, str) else pattern)


def test_keys_of_llguidance_are_of_no_effect(llm: LLM, grammars: Grammars) -> None:
    sly = {"x-guidance": {"whitespace_flexible": True, "lenient": True}, **PERSON}
    assert not walk(grammars.json_schema(sly), llm.tokenizer, '{\n\n"name": "A", "age": 1}')
    named = {"type": "object", "properties": {"x-guidance": {"type": "integer"}}, "required": ["x-guidance"]}
    assert walk(grammars.json_schema(named), llm.tokenizer, '{"x-guidance": 1}')
    with pytest.raises(InputError, match="uniqueItems"):
        grammars.json_schema({"x-guidance": {"lenient": True}, "type": "array", "uniqueItems": True})


# The first takes hours and all memory, in llguidance alone; the others seconds, and 2 GB at most.
BOMBS: list[tuple[str, Any]] = [
    ("json_schema", {"allOf": [{"type": "string", "pattern": f".*{c}.{{12}}"} for c in "abcdefghijklmnopqrstuvwxyz"]}),
    ("regex", "a?" * 10_000 + "a" * 10_000),
    ("regex", "((a{100}){100}){100}"),
    ("regex", "(a*)*" * 2_000),
    ("json_schema", {"type": "object", "properties": {f"p{i}": {} for i in range(3_500)}}),
    ("lark", "start: X0\n" + "".join(f"X{i}: X{i + 1} X{i + 1}\n" for i in range(40)) + 'X40: "a"'),
    ("lark", "start: " + "(" * 20_000 + '"a"' + ")" * 20_000),
    ("regex", "(" * 20_000 + "a" + ")" * 20_000),
]


def test_a_grammar_that_takes_long_is_stopped_and_stops_no_other(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "COMPILE_SECONDS", 0.2)
    grammars = grammars_of(llm)
    kind, bomb = BOMBS[0]
    with ThreadPoolExecutor(3) as pool:
        for made in [pool.submit(getattr(grammars, kind), {**bomb, "title": str(place)}) for place in range(3)]:
            with pytest.raises(InputError, match=r"made within 0\.2 s, got a slower one"):
                made.result(30)
    assert grammars.regex("ab").allowed().any()
    monkeypatch.setattr(grammars._trials, "ask", None)
    with pytest.raises(InputError, match="a slower one"):  # at once: it is known
        grammars.json_schema({**bomb, "title": "2"})


@pytest.mark.parametrize("bomb", BOMBS[1:], ids=lambda bomb: str(bomb)[:30])
def test_bombs_take_bounded_time_and_memory(grammars: Grammars, bomb: tuple[str, Any]) -> None:
    kind, value = bomb
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with suppress(InputError):
        _follow(getattr(grammars, kind)(value), -1, 20)
    assert time.process_time() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KB


def test_an_answer_may_not_take_long_at_every_token(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    constraint = grammars.lark('start: s\ns: s s s | s s | "a"')  # takes longer with each token
    monkeypatch.setattr(grammar, "STEP_SECONDS", 0.02)
    monkeypatch.setattr(grammar, "MEAN_SECONDS", 0.0001)
    with pytest.raises(InputError, match=r"got more than 0\.02 s for a token, or 0\.0001 s for each"):
        _follow(constraint, -1, 1000)


def _follow(constraint: Constraint, place: int, steps: int) -> None:
    """Take the allowed token at this place, again and again."""
    for _ in range(steps):
        constraint.accept(int(np.flatnonzero(constraint.allowed())[place]))


def test_a_slow_step_fails(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    constraint = grammars.regex("[ab]+c")
    constraint.accept(int(np.flatnonzero(constraint.allowed())[0]))
    other = GrammarConstraint(constraint._matcher, 4096, (1,), constraint._workers)
    monkeypatch.setattr(grammar, "STEP_SECONDS", -1.0)
    with pytest.raises(InputError, match="grammar: expected an answer that keeps to it, got more than"):
        other.allowed()
    assert other.forced(5) == []


def test_an_error_is_never_forgotten(llm: LLM, grammars: Grammars) -> None:
    constraint = grammars.regex("ab")
    wrong = llm.tokenizer.encode("z", add_bos=False)[0]
    for _ in range(2):
        with pytest.raises(InputError, match="grammar: expected an answer that keeps to it"):
            constraint.accept(wrong)
        with pytest.raises(InputError, match="grammar"):
            constraint.allowed()
        assert constraint.forced(3) == []
    with pytest.raises(InputError, match="grammar"):
        constraint.copy().allowed()


def test_grammars_are_kept_and_the_oldest_go(llm: LLM) -> None:
    made = grammars_of(llm)
    for i in range(grammar.KEPT_GRAMMARS + 5):
        made.regex(f"a{{{i + 1}}}")
        made.regex("a{1}")
    assert len(made._kept[None]) == grammar.KEPT_GRAMMARS
    first = made.regex("a{1}")
    first.accept(llm.tokenizer.encode("a", add_bos=False)[0])
    assert not made.regex("a{1}").allowed()[list(llm.tokenizer.eos_token_ids)].any()  # as if nobody had used it


def test_each_owner_has_grammars_of_its_own(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the time of an answer would tell that another key has used its grammar."""
    made, tried = grammars_of(llm), list[str]()
    attempt = made._try
    monkeypatch.setattr(made, "_try", lambda kind, text: (tried.append(kind), attempt(kind, text)))
    tools = check_tools([{"type": "function", "function": {"name": "go"}}]).tools
    for owner in ("one", "one", "other", None):
        made.regex("ab", owner=owner)
        made.lark('start: "a"', owner=owner)
        made.json_schema(PERSON, owner=owner)
        made.tool_calls(tools, LLAMA, owner=owner)
    assert tried == 3 * ["regex", "lark", "schema", "lark"]
    for i in range(grammar.KEPT_GRAMMARS):
        made.regex(f"b{{{i + 1}}}", owner="other")
    tried.clear()
    made.regex("ab", owner="one")
    assert not tried  # whatever others do
    monkeypatch.setattr(grammar, "ALL_GRAMMARS", 20)
    made.regex("ac", owner="one")
    assert sum(map(len, made._kept.values())) == 20
    made.regex("ab", owner="one")
    assert tried == ["regex"]  # of the new one


def test_threads_share_grammars(llm: LLM, grammars: Grammars) -> None:
    def answer(seed: int) -> tuple[str, bool]:
        made = llm.generate("x", max_tokens=80, seed=seed, constraint=grammars.json_schema(PERSON))
        return made.text, made.finish_reason == "stop" and valid(json.loads(made.text), PERSON)

    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(answer, range(24)))
    assert together == [answer(seed) for seed in range(24)]
    assert all(right for _, right in together)


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RunError, match=r"structured output needs llguidance; try pip install 'llamita\[serve\]'"):
        Grammars("{}", 10, (1,))


def test_a_tokenizer_that_it_cannot_read_is_refused() -> None:
    with pytest.raises(InputError, match=r"tokenizer\.json: expected a tokenizer that llguidance reads"):
        Grammars("{}", 10, (1,))
    with pytest.raises(InputError, match="a model with an end token"):
        Grammars("{}", 10, ())
