"""Learn R1 and R2 on the whole model with rounded activations, by gradient steps that stay orthogonal.

The step is Cayley's (Li et al. 2020, arXiv 2002.01113): R becomes R·(I + a/2·S)⁻¹·(I - a/2·S), solved instead of
iterated, so that R stays orthogonal. S is skew: the gradient in the tangent space, with momentum. Rounding is
differentiated with fixed codes, so a rotation learns that a smaller range makes smaller errors. Losses, steps and sums
of gradients are in float32 or wider, whatever dtype products have.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from llamita import _native
from llamita.errors import InputError
from llamita.methods.architecture import window_mask
from llamita.methods.blocks import rotary_tables
from llamita.methods.rotation_matrices import RotationMatrices, rotated
from llamita.methods.runtime_rotations import hadamard_transform
from llamita.methods.settings import CHECKED, SpinQuantSettings
from llamita.methods.setup import Setup
from llamita.models.names import HEAD_NORMS
from llamita.models.weights import FloatSource, bias_of
from llamita.numerics.affine import to_f32
from llamita.system import torch_processes
from llamita.system.kept_work import kept_arrays, write_whole

_MOMENTUM = 0.9
_ITERATIONS = 12  # give the norm within a few per cent, enough for the length of a step
_SMALLEST = 2.0**-126  # of scales: torchao's
_FILE, _KEPT = "rotations.npz", 10  # in the work directory; steps between two writes
_GAINED = (None, False, True)  # the file stores the place of the value here


def learn(
    source: FloatSource, matrices: RotationMatrices, settings: SpinQuantSettings, setup: Setup
) -> RotationMatrices:
    """Return the rotations after `settings.steps` steps from `matrices`, on one device or, under Accelerate, several.

    Where these do not lower the float32 loss of the first `CHECKED` samples, it is `matrices`.

    Raises:
        InputError: no calibration text, or groups of weights that do not fit.
    """
    if setup.calibration is None:
        raise InputError("spinquant", "calibration text", "none", "try --set spinquant.steps=0")
    inputs = sorted({columns for _, columns in source.config.linear_shapes().values()})
    if settings.weights and any(columns % settings.weights for columns in inputs):
        raise InputError("spinquant.weights", f"a divisor of {inputs}", f"{settings.weights}")
    torch.set_num_threads(_native.threads())
    torch_processes.join()  # before Accelerate, which would leave either CPU or GPU without sums
    accelerator = Accelerator()
    state = _begin(matrices, setup, accelerator.device)
    if state.has_gained is None:
        model = _Model(source, matrices, settings, accelerator.device)
        for tokens in _batches(setup.calibration.tokens, settings, setup.seed, accelerator, state.step):
            if setup.progress:
                setup.progress("learning rotations", state.step, settings.steps)
            loss = model.loss(tokens.to(accelerator.device), state.rotations)
            gradients = torch.autograd.grad(loss, list(state.rotations.values()))
            rate = settings.lr * (1 - state.step / settings.steps)
            for name, gradient in zip(state.rotations, gradients, strict=True):
                gradient = accelerator.reduce(gradient, "mean")
                _turn(state.rotations[name], state.momenta[name], gradient, rate)  # type: ignore[arg-type]
            state.step += 1
            if state.step % _KEPT == 0 or state.step == settings.steps:
                _keep(state, setup)
        checked = setup.calibration.tokens[:CHECKED]
        first = {name: _parameter(r, accelerator.device) for name, r in _used(matrices).items()}
        before, after = (_mean_loss(model, checked, r, accelerator) for r in (first, state.rotations))
        state.has_gained = after < before
        _keep(state, setup)
    if not state.has_gained:
        return matrices
    found = {name: _orthogonal(r) for name, r in state.rotations.items()}
    return RotationMatrices(found.get("r1"), found.get("r2"), matrices.r4_size)


@dataclass
class _State:
    """Rotations after some steps, and their momenta, by name: "r1" (hidden, hidden), "r2" (layers, d, d).

    `has_gained` is None until all steps are done and the first and the last rotations are compared.
    """

    step: int
    rotations: dict[str, Tensor]
    momenta: dict[str, Tensor]
    has_gained: bool | None = None


def _begin(matrices: RotationMatrices, setup: Setup, device: torch.device) -> _State:
    """Return step 0, or the last state of a run that was killed."""
    rotations = {name: _parameter(r, device) for name, r in _used(matrices).items()}
    state = _State(0, rotations, {name: torch.zeros_like(r) for name, r in rotations.items()})
    if setup.work is None or not (setup.work / _FILE).exists():
        return state
    names = ["step", "has_gained", *rotations, *(f"{name}.momentum" for name in rotations)]
    kept = kept_arrays(setup.work / _FILE, names)
    if kept is not None:
        state.step = int(kept["step"])
        state.has_gained = _GAINED[int(kept["has_gained"])]
        with torch.no_grad():
            for name in rotations:
                rotations[name].copy_(torch.from_numpy(kept[name]))
                state.momenta[name].copy_(torch.from_numpy(kept[f"{name}.momentum"]))
    return state


def _keep(state: _State, setup: Setup) -> None:
    """Write the state, for a run that resumes this one."""
    if setup.work is None:
        return
    arrays = {name: r.detach().cpu().numpy() for name, r in state.rotations.items()}
    arrays |= {f"{name}.momentum": m.cpu().numpy() for name, m in state.momenta.items()}
    arrays |= {"step": np.array(state.step), "has_gained": np.array(_GAINED.index(state.has_gained))}
    write_whole(setup.work / _FILE, lambda file: np.savez(file, **arrays))  # pyright: ignore[reportArgumentType]


def _mean_loss(model: "_Model", tokens: np.ndarray, rotations: dict[str, Tensor], accelerator: Any) -> float:
    """In float32 over samples (samples, length), each process with its part of them."""
    total = torch.zeros((), device=accelerator.device)
    mine = torch.from_numpy(tokens[accelerator.process_index :: accelerator.num_processes].astype(np.int64))
    with torch.no_grad():
        for sample in mine.to(accelerator.device):
            total += model.loss(sample[None], rotations, in_float32=True)
    return float(accelerator.reduce(total, "sum")) / len(tokens)


def _used(matrices: RotationMatrices) -> dict[str, np.ndarray]:
    both = {"r1": matrices.r1, "r2": matrices.r2}
    return {name: matrix for name, matrix in both.items() if matrix is not None}


def _parameter(matrix: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(matrix).to(device, torch.float32).requires_grad_()


def _batches(
    tokens: np.ndarray, settings: SpinQuantSettings, seed: int, accelerator: Any, first: int
) -> Iterator[Tensor]:
    """Yield this process's part of the samples of each step from `first` on: int64 (samples, length).

    All samples come in turn and are then shuffled again.
    """
    rng, order = np.random.default_rng(seed), np.empty(0, np.int64)
    processes = accelerator.num_processes
    wanted = -(-settings.batch // processes) * processes
    for step in range(settings.steps):
        while len(order) < wanted:
            order = np.concatenate([order, rng.permutation(len(tokens))])
        chosen, order = order[:wanted], order[wanted:]
        mine = chosen[accelerator.process_index :: accelerator.num_processes]
        if step >= first:
            yield torch.from_numpy(tokens[mine].astype(np.int64))


def _turn(rotation: Tensor, momentum: Tensor, gradient: Tensor, rate: float) -> None:
    """Take a Cayley step of R (..., n, n) in place; no plane turns by more than about `rate`."""
    with torch.no_grad():
        pulled = rotation.mT @ gradient
        momentum.mul_(_MOMENTUM).add_(pulled - pulled.mT)
        angle = _spectral_norm(momentum).amax()  # the layers' R2 keep their proportions
        skew = (momentum * (rate / 2 / angle.clamp(min=_SMALLEST))).double()
        unit = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
        rotation.copy_(rotation.double() @ torch.linalg.solve(unit + skew, unit - skew))


def _spectral_norm(skew: Tensor) -> Tensor:
    """Return the largest angle by which S (..., n, n) turns a plane, by power iteration: (...,)."""
    v = skew.square().sum(-1, keepdim=True)  # (..., n, 1): the rows with most energy lead
    for _ in range(_ITERATIONS):
        v = skew @ (skew @ v)
        v = v / v.norm(dim=-2, keepdim=True).clamp(min=_SMALLEST)
    return (skew @ v).norm(dim=(-2, -1))


def _orthogonal(rotation: Tensor) -> np.ndarray:
    """Return the orthogonal matrix nearest to R (..., n, n), float64, to undo the rounding of float32."""
    left, _, right = torch.linalg.svd(rotation.detach().double().cpu())
    return (left @ right).numpy()


@dataclass(frozen=True)
class _Layer:
    """Weights (outputs, inputs) and biases of a block by their name within it, norms folded, R4 merged."""

    weights: dict[str, Tensor]
    biases: dict[str, Tensor | None]
    head_norms: tuple[Tensor, ...]  # of queries and keys, (head_dim,) each; none in most families


class _Model:
    """The source, and its loss as a function of R1 and R2: {"r1": (hidden, hidden), "r2": (layers, d, d)}."""

    def __init__(
        self, source: FloatSource, matrices: RotationMatrices, settings: SpinQuantSettings, device: torch.device
    ) -> None:
        self._config, self._settings, self._device = source.config, settings, device
        self._dtype = getattr(torch, settings.dtype)
        self._rotation = hadamard_transform if matrices.r4_size else _same
        merged = rotated(source, RotationMatrices(None, None, matrices.r4_size))
        self._layers = [self._layer(merged, i) for i in range(self._config.layers)]
        self._table = self._tensor(source.weight("model.embed_tokens")).to(self._dtype)
        self._head = self._table
        if not self._config.tied:
            self._head = self._tensor(source.weight("lm_head")).to(self._dtype)
        self._gamma = self._tensor(source.vector("model.norm.weight"))

    def loss(self, tokens: Tensor, rotations: dict[str, Tensor], in_float32: bool = False) -> Tensor:
        """Return the loss with rounded activations, mean over the predicted tokens of (samples, length)."""
        is_bf16 = self._dtype == torch.bfloat16 and not in_float32
        # No cache: one bf16 copy of a rotation would sum the gradients of all layers in bf16.
        with torch.autocast(self._device.type, torch.bfloat16, enabled=is_bf16, cache_enabled=False):
            return self._loss(tokens, rotations)

    def _loss(self, tokens: Tensor, rotations: dict[str, Tensor]) -> Tensor:
        logits = self._logits(tokens, rotations, is_rounded=True)[:, :-1].flatten(0, 1)
        if self._settings.loss == "cross-entropy":
            return functional.cross_entropy(logits, tokens[:, 1:].flatten())
        with torch.no_grad():
            target = self._logits(tokens, {}, is_rounded=False)[:, :-1].flatten(0, 1).log_softmax(-1)
        return functional.kl_div(logits.log_softmax(-1), target, log_target=True, reduction="batchmean")

    def _logits(self, tokens: Tensor, rotations: dict[str, Tensor], is_rounded: bool) -> Tensor:
        r1, r2 = rotations.get("r1"), rotations.get("r2")
        rounded = _round_tokens if is_rounded else _same
        rotary = rotary_tables(self._config, tokens.shape[1])
        rotary = (rotary[0].to(self._device), rotary[1].to(self._device))
        x = _times(self._table[tokens].float(), r1).float()  # (samples, length, hidden)
        for i, layer in enumerate(self._layers):
            r2_i = None if r2 is None else r2[i]
            # Recomputed in the backward pass, so that only one layer's activations and rotated weights are kept.
            x = checkpoint(self._block, x, i, layer, r1, r2_i, rotary, rounded, use_reentrant=False)  # type: ignore[assignment]
        hidden = _unrotate(_norm(x, self._config.norm_eps), r1) * self._gamma
        head = self._head if torch.is_autocast_enabled(self._device.type) else self._head.float()
        # Instead of rotating the table: (h·R1, rounded)·R1ᵀ·Wᵀ.
        logits = _unrotate(rounded(_times(hidden, r1)), r1) @ head.T
        return logits.float()  # on a CPU, autocast leaves log_softmax in bf16

    def _block(
        self, x: Tensor, index: int, layer: _Layer, r1: Tensor | None, r2: Tensor | None,
        rotary: tuple[Tensor, Tensor], rounded: Callable[[Tensor], Tensor],
    ) -> Tensor:  # fmt: skip
        config = self._config
        is_rounded = rounded is not _same

        def linear(name: str, x: Tensor) -> Tensor:
            weight, bias = self._rotated(layer, name, r1, r2)
            if is_rounded and self._settings.weights:
                weight = _round_groups(weight, self._settings.weights)
            return functional.linear(x, weight, bias)

        n = rounded(_norm(x, config.norm_eps))
        q, k, v = (
            linear(f"self_attn.{name}_proj", n).unflatten(-1, (-1, config.head_dim)).transpose(1, 2) for name in "qkv"
        )  # (samples, heads, length, head_dim)
        if layer.head_norms:
            q, k = (_norm(t, config.norm_eps) * norm for t, norm in zip((q, k), layer.head_norms, strict=True))
        if index not in config.unrotated:
            q, k = (_rotary(t, *rotary) for t in (q, k))
        mask = window_mask(config.window_of(index), x.shape[1])
        mask = None if mask is None else mask.to(x.device)
        attended = functional.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
        x = x + linear("self_attn.o_proj", rounded(attended.transpose(1, 2).flatten(2)))
        n = rounded(_norm(x, config.norm_eps))
        inner = functional.silu(linear("mlp.gate_proj", n)) * linear("mlp.up_proj", n)
        return x + linear("mlp.down_proj", rounded(self._rotation(inner)))

    def _rotated(self, layer: _Layer, name: str, r1: Tensor | None, r2: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias of a layer under the rotations, as `rotation_matrices.rotated` merges them."""
        weight, bias, d = layer.weights[name].float(), layer.biases[name], self._config.head_dim
        if name in ("self_attn.o_proj", "mlp.down_proj"):
            if name == "self_attn.o_proj" and r2 is not None:
                weight = (weight.unflatten(1, (-1, d)) @ r2).flatten(1)
            return _times(weight.T, r1).T, None if bias is None else _times(bias, r1)
        weight = _times(weight, r1)
        if name == "self_attn.v_proj" and r2 is not None:
            weight = (r2.T @ weight.unflatten(0, (-1, d))).flatten(0, 1)
            bias = None if bias is None else (bias.unflatten(0, (-1, d)) @ r2).flatten()
        return weight, bias

    def _layer(self, source: FloatSource, index: int) -> _Layer:
        block = f"model.layers.{index}"
        before = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}
        weights, biases = {}, {}
        for name in self._config.linear_shapes():
            weight, bias = self._tensor(source.weight(f"{block}.{name}")), bias_of(source, f"{block}.{name}")
            if name not in ("self_attn.o_proj", "mlp.down_proj"):
                norm = before[name.partition(".")[0]]
                weight = weight * self._tensor(source.vector(f"{block}.{norm}.weight"))
            weights[name] = weight.to(self._dtype)
            biases[name] = None if bias is None else self._tensor(bias)
        norms = HEAD_NORMS if self._config.qk_norm else ()
        return _Layer(weights, biases, tuple(self._tensor(source.vector(f"{block}.{norm}.weight")) for norm in norms))

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(to_f32(array), np.float32)).to(self._device)


