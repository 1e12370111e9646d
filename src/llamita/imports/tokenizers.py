"""Convert Meta's tokenizer.model to tokenizer.json: tiktoken's ranks (Llama 3), SentencePiece's model (Llama 2).

Both are BPE, and both leave the merges out. A merge is a piece that can be cut into two known pieces. tiktoken orders
merges by the rank of the whole piece, SentencePiece by its score.
"""

import base64
import binascii
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from llamita.errors import InputError, shown
from llamita.formats.gguf_words import SPLITS, WordSplit
from llamita.system.files import exists_in, read_bytes, read_json

FILE = "tokenizer.model"
_LARGEST = 32 << 20  # bytes of a tokenizer.model; Llama 3's has 2.2 MB
_MOST_PIECES = 1 << 20
_LONGEST_PIECE = 256  # bytes; Llama 3's longest has 128
_MOST_MERGES = 1 << 22
_BOS, _END, _TURN = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
LLAMA3_ENDS = (_END, "<|eom_id|>", _TURN)
_SPECIAL = {  # by their place behind the ranks; the others are reserved, with numbers of their own
    0: _BOS, 1: _END, 4: "<|finetune_right_pad_id|>", 6: "<|start_header_id|>", 7: "<|end_header_id|>",
    8: "<|eom_id|>", 9: _TURN, 10: "<|python_tag|>",
}  # fmt: skip
_SPECIALS = 256
_UNIGRAM, _BPE = 1, 2  # kinds of SentencePiece's models; the first is the default
Added = Sequence[str] | Mapping[str, bool]  # tokens that are never cut; false for those that are part of a text
_SPACE = "\u2581"  # how SentencePiece writes a space


@dataclass(frozen=True)
class Converted:
    """A converted tokenizer: how many tokens it has, and the ids of those that begin and end a text."""

    tokens: int
    bos: int
    ends: tuple[int, ...]
    is_llama3: bool


def convert_tokenizer(source: Path, directory: Path) -> Converted:
    """Write tokenizer.json and its settings from the tokenizer.model of a directory.

    A directory that has a tokenizer.json instead, as `export --to meta` writes, needs no conversion.

    Raises:
        InputError: the file is missing, too large, or of neither kind.
    """
    if not exists_in(source, FILE) and exists_in(source, "tokenizer.json"):
        return _from_json(source)
    data = read_bytes(source, FILE, _LARGEST)
    is_llama3 = data[:1] != b"\n"  # the first field of SentencePiece's message
    if not is_llama3:
        tokenizer, settings = _from_sentencepiece(data)
    else:
        tokenizer, settings = _from_ranks(data)
    write_tokenizer(tokenizer, settings, directory)
    ends = LLAMA3_ENDS if is_llama3 else ("</s>",)
    first, *last = (tokenizer.token_to_id(name) or 0 for name in (settings["bos_token"], *ends))
    return Converted(tokenizer.get_vocab_size(), first, tuple(last), is_llama3)


def _from_json(source: Path) -> Converted:
    """Describe a tokenizer.json that needs no conversion."""
    settings = read_json(source, "tokenizer_config.json")
    try:
        tokenizer = Tokenizer.from_buffer(read_bytes(source, "tokenizer.json"))
    except Exception as error:  # the library raises no narrower class
        raise InputError("tokenizer.json", "a tokenizer", str(error)[:80]) from None
    tokens = [settings.get("bos_token"), settings.get("eos_token")]
    names = [token.get("content") if isinstance(token, dict) else token for token in tokens]
    bos, eos = (tokenizer.token_to_id(name) if isinstance(name, str) else None for name in names)
    if bos is None or eos is None:
        raise InputError("tokenizer_config.json", "two tokens, bos and eos", shown(names))
    return Converted(tokenizer.get_vocab_size(), bos, (eos,), tokenizer.token_to_id(_BOS) is not None)


def write_tokenizer(tokenizer: Tokenizer, settings: dict[str, Any], directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    tokenizer.save(str(directory / "tokenizer.json"))
    common = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (directory / "tokenizer_config.json").write_text(json.dumps(common | settings, indent=1), "utf-8")


def _from_ranks(data: bytes) -> tuple[Tokenizer, dict[str, Any]]:
    """Return Llama 3's tokenizer from lines that each have a piece's bytes in base64 and its rank."""
    ranks = dict(_ranks(data))
    if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([b]) in ranks for b in range(256)):
        raise InputError(FILE, "ranks from 0 on and a piece for every byte", "others")
    merges = []
    for token, rank in ranks.items():
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [(a, b) for a, b in splits if a in ranks and b in ranks]
        merges += [(rank, a, b) for a, b in sorted(pairs, key=lambda p: (ranks[p[0]], ranks[p[1]]))]
        _check_merges(len(merges))
    merges.sort(key=lambda merge: merge[0])
    letters = _byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    vocabulary = {spell(token): rank for token, rank in ranks.items()}
    reserved = count()
    names = [_SPECIAL.get(i) or f"<|reserved_special_token_{next(reserved)}|>" for i in range(_SPECIALS)]
    tokenizer = byte_level(vocabulary, [(spell(a), spell(b)) for _, a, b in merges], SPLITS["llama-bpe"], names, _BOS)
    return tokenizer, {"bos_token": _BOS, "eos_token": _TURN}


