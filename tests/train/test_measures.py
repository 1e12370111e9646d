"""Check the measures of tasks: a few answers by hand, and equal texts, which score 100."""

from pathlib import Path

import numpy as np
import pytest
from tiny import make_checkpoint

import llamita
from llamita.models.checkpoint import Checkpoint
from llamita.text.tokenizer import Tokenizer
from llamita.train.examples import tokenize
from llamita.train.records import Record
from llamita.train.tasks import conversation

pytest.importorskip("sacrebleu", reason="measures are on the Torch side")
pytest.importorskip("rouge_score", reason="measures are on the Torch side")

from llamita.train.measures import question_answering, score, summarization, translation


def test_questions_are_answered_up_to_articles_case_and_punctuation() -> None:
    found = question_answering([("The Panthers!", ("panthers", "x")), ("in 1999", ("1998",))])
    assert found == {"exact match": 50.0, "F1": 50.0}
    one = question_answering([("a b c", ("b c d",))])  # "a" is an article: 2 of 2 words, 2 of 3
    assert one == {"exact match": 0.0, "F1": pytest.approx(80.0)}
    assert question_answering([("", ("",)), ("x", ("",))]) == {"exact match": 50.0, "F1": 50.0}


def test_translations_and_summaries_are_scored_by_their_libraries() -> None:
    same = [("Il fait froid dehors ce soir.", ("Il fait froid dehors ce soir.",))]
    assert translation(same) == {"chrF": pytest.approx(100.0), "BLEU": pytest.approx(100.0)}
    worse = translation([("Il fait beau dehors ce matin.", same[0][1])])
    assert 0 < worse["BLEU"] < worse["chrF"] < 100
    found = summarization([("a dog ran", ("a dog ran home",))])
    assert found["ROUGE-1"] == pytest.approx(100 * 2 * 3 / 7)
    assert found["ROUGE-2"] == pytest.approx(100 * 2 * 2 / 5)
    assert found["ROUGE-L"] == pytest.approx(100 * 2 * 3 / 7)


def test_the_loss_is_over_the_answers_tokens(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model")
    llm, tokenizer = llamita.load(path), Tokenizer(path, Checkpoint(path).config)
    given = [conversation(Record(f"{i}", {"source": f"go {i}", "target": f"va {i}"}), "translation") for i in range(3)]
    measured = [(tokenize(one, tokenizer, None), one) for one in given]
    found = score(llm, "translation", measured, limit=2)
    losses = []
    for example, _ in measured:
        logits = llm.logits(example.ids)[:-1].astype(np.float64)
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        chosen = -log_p[np.arange(len(logits)), example.ids[1:]]
        losses += list(chosen[example.is_learned[1:]])
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert set(found.measures) == {"chrF", "BLEU"}
    assert score(llm, "assistant", measured).measures == {}
