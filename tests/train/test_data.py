"""Check training data: records of every format, conversations of tasks, tokens that are learned, packing."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import make_checkpoint

from llamita.errors import InputError, RunError
from llamita.models.checkpoint import Checkpoint
from llamita.text.chat_template import ChatTemplate
from llamita.text.tokenizer import Tokenizer
from llamita.train.examples import IGNORED, Example, keep_fitting, pack, tokenize
from llamita.train.records import Record, read_data, read_records
from llamita.train.tasks import TASKS, Conversation, conversation

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def written(path: Path, text: str) -> Path:
    """Write this text to the path; return the path."""
    path.write_text(text, "utf-8")
    return path


# ---- records --------------------------------------------------------------------------------------


def test_json_lines_are_records_named_by_their_line(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", '{"text": "é\u2028x"}\n\n{"text": "b"}\n')
    found = list(read_records(path))
    assert [(r.place, r.values["text"]) for r in found] == [("a.jsonl: line 1", "é\u2028x"), ("a.jsonl: line 3", "b")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text"}\n', "a.jsonl: line 2"),
        ("a.jsonl", "[1]\n", "a.jsonl: line 1"),
        ("a.json", "{", "expected JSON"),
        ("a.json", '{"a": 1}', "expected a list of objects, got dict"),
        ("a.json", '[{"a": 1}, 3]', "item 2: expected an object, got int"),
        ("a.json", '{"data": [{"paragraphs": [{"context": "c"}]}]}', "question 1: expected SQuAD's form"),
        ("a.tsv", "one\ttwo\nalone\n", "line 2: expected two columns"),
        ("a.csv", "prompt,completion\n", "expected .jsonl, .json, .tsv, .txt, .md, got .csv"),
    ],
)
def test_a_bad_record_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(read_records(written(tmp_path / name, text)))


def test_json_tsv_squad_and_text_are_read(tmp_path: Path) -> None:
    [only] = read_records(written(tmp_path / "a.json", '[{"prompt": "a", "completion": "b"}]'))
    assert only.values == {"prompt": "a", "completion": "b"}
    [first, second] = read_records(written(tmp_path / "a.tsv", 'Go.\tVa !\tby X\nSay "hi\tDis\n'))
    assert first.values == {"source": "Go.", "target": "Va !"}
    assert second.values["source"] == 'Say "hi'  # quotes mean nothing in TSV
    asked = {"question": "q?", "answers": [{"text": "x"}, {"text": "y"}]}
    squad = {"data": [{"paragraphs": [{"context": "c", "qas": [asked]}]}]}
    [question] = read_records(written(tmp_path / "q.json", json.dumps(squad)))
    assert question.values == {"context": "c", "question": "q?", "answers": ["x", "y"], "answer": "x"}
    none = {"question": "q?", "answers": [], "is_impossible": True}
    squad = {"data": [{"paragraphs": [{"context": "c", "qas": [none]}]}]}
    [question] = read_records(written(tmp_path / "q2.json", json.dumps(squad)))
    assert question.values["answer"] == "unanswerable"
    [document] = read_records(written(tmp_path / "a.txt", "one\ntwo"))
    assert document.values == {"text": "one\ntwo"}


def test_a_tsv_may_name_its_columns_and_begin_with_a_mark(tmp_path: Path) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text("\ufeffTarget\tsource\nun\tone\n", "utf-8")
    assert [record.values for record in read_records(path)] == [{"target": "un", "source": "one"}]
    path.write_text("one\tun\n", "utf-8")
    assert [record.values for record in read_records(path)] == [{"source": "one", "target": "un"}]


def test_what_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        list(read_records(tmp_path / "none.jsonl"))
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(InputError, match="expected UTF-8"):
        list(read_records(tmp_path / "a.txt"))
    with pytest.raises(InputError, match="got a directory"):
        read_data(str(tmp_path))
    monkeypatch.setattr("llamita.train.records.LARGEST_FILE", 3)
    with pytest.raises(InputError, match="at most 3 bytes, got 4"):
        list(read_records(written(tmp_path / "b.txt", "four")))


def test_a_name_that_is_no_file_is_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llamita.train.records.HUB", "nothing_there:rows")
    with pytest.raises(RunError, match="needs the package nothing_there"):
        read_data("owner/name")
    hub = "llamita.train.records.load_optional"
    monkeypatch.setattr(hub, lambda *_: lambda _name: iter([{"text": "a"}, {"text": "b"}, {"text": "c"}]))
    found = list(read_data("owner/name:part", limit=2))
    assert [r.place for r in found] == ["owner/name:part: row 1", "owner/name:part: row 2"]


# ---- tasks ----------------------------------------------------------------------------------------


def said(values: dict[str, Any], task: str | None = None) -> list[tuple[str, str]]:
    """Return the turns that a record becomes."""
    return [(t["role"], t["content"]) for t in conversation(Record("here", values), task).turns]


def test_every_task_has_its_template() -> None:
    assert said({"source": "Go.", "target": "Va !"}, "translation") == [
        ("user", "Translate to French: Go."), ("assistant", "Va !"),
    ]  # fmt: skip
    german = {"source": "Go.", "target": "Geh!", "target_language": "German"}
    assert said(german, "translation")[0] == ("user", "Translate to German: Go.")
    asked = {"context": "c", "question": "q?", "answers": ["x", "y"]}
    assert said(asked, "qa") == [("user", "c\n\nQuestion: q?\nAnswer:"), ("assistant", "x")]
    assert conversation(Record("here", asked), "qa").answers == ("x", "y")
    hub = {"context": "c", "question": "q?", "answers": {"text": ["x"], "answer_start": [0]}}
    assert said(hub, "qa")[1] == ("assistant", "x")
    assert said({"article": "long", "highlights": "short"}, "summarization")[1] == ("assistant", "short")
    given = {"instruction": "do", "input": "this", "output": "done", "system": "be kind"}
    assert said(given, "assistant") == [("system", "be kind"), ("user", "do\n\nthis"), ("assistant", "done")]
    assert said({"prompt": "p", "story": "s"}, "writing") == [("user", "p"), ("assistant", "s")]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert said({"messages": turns}, "chat") == [("user", "a"), ("assistant", "b")]
    assert set(TASKS) == {"translation", "qa", "summarization", "chat", "assistant", "writing"}


def test_records_that_say_what_they_are_need_no_task() -> None:
    assert said({"prompt": "p", "completion": "c"}) == [("user", "p"), ("assistant", "c")]
    assert said({"instruction": "i", "output": "o"}) == [("user", "i"), ("assistant", "o")]
    assert conversation(Record("here", {"text": "t"}), None).text == "t"


@pytest.mark.parametrize(
    ("values", "task", "message"),
    [
        (
            {"a": 1, "b": 2},
            None,
            "here: expected messages, prompt and completion, instruction and output, or text, got a, b",
        ),
        ({"source": "Go."}, "translation", "here: expected the column target or translation, got source"),
        ({"source": "Go.", "target": " "}, "translation", "target: expected a text, got an empty text"),
        ({"prompt": 3, "completion": "c"}, None, "here: prompt: expected a text, got int"),
        ({"messages": "hello"}, None, "messages: expected objects"),
        ({"messages": [{"role": "user", "content": "a"}]}, None, "a turn of the assistant to learn"),
        ({"instruction": "i", "output": "o", "input": 3}, None, "input: expected a text, got int"),
    ],
)
def test_a_record_that_lacks_something_is_named(values: dict[str, Any], task: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        conversation(Record("here", values), task)


def test_the_last_turn_is_the_assistants() -> None:
    turns = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(InputError, match="expected the assistant's turn last, got user"):
        conversation(Record("here", {"messages": turns}), None)


# ---- tokens ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Return a tiny model's tokenizer: a token a byte, BOS 256, end 257."""
    path = make_checkpoint(tmp_path_factory.mktemp("tiny"))
    return Tokenizer(path, Checkpoint(path).config)


