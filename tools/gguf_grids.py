"""Write `src/llamita/formats/gguf_grids.npz`: the codebooks of GGUF's IQ kinds, from the package gguf.

pip install gguf==0.19.0 && python tools/gguf_grids.py
"""

from pathlib import Path

import numpy as np
from gguf import quants

OUT = Path(__file__).parents[1] / "src/llamita/formats/gguf_grids.npz"
KINDS = {
    "iq2_xxs": quants.IQ2_XXS, "iq2_xs": quants.IQ2_XS, "iq2_s": quants.IQ2_S,
    "iq3_xxs": quants.IQ3_XXS, "iq3_s": quants.IQ3_S, "iq1": quants.IQ1_S,
}  # fmt: skip


def main() -> None:
    """Write each codebook as int8 (places, weights)."""
    grids = {}
    for name, kind in KINDS.items():
        kind.init_grid()
        assert kind.grid is not None
        grids[name] = kind.grid.reshape(kind.grid_shape).astype(np.int8)
    np.savez_compressed(OUT, **grids)


if __name__ == "__main__":
    main()
