"""Compare calibration texts with preset llamita on the embedded model: a table of docs/reference/methods.md.

    python benchmarks/calibration_texts.py --text DIR --wikitext FILE

DIR holds tinystories_train.txt, tinystories_valid.txt and children.txt, the kinds that the model has learned.
The model is quantized on each text, and scored on stories and books that no calibration has seen.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from stories import SCORED, read_stories

from llamita.engine.llm import LLM
from llamita.evaluate.scores import Contender, score_tokens
from llamita.imports.open import resolve
from llamita.methods.chain import PRESET_METHODS
from llamita.methods.setup import Calibration, Setup
from llamita.models.checkpoint import Checkpoint
from llamita.numerics.intervals import mean_interval
from llamita.numerics.scheme import make_scheme
from llamita.quantize.calibration import draw_windows, load_calibration
from llamita.quantize.rounded import RoundedSource
from llamita.text.tokenizer import Tokenizer

LENGTH = 512  # tokens of a window
LAST = 60_000  # characters of books
Windows = dict[str, np.ndarray]  # by the text's name: (samples, LENGTH)


def real_windows(source: Checkpoint, texts: dict[str, str], samples: int, seed: int) -> Windows:
    """Return windows of each text, and of stories and books by halves."""
    tokenizer = Tokenizer(source.path, source.config)

    def draw(name: str, count: int) -> np.ndarray:
        stream = np.array(tokenizer.encode(texts[name]), np.int32)
        return draw_windows(stream, count, LENGTH, seed, tokenizer.bos_token_id, name)

    halves = [draw(name, samples // 2) for name in ("stories", "books")]
    return {name: draw(name, samples) for name in texts} | {"stories and books": np.concatenate(halves)}


def rows(source: Checkpoint, texts: dict[str, str], samples: int, seed: int) -> Iterator[tuple[str, Calibration]]:
    """Return every calibration text with its name; the model's own first."""
    yield "self", load_calibration("self", source, samples, LENGTH, seed)
    for name, windows in real_windows(source, texts, samples, seed).items():
        yield name, Calibration(name, "", windows)


def main() -> None:
    """Print a line as each model is scored, then a Markdown table: KL divergence from the float model, times 1000."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="directory with the texts")
    parser.add_argument("--wikitext", type=Path, required=True, help="a part of WikiText-2's train split")
    parser.add_argument("--groups", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=128, help="windows of 512 tokens")
    parser.add_argument("--method", help="the chain, without settings; by default that of preset llamita")
    arguments = parser.parse_args()
    source = Checkpoint(resolve("embedded"))
    books = (arguments.text / "children.txt").read_text("utf-8")
    texts = {
        "stories": read_stories(arguments.text / "tinystories_train.txt"),
        "books": books[:-LAST],
        "WikiText-2": arguments.wikitext.read_text("utf-8"),
    }
    scored = {"stories": read_stories(arguments.text / "tinystories_valid.txt")[SCORED], "books": books[-LAST:]}
    reference = Contender("float", LLM(source), True)
    method, settings = (arguments.method, {}) if arguments.method else PRESET_METHODS["llamita"]
    found: dict[tuple[str, int, str], list[np.ndarray]] = {}
    for seed in arguments.seeds:
        for name, calibration in rows(source, texts, arguments.samples, seed):
            for group_size in arguments.groups:
                scheme = make_scheme("llama3.2", group_size)
                rounded = LLM(RoundedSource(source, scheme, method, Setup(calibration, seed, settings=settings)))
                for kind, text in scored.items():
                    kl = score_tokens([reference, Contender("rounded", rounded, False)], text).kl[1]
                    found.setdefault((name, group_size, kind), []).append(kl)
                    print(f"seed {seed} g{group_size} {name} on {kind}: {1e3 * kl.mean():.2f}", flush=True)
    print(*_table(found, arguments.groups, list(scored)), sep="\n")


def _table(found: dict[tuple[str, int, str], list[np.ndarray]], groups: list[int], kinds: list[str]) -> Iterator[str]:
    heads = [f"{kind}, groups of {group_size}" for group_size in groups for kind in kinds]
    yield "| calibration text | " + " | ".join(heads) + " |"
    yield "|---" * (1 + len(heads)) + "|"
    for name in dict.fromkeys(name for name, _, _ in found):
        texts = [_figure(found[name, group_size, kind]) for group_size in groups for kind in kinds]
        yield f"| {name} | " + " | ".join(texts) + " |"


def _figure(seeds: list[np.ndarray]) -> str:
    """Return the mean over the seeds, its interval over the tokens, and the means of single seeds."""
    interval = mean_interval(np.mean(seeds, axis=0))
    spread = sorted(1e3 * kl.mean() for kl in seeds)
    half = 1e3 * (interval.high - interval.low) / 2
    return f"{1e3 * interval.value:.2f} ± {half:.2f} ({spread[0]:.2f} to {spread[-1]:.2f})"


if __name__ == "__main__":
    main()
