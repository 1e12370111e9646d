"""Products of matrices as another CPU's kernels could have summed them: `pytest -p noisy_torch`.

Every product of Torch on the CPU takes its columns in another order, which depends on its shape and on the
seed in LLAMITA_TEST_NOISE. So the same product has the same bits in a run, and sums round differently from
those of the plain run. A test that fails under some seed depends on the CPU, or rests on luck.
"""

import os
from typing import Any

import numpy as np
import torch

SEED = int(os.environ.get("LLAMITA_TEST_NOISE", "0"))
_LIBRARY = torch.library.Library("aten", "IMPL")


def _order(*shape: int) -> torch.Tensor:
    """A random order of the columns of a product (rows, columns, outputs, ...)."""
    return torch.from_numpy(np.random.default_rng([SEED, *shape]).permutation(shape[1]))


def _reorder(name: str, place: int) -> None:
    """Register the product `name`, whose factors are its arguments `place` and the next."""
    kernel = torch.library.get_kernel(f"aten::{name}", "CPU")

    def product(keys: Any, *arguments: Any, **options: Any) -> Any:
        left, right = arguments[place : place + 2]
        order = _order(left.shape[-2], left.shape[-1], right.shape[-1])
        changed = (left.index_select(-1, order), right.index_select(-2, order))
        return kernel.call_boxed(keys, *arguments[:place], *changed, *arguments[place + 2 :], **options)

    _LIBRARY.impl(name, product, "CPU", with_keyset=True)


for _name, _place in {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}.items():
    _reorder(_name, _place)