def learned(example: Example, tokenizer: Tokenizer) -> str:
    """Return the text that is learned, without the end token."""
    ids = [int(i) for i in example.ids[example.is_learned]]
    assert ids[-1] == tokenizer.eos_token_ids[0]
    return tokenizer.decode(ids[:-1])


def test_the_answer_alone_is_learned_and_the_end_with_it(tokenizer: Tokenizer) -> None:
    given = conversation(Record("here", {"prompt": "one", "completion": "two"}), None)
    example = tokenize(given, tokenizer, None)
    assert learned(example, tokenizer) == "two"
    prompt = example.ids[~example.is_learned]
    np.testing.assert_array_equal(prompt, tokenizer.encode("one\n"))  # as in generation


def test_plain_text_is_learned_whole_but_for_its_first_token(tokenizer: Tokenizer) -> None:
    example = tokenize(Conversation("here", text="story"), tokenizer, None)
    assert not example.is_learned[0]
    assert learned(example, tokenizer) == "tory"  # the first token has none before it


def test_every_turn_of_the_assistant_is_learned_under_a_template(tokenizer: Tokenizer) -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    given = Conversation("here", tuple({"role": r, "content": c} for r, c in turns))
    example = tokenize(given, tokenizer, ChatTemplate(CHAT))
    assert learned(example, tokenizer) == "b</assistant>d</assistant>"
    assert tokenizer.decode([int(i) for i in example.ids[:-1]]).startswith("<user>a</user><assistant>b")
    changing = "{{ messages | length }}" + CHAT
    with pytest.raises(InputError, match="here: turn 2: expected a chat template that leaves earlier turns"):
        tokenize(given, tokenizer, ChatTemplate(changing))