def byte_level(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], split: WordSplit, special: Added,
    bos: str | None,
) -> Tokenizer:  # fmt: skip
    """Return a BPE of bytes, as Llama 3 and GPT-2 have it.

    Args:
        vocabulary: pieces in GPT-2's letters for bytes.
        special: tokens to add, unless the vocabulary has them.
        bos: the token in front of every text.
    """
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=split.whole_words))
    if split.is_composed:
        tokenizer.normalizer = normalizers.NFC()
    steps = [pre_tokenizers.Split(Regex(words), behavior="isolated") for words in split.expressions]
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    return _with_special(tokenizer, special, bos)


def _with_special(tokenizer: Tokenizer, special: Added, bos: str | None) -> Tokenizer:
    """Add tokens that are never cut, and the one in front of every text."""
    flags = special if isinstance(special, Mapping) else dict.fromkeys(special, True)
    tokenizer.add_tokens([AddedToken(name, special=flag, normalized=False) for name, flag in flags.items()])
    if bos is not None:
        number = tokenizer.token_to_id(bos)
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, number)])
    return tokenizer


def _check_merges(merges: int) -> None:
    if merges > _MOST_MERGES:
        raise InputError(FILE, f"at most {_MOST_MERGES:,} ways to make a piece of two", "more")


def _ranks(data: bytes) -> Iterator[tuple[bytes, int]]:
    lines = data.splitlines()
    if len(lines) > _MOST_PIECES:
        raise InputError(FILE, f"at most {_MOST_PIECES} pieces", f"{len(lines)}")
    for number, line in enumerate(lines, 1):
        try:
            piece, rank = line.split()
            found = base64.b64decode(piece, validate=True), int(rank)
        except (ValueError, binascii.Error):
            expected = "base64 and a rank, as in Llama 3's file, or SentencePiece's model"
            raise InputError(f"{FILE}: line {number}", expected) from None
        if not 0 < len(found[0]) <= _LONGEST_PIECE:
            raise InputError(f"{FILE}: line {number}", f"a piece of 1 to {_LONGEST_PIECE} bytes")
        yield found


def _from_sentencepiece(data: bytes) -> tuple[Tokenizer, dict[str, Any]]:
    """Return Llama 2's tokenizer from pieces with scores."""
    pieces = list(_pieces(data))
    if len(pieces) < 259 or [piece for piece, _ in pieces[:3]] != ["<unk>", "<s>", "</s>"]:
        raise InputError(FILE, "the pieces <unk>, <s>, </s> and 256 bytes first, as in Llama 2's")
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    return with_scores(pieces), settings


def with_scores(
    pieces: list[tuple[str, float]], special: Added = ("<unk>", "<s>", "</s>"),
    bos: str | None = "<s>", adds_space: bool = True,
) -> Tokenizer:  # fmt: skip
    """Return a BPE whose merges are ordered by the score of the whole, as in SentencePiece, then by ids.

    Args:
        special: pieces that are never cut or made of others.
        bos: the token in front of every text.
        adds_space: whether a text is read as if a space came before it.
    """
    vocabulary = {piece: i for i, (piece, _) in enumerate(pieces)}
    score = dict(pieces)
    merges = []
    for piece in vocabulary:
        pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        merges += [(-score[piece], vocabulary[a], vocabulary[b], a, b) for a, b in pairs if a in score and b in score]
        _check_merges(len(merges))
    merges.sort(key=lambda merge: merge[:3])
    tokenizer = Tokenizer(
        models.BPE(vocabulary, [(a, b) for *_, a, b in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    spaces: Any = normalizers.Replace(" ", _SPACE)
    prefix = [normalizers.Prepend(_SPACE)] if adds_space else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, spaces])
    strip = [decoders.Strip(" ", 1, 0)] if adds_space else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return _with_special(tokenizer, special, bos)


def _pieces(data: bytes) -> Iterator[tuple[str, float]]:
    """Yield (piece, score) from a ModelProto: field 1, repeated, in which 1 is the text and 2 the score.

    Field 2 has the settings of the training; in it 3 is the kind of model, of which only BPE has merges.
    """
    count = 0
    try:
        for field, value in _fields(data):
            if field == 2 and isinstance(value, bytes):
                kind = dict(_fields(value)).get(3, _UNIGRAM)
                if kind != _BPE:
                    named = "a Unigram model" if kind == _UNIGRAM else f"kind {kind}"
                    raise InputError(FILE, "SentencePiece's BPE, as Llama 2's", named)
            if field != 1 or not isinstance(value, bytes):
                continue
            count += 1
            parts = dict(_fields(value))
            text, score = parts.get(1), parts.get(2, bytes(4))
            if not isinstance(text, bytes) or not isinstance(score, bytes) or not 0 < len(text) <= _LONGEST_PIECE:
                raise InputError(f"{FILE}: piece {count}", f"a text of at most {_LONGEST_PIECE} bytes")
            yield text.decode(), struct.unpack("<f", score)[0]
            if count > _MOST_PIECES:
                raise InputError(FILE, f"at most {_MOST_PIECES} pieces")
    except (IndexError, KeyError, ValueError, struct.error):
        raise InputError(f"{FILE}: piece {count + 1}", "SentencePiece's model", "a damaged one") from None


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Yield (number, value) of a protocol buffer message; raise IndexError, KeyError or ValueError for other bytes."""
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
            if shift > 63:
                raise ValueError("a number of more than 64 bits")

    while at < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        if size > len(data) - at:
            raise ValueError("beyond the end")
        yield key >> 3, data[at : at + size]
        at += size


def _byte_letters() -> dict[int, str]:
    """Return GPT-2's letter for each byte: printable bytes keep theirs."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
