"""Name the ways to split a text into words before BPE, as `tokenizer.ggml.pre` names them.

A GGUF has the name alone; the expressions are in llama.cpp (src/llama-vocab.cpp). Each expression divides what the
ones before it left, and what it does not match is a piece as well.
"""

from dataclasses import dataclass
from typing import Any

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}"
_QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_TEKKEN = rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}"
_GPT4O = (
    rf"{_BEFORE}{_UPPER}*{_LOWER}+{_ENDINGS}?|{_BEFORE}{_UPPER}+{_LOWER}*{_ENDINGS}?|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}"
)
_DIGIT, _DIGITS = r"\p{N}", r"\p{N}{1,3}"
_CJK = "[一-龥ࠀ-一가-\ud7ff]+"
_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_REST}"
)


@dataclass(frozen=True)
class WordSplit:
    """How a text is split.

    Attributes:
        expressions: in the order in which they divide a text.
        whole_words: whether a word that is a token is taken as it is, before any merge.
        is_composed: whether texts are brought to Unicode's form NFC first, as the models' own tokenizers do.
    """

    expressions: tuple[str, ...]
    whole_words: bool = False
    is_composed: bool = False


_LLAMA3_WHOLE = WordSplit((LLAMA3,), whole_words=True)
_DIGITS_APART = WordSplit((_DIGIT, GPT2))
_OF_QWEN2 = WordSplit((_QWEN2,), is_composed=True)
# The first name of a split is the one that is written.
SPLITS = {
    "llama-bpe": _LLAMA3_WHOLE,
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0", "lfm2"), _LLAMA3_WHOLE),
    "gpt-2": WordSplit((GPT2,)),
    **dict.fromkeys(("mpt", "olmo", "jais", "trillion", "phi-2", "exaone4", "granite-docling"), WordSplit((GPT2,))),
    "smollm": _DIGITS_APART,
    **dict.fromkeys(("refact", "starcoder", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS_APART),
    "dbrx": WordSplit((LLAMA3,)),
    **dict.fromkeys(("smaug-bpe", "glm4", "chatglm-bpe"), WordSplit((LLAMA3,))),
    "qwen2": _OF_QWEN2,
    **dict.fromkeys(("deepseek-r1-qwen", "megrez", "hunyuan"), _OF_QWEN2),
    "stablelm2": WordSplit((_QWEN2,)),
    "tekken": WordSplit((_TEKKEN,), whole_words=True),
    "gpt-4o": WordSplit((_GPT4O,)),
    "deepseek-coder": WordSplit((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, _DIGIT)),
    "deepseek-v3": WordSplit((_DIGITS, "[一-龥\u3040-ゟ\u30a0-ヿ]+", _DEEPSEEK3)),
}


def name_of(expressions: tuple[str, ...], whole_words: bool, is_composed: bool) -> str | None:
    """Return llama.cpp's name for a split, None if it has none that is known here.

    llama.cpp composes no text; a split that differs in this alone has the name, too.
    """
    wanted = [WordSplit(expressions, whole_words, composed) for composed in (is_composed, not is_composed)]
    return next((name for want in wanted for name, split in SPLITS.items() if split == want), None)


def expressions_of(steps: list[dict[str, Any]]) -> tuple[str, ...] | None:
    """Return the expressions of a tokenizer.json's pre-tokenizers, which end with ByteLevel; None for other steps."""
    found: list[str] = []
    for step in steps:
        kind = step.get("type")
        if kind == "Digits":
            found.append(_DIGIT if step.get("individual_digits") else r"\p{N}+")
        elif kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            pattern = step.get("pattern")
            found.append(pattern.get("Regex", "") if isinstance(pattern, dict) else "")
        elif kind == "ByteLevel" and step is steps[-1] and not step.get("add_prefix_space"):
            found += [GPT2] if step.get("use_regex", True) else []
        else:
            return None
    return tuple(found)
