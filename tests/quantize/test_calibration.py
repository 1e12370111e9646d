"""Calibration text: the model writes what it would generate; windows of files are fair and checked."""

import hashlib
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import assert_nothing_is_left, run
from tiny import make_checkpoint
from tokenizers import pre_tokenizers

import llamita
from llamita.errors import InputError, RunError
from llamita.models.checkpoint import Checkpoint
from llamita.quantize import calibration, own_text
from llamita.quantize.calibration import draw_windows
from llamita.system.threads import use_threads

BOS, ENDS = 256, list(range(32))  # every tenth token ends a document, so that rows hold several
LENGTH = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "model", eos_token_id=ENDS)


def load_calibration(name: str, model: Path, *options: Any, **named: Any) -> calibration.Calibration:
    source = Checkpoint(model)
    try:
        return calibration.load_calibration(name, source, *options, **named)
    finally:
        source.close()


def write(model: Path, samples: int, seed: int = 0) -> np.ndarray:
    source = Checkpoint(model)
    rows = own_text.Writer(source, LENGTH, seed).write(range(samples))
    source.close()
    return rows


@pytest.mark.parametrize(("name", "preset"), [("self", None), ("self-fast", "llamita")])
def test_a_row_begins_with_what_the_model_generates(model: Path, name: str, preset: str | None) -> None:
    llm = llamita.load(model, preset=preset, kv_dtype="f16")
    rows, several = load_calibration(name, model, 4, LENGTH, seed=3).tokens, 0
    for place, row in enumerate(rows):
        drawn = llm.generate([BOS], max_tokens=LENGTH - 1, temperature=1.0, top_p=1.0, seed=3 * 2**32 + place)
        first = [BOS, *drawn.token_ids]
        assert row[: len(first)].tolist() == first
        if drawn.finish_reason == "stop":
            assert row[len(first)] in ENDS
            several += 1
    assert several  # else the ends were never seen


def test_documents_follow_each_other_without_knowing_of_each_other(model: Path) -> None:
    llm = llamita.load(model, kv_dtype="f16")
    row = write(model, 1)[0]
    starts = [0, *(np.flatnonzero(np.isin(row[:-1], ENDS)) + 1)]
    assert len(starts) > 2
    assert (row[starts] == BOS).all()
    # the draws go on where the first document's ended: one number for each token but BOS
    random = np.random.default_rng(0)
    random.random(starts[1] - 1)
    for at in range(starts[1], starts[2] - 1):
        logits = llm.logits(row[starts[1] : at + 1])[-1].astype(np.float64)
        upto = np.cumsum(np.exp(logits - logits.max()))
        assert row[at + 1] == np.searchsorted(upto, random.random() * upto[-1], side="right")


