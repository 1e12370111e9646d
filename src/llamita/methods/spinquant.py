"""SpinQuant (Liu et al., arXiv 2405.16406): rotations that leave the function as it is and round better.

R1 rotates the residual stream, R2 the values of each layer's heads; both are merged into weights, products in
float64. R4, a Hadamard transform in front of down_proj, runs online. They begin as Hadamard matrices with
random signs; R1 and R2 are then learned (`methods/learn_rotations.py`, on Torch). Norms are folded first, and
no mean is subtracted: RMSNorm has none. Tied tables stay tied, by a product M in front of the head.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llamita.errors import InputError
from llamita.methods.settings import SpinQuantSettings, settings_of
from llamita.methods.setup import Setup
from llamita.models.transformed import F64, Change, FloatSource, ModuleChange, TransformedSource, rotations_of
from llamita.numerics.hadamard import fast_hadamard, hadamard_matrix
from llamita.numerics.rotations import NAMES, Rotations
from llamita.system.extras import load_optional

_LEARN = "llamita.methods.learn_rotations:learn"
_NO_TORCH = (
    "--method spinquant: expected the package {package}, found none; try pip install "
    "'llamita[torch]', or --set spinquant.steps=0, which learns nothing and needs none"
)


@dataclass(frozen=True)
class RotationMatrices:
    """R1 and R2 as matrices that rows are multiplied by, orthogonal; None where they are not used.

    Attributes:
        r1: float64 (hidden, hidden).
        r2: float64 (layers, head_dim, head_dim).
        r4_size: the inputs of down_proj, None without R4.
    """

    r1: F64 | None
    r2: F64 | None
    r4_size: int | None

    @property
    def names(self) -> tuple[str, ...]:
        """Those in use."""
        used = {"R1": self.r1 is not None, "R2": self.r2 is not None, "R4": self.r4_size is not None}
        return tuple(name for name in NAMES if used[name])


def transform(source: FloatSource, setup: Setup) -> TransformedSource:
    """The source, rotated. Learning needs calibration text and Torch; with 0 steps neither is touched.

    Raises:
        InputError: a setting that is none, or a size of the model without a Hadamard matrix.
        RunError: Torch is missing.
    """
    settings = settings_of(SpinQuantSettings, "spinquant", setup.settings)
    if rotations_of(source).names:
        raise InputError("--method: expected spinquant once, got a model that is rotated already")
    matrices = random_rotations(source, settings, setup.seed)
    if settings.learns:
        matrices = learner()(source, matrices, settings, setup)
    return rotated(source, matrices, settings.online)


def learner() -> Callable[..., RotationMatrices]:
    """`learn_rotations.learn`.

    Raises:
        RunError: a package that it needs is missing.
    """
    return load_optional(_LEARN, _NO_TORCH)


def random_rotations(source: FloatSource, settings: SpinQuantSettings, seed: int) -> RotationMatrices:
    """Hadamard matrices with random signs, as QuaRot has them (arXiv 2404.00456), for R1 and every R2."""
    config, rng = source.config, np.random.default_rng(seed)

    def draw(size: int) -> F64:
        return rng.choice([-1.0, 1.0], size)[:, None] * hadamard_matrix(size)

    sizes = settings.sizes(config)
    r1 = draw(sizes["R1"]) if "R1" in settings.names else None
    r2 = np.stack([draw(sizes["R2"]) for _ in range(config.layers)]) if "R2" in settings.names else None
    return RotationMatrices(r1, r2, sizes.get("R4"))


def rotated(source: FloatSource, matrices: RotationMatrices, online: bool = True) -> TransformedSource:
    """The source with these rotations merged; its function is the same if R4 and M run online."""
    config = source.config
    r1, changes, ones = matrices.r1, {}, set()
    for layer in range(config.layers):
        changes |= _block_changes(source, matrices, layer)
        if r1 is not None:
            norms = ("input_layernorm", "post_attention_layernorm")
            ones |= {f"model.layers.{layer}.{norm}.weight" for norm in norms}
    transform = None
    if r1 is not None:
        gamma = source.vector("model.norm.weight").astype(np.float64)
        changes["model.embed_tokens"] = ModuleChange(inputs=(_times_matrix(r1),))
        if config.tied and online:
            transform = (r1.T @ (gamma[:, None] * r1)).astype(np.float32)
        else:
            changes["lm_head"] = ModuleChange(inputs=(_times(gamma), _times_matrix(r1)))
        ones.add("model.norm.weight")
    rotations = Rotations(matrices.names, matrices.r4_size, transform)
    untie = r1 is not None and not online
    return TransformedSource(source, changes, ones=ones, rotations=rotations, untie=untie)


def _block_changes(source: FloatSource, matrices: RotationMatrices, layer: int) -> dict[str, ModuleChange]:
    """What the rotations do to the linear layers of a block."""
    config, block = source.config, f"model.layers.{layer}"
    stream: tuple[Change, ...] = () if matrices.r1 is None else (_times_matrix(matrices.r1),)
    values: tuple[Change, ...] = ()
    if matrices.r2 is not None:
        values = (_times_matrix(matrices.r2[layer], config.head_dim),)

    def after(norm: str) -> tuple[Change, ...]:
        gamma = source.vector(f"{block}.{norm}.weight").astype(np.float64)
        return (_times(gamma), *stream) if stream else ()

    attention, mlp = after("input_layernorm"), after("post_attention_layernorm")
    changes = {
        "self_attn.q_proj": ModuleChange(inputs=attention),
        "self_attn.k_proj": ModuleChange(inputs=attention),
        "self_attn.v_proj": ModuleChange(inputs=attention, outputs=values),
        "self_attn.o_proj": ModuleChange(inputs=values, outputs=stream),
        "mlp.gate_proj": ModuleChange(inputs=mlp),
        "mlp.up_proj": ModuleChange(inputs=mlp),
        "mlp.down_proj": ModuleChange(
            inputs=(fast_hadamard,) if matrices.r4_size else (), outputs=stream
        ),
    }  # fmt: skip
    return {f"{block}.{name}": change for name, change in changes.items() if change != ModuleChange()}


def _times(scales: F64) -> Change:
    return lambda x: x * scales


def _times_matrix(matrix: F64, head: int | None = None) -> Change:
    """Rows times a matrix; with `head`, each stretch of that many values by itself."""
    if head is None:
        return lambda x: x @ matrix
    return lambda x: (x.reshape(*x.shape[:-1], -1, head) @ matrix).reshape(x.shape)
