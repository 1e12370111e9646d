"""Texts to tokens and back: real tokenizers of both kinds, streams cut anywhere, BOS once, clear refusals."""

import json
import shutil
from functools import lru_cache
from pathlib import Path

import pytest
from real_tokenizers import write_llama2, write_llama3
from tiny import make_checkpoint

from llamita.errors import InputError
from llamita.imports.open import resolve
from llamita.models.config import ModelConfig
from llamita.text.tokenizer import Detokenizer, Tokenizer, _one_line, _sentencepiece_bytes

TEXTS = [
    "Once upon a time",
    " leading and  double spaces, trailing ",
    "naïve café — Zürich",
    "我喜欢用中文写作。",
    "family 👨‍👩‍👧‍👦, flag 🇲🇽, heart ❤️‍🔥",
    "tabs\tand\nlines\r\n\n\nend",
    "עברית العربية हिन्दी ไทย",
    "def f(x):\n    return x ** 2  # code",
    "\u0000\u200b\ufeff odd \ufffd ones",
    "1234567890 3.14159",
]


@pytest.fixture(scope="module")
def llama3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama3(tmp_path_factory.mktemp("llama3"))


@pytest.fixture(scope="module")
def llama2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama2(tmp_path_factory.mktemp("llama2"))


@pytest.fixture(scope="module", params=["llama3", "llama2", "embedded"])
def directory(request: pytest.FixtureRequest) -> Path:
    return resolve("embedded") if request.param == "embedded" else request.getfixturevalue(request.param)


@lru_cache
def opened(directory: Path) -> Tokenizer:
    return Tokenizer(directory)


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_undoes_encoding(directory: Path, text: str) -> None:
    tokenizer = opened(directory)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_shows_whole_characters_only(directory: Path, text: str) -> None:
    tokenizer = opened(directory)
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.add(token) for token in tokenizer.encode(text)]
    assert detokenizer.finish() == ""
    assert "".join(pieces) == text
    assert text.count("\ufffd") == sum(piece.count("\ufffd") for piece in pieces)


def test_known_token_ids(llama2: Path, llama3: Path) -> None:
    assert opened(llama3).encode("hello world!") == [128000, 15339, 1917, 0]
    assert opened(llama2).encode("Hello world") == [1, 15043, 3186]


def test_token_ids_and_texts_are_those_of_transformers(directory: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    ours = opened(directory)
    for text in TEXTS:
        ids = ours.encode(text, add_bos=False)
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_a_continuation_keeps_the_space_between_words(llama2: Path) -> None:
    tokenizer = opened(llama2)
    ids = tokenizer.encode("Once upon a time")
    for cut in range(2, len(ids)):
        begun = tokenizer.decode(ids[:cut])
        detokenizer = Detokenizer(tokenizer, continues=True)
        assert begun + "".join(detokenizer.add(token) for token in ids[cut:]) == "Once upon a time"


def test_an_open_character_at_the_end_becomes_one_replacement(directory: Path) -> None:
    tokenizer = opened(directory)
    ids = tokenizer.encode("\U0001f9ff", add_bos=False)  # rare: several tokens, none of them whole
    assert len(ids) > 1
    detokenizer = Detokenizer(tokenizer)
    assert "".join(detokenizer.add(token) for token in ids[:-1]) == ""
    assert detokenizer.finish() == "\ufffd"


def test_special_tokens_are_not_text(llama3: Path) -> None:
    tokenizer = opened(llama3)
    ids = tokenizer.encode("Hi<|eot_id|> there")
    assert 128009 in ids
    assert tokenizer.decode(ids) == "Hi there"
    assert tokenizer.decode(ids, skip_special=False) == "<|begin_of_text|>Hi<|eot_id|> there"


def test_bos_comes_once(llama3: Path, llama2: Path) -> None:
    for path, bos in ((llama3, "<|begin_of_text|>"), (llama2, "<s>")):
        tokenizer = opened(path)
        assert tokenizer.adds_bos
        assert tokenizer.bos_token == bos
        for text in ("Hi", f"{bos}Hi"):
            assert tokenizer.encode(text)[:2].count(tokenizer.encode("")[0]) == 1
        assert tokenizer.encode("") == [tokenizer.bos_token_id]
        assert tokenizer.encode("", add_bos=False) == []


def test_settings_decide_about_bos(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)  # its post-processor adds nothing
    tokenizer = Tokenizer(tmp_path)
    assert not tokenizer.adds_bos
    assert tokenizer.encode("A", add_bos=True)[0] == tokenizer.bos_token_id == 256
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": True}))
    assert Tokenizer(tmp_path).encode("A")[0] == 256
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "bos_token": None}))
    config = ModelConfig.from_hf(json.loads((tmp_path / "config.json").read_text()))
    assert Tokenizer(tmp_path, config).bos_token_id is None  # the tokenizer knows better than the model


