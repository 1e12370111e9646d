"""Measure the loss by a KV cache in fewer bits: perplexity, and KL divergence from the float model with an f32 cache.

python benchmarks/kv_cache.py [MODEL] [--text FILE] [--chunks N]
"""

from kl_table import PRESET, parser, print_table

import llamita
from llamita.engine.kv_cache import KV_DTYPES
from llamita.evaluate.scores import Contender


def main() -> None:
    """Print the table."""
    arguments = parser(__doc__).parse_args()
    settings = [(preset, kv) for preset in (None, PRESET) for kv in KV_DTYPES]
    contenders = [
        Contender(f"{preset or 'float'} | {kv}", llamita.load(arguments.model, scheme=preset, kv_dtype=kv), i == 0)
        for i, (preset, kv) in enumerate(settings)
    ]
    print_table(arguments, contenders, "cache", 4)


if __name__ == "__main__":
    main()