def test_neither_threads_nor_rows_at_once_change_a_token(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = write(model, 5)
    monkeypatch.setattr(own_text, "ROWS_AT_ONCE", 2)
    np.testing.assert_array_equal(write(model, 5), expected)
    monkeypatch.setattr(own_text, "CACHE_BYTES", 1)  # still one row at a time
    use_threads(1)
    np.testing.assert_array_equal(write(model, 5), expected)
    use_threads(None)
    np.testing.assert_array_equal(write(model, 3), expected[:3])
    assert (write(model, 5, seed=1) != expected).any(axis=1).all()


def test_text_that_was_kept_is_not_written_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load_calibration("self", model, 5, LENGTH).tokens
    monkeypatch.setattr(own_text, "ROWS_AT_ONCE", 2)
    write, written = own_text.Writer.write, list[range]()

    def cut_off(self: own_text.Writer, places: range, told: Any) -> np.ndarray:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(places)
        return write(self, places, told)

    monkeypatch.setattr(own_text.Writer, "write", cut_off)
    with pytest.raises(KeyboardInterrupt):
        load_calibration("self", model, 5, LENGTH, work=tmp_path)
    written.clear()
    np.testing.assert_array_equal(load_calibration("self", model, 5, LENGTH, work=tmp_path).tokens, expected)
    assert written == [range(4, 5)]


def test_a_run_that_failed_keeps_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes once the directory is there; another text, or a changed model, begins anew."""
    write, written = own_text.Writer.write, list[range]()

    def count(self: own_text.Writer, places: range, told: Any) -> np.ndarray:
        written.append(places)
        return write(self, places, told)

    monkeypatch.setattr(own_text.Writer, "write", count)
    model = make_checkpoint(tmp_path / "src", rope_theta=10000.0)
    command = ("quantize", model, "-o", tmp_path / "out", "--samples", "2", "--length", "8", "--max-loss")
    for options in (("1e-9",), ("1e-9",), ("1e-9", "--seed", "1")):  # less than int8 loses: refused
        assert run(*command, *options) == 2
    assert len(written) == 2
    config = model / "config.json"
    config.write_text(config.read_text().replace("10000.0", "20000.0"))
    assert run(*command, "1e-9", "--seed", "1") == 2
    assert len(written) == 3
    assert run(*command, "9", "--seed", "1") == 0
    assert len(written) == 3
    assert_nothing_is_left(tmp_path, "src", "out")


def test_progress_ends_with_all_tokens(model: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    found = load_calibration("self", model, 3, LENGTH, progress=lambda *step: seen.append(step))
    assert found.tokens.shape == (3, LENGTH)
    assert found.tokens.dtype == np.int32
    done = [step[1] for step in seen]
    assert done == sorted(done)
    assert seen[-1][1:] == (3 * LENGTH, 3 * LENGTH)


def test_the_hash_is_of_the_tokens(model: Path) -> None:
    found = load_calibration("self", model, 2, LENGTH, seed=5)
    data = b"".join(int(token).to_bytes(4, "little") for token in found.tokens.reshape(-1))
    assert found.sha256 == hashlib.sha256(data).hexdigest()
    assert found.name == "self"


def test_a_model_without_bos_needs_a_text(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model", bos_token_id=None)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**settings, "bos_token": None}))
    with pytest.raises(InputError, match=r"bos_token: expected one .* try --calibration FILE"):
        load_calibration("self", path, 1, LENGTH)
    text = tmp_path / "text.txt"
    text.write_text("abcdefg")
    tokens = load_calibration(str(text), path, 2, 4).tokens
    assert spell(tokens.reshape(-1)[:-1]) == "abcdefg"
    assert tokens[1, 3] == 257  # the end token


def spell(tokens: np.ndarray) -> str:
    """The text of tokens of the tiny tokenizer, whose ids are the places of bytes in its alphabet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return "".join(alphabet[token] for token in tokens)  # ASCII stands for itself there


def test_windows_of_a_file_share_nothing_and_come_from_it(model: Path, tmp_path: Path) -> None:
    text = "".join(f"{number:05}," for number in range(400))
    path = tmp_path / "numbers.txt"
    path.write_text(text)
    found = load_calibration(str(path), model, 20, 31, seed=1)
    assert found.name == "numbers.txt"
    assert (found.tokens[:, 0] == BOS).all()
    places = [text.index(spell(row)) for row in found.tokens[:, 1:]]
    assert len(places) == 20
    assert (np.diff(places) >= 30).all()
    assert places != list(range(places[0], places[0] + 600, 30))  # drawn, not the first twenty
    other = load_calibration(str(path), model, 20, 31, seed=2)
    assert (other.tokens != found.tokens).any()
    np.testing.assert_array_equal(load_calibration(str(path), model, 20, 31, seed=1).tokens, found.tokens)


def test_every_piece_may_be_drawn() -> None:
    stream = np.arange(100, dtype=np.int32)
    seen = {token for seed in range(40) for token in draw_windows(stream, 2, 10, seed, None, "x").flat}
    assert seen == set(range(100))
    exact = draw_windows(stream, 10, 10, 7, None, "x")
    np.testing.assert_array_equal(exact.reshape(-1), stream)


def test_a_text_that_is_too_short_is_refused(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("x" * 97)  # with BOS and end token 99
    load_calibration(str(path), model, 11, 10)
    with pytest.raises(InputError, match=r"at least 108 tokens for 12 windows of 10, got 99; try a longer"):
        load_calibration(str(path), model, 12, 10)


def test_json_lines_are_documents(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "stories.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two", "other": 1}\n')
    window = load_calibration(str(path), model, 1, 11).tokens[0]  # BOS, then all of the stream
    assert np.flatnonzero(window == BOS).tolist() == [0, 1, 6]
    assert spell(window[2:5]) == "one"
    assert window[5] == window[10] == 257  # the tokenizer's end token
    path.write_text('{"text": "one"}\n{"txt": "two"}\n')
    with pytest.raises(InputError, match=r'stories\.jsonl: line 2: expected an object with a string "text"'):
        load_calibration(str(path), model, 1, 4)
    path.write_text('{"text": "one"}\n[1]\n')
    with pytest.raises(InputError, match="line 2: expected a JSON object"):
        load_calibration(str(path), model, 1, 4)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nowhere.txt", {}, "'nowhere.txt'; there is no such file"),
        ("some/nowhere.jsonl", {}, "there is no such file"),
        ("two words", {}, "expected 'self', 'self-fast', a text file, or a data set's name"),
        ("self", {"samples": 0}, "--samples: expected at least 1, got 0"),
        ("self", {"length": 1}, "--length: expected at least 2, got 1"),
        ("self", {"length": 513}, "--length: expected at most 512 tokens, the model's context, got 513"),
        ("self", {"seed": -1}, "--seed: expected at least 0, got -1"),
    ],
)
def test_mistakes_are_one_line(model: Path, name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as found:
        load_calibration(name, model, **{"samples": 2, "length": 8, **options})
    assert "\n" not in str(found.value)


def test_files_that_are_no_text(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bytes.txt"
    path.write_bytes(b"abc\xff")
    with pytest.raises(InputError, match="expected UTF-8, got a stray byte at 3"):
        load_calibration(str(path), model, 1, 4)
    monkeypatch.setattr(calibration, "LARGEST_FILE", 3)
    with pytest.raises(InputError, match="expected at most 3 bytes, got 4; try a part of it"):
        load_calibration(str(path), model, 1, 4)
    with pytest.raises(InputError, match="expected a text file, got a directory"):
        load_calibration(str(tmp_path), model, 1, 4)


def test_a_data_set_needs_its_package(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "HUB", "no_such_package:documents")
    with pytest.raises(RunError, match=r"needs the package no_such_package.*llamita\[torch\]"):
        load_calibration("wikitext", model, 1, 4)


class TestHub:
    """Data sets of the hub; a local directory stands for one that the hub has."""

    @pytest.fixture(autouse=True)
    def _needs_datasets(self) -> None:
        pytest.importorskip("datasets", reason="needs datasets: pip install '.[torch]'")
        self.hub_texts = import_module("llamita.text.hub_datasets")

    def test_out_of_reach_is_said_in_one_line(self, model: Path) -> None:
        with pytest.raises(RunError, match="wikitext: expected a data set that the hub or its cache has"):
            load_calibration("wikitext", model, 1, 4)
        with pytest.raises(RunError, match="owner/name: expected a data set"):
            load_calibration("owner/name", model, 1, 4)

    def test_wikitext_is_one_document(self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "train.jsonl").write_text('{"text": " = A = "}\n{"text": "b"}\n')
        monkeypatch.setattr(self.hub_texts, "WIKITEXT", (str(tmp_path), None))
        assert list(self.hub_texts.documents("wikitext", 0)) == [" = A = \n\nb"]
        assert load_calibration("wikitext", model, 1, 8).name == "wikitext"

    def test_documents_come_in_an_order_of_the_seed(self, tmp_path: Path) -> None:
        rows = [json.dumps({"text": f"story {i}"}) for i in range(50)]
        (tmp_path / "train.jsonl").write_text("\n".join(rows))
        first, again, other = (list(self.hub_texts.documents(str(tmp_path), seed)) for seed in (1, 1, 2))
        assert sorted(first) == sorted(f"story {i}" for i in range(50))
        assert first == again != other

    def test_a_data_set_without_texts_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "train.jsonl").write_text('{"question": "?", "answer": "!"}\n')
        with pytest.raises(InputError, match='expected a column "text", got question, answer'):
            list(self.hub_texts.documents(str(tmp_path), 0))
        with pytest.raises(InputError, match="nothing"):
            list(self.hub_texts.documents(f"{tmp_path}:nothing", 0))
