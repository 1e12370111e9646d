"""Measure what drafts gain on kinds of text: `python benchmarks/drafts.py MODEL`.

Runs without drafts, with those of n-grams (matches of 2 or 3 tokens, up to 4 tokens drafted) and with ours take turns,
and give the same tokens. A small model copies badly, so `asked` is the answer that a model which obeys would give: its
logits replace the model's after each step. Rates are those of the fastest round; tokens a step are of all rounds.
"""

import argparse
import time
from itertools import product
from typing import Any

import numpy as np

import llamita
from llamita.engine import speculation
from llamita.engine.llm import LLM
from llamita.engine.matches import Corpus, Match, find_match
from llamita.engine.requests import Options, Timings
from llamita.engine.speculation import StepTimes

STORY = """Tom lived in a small house at the edge of the village. Every morning he walked to the river with a basket, \
because the fish came close to the bank before the sun was high. His neighbour, an old sailor, told him where the \
water was deep and which stones were loose. In winter the river froze, and Tom mended nets beside the stove while the \
wind shook the windows. When the ice broke in March, the first boats came up from the coast with salt, lamp oil and \
letters. Tom could not read well, so the sailor read the letters to him twice, and they laughed about the news from \
the harbour. One day a letter said that the bridge would be rebuilt, and that each house should send one person to \
help for a week. Tom packed bread, a hammer and a warm coat, and left before dawn. The work was hard, but at night \
there was soup, and somebody always sang. When the bridge was finished, the whole village crossed it together, and Tom \
carried the old sailor's chair so that he could sit in the middle and watch the water."""
CODE = '''class Account:
    """Keeps the balance of one customer."""

    def __init__(self, owner: str, balance: float = 0.0) -> None:
        self.owner = owner
        self.balance = balance
        self.history = []

    def deposit(self, amount: float) -> None:
        if amount <= 0:
            raise ValueError("the amount must be positive")
        self.balance += amount
        self.history.append(("deposit", amount))

    def withdraw(self, amount: float) -> None:
        if amount <= 0:
            raise ValueError("the amount must be positive")
        if amount > self.balance:
            raise ValueError("the balance is too low")
        self.balance -= amount
        self.history.append(("withdraw", amount))
'''
LOG = "\n".join(
    f"2026-03-{day:02} {9 + day % 8:02}:{day * 7 % 60:02} {level} {part}: {text}"
    for day, (level, part, text) in enumerate(
        [
            ("INFO", "disk", "check of volume alpha finished without errors"),
            ("ERROR", "network", "connection to host backup-3 was lost after 40 seconds"),
            ("INFO", "mail", "queue is empty"),
            ("ERROR", "disk", "volume beta has only 512 MB left"),
            ("INFO", "network", "connection to host backup-3 is back"),
            ("ERROR", "mail", "message 81723 was refused by the receiving server"),
            ("INFO", "login", "user anna came from the office network"),
            ("ERROR", "login", "user root was refused five times from one address"),
            ("INFO", "disk", "volume beta was extended to 20 GB"),
            ("ERROR", "power", "the second supply reports a voltage of 11.2"),
        ],
        start=1,
    )
)


NEW_METHOD = """
    def transfer(self, amount: float, other: "Account") -> None:
        if amount <= 0:
            raise ValueError("the amount must be positive")
        if amount > self.balance:
            raise ValueError("the balance is too low")
        self.balance -= amount
        other.balance += amount
        self.history.append(("transfer", amount))
"""
# The prompt of each task, and the answer that is asked for.
TASKS = {
    "edit": (
        f"Original text:\n\n{STORY}\n\nThe same text, in which Tom is called Ben:\n\n",
        STORY.replace("Tom", "Ben"),
    ),
    "code": (f"# bank.py\n{CODE}\n\n# bank.py with a method `transfer`\n", CODE + NEW_METHOD),
    "code of a file": ("A class of bank.py:\n\n", CODE + NEW_METHOD),
    "extraction": (
        f"Log:\n\n{LOG}\n\nAll lines that say ERROR:\n\n",
        "\n".join(line for line in LOG.split("\n") if "ERROR" in line),
    ),
    "free text": ("Here is a long story about a village.\n\n", STORY),
}
FILES = {"code of a file": CODE}  # what --draft-from names
SEEDS = {"temperature 0.7": (1, 2, 3)}  # one where nothing is drawn
BEGUN = 24  # tokens of the asked answer that are given, so that the model knows what to do
KINDS: dict[str, Options] = {
    "asked": {"greedy": True},
    "greedy": {"greedy": True, "stop": ["\n\n\n"]},
    "temperature 0.7": {"temperature": 0.7, "top_p": 0.95},
}


