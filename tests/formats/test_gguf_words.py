"""The ways to split a text that a GGUF names: what tokenizer.json says for each, there and back."""

import json
from typing import Any

import pytest
from places import DATA
from tokenizers import Regex, pre_tokenizers

from llamita.formats.gguf_words import GPT2, SPLITS, WordSplit, expressions_of, name_of
from llamita.imports.tokenizers import byte_level

TEXTS = [
    "", " ", "  \n\n x", "It's 1234567 o'clock, isn't it?\r\n", "naïve — Ⅷ² ١٢٣ 你好\uff0c世界 こんにちは",
    "a\u0301\tb\u200b\U0001f600!!",
    "HTTPServer2x don'T", "/usr/local\n\n  y", "x\u3000 \u00a0y", "[end]…",
]  # fmt: skip


def pieces(steps: list[Any], text: str) -> list[str]:
    return [piece for piece, _ in pre_tokenizers.Sequence(steps).pre_tokenize_str(text)]


def splits(expressions: tuple[str, ...]) -> list[Any]:
    steps: list[Any] = [pre_tokenizers.Split(Regex(one), behavior="isolated") for one in expressions]
    return [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


@pytest.mark.parametrize("name", SPLITS)
def test_a_split_is_found_again_in_what_is_written_for_it(name: str) -> None:
    split = SPLITS[name]
    letters = pre_tokenizers.ByteLevel.alphabet()
    whole = json.loads(byte_level({letter: i for i, letter in enumerate(letters)}, [], split, (), None).to_str())
    expressions = expressions_of(whole["pre_tokenizer"]["pretokenizers"])
    assert expressions is not None
    assert expressions == split.expressions
    is_composed = (whole["normalizer"] or {}).get("type") == "NFC"
    found = name_of(expressions, whole["model"]["ignore_merges"], is_composed)
    assert found is not None
    assert SPLITS[found] == split


def test_the_steps_of_published_tokenizers_are_the_expressions_of_their_names() -> None:
    """SmolLM's has Digits and ByteLevel, GPT-2's ByteLevel alone: other steps, the same pieces."""
    digits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    gpt2 = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    lines = [*TEXTS, *real_lines()]
    for steps, name in ((digits, "smollm"), (gpt2, "gpt-2")):
        dumped = [json.loads(step.__getstate__()) for step in steps]
        assert expressions_of(dumped) == SPLITS[name].expressions
        for line in lines:
            assert pieces(steps, line) == pieces(splits(SPLITS[name].expressions), line), line


def real_lines() -> list[str]:
    paths = sorted(DATA.glob("**/*.txt"))[:3] if DATA.is_dir() else []
    return [line for path in paths for line in path.read_text("utf-8", "replace").splitlines()[:1000]]


@pytest.mark.parametrize(
    "steps",
    [
        [{"type": "Whitespace"}],
        [{"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Removed"}],
        [{"type": "ByteLevel", "add_prefix_space": True}],
        [{"type": "ByteLevel"}, {"type": "Digits"}],
    ],
)
def test_other_steps_have_no_expressions(steps: list[dict[str, Any]]) -> None:
    assert expressions_of(steps) is None


def test_an_unknown_split_has_no_name() -> None:
    assert name_of(("x",), False, False) is None
    assert name_of((GPT2,), True, False) is None  # no name takes whole words with GPT-2's expression
    assert name_of((GPT2,), False, True) == "gpt-2"  # llama.cpp composes no text, so the name is the same
    assert WordSplit((GPT2,)) == SPLITS["gpt-2"]
