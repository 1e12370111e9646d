"""SpinQuant (Liu et al., arXiv 2405.16406): rotations that keep the model's function and make it round better.

R1 rotates the residual stream and R2 the values of each layer's heads. Both are merged into the weights
(`methods/rotation_matrices.py`). R4, a Hadamard transform in front of down_proj, acts at run time. They begin as
Hadamard matrices with random signs; R1 and R2 are then learned (`methods/learn_rotations.py`, on Torch).
"""

from collections.abc import Callable

import numpy as np

from llamita.errors import InputError
from llamita.methods.rotation_matrices import RotationMatrices, rotated
from llamita.methods.settings import SpinQuantSettings, settings_of
from llamita.methods.setup import Setup
from llamita.models.transformed import F64, TransformedSource
from llamita.models.weights import FloatSource
from llamita.numerics.hadamard import hadamard_matrix
from llamita.system.extras import load_optional

_LEARN = "llamita.methods.learn_rotations:learn"
_NO_TORCH = (
    "method spinquant: expected the package {package}, found none; try pip install "
    "'llamita[torch]', or --set spinquant.steps=0, which learns nothing and needs none"
)


def transform(source: FloatSource, setup: Setup) -> TransformedSource:
    """Return the source, rotated. Learning needs calibration text and Torch; with 0 steps neither is used.

    Raises:
        InputError: an unknown setting, or a size of the model without a Hadamard matrix.
        RunError: Torch is missing.
    """
    settings = settings_of(SpinQuantSettings, "spinquant", setup.settings)
    if source.rotations.names:
        raise InputError("--method", "spinquant once", "a model that is already rotated")
    matrices = random_rotations(source, settings, setup.seed)
    if settings.learns:
        matrices = learner()(source, matrices, settings, setup)
    return rotated(source, matrices, settings.online)


def learner() -> Callable[..., RotationMatrices]:
    """Return `learn_rotations.learn`.

    Raises:
        RunError: a package that it needs is missing.
    """
    return load_optional(_LEARN, _NO_TORCH)


def random_rotations(source: FloatSource, settings: SpinQuantSettings, seed: int) -> RotationMatrices:
    """Return Hadamard matrices with random signs for R1 and every R2, as in QuaRot (arXiv 2404.00456)."""
    config, rng = source.config, np.random.default_rng(seed)

    def draw(size: int) -> F64:
        return rng.choice([-1.0, 1.0], size)[:, None] * hadamard_matrix(size)

    sizes = settings.sizes(config)
    r1 = draw(sizes["R1"]) if "R1" in settings.names else None
    r2 = np.stack([draw(sizes["R2"]) for _ in range(config.layers)]) if "R2" in settings.names else None
    return RotationMatrices(r1, r2, sizes.get("R4"))
