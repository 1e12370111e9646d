"""Turn text into token ids and back, by the Hugging Face files of a model directory.

Encoding is the `tokenizers` library's own. Decoding goes through bytes, one token at a time: byte-level
BPE (Llama 3) and SentencePiece pieces (Llama 2) are both functions from a token to its bytes, so every
token of a stream costs the same, and a stream never shows half a character.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import tokenizers

from llamita.errors import InputError, shown
from llamita.models.config import ModelConfig
from llamita.models.metadata import METADATA
from llamita.system.files import exists_in, read_json, safe_path

_CONVERT = 'try `AutoTokenizer.from_pretrained("{0}").save_pretrained("{0}")` of transformers to make one'
_COPY = "try copying it from the source again"  # of a packed model, which transformers cannot convert
_ID_LIMIT = 2**32  # the library's ids are 32 bits
_BYTE_PIECE = re.compile("<0x[0-9A-Fa-f]{2}>")  # SentencePiece's spelling of a byte


class Tokenizer:
    """The tokenizer of a model directory.

    Attributes:
        bos_token, eos_token: their text, for chat templates; "" if the model has none.
        bos_token_id: None if the model has none.
        adds_bos: whether the model's files put a BOS token in front of a text.
        eos_token_ids: every token that ends a text, by the tokenizer's files or the model's.
    """

    def __init__(self, directory: Path, config: ModelConfig | None = None) -> None:
        self._inner = _read_tokenizer(directory)
        self._id_limit = config.vocab_size if config else _ID_LIMIT
        self._added = self._inner.get_added_tokens_decoder()
        self._pieces = _piece_reader(self._inner)
        self._strips_space = _strips_leading_space(_decoder_steps(self._inner))
        self._bytes: dict[int, bytes] = {}
        settings = {
            **read_settings(directory, "special_tokens_map.json"),
            **read_settings(directory, "tokenizer_config.json"),
        }
        bos = config.bos_token_id if config else None
        self.bos_token_id = self._special(settings, "bos_token", bos)
        self.bos_token = self._text_of(self.bos_token_id)
        eos = self._special(settings, "eos_token", None)
        generation = read_settings(directory, "generation_config.json").get("eos_token_id")
        ends = [
            eos,
            *(generation if isinstance(generation, list) else [generation]),
            *(config.eos_token_ids if config else ()),
        ]
        ends = [end for end in ends if isinstance(end, int) and not isinstance(end, bool)]
        self.eos_token_ids = tuple(dict.fromkeys(ends))
        self._check_ids([*ends, *([] if self.bos_token_id is None else [self.bos_token_id])])
        self.eos_token = self._text_of(eos if eos is not None else next(iter(self.eos_token_ids), None))
        by_itself = self._encode("", add_special_tokens=True)[:1] == [self.bos_token_id]
        self.adds_bos = self.bos_token_id is not None and bool(settings.get("add_bos_token", by_itself))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self._inner.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_bos: bool | None = None) -> list[int]:
        """Return the token ids of a text; special tokens written out in it count as such.

        Args:
            text: any text that UTF-8 can express.
            add_bos: put the BOS token in front, if the model has one and the text does not begin with it;
                by default as the model's files say.

        Raises:
            InputError: the text holds a lone surrogate, which Python puts for a byte that is not UTF-8; or
                this text shows that the model's tokenizer.json contradicts itself.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError("text", "valid UTF-8", f"a stray byte at character {error.start}") from None
        ids = self._encode(text, add_special_tokens=False)
        wanted = self.adds_bos if add_bos is None else add_bos
        if wanted and self.bos_token_id is not None and ids[:1] != [self.bos_token_id]:
            ids.insert(0, self.bos_token_id)
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Return the text of token ids; bytes that are not UTF-8 become U+FFFD."""
        detokenizer = Detokenizer(self, skip_special=skip_special)
        return "".join([*(detokenizer.add(token) for token in ids), detokenizer.finish()])

    def token_bytes(self, token: int, *, skip_special: bool = True) -> bytes:
        """Return the bytes of a token: none for a special token, or an id without a token."""
        if skip_special and token in self._added and self._added[token].special:
            return b""
        if token not in self._bytes:
            piece = self._piece(token)
            self._bytes[token] = b"" if piece is None else self._pieces(piece)
        return self._bytes[token]

    @property
    def strips_space(self) -> bool:
        """True if a text loses the space that SentencePiece puts before its first word."""
        return self._strips_space

    def _special(self, settings: dict[str, Any], key: str, default: int | None) -> int | None:
        """Return a special token's id; `default` only if the files do not name it."""
        if key not in settings:
            return default
        value = settings[key]
        text = value.get("content") if isinstance(value, dict) else value
        if not isinstance(text, str):
            return None
        with _one_line(f"{key} {text!r}"):
            return self._inner.token_to_id(text)

    def _check_ids(self, ids: list[int]) -> None:
        for token in ids:
            if not 0 <= token < self._id_limit:
                raise InputError("bos and eos token ids", f"0 to {self._id_limit - 1}", shown(token))

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        with _one_line("tokenizer.json"):
            return self._inner.encode(text, add_special_tokens=add_special_tokens).ids

    def _piece(self, token: int) -> str | None:
        return self._inner.id_to_token(token) if 0 <= token < _ID_LIMIT else None

    def _text_of(self, token: int | None) -> str:
        return "" if token is None else self._piece(token) or ""


