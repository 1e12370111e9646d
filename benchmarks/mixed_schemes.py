"""Compare a scheme for each layer with one group size for all, at the same bytes.

python benchmarks/mixed_schemes.py --calibration FILE --text FILE [MODEL] [--preset NAME] [--characters N]
"""

import argparse
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from llamita.engine.weights import load_weights
from llamita.imports.open import resolve
from llamita.models.checkpoint import Checkpoint
from llamita.models.layer_kinds import describe_kinds
from llamita.models.sizes import make_plan
from llamita.numerics.intervals import mean_interval, paired_difference
from llamita.numerics.scheme import GROUP_SIZES, QuantScheme, make_scheme
from llamita.quantize.layer_choice import Meter, allocate, measure_options, mixed_scheme, size_bounds
from llamita.quantize.rounded import RoundedSource
from llamita.text.tokenizer import Tokenizer

LENGTH = 512  # tokens of a sample
SAMPLES = 16  # of calibration text


def main() -> None:
    """Print a Markdown table; KL divergences from the float model are in nats a token, times 1000."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="embedded")
    parser.add_argument("--calibration", type=Path, required=True, help="what the choice is made on")
    parser.add_argument("--text", type=Path, required=True, help="what is scored")
    parser.add_argument("--preset", default="llamita")
    parser.add_argument("--characters", type=int, help="of the text; by default all")
    arguments = parser.parse_args()
    source = Checkpoint(resolve(arguments.model))
    tokens = _tokens(source, arguments.calibration.read_text())[:SAMPLES]
    meter = Meter(source, _tokens(source, arguments.text.read_text()[: arguments.characters]))

    def loss(scheme: QuantScheme) -> np.ndarray:
        return meter.divergence(load_weights(RoundedSource(source, scheme)))

    def size(scheme: QuantScheme) -> int:
        return make_plan(source.config, scheme, lambda name: source.info(name).dtype).file_bytes

    scheme = make_scheme(arguments.preset)
    uniform = [replace(scheme, group_size=group_size) for group_size in sorted(GROUP_SIZES, reverse=True)]
    sizes, losses = [size(one) for one in uniform], [loss(one) for one in uniform]
    budgets = sorted({*sizes[1:], *((a + b) // 2 for a, b in pairwise(sizes))})
    _, options = measure_options(source, scheme, Meter(source, tokens))
    _, overhead = size_bounds(source, scheme)
    print("| bytes | one group size | KL | mixed | KL | change | layers |\n|---|---|---|---|---|---|---|")
    for budget in budgets:
        best = max(i for i, taken in enumerate(sizes) if taken <= budget)
        found = mixed_scheme(scheme, allocate(options, budget - overhead))
        own = loss(found)
        change = paired_difference(own, losses[best])
        share = [100 * x / losses[best].mean() for x in (change.value, change.low, change.high)]
        print(
            f"| {budget:,} | {uniform[best].group_size} | {_text(losses[best])} | {size(found):,} | "
            f"{_text(own)} | {share[0]:.1f} % ({share[1]:.1f} to {share[2]:.1f}) | "
            f"{describe_kinds(source.config, found)} |",
            flush=True,
        )


def _tokens(source: Checkpoint, text: str) -> np.ndarray:
    ids = np.array(Tokenizer(source.path, source.config).encode(text), np.int32)
    return ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)


def _text(values: np.ndarray) -> str:
    interval = mean_interval(values)
    return f"{1e3 * interval.value:.2f} ± {1e3 * (interval.high - interval.low) / 2:.2f}"


if __name__ == "__main__":
    main()
