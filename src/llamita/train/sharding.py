"""Weights, gradients and the optimizer's state in parts, one for each process; what is kept on disk is whole.

PyTorch's FSDP2 (fully_shard; Zhao et al. 2023, arXiv 2304.11277): a decoder layer is whole while it computes.
Applied here, not by accelerate, which has no FSDP on CPUs.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from llamita.system import processes
from llamita.system.files import flush_path
from llamita.system.kept_work import partial_of


def shard(model: Any, device: torch.device) -> None:
    """Leave this process its part of every parameter, on the device; tied ones stay tied."""
    mesh = init_device_mesh(device.type, (processes.world(),))
    for module in model.modules():
        if isinstance(module, LlamaDecoderLayer):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def reshard(model: Any) -> None:
    """Give up what a forward pass without a backward one has left whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A tensor whose parts the processes may hold; all must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, or this process's part of it where it has only a part of the other."""
    if not isinstance(other, DTensor):
        return tensor
    mesh = other.device_mesh
    return distribute_tensor(tensor.to(mesh.device_type), mesh, other.placements, src_data_rank=None)


def _trained(model: Any) -> Iterator[tuple[str, Tensor]]:
    """All that training can have changed, whole."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, whole(parameter.detach())


def keep(model: Any, path: Path) -> None:
    """All that training can have changed, in a file that appears whole; the first process writes it."""
    state: dict[str, Tensor] = {}
    for name, tensor in _trained(model):
        if processes.rank() == 0:
            state[name] = tensor.cpu().contiguous()
    if processes.rank() == 0:
        partial = partial_of(path)
        save_file(state, partial)
        flush_path(partial)
        partial.rename(path)


def restore(model: Any, path: Path) -> None:
    """What was kept, back in a model, whose parameters may be parts."""
    state = load_file(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in state:
                parameter.copy_(_like(state[name], parameter))


def take_whole(model: Any, sharded: Any) -> None:
    """What a sharded copy of a model has learned, in the model."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in _trained(sharded):
            parameters[name].copy_(tensor)


def optimizer_state(optimizer: Any) -> dict[str, Any]:
    """As one process would have it, all on the CPU; empty but in the first process."""
    state = optimizer.state_dict()
    moments: dict[int, dict[str, Any]] = {}
    for number, values in state["state"].items():
        found = {name: whole(value) for name, value in values.items()}
        if processes.rank() == 0:
            moments[number] = {name: value.cpu() for name, value in found.items()}
    return {**state, "state": moments}


def restore_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """Such a state, back in an optimizer, whose parameters may be parts."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, values in state["state"].items():
        for name, value in values.items():
            if value.shape == parameters[number].shape:
                values[name] = _like(value, parameters[number])
    optimizer.load_state_dict(state)
