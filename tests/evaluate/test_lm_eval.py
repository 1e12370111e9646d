"""LM Eval over our engine gives the numbers of LM Eval's own Hugging Face backend on the same float model."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from jsonl import write_jsonl
from tiny import make_checkpoint
from tokenizers import Tokenizer, processors

import llamita
from llamita.errors import InputError, RunError
from llamita.evaluate import wikitext

_NEEDS = "needs LM Eval: pip install '.[torch]'"
lm_eval: Any = pytest.importorskip("lm_eval", reason=_NEEDS)
huggingface: Any = pytest.importorskip("lm_eval.models.huggingface", reason=_NEEDS)
torch: Any = pytest.importorskip("torch", reason=_NEEDS)
harness: Any = pytest.importorskip("llamita.evaluate.lm_eval", reason=_NEEDS)

MAX_SEQ_LEN = 64  # short, so that every text takes several windows and long prompts are cut
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "black", "birds", ",", "then", "slept", "."]
SAME = 1e-4  # relative; float32 in another order


@pytest.fixture(scope="module", params=["adds BOS", "adds none"])
def checkpoint(request, tmp_path_factory) -> Path:
    """A float model whose tokenizer does or does not put BOS before a text by itself."""
    path = make_checkpoint(tmp_path_factory.mktemp("model") / "float", "llama32", dtype="F32")
    if request.param == "adds BOS":
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        bos = "<|begin_of_text|>"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
        tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def ours(checkpoint) -> Any:
    return harness.EngineLM(llamita.load(checkpoint), MAX_SEQ_LEN)


@pytest.fixture(scope="module")
def theirs(checkpoint) -> Any:
    return make_theirs(checkpoint)


def make_theirs(checkpoint: Path, **options: Any) -> Any:
    """LM Eval's own backend, on one thread: the models are tiny and the machine may be busy."""
    torch.set_num_threads(1)
    return huggingface.HFLM(
        str(checkpoint), device="cpu", dtype="float32", max_length=MAX_SEQ_LEN, batch_size=1, **options
    )


def texts(count: int, words: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, size=words)) for _ in range(count)]


def requests(*arguments: tuple) -> list[Any]:
    return [SimpleNamespace(args=a, task_name="test") for a in arguments]


def test_rolling_loglikelihoods(ours, theirs):
    asked = requests(*[(t,) for t in ["x", *texts(3, 5), *texts(3, 100), "a" * MAX_SEQ_LEN, "b" * (MAX_SEQ_LEN + 1)]])
    got, want = ours.loglikelihood_rolling(asked), theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    assert got == pytest.approx(want, rel=SAME)


def test_continuations_with_shared_empty_and_too_long_contexts(ours, theirs):
    shared = texts(1, 8)[0]
    pairs = [(shared, " cat"), (shared, " catalogue"), (shared + " ", "dog"), ("", "the cat"), ("x", "y")]
    pairs += [(context, " and") for context in texts(4, 40)] + [(shared, " " + t) for t in texts(3, 3)]
    asked = requests(*pairs, *pairs[:2])  # the same question twice
    got, want = ours.loglikelihood(asked), theirs.loglikelihood(asked, disable_tqdm=True)
    assert [g[0] for g in got] == pytest.approx([w[0] for w in want], rel=SAME)
    assert [g[1] for g in got] == [w[1] for w in want]


def test_greedy_is_found_where_it_is(ours, theirs):
    asked = requests(*[(context, letter) for context in texts(4, 2) for letter in map(chr, range(32, 127))])
    got = [greedy for _, greedy in ours.loglikelihood(asked)]
    assert got == [bool(greedy) for _, greedy in theirs.loglikelihood(asked, disable_tqdm=True)]
    assert any(got)


def test_generations(ours, theirs):
    settings = {"until": ["m", "v"], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}
    asked = requests(*[(t, settings) for t in [*texts(6, 4), *texts(2, 60)]])
    got = ours.generate_until(asked)
    assert got == theirs.generate_until(asked, disable_tqdm=True)
    uncut = ours.generate_until(requests(*[(r.args[0], {**settings, "until": []}) for r in asked]))
    assert got == [text.split("m")[0].split("v")[0] for text in uncut]
    assert got != uncut


def test_long_prompts_lose_their_beginning_and_leave_room(ours, monkeypatch):
    prompts = []
    generate = ours._llm.generate
    monkeypatch.setattr(ours._llm, "generate", lambda ids, **o: prompts.append(ids) or generate(ids, **o))
    long = texts(1, 60)[0]
    settings = {"until": [], "max_gen_toks": 12}
    ours.generate_until(requests((long, settings), ("x", settings)))
    assert prompts == [ours.tok_encode(long)[-(MAX_SEQ_LEN - 12) :], ours.tok_encode("x")]


def test_sharing_prefixes_changes_no_number(checkpoint):
    """Also for the questions in between, whose keys and values are overwritten and needed again."""
    llm = llamita.load(checkpoint)
    shared = texts(1, 4)[0]
    pairs = [(shared + t, " mat") for t in texts(5, 3)] + [(t, " tree") for t in texts(3, 4)]
    together = harness.EngineLM(llm, MAX_SEQ_LEN).loglikelihood(requests(*pairs))
    alone = [harness.EngineLM(llm, MAX_SEQ_LEN).loglikelihood(requests(pair))[0] for pair in pairs]
    assert together == alone


