"""Measure how well a model does a task: the loss of the right answers, and the model's own answers.

Translations: chrF and BLEU (sacrebleu; Popović 2015, Post 2018). Answers about a passage: exact match and F1 as in
SQuAD (Rajpurkar et al. 2016, arXiv 1606.05250). Summaries: ROUGE (rouge-score; Lin 2004). All are from 0 to 100.
The engine runs the model, so a packed model is measured as it will run.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from llamita.engine.llm import LLM
from llamita.engine.requests import Prompt
from llamita.evaluate.scores import token_losses
from llamita.system.progress import Progress
from llamita.text.chat_template import find_template
from llamita.train.examples import Example, line_of
from llamita.train.tasks import Conversation

Answers = Sequence[tuple[str, tuple[str, ...]]]  # the model's answer and the right answers
_LONGER, _SPARE = 2, 16  # an answer may have twice the tokens of the longest right one, and 16 more
_TOGETHER = 64  # prompts handed to the engine at a time


@dataclass(frozen=True)
class Scores:
    """The scores of a model: nats a learned token, and the task's measures by name (some tasks have none)."""

    loss: float
    measures: dict[str, float]


def score(
    llm: LLM, task: str | None, measured: Sequence[tuple[Example, Conversation]], adapter: str | None = None,
    limit: int = 200, progress: Progress = None,
) -> Scores:  # fmt: skip
    """Score a model on held-out examples.

    Args:
        task: a key of MEASURES; other tasks have only the loss.
        measured: the examples and their conversations.
        limit: generate at most this many answers; the loss is of all examples.
    """
    losses = example_losses(llm, [example for example, _ in measured], adapter, progress)
    longest = max((len(one) for one in losses), default=1)
    found: dict[str, float] = {}
    if task in MEASURES:
        asked = [conversation for _, conversation in measured[:limit]]
        said = _answer(llm, asked, adapter, _LONGER * longest + _SPARE, progress)
        found = MEASURES[task]([(text, one.answers) for text, one in zip(said, asked, strict=True)])
    return Scores(float(np.concatenate(losses).mean()) if losses else 0.0, found)


def example_losses(
    llm: LLM, examples: Sequence[Example], adapter: str | None = None, progress: Progress = None
) -> list[np.ndarray]:
    """Return the nats of every learned token of each example: float64 (learned tokens,)."""
    found = []
    for number, example in enumerate(examples):
        if progress:
            progress("measuring", number, len(examples))
        losses = token_losses(llm.logits(example.ids, adapter=adapter)[:-1], example.ids[1:])
        found.append(losses[example.is_learned[1:]])
    return found


def _answer(
    llm: LLM, asked: Sequence[Conversation], adapter: str | None, max_tokens: int, progress: Progress
) -> list[str]:
    """Return the likeliest answer to each prompt; prompts have the format of training."""
    has_template = find_template(llm.path) is not None
    prompts = list[Prompt]()
    for one in asked:
        before = list(one.turns[:-1])
        prompts.append(before if has_template else "".join(map(line_of, before)))
    said = list[str]()
    for start in range(0, len(prompts), _TOGETHER):
        if progress:
            progress("answering", start, len(prompts))
        part = prompts[start : start + _TOGETHER]
        said += [g.text for g in llm.generate_many(part, greedy=True, max_tokens=max_tokens, adapter=adapter)]
    return said


def translation(answers: Answers) -> dict[str, float]:
    """Return chrF (chrF2, character 6-grams) and BLEU (4-grams, tokenized as WMT does) of the whole corpus."""
    said, right = [text for text, _ in answers], [[known[0] for _, known in answers]]
    return {"chrF": CHRF().corpus_score(said, right).score, "BLEU": BLEU().corpus_score(said, right).score}


def question_answering(answers: Answers) -> dict[str, float]:
    """Return exact match and F1 over words: the best over the right answers, averaged over questions."""
    exact = [max(float(_words(text) == _words(one)) for one in known) for text, known in answers]
    overlap = [max(_f1(_words(text), _words(one)) for one in known) for text, known in answers]
    return {"exact match": 100 * float(np.mean(exact)), "F1": 100 * float(np.mean(overlap))}


def _words(text: str) -> list[str]:
    """Split a text into words in lower case, without punctuation and articles."""
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _f1(said: list[str], right: list[str]) -> float:
    common = sum((Counter(said) & Counter(right)).values())
    if not said or not right:
        return float(said == right)
    return 2 * common / (len(said) + len(right))


def summarization(answers: Answers) -> dict[str, float]:
    """Return the F-measures of ROUGE-1, ROUGE-2 and ROUGE-L with stems, averaged over texts."""
    kinds = {"ROUGE-1": "rouge1", "ROUGE-2": "rouge2", "ROUGE-L": "rougeL"}
    scorer = RougeScorer(list(kinds.values()), use_stemmer=True)
    found = [scorer.score(known[0], text) for text, known in answers]
    return {name: 100 * float(np.mean([one[kind].fmeasure for one in found])) for name, kind in kinds.items()}


MEASURES: dict[str | None, Callable[[Answers], dict[str, float]]] = {
    "translation": translation,
    "qa": question_answering,
    "summarization": summarization,
}
