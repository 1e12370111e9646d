"""Divide weights, gradients and the optimizer's state among processes; files on disk hold all of them.

By PyTorch's FSDP2 (fully_shard; Zhao et al. 2023, arXiv 2304.11277): a decoder layer is gathered while it computes.
It is applied here and not by accelerate, which has no FSDP on CPUs.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from llamita.system import processes
from llamita.system.files import flush_path
from llamita.system.kept_work import partial_of


def shard(model: Any, device: torch.device) -> None:
    """Keep only this process's part of every parameter, on the device; tied parameters stay tied."""
    mesh = init_device_mesh(device.type, (processes.world(),))
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def reshard(model: Any) -> None:
    """Free the parameters that a forward pass without a backward pass has left gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """Gather a tensor whose parts the processes may hold; every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(tensor: Tensor, other: Tensor) -> Tensor:
    """Return a whole tensor, or only this process's part if the other one is divided."""
    if not isinstance(other, DTensor):
        return tensor
    mesh = other.device_mesh
    return distribute_tensor(tensor.to(mesh.device_type), mesh, other.placements, src_data_rank=None)


def _trained(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters that training can have changed, gathered."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, whole(parameter.detach())


def keep(model: Any, path: Path) -> None:
    """Write the parameters that training can have changed; the first process writes, and renames the finished file."""
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
    """Load what `keep` has written into a model, whose parameters may be divided."""
    state = load_file(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in state:
                parameter.copy_(_like(state[name], parameter))


def take_whole(model: Any, sharded: Any) -> None:
    """Copy what a sharded copy of a model has learned into the model."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in _trained(sharded):
            parameters[name].copy_(tensor)


def optimizer_state(optimizer: Any) -> dict[str, Any]:
    """Return the state as a single process would have it, on the CPU; empty in every process but the first."""
    state = optimizer.state_dict()
    moments: dict[int, dict[str, Any]] = {}
    for number, values in state["state"].items():
        found = {name: whole(value) for name, value in values.items()}
        if processes.rank() == 0:
            moments[number] = {name: value.cpu() for name, value in found.items()}
    return {**state, "state": moments}


def restore_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """Load such a state into an optimizer, whose parameters may be divided."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, values in state["state"].items():
        for name, value in values.items():
            if value.shape == parameters[number].shape:
                values[name] = _like(value, parameters[number])
    optimizer.load_state_dict(state)
