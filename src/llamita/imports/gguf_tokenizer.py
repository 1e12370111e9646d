"""Make tokenizer.json and its settings from the tokens, merges, scores and flags of a GGUF file."""

from pathlib import Path
from typing import Any

import numpy as np

from llamita.errors import InputError, shown
from llamita.formats.gguf_parts import GgufModel
from llamita.formats.gguf_words import SPLITS
from llamita.imports.tokenizers import byte_level, with_scores, write_tokenizer
from llamita.system.files import write_bytes

_CONTROL, _USER = 3, 4  # kinds of tokens: never part of a text; added by users, and part of it
_BEGINS = ("llama-bpe", "tekken")  # splits whose models begin with BOS where the file does not say


def convert_tokenizer(file: GgufModel, directory: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and, if the file has one, chat_template.jinja.

    Raises:
        InputError: a value is missing or damaged, or names a way to split texts that is not known here.
    """
    values, name = file.values, file.path.name
    tokens, kinds = values["tokenizer.ggml.tokens"], values.get("tokenizer.ggml.token_type")
    if not isinstance(kinds, np.ndarray) or len(kinds) != len(tokens):
        raise InputError(f"{name}: tokenizer.ggml.token_type", "a number for each token")
    model = values.get("tokenizer.ggml.model")
    if model == "llama":
        _with_scores(file, tokens, kinds, directory)
    elif model == "gpt2":
        _byte_level(file, tokens, kinds, directory)
    else:
        raise InputError(f"{name}: tokenizer.ggml.model", "llama or gpt2", shown(model, 40))
    template = values.get("tokenizer.chat_template")
    if isinstance(template, str):
        write_bytes(directory / "chat_template.jinja", template.encode())


def _with_scores(file: GgufModel, tokens: list[str], kinds: np.ndarray, directory: Path) -> None:
    scores = file.values.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or len(scores) != len(tokens) or tokens[:3] != ["<unk>", "<s>", "</s>"]:
        expected = "one for each token, and Llama 2's first three"
        raise InputError(f"{file.path.name}: tokenizer.ggml.scores", expected)
    pieces = list(zip(tokens, (float(score) for score in scores), strict=True))
    settings, adds = _settings(file, tokens), _flag(file, "add_bos_token", True)
    begin = settings["bos_token"] if adds else None
    made = with_scores(pieces, _added(tokens, kinds), begin, _flag(file, "add_space_prefix", True))
    write_tokenizer(made, {**settings, "add_bos_token": adds}, directory)


def _byte_level(file: GgufModel, tokens: list[str], kinds: np.ndarray, directory: Path) -> None:
    merges, name = file.values.get("tokenizer.ggml.merges"), file.values.get("tokenizer.ggml.pre")
    where = f"{file.path.name}: tokenizer.ggml"
    if name not in SPLITS or not isinstance(merges, list):
        raise InputError(f"{where}.pre", f"one of {', '.join(SPLITS)} with merges", shown(name, 40))
    pairs = [tuple(merge.split(" ")) for merge in merges]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if any(len(pair) != 2 or not {*pair, "".join(pair)} <= vocabulary.keys() for pair in pairs):
        raise InputError(f"{where}.merges", "pairs of tokens that make a token")
    settings, split = _settings(file, tokens), SPLITS[name]
    adds = _flag(file, "add_bos_token", split in [SPLITS[known] for known in _BEGINS])
    begin = settings["bos_token"] if adds else None
    made = byte_level(vocabulary, [(a, b) for a, b in pairs], split, _added(tokens, kinds), begin)
    write_tokenizer(made, settings, directory)


def _added(tokens: list[str], kinds: np.ndarray) -> dict[str, bool]:
    """Return the tokens that are never cut, in order, with a flag: they are no part of a text."""
    return {
        token: bool(kind == _CONTROL) for token, kind in zip(tokens, kinds, strict=True) if kind in (_CONTROL, _USER)
    }


def _settings(file: GgufModel, tokens: list[str]) -> dict[str, Any]:
    numbers = (file.values.get(f"tokenizer.ggml.{one}_token_id") for one in ("bos", "eos"))
    bos, eos = (tokens[n] if type(n) is int and 0 <= n < len(tokens) else None for n in numbers)
    return {"bos_token": bos, "eos_token": eos}


def _flag(file: GgufModel, key: str, default: bool) -> bool:
    value = file.values.get(f"tokenizer.ggml.{key}", default)
    return value if isinstance(value, bool) else default
