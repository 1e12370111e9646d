"""Measure what bf16 inputs of float layers cost: KL divergence from float32 math, beside that of 4-bit weights.

python benchmarks/float_math.py [MODEL] [--text FILE] [--chunks N]

MODEL has BF16 weights, and the processor AVX-512 BF16.
"""

import argparse
from pathlib import Path

import llamita
from llamita.engine.weights import FLOAT_MATHS
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
    settings = [(None, math) for math in FLOAT_MATHS] + [(PRESET, FLOAT_MATHS[0])]
    contenders = []
    for i, (preset, math) in enumerate(settings):
        llm = llamita.load(arguments.model, scheme=preset, float_math=math, kv_dtype="f32")
        if llm.float_math != math:
            parser.error(f"expected BF16 weights and a processor that multiplies them, got {llm.float_math} math")
        contenders.append(Contender(f"{preset or 'float'} | {math}", llm, i == 0))
    scores = score_text(contenders, text, limit=arguments.chunks)
    print(f"{scores[0].tokens:,} tokens\n\n| weights | float math | perplexity | KL, 1e-3 nats |\n|---|---|---|---|")
    for contender, score in zip(contenders, scores, strict=True):
        kl = f"{1e3 * score.kl.value:.6f} ± {1e3 * (score.kl.high - score.kl.low) / 2:.6f}" if score.kl else ""
        print(f"| {contender.name} | {score.perplexity:.4f} | {kl} |")


if __name__ == "__main__":
    main()