def test_refuses_what_it_cannot_do(ours):
    with pytest.raises(InputError, match="max_gen_toks: expected below 64, got 64"):
        ours.generate_until(requests(("x", {"until": [], "max_gen_toks": 64})))
    with pytest.raises(InputError, match="got 'num_beams'"):
        ours.generate_until(requests(("x", {"until": [], "max_gen_toks": 4, "num_beams": 3})))
    with pytest.raises(InputError, match="continuations of 1 to 64 tokens, got 100"):
        ours.loglikelihood(requests(("x", "y" * 100)))


def write_task(folder: Path, name: str, documents: list[dict[str, Any]], **settings: Any) -> str:
    """A task of LM Eval over local data; the path of its YAML file."""
    data = write_jsonl(folder / f"{name}.jsonl", documents)
    task = {"task": name, "dataset_path": "json", "test_split": "test", **settings}
    task["dataset_kwargs"] = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
    (folder / f"{name}.yaml").write_text(json.dumps(task))
    return str(folder / f"{name}.yaml")


def test_tasks_end_to_end(checkpoint, theirs, tmp_path):
    """The local wikitext file, a multiple choice with examples in its prompt, and a generation."""
    raw = "".join(f" \n = Page {i} = \n \n {t} @-@ {t} . \n \n" for i, t in enumerate(texts(4, 40)))
    pages = wikitext.parse(raw, "small").pages
    assert len(pages) == 4
    quiz = [{"q": t, "choices": ["a", "b", "c"], "gold": i % 3} for i, t in enumerate(texts(12, 3))]
    choice = write_task(
        tmp_path, "tiny_choice", quiz, output_type="multiple_choice", doc_to_text="{{q}}",
        doc_to_target="gold", doc_to_choice="choices", num_fewshot=1, fewshot_split="test",
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )  # fmt: skip
    write = write_task(
        tmp_path, "tiny_write", [{"q": t, "a": "a"} for t in texts(4, 3)], output_type="generate_until",
        doc_to_text="{{q}}", doc_to_target="a", metric_list=[{"metric": "exact_match"}],
        generation_kwargs={"until": ["."], "max_gen_toks": 4},
    )  # fmt: skip
    llm = llamita.load(checkpoint)
    names = ["wikitext", choice, write]
    (got,) = harness.run_tasks([llm], names, pages=pages, max_seq_len=MAX_SEQ_LEN, limit=11)
    found = {scores.task: scores for scores in got}
    assert {name: scores.documents for name, scores in found.items()} == {
        "wikitext": 4, "tiny_choice": 11, "tiny_write": 4}  # fmt: skip
    with harness._local_task(pages) as folder:
        manager = lm_eval.tasks.TaskManager(include_path=folder, include_defaults=False)
        results = lm_eval.simple_evaluate(model=theirs, tasks=names, task_manager=manager, limit=11, log_samples=False)[
            "results"
        ]
    for name, scores in found.items():
        for metric, value in scores.metrics.items():
            assert value == pytest.approx(results[name][f"{metric},none"], rel=SAME), (name, metric)
    assert set(found["wikitext"].metrics) == {"word_perplexity", "byte_perplexity", "bits_per_byte"}
    assert found["tiny_choice"].errors["acc"] > 0


def test_add_bos_token_means_what_it_means_there(checkpoint, ours):
    asked = requests(*[(t,) for t in texts(2, 50)])
    theirs = make_theirs(checkpoint, add_bos_token=False)
    without = harness.EngineLM(llamita.load(checkpoint), MAX_SEQ_LEN, False)
    got = without.loglikelihood_rolling(asked)
    assert got == pytest.approx(theirs.loglikelihood_rolling(asked, disable_tqdm=True), rel=SAME)
    adds_by_itself = ours.tok_encode("x") != without.tok_encode("x")
    assert (got != ours.loglikelihood_rolling(asked)) == adds_by_itself


def test_unknown_tasks_and_data_out_of_reach_are_one_line(checkpoint, tmp_path, monkeypatch):
    manager = lm_eval.tasks.TaskManager(include_defaults=False)  # the whole index takes seconds
    monkeypatch.setattr(harness, "TaskManager", lambda **_: manager)
    llm = llamita.load(checkpoint)
    with pytest.raises(InputError, match="expected a task of LM Eval, got 'no_such_task'"):
        harness.run_tasks([llm], ["no_such_task"])
    path = write_task(tmp_path, "lost", [{"page": "x"}], output_type="loglikelihood_rolling", doc_to_target="{{page}}")
    (tmp_path / "lost.jsonl").unlink()
    with pytest.raises(RunError, match=r"--tasks .*lost.yaml: cannot be loaded") as caught:
        harness.run_tasks([llm], [path])
    assert len(str(caught.value).splitlines()) == 1