def _same(x: Tensor) -> Tensor:
    return x


def _times(x: Tensor, rotation: Tensor | None) -> Tensor:
    return x if rotation is None else x @ rotation


def _unrotate(x: Tensor, rotation: Tensor | None) -> Tensor:
    return x if rotation is None else x @ rotation.T


def _norm(x: Tensor, eps: float) -> Tensor:
    """Apply RMSNorm without its weight, which is folded."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x (samples, heads, length, head_dim) by its position; halves are rotated."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


def _round_tokens(x: Tensor) -> Tensor:
    """Round as `activations.quantize_activations` does, but differentiable in the range, too."""
    x = x.float()  # in bf16, codes from 128 on would not be rounded at all
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scales = ((high - low) / 255).clamp(min=_SMALLEST)
    with torch.no_grad():
        zero_points = (-128 - torch.round(low / scales)).clamp(-128, 127)
        codes = (torch.round(x / scales) + zero_points).clamp(-128, 127) - zero_points
        residual = codes - x / scales
    return x + residual * scales


def _round_groups(weight: Tensor, group_size: int) -> Tensor:
    """Round weights (outputs, inputs) to int4 in groups, differentiable in weights and scales."""
    groups = weight.float().unflatten(1, (-1, group_size))
    scales = (groups.abs().amax(-1, keepdim=True) / 7.5).clamp(min=_SMALLEST)
    with torch.no_grad():
        residual = torch.round(groups / scales).clamp(-8, 7) - groups / scales
    return (groups + residual * scales).flatten(1)
