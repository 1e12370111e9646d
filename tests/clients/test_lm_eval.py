"""LM Eval through the server gives what `llamita evaluate` gives: the same scores to the last bit."""

import json
from collections.abc import Iterator
from types import SimpleNamespace as Request
from typing import Any

import pytest
from jsonl import write_jsonl
from places import HELD_OUT
from served import Served, serving

import llamita
from llamita.engine.llm import LLM

_NEEDS = "needs LM Eval and tenacity: pip install '.[torch,dev]'"
lm_eval: Any = pytest.importorskip("lm_eval", reason=_NEEDS)
pytest.importorskip("tenacity", reason=_NEEDS)
api_models: Any = pytest.importorskip("lm_eval.models.openai_completions", reason=_NEEDS)
harness: Any = pytest.importorskip("llamita.evaluate.lm_eval", reason=_NEEDS)

MAX_SEQ_LEN = 100  # short, so that a page takes several windows
# LM Eval's client keeps one token for the answer that it asks for, and one more that it calls the context.
MAX_LENGTH = MAX_SEQ_LEN + 2


@pytest.fixture(scope="module")
def llm() -> LLM:
    return llamita.load("embedded", scheme="llama3.2")


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[Served]:
    with serving({"embedded": llm}) as served:
        yield served


@pytest.fixture(scope="module")
def stories() -> list[str]:
    """Pages in the form of WikiText's."""
    text = HELD_OUT.read_text("utf-8").replace(".", " . ").replace(",", " , ")
    return [text[start : start + 1500] for start in range(0, 4500, 1500)]


@pytest.fixture(scope="module")
def quiz(stories: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A task of multiple choice: how does the sentence go on?"""
    folder = tmp_path_factory.mktemp("quiz")
    words = [text.split() for text in stories]
    documents = [
        {"q": " ".join(w[i : i + 12]), "choices": [w[i + 12], w[i + 30], w[i + 31] + " " + w[i + 32]], "gold": 0}
        for w in words
        for i in range(0, 90, 30)
    ]
    task = {
        "task": "quiz", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(write_jsonl(folder / "quiz.jsonl", documents))},
                           "cache_dir": str(folder / "cache")},
        "doc_to_text": "{{q}}", "doc_to_target": "gold", "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }  # fmt: skip
    path = folder / "quiz.yaml"
    path.write_text(json.dumps(task))  # JSON is YAML
    return str(path)


def api(server: Served, **options: Any) -> Any:
    return api_models.LocalCompletionsAPI(
        base_url=f"{server.address}/v1/completions", model="embedded", max_length=MAX_LENGTH,
        custom_prefix_token_id=0, **options,  # this model's BOS; LM Eval takes an id of 0 for none
    )  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"num_concurrent": 4}, {"batch_size": 3}], ids=["one", "many", "batches"])
def test_perplexity_and_choices_are_evaluates(
    server: Served, llm: LLM, stories: list[str], quiz: str, options: dict[str, int]
) -> None:
    names = ["wikitext", quiz]
    (ours,) = harness.run_tasks([llm], names, pages=stories, max_seq_len=MAX_SEQ_LEN, limit=9, add_bos_token=False)
    with harness._local_task(stories) as folder, harness._quiet():
        manager = lm_eval.tasks.TaskManager(include_path=folder, include_defaults=False)
        found = lm_eval.simple_evaluate(
            model=api(server, **options), tasks=names, task_manager=manager, limit=9, log_samples=True
        )
    for scores in ours:
        assert scores.documents == len(found["samples"][scores.task])
        for metric, value in scores.metrics.items():
            assert value == found["results"][scores.task][f"{metric},none"], metric
    assert {scores.task for scores in ours} == {"wikitext", "quiz"}


def test_loglikelihoods_are_evaluates(server: Served, llm: LLM, stories: list[str]) -> None:
    """Each to the last bit, with what greedy decoding would give, also where the context is cut."""
    pairs = [(text[:n], text[n : n + 8]) for text in stories for n in (1, 20, 200, 600)] + [("", stories[0][:30])]
    ids = llm.tokenizer.encode(stories[0][:80], add_bos=False)
    likeliest = llm.generate(ids, greedy=True, max_tokens=4)
    pairs.append((stories[0][:80], likeliest.text))
    requests = [Request(args=pair, task_name="test") for pair in pairs]
    ours = harness.EngineLM(llm, MAX_SEQ_LEN, False).loglikelihood(requests)
    theirs = api(server).loglikelihood(requests, disable_tqdm=True)
    assert [tuple(pair) for pair in theirs] == ours
    assert {greedy for _, greedy in ours} == {False, True}


def test_generations_of_both_endpoints(server: Served, llm: LLM, stories: list[str]) -> None:
    settings = {"until": [".", "!"], "max_gen_toks": 12, "do_sample": False}
    texts = [text[:60] for text in stories]
    ours = harness.EngineLM(llm, MAX_SEQ_LEN, False).generate_until([Request(args=(t, settings)) for t in texts])
    assert api(server).generate_until([Request(args=(t, settings)) for t in texts], disable_tqdm=True) == ours
    chat = api_models.LocalChatCompletion(
        base_url=f"{server.address}/v1/chat/completions", model="embedded", max_length=MAX_LENGTH
    )
    messages = [[{"role": "user", "content": text}] for text in texts]
    asked = [Request(args=(chat.apply_chat_template(m), settings)) for m in messages]
    expected = [llm.generate(m, greedy=True, max_tokens=12, stop=[".", "!"]).text for m in messages]
    assert chat.generate_until(asked, disable_tqdm=True) == expected
