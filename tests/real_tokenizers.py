"""Meta's tokenizer models as tokenizer.json, made on the fly from the development data.

Only tests need this: a user's checkpoint in Hugging Face form has its tokenizer.json already.
"""

import base64
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

DATA = Path(os.environ.get("LLAMITA_DATA", Path(__file__).parents[2] / "shared" / "data")) / "tokenizers"
# Llama 3's split into words, from Meta's tokenizer.py
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_BOS, LLAMA3_EOT = "<|begin_of_text|>", "<|eot_id|>"
_LLAMA3_SPECIAL = {
    128000: LLAMA3_BOS, 128001: "<|end_of_text|>", 128006: "<|start_header_id|>", 128007: "<|end_header_id|>",
    128008: "<|eom_id|>", 128009: LLAMA3_EOT, 128010: "<|python_tag|>",
}  # fmt: skip


def model_file(name: str) -> Path:
    """The file of this name, or skip the test."""
    if not (DATA / name).exists():
        pytest.skip(f"needs {name}: set LLAMITA_DATA (looked in {DATA})")
    return DATA / name


def write_llama3(directory: Path) -> Path:
    """tokenizer.json and its settings from tiktoken ranks: base64 of the bytes, and the id."""
    lines = model_file("llama3_tokenizer.model").read_text().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    letters = _byte_letters()
    merges = []
    for token, rank in ranks.items():
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [(a, b) for a, b in splits if a in ranks and b in ranks]
        merges += [(rank, a, b) for a, b in sorted(pairs, key=lambda p: (ranks[p[0]], ranks[p[1]]))]
    merges.sort(key=lambda merge: merge[0])

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    vocabulary = {spell(token): rank for token, rank in ranks.items()}
    model = models.BPE(vocabulary, [(spell(a), spell(b)) for _, a, b in merges], ignore_merges=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    names = [
        _LLAMA3_SPECIAL.get(i, f"<|reserved_special_token_{i - 128000}|>") for i in range(128000, 128256)
    ]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{LLAMA3_BOS} $A", special_tokens=[(LLAMA3_BOS, 128000)]
    )
    return _save(directory, tokenizer, bos_token=LLAMA3_BOS, eos_token=LLAMA3_EOT)


def write_llama2(directory: Path) -> Path:
    """tokenizer.json and its settings from a SentencePiece model."""
    pieces = list(_sentencepieces(model_file("llama2_tokenizer.model").read_bytes()))
    vocabulary = {piece: i for i, (piece, _) in enumerate(pieces)}
    score = dict(pieces)
    merges = []
    for piece in vocabulary:
        pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        merges += [
            (-score[piece], vocabulary[a], vocabulary[b], a, b) for a, b in pairs if a in score and b in score
        ]
    merges.sort(key=lambda merge: merge[:3])
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary, [(a, b) for *_, a, b in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")]
    )
    return _save(directory, tokenizer, bos_token="<s>", eos_token="</s>", add_bos_token=True)


def _save(directory: Path, tokenizer: Tokenizer, **settings: object) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **settings,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def _byte_letters() -> dict[int, str]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def _sentencepieces(data: bytes) -> Iterator[tuple[str, float]]:
    """(piece, score) of a SentencePiece ModelProto: field 1, repeated; in it 1 is the text, 2 the score."""
    for field, value in _fields(data):
        if field == 1 and isinstance(value, bytes):
            parts = dict(_fields(value))
            yield parts[1].decode(), struct.unpack("<f", parts.get(2, b"\0\0\0\0"))[0]  # type: ignore[union-attr, arg-type]


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """(number, value) of the fields of a protocol buffer message."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        yield key >> 3, data[at : at + size]
        at += size