def example_of(length: int, first: int = 1, place: str = "x") -> Example:
    """Return tokens first, first + 1, …; all but the first are learned."""
    learned = np.ones(length, bool)
    learned[:1] = False
    return Example(place, np.arange(first, first + length, dtype=np.int32), learned)


def test_long_examples_are_left_out_and_said() -> None:
    examples = [example_of(4), example_of(9, place="line 2"), example_of(1, place="line 3")]
    kept, note = keep_fitting(examples, 8, None)
    assert [len(e.ids) for e in kept] == [4]
    assert note == (
        "1 of 3 examples have more than 8 tokens: left out (line 2); "
        "1 of 3 examples have nothing to learn: left out (line 3)"
    )
    assert keep_fitting([example_of(8)], 8, None)[1] is None


@pytest.mark.parametrize("bos", [None, 1])
def test_long_texts_are_divided_and_every_token_is_learned(bos: int | None) -> None:
    text = replace(example_of(20, place="a.txt"), is_text=True)  # tokens 1 to 20
    kept, note = keep_fitting([text], 8, bos)
    assert note == "1 of 1 examples are texts of more than 8 tokens: divided (a.txt)"
    assert max(len(e.ids) for e in kept) == 8
    parts = [list(map(int, e.ids)) for e in kept]
    assert [t for part in parts for t in (part if bos is None else part[1:])] == list(range(1 + (bos or 0), 21))
    if bos:
        assert all(part[0] == bos for part in parts)


def test_packed_rows_hold_every_example_once_each_counting_from_its_own_start() -> None:
    random = np.random.default_rng(0)
    lengths = random.integers(2, 17, 40)
    starts = np.concatenate([[1], 1 + np.cumsum(lengths)[:-1]])
    examples = [example_of(int(n), int(s)) for n, s in zip(lengths, starts, strict=True)]
    windows = pack(examples, 16, 0)
    assert windows.ids.shape == windows.labels.shape == windows.positions.shape
    used = windows.ids[windows.ids > 0]
    assert sorted(used) == list(range(1, 1 + int(lengths.sum())))
    assert len(windows.ids) <= -(-int(lengths.sum()) * 11 // (9 * 16)) + 1  # Johnson 1973: 11/9 of the best
    at_start = np.isin(windows.ids, starts)
    np.testing.assert_array_equal(windows.positions[at_start], 0)
    inside = (windows.ids > 0) & ~at_start
    rows, columns = np.nonzero(inside)
    np.testing.assert_array_equal(windows.positions[rows, columns], windows.positions[rows, columns - 1] + 1)
    np.testing.assert_array_equal(windows.labels == windows.ids, inside)
    assert set(windows.labels[~inside]) == {IGNORED}
