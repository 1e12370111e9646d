"""What benchmarks of small losses share: their arguments, and a table of perplexity and KL divergence on one text."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from llamita.evaluate.scores import Contender, embedded_text, score_text

PRESET = "llama3.2"  # of the 4-bit weights beside which a loss is seen


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return the parser of a benchmark: a model, a text, and how much of it."""
    made = argparse.ArgumentParser(description=doc)
    made.add_argument("model", nargs="?", default="embedded")
    made.add_argument("--text", type=Path, help="by default the text that ships with llamita")
    made.add_argument("--chunks", type=int, help="of 2,048 tokens; by default all")
    return made


def print_table(arguments: argparse.Namespace, contenders: Sequence[Contender], column: str, digits: int) -> None:
    """Print a Markdown table; KL divergences are in nats a token, times 1000, with so many digits.

    A contender's name is that of its weights and its value of `column`, with " | " between them.
    """
    text = arguments.text.read_text() if arguments.text else embedded_text()
    scores = score_text(contenders, text, limit=arguments.chunks)
    print(f"{scores[0].tokens:,} tokens\n\n| weights | {column} | perplexity | KL, 1e-3 nats |\n|---|---|---|---|")
    for contender, score in zip(contenders, scores, strict=True):
        kl = score.kl
        shown = f"{1e3 * kl.value:.{digits}f} ± {1e3 * (kl.high - kl.low) / 2:.{digits}f}" if kl else ""
        print(f"| {contender.name} | {score.perplexity:.4f} | {shown} |")