class Detokenizer:
    """Turn a stream of tokens into a stream of text with whole characters only.

    Args:
        tokenizer: the tokenizer of the tokens.
        continues: whether the tokens continue a text, so that a leading space belongs to them.
    """

    def __init__(self, tokenizer: Tokenizer, *, continues: bool = False, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._strip = tokenizer.strips_space and not continues
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        """Return the text that this token completes; "" inside a character."""
        piece = self._tokenizer.token_bytes(token, skip_special=self._skip_special)
        if self._strip and piece:
            self._strip = False
            piece = piece.removeprefix(b" ")
        return self._utf8.decode(piece)

    def finish(self) -> str:
        """Return the rest at the end: U+FFFD if the tokens stop inside a character, else ""."""
        return self._utf8.decode(b"", final=True)


def read_settings(directory: Path, name: str) -> dict[str, Any]:
    """Read the object in a JSON file; return {} if the model has no such file."""
    return read_json(directory, name) if exists_in(directory, name) else {}


def _read_tokenizer(directory: Path) -> tokenizers.Tokenizer:
    if not exists_in(directory, "tokenizer.json"):
        found = "tokenizer.model alone" if exists_in(directory, "tokenizer.model") else "none"
        hint = _COPY if exists_in(directory, METADATA) else _CONVERT.format(directory)
        raise InputError(str(directory), "tokenizer.json", found, hint)
    path = safe_path(directory, "tokenizer.json")
    with _one_line(str(path)):
        inner = tokenizers.Tokenizer.from_file(str(path))
        inner.no_truncation()  # a length limit in the file would cut prompts silently
        inner.no_padding()
    return inner


@contextmanager
def _one_line(where: str) -> Iterator[None]:
    """Turn the library's errors into InputError: it raises bare Exception, and PanicException on its own bugs.

    That one is a BaseException that cannot be imported, so it is recognized by name. An interrupt passes.
    """
    try:
        yield
    except MemoryError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(where, "a tokenizer of the tokenizers library", " ".join(str(error).split())) from None


def _decoder_steps(inner: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    """Return the steps of the decoder as JSON values."""
    if inner.decoder is None:
        return []
    spec = json.loads(inner.decoder.__getstate__())
    return spec["decoders"] if spec["type"] == "Sequence" else [spec]


def _piece_reader(inner: tokenizers.Tokenizer) -> Callable[[str], bytes]:
    """Return the function from a token's text in the vocabulary to its bytes."""
    kinds = [step["type"] for step in _decoder_steps(inner)]
    if "ByteLevel" in kinds:
        return _byte_level_bytes
    if "ByteFallback" in kinds or "Metaspace" in kinds:
        return _sentencepiece_bytes
    found = ", ".join(kinds) or "none"
    raise InputError("tokenizer.json: decoder", "ByteLevel, ByteFallback or Metaspace", found)


def _strips_leading_space(steps: list[dict[str, Any]]) -> bool:
    return any(
        (step["type"] == "Strip" and step.get("content") == " " and step.get("start"))
        or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    """Return GPT-2's alphabet: printable Latin-1 is itself, the other bytes are U+0100 and on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _byte_level_bytes(piece: str) -> bytes:
    table = _byte_of_character()
    if all(character in table for character in piece):
        return bytes(table[character] for character in piece)
    return piece.encode()  # an added token, kept in the file as plain text


def _sentencepiece_bytes(piece: str) -> bytes:
    if _BYTE_PIECE.fullmatch(piece):
        return bytes.fromhex(piece[3:5])
    return piece.replace("\u2581", " ").encode()  # U+2581, the block in place of a space