class Obeying:
    """Runs the model, but returns logits of an answer that is asked for, of the only sequence."""

    def __init__(self, llm: LLM, prompt: int, answer: list[int]) -> None:
        self.config = llm.config
        self._model, self._prompt, self._answer = llm.model, prompt, answer

    def step(self, sequences: Any, rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        logits = self._model.step(sequences, rows, out)
        ((cache, ids),) = sequences
        for row, at in zip(logits, rows, strict=True):
            place = cache.length - len(ids) + int(at) + 1 - self._prompt
            row[:] = 0
            row[self._answer[min(place, len(self._answer) - 1)]] = 100
        return logits


def find_ngram(text: np.ndarray, _: Corpus | None = None) -> Match | None:
    """Find the last occurrence of the last three tokens, or else two."""
    for order in (3, 2):
        starts = np.flatnonzero(np.all([text[i : i - order] == text[i - order] for i in range(order)], axis=0))
        if len(starts):
            return Match(None, int(starts[-1]) + order, order)
    return None


VARIANTS = {"none": (0, find_match), "n-grams": (4, find_ngram), "ours": (15, find_match)}
TIMES = {name: StepTimes() for name in VARIANTS}  # each learns what its own steps take


def measure(llm: LLM, task: str, kind: str, tokens: int, repeats: int) -> dict[str, list[list[Timings]]]:
    """Run all variants in turn, after a round that learns what steps take; return the timings of each by seed."""
    prompt, answer = TASKS[task]
    ids, wanted = llm.tokenizer.encode(prompt), llm.tokenizer.encode(answer, add_bos=False)
    ids += wanted[:BEGUN]
    llm.scheduler.model = llm.model
    llm._corpus = Corpus(np.array(llm.tokenizer.encode(FILES[task]), dtype=np.int32)) if task in FILES else None
    if kind == "asked":
        tokens = len(wanted) - BEGUN
        llm.scheduler.model = Obeying(llm, len(ids), wanted[BEGUN:])  # type: ignore[assignment]
    seeds = SEEDS.get(kind, (1,))
    found: dict[str, list[list[Timings]]] = {name: [[] for _ in seeds] for name in VARIANTS}
    for _, (place, seed) in product(range(repeats + 1), enumerate(seeds)):
        texts = []
        for name, (most, find) in VARIANTS.items():
            speculation.find_match = find
            llm.scheduler._times = TIMES[name]
            options: Options = {**KINDS[kind], "max_tokens": tokens, "speculate": most, "seed": seed}
            generation = llm.generate(ids, **options)
            found[name][place].append(generation.timings)
            texts.append(generation.token_ids)
        assert texts[1:] == texts[:-1]
    return {name: [timings[1:] for timings in by_seed] for name, by_seed in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--task", choices=TASKS, help="this task alone")
    parser.add_argument("--cpu-time", action="store_true", help="processor time of one thread, on a machine at work")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    if arguments.cpu_time:
        time.perf_counter = time.process_time
    llm = llamita.load(arguments.model, context=2048, threads=1 if arguments.cpu_time else None)
    print("| task | answer | tok/s: none | n-grams | ours | ours ÷ none | tokens a step: n-grams | ours | right |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for task in [arguments.task] if arguments.task else TASKS:
        for kind in KINDS:
            found = measure(llm, task, kind, arguments.tokens, arguments.repeats)
            print(f"| {task} | {kind} | {' | '.join(cells(found))} |", flush=True)


def cells(found: dict[str, list[list[Timings]]]) -> list[str]:
    """Return the figures of one row."""
    rates, steps = {}, {}
    for name, by_seed in found.items():
        every = [t for timings in by_seed for t in timings]
        tokens = sum(timings[0].generated_tokens - 1 for timings in by_seed)
        rates[name] = tokens / sum(min(t.decode_seconds for t in timings) for timings in by_seed)
        steps[name] = sum(t.generated_tokens - 1 for t in every) / sum(t.decode_steps for t in every)
    ours = [t for timings in found["ours"] for t in timings]
    right = sum(t.accepted_tokens for t in ours) / max(1, sum(t.drafted_tokens for t in ours))
    return [
        *(f"{rate:.0f}" for rate in rates.values()),
        f"{rates['ours'] / rates['none']:.2f}",
        f"{steps['n-grams']:.2f}",
        f"{steps['ours']:.2f}",
        f"{right:.0%}",
    ]


if __name__ == "__main__":
    main()
