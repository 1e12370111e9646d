"""Measure the error of each scale rule on a Gaussian matrix: the table of docs/reference/numerics.md.

python benchmarks/scale_rules.py
"""

import numpy as np

from llamita import _native

ROWS, COLUMNS, SEED = 512, 2048, 0


def main() -> None:
    weights = np.random.default_rng(SEED).standard_normal((ROWS, COLUMNS), dtype=np.float32)
    energy = float(np.square(weights, dtype=np.float64).sum())
    print("| group | torchao | search |\n|---|---|---|")
    for bits, group_size, label in [
        (4, 32, "32"),
        (4, 64, "64"),
        (4, 128, "128"),
        (4, 256, "256"),
        (8, COLUMNS, "int8, per channel"),
    ]:
        errors = []
        for rule in ("torchao", "search"):
            _, _, squared_error = _native.round_weights(weights, bits, group_size, rule, None)
            errors.append(f"{squared_error.sum() / energy * 1e3:.4g}")
        print(f"| {label} | {' | '.join(errors)} |")


if __name__ == "__main__":
    main()
