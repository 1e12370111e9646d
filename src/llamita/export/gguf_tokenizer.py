"""Turn a tokenizer.json into GGUF's metadata: tokens, their kinds, merges or scores."""

from typing import Any

import numpy as np

from llamita.errors import InputError, shown
from llamita.formats.gguf_words import SPLITS, expressions_of, name_of
from llamita.models.packed import PackedModel
from llamita.system.files import parse_json, read_bytes
from llamita.text.tokenizer import Tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER, _BYTE = 1, 2, 3, 4, 6  # llama.cpp's kinds of tokens
_LARGEST = 64 << 20  # bytes of a tokenizer.json


def tokenizer_values(packed: PackedModel) -> dict[str, Any]:
    """Return the tokenizer's metadata.

    Raises:
        InputError: the tokenizer splits texts in a way that llama.cpp has no name for, or it is no BPE.
    """
    tokenizer = Tokenizer(packed.path, packed.config)  # checks the whole file
    whole = parse_json(read_bytes(packed.path, "tokenizer.json", _LARGEST), "tokenizer.json")
    model = whole["model"]
    if model.get("type") != "BPE":
        hint = "llamita does not write llama.cpp's format of others"
        raise InputError("tokenizer.json: model", "BPE", shown(model.get("type")), hint)
    added = {int(token["id"]): token for token in whole.get("added_tokens", [])}
    words = {int(number): word for word, number in model["vocab"].items()}
    words |= {number: token["content"] for number, token in added.items()}
    count = packed.config.vocab_size
    tokens = [words.get(number, f"[PAD{number}]") for number in range(count)]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    found: dict[str, Any] = {"tokenizer.ggml.tokens": tokens}
    if model.get("byte_fallback"):
        found |= _sentencepiece(tokens, merges, added)
        found["tokenizer.ggml.add_space_prefix"] = _adds_space(whole)
    else:
        found |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": _split_name(whole),
                  "tokenizer.ggml.merges": merges}  # fmt: skip
    kinds = [_kind(number, word, words, added, bool(model.get("byte_fallback"))) for number, word in enumerate(tokens)]
    found["tokenizer.ggml.token_type"] = np.array(kinds, np.int32)
    return found | _special(tokenizer)


def _kind(number: int, word: str, words: dict[int, str], added: dict[int, Any], has_bytes: bool) -> int:
    if number not in words:
        return _CONTROL  # rows of the table that no text uses
    if number in added:
        if word == "<unk>":
            return _UNKNOWN
        return _CONTROL if added[number].get("special") else _USER
    is_byte = has_bytes and len(word) == 6 and word.startswith("<0x") and word.endswith(">")
    return _BYTE if is_byte else _NORMAL


def _sentencepiece(tokens: list[str], merges: list[str], added: dict[int, Any]) -> dict[str, Any]:
    """Return scores in the order of merges; SentencePiece's BPE uses nothing else."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault(pair.replace(" ", "", 1), rank)
    last = len(merges)
    scores = [0.0 if i in added else -float(ranks.get(word, last)) for i, word in enumerate(tokens)]
    return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.scores": np.array(scores, np.float32)}  # fmt: skip


def _split_name(whole: dict[str, Any]) -> str:
    """Return llama.cpp's name for the rule by which this tokenizer splits a text; refuse any other step."""
    before, normalizer = whole.get("pre_tokenizer") or {}, whole.get("normalizer") or {}
    expressions = expressions_of(before.get("pretokenizers", [before]))
    is_composed = normalizer.get("type") == "NFC"
    name = None
    if expressions is not None and (is_composed or not normalizer):
        name = name_of(expressions, bool(whole["model"].get("ignore_merges")), is_composed)
    if name is None:
        expected = f"a way to split a text that llama.cpp has a name for ({', '.join(SPLITS)})"
        raise InputError("tokenizer.json: pre_tokenizer", expected, "another")
    return name


def _adds_space(whole: dict[str, Any]) -> bool:
    """Return whether a SentencePiece model puts a space in front of a text; its other steps must be Llama 2's."""
    steps = (whole.get("normalizer") or {}).get("normalizers", [whole.get("normalizer") or {}])
    kinds = [step.get("type") for step in steps]
    if kinds not in (["Prepend", "Replace"], ["Replace"]) or steps[-1].get("content") != "\u2581":
        raise InputError("tokenizer.json: normalizer", "Llama 2's, which writes spaces as ▁", "another")
    return kinds[0] == "Prepend"


def _special(tokenizer: Tokenizer) -> dict[str, Any]:
    found: dict[str, Any] = {"tokenizer.ggml.add_bos_token": tokenizer.adds_bos}
    if tokenizer.bos_token_id is not None:
        found["tokenizer.ggml.bos_token_id"] = tokenizer.bos_token_id
    if tokenizer.eos_token_ids:
        found["tokenizer.ggml.eos_token_id"] = tokenizer.eos_token_ids[0]
    if len(tokenizer.eos_token_ids) > 1:  # the token that ends a turn
        found["tokenizer.ggml.eot_token_id"] = tokenizer.eos_token_ids[-1]
    return found