def test_end_tokens_come_from_every_file_that_names_one(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama3", eos_token_id=[7, 9])
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["eos_token"] = {"content": "<|eot_id|>", "special": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 11]}')
    config = ModelConfig.from_hf(json.loads((tmp_path / "config.json").read_text()))
    tokenizer = Tokenizer(tmp_path, config)
    assert set(tokenizer.eos_token_ids) == {258, 7, 9, 11}
    assert tokenizer.eos_token == "<|eot_id|>"


def test_a_length_limit_in_the_file_does_not_cut(tmp_path: Path) -> None:
    shutil.copytree(resolve("embedded"), tmp_path, dirs_exist_ok=True)
    file = tmp_path / "tokenizer.json"
    values = json.loads(file.read_text())
    values["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    file.write_text(json.dumps(values))
    assert len(Tokenizer(tmp_path).encode("one two three four five six")) > 6


def test_ids_without_a_token_are_silent(llama3: Path) -> None:
    assert opened(llama3).decode([500_000, 9906]) == "Hello"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "tokenizer.json, got none"),
        ({"tokenizer.model": "x"}, "tokenizer.model alone"),
        ({"tokenizer.json": "{"}, "tokenizers library"),
        ({"tokenizer.json": '{"model": {"type": "Nonsense"}}'}, "tokenizers library"),
    ],
)
def test_a_missing_or_broken_tokenizer_is_one_clear_line(tmp_path: Path, files: dict[str, str], expected: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=expected) as error:
        Tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_a_stray_byte_is_refused(llama3: Path) -> None:
    with pytest.raises(InputError, match="UTF-8"):
        opened(llama3).encode("ab\udcff")


@pytest.mark.parametrize("change", [{"bos_token_id": 2**40}, {"bos_token_id": 320}, {"eos_token_id": 2**40}])
def test_an_id_outside_the_vocabulary_is_refused(tmp_path: Path, change: dict[str, int]) -> None:
    make_checkpoint(tmp_path, "llama3")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    config = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(InputError, match="token ids: expected 0 to 319"):
        Tokenizer(tmp_path, ModelConfig.from_hf(config | change))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [257, 1180591620717411303424]}')
    with pytest.raises(InputError, match="token ids"):
        Tokenizer(tmp_path)


def test_an_unknown_token_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama3")
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    values["model"]["unk_token"] = "<nope>"
    del values["model"]["vocab"]["a"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="Unk token") as error:
        Tokenizer(tmp_path).encode("a")
    assert "\n" not in str(error.value)


class Panic(BaseException):
    """As pyo3 makes one: known by its name alone."""


Panic.__name__ = "PanicException"


@pytest.mark.parametrize(
    ("raised", "expected"), [(Panic("a\nb"), InputError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_a_panic_is_an_error_and_an_interrupt_is_not(raised: BaseException, expected: type[BaseException]) -> None:
    with pytest.raises(expected) as error, _one_line("here"):
        raise raised
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("piece", "meant"), [("<0x0A>", b"\n"), ("<0xGG>", b"<0xGG>"), ("<0x 1>", b"<0x 1>"), ("\u2581a", b" a")]
)
def test_pieces_of_sentencepiece(piece: str, meant: bytes) -> None:
    assert _sentencepiece_bytes(piece) == meant
