"""Measure the loss by a KV cache in fewer bits: perplexity, and KL divergence from the float model with an f32 cache.

python benchmarks/kv_cache.py [MODEL] [--text FILE] [--chunks N]
"""

import argparse
from pathlib import Path

import llamita
from llamita.engine.kv_cache import KV_DTYPES
from llamita.evaluate.scores import Contender, embedded_text, score_text

PRESET = "llama3.2"


def main() -> None:
    """Print a Markdown table; KL divergences are in nats a token, times 1000."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="embedded")
    parser.add_argument("--text", type=Path, help="by default the text that ships with llamita")
    parser.add_argument("--chunks", type=int, help="of 2,048 tokens; by default all")
    arguments = parser.parse_args()
    text = arguments.text.read_text() if arguments.text else embedded_text()
    settings = [(preset, kv) for preset in (None, PRESET) for kv in KV_DTYPES]
    contenders = [
        Contender(f"{preset or 'float'} | {kv}", llamita.load(arguments.model, scheme=preset, kv_dtype=kv), i == 0)
        for i, (preset, kv) in enumerate(settings)
    ]
    scores = score_text(contenders, text, limit=arguments.chunks)
    print(f"{scores[0].tokens:,} tokens\n\n| weights | cache | perplexity | KL, 1e-3 nats |\n|---|---|---|---|")
    for contender, score in zip(contenders, scores, strict=True):
        kl = f"{1e3 * score.kl.value:.4f} ± {1e3 * (score.kl.high - score.kl.low) / 2:.4f}" if score.kl else ""
        print(f"| {contender.name} | {score.perplexity:.4f} | {kl} |")


if __name__ == "__main__":
    main()
