"""Save what training made: a float checkpoint, adapters in PEFT's format, or a packed model."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from llamita.errors import RunError
from llamita.formats.safetensors import TensorWriter
from llamita.methods.setup import Setup
from llamita.methods.trained import SCALES
from llamita.models.checkpoint import Checkpoint
from llamita.models.names import EMBEDDING, HEAD
from llamita.models.packed_writer import copy_companions, copy_config, find_companions
from llamita.numerics.rotations import Rotations
from llamita.numerics.scheme import QuantScheme
from llamita.quantize.pipeline import Summary, quantize
from llamita.system.staging import flush_files
from llamita.train.fake_quant import FakeQuantEmbedding, FakeQuantLinear

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def save_float(model: Any, source: Checkpoint, directory: Path) -> None:
    """Save the model as an ordinary checkpoint in its source's dtype, with tokenizer, licence and the like.

    Args:
        directory: an empty one.
    """
    dtype = _DTYPES[source.info(f"{EMBEDDING}.weight").dtype]
    shared = {f"{HEAD}.weight"} if source.config.tied else set()
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items() if name not in shared}
    model.save_pretrained(directory, state_dict=state)
    (directory / "config.json").unlink(missing_ok=True)  # transformers' own
    copy_config(source, directory)  # the architecture is the same
    _copy_companions(source, directory)
    flush_files(directory)


def save_adapters(model: Any, base: str, directory: Path, query_factor: float = 1.0) -> None:
    """Save low-rank adapters in BF16, in PEFT's own files.

    Args:
        model: PEFT's.
        base: the name of the model that the adapters are for.
        query_factor: see `ModelConfig`; on disk, adapters are for the family's own weights.
    """
    model.peft_config["default"].base_model_name_or_path = base
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            own = parameter.data / query_factor if "q_proj.lora_B" in name else parameter.data
            parameter.data = own.to(torch.bfloat16)
    model.save_pretrained(directory, save_embedding_layers=False)
    (directory / "README.md").unlink(missing_ok=True)  # PEFT's template, which says nothing
    flush_files(directory)


def save_trained(model: Any, source: Checkpoint, directory: Path) -> None:
    """Save the float weights behind the codes, in float32, and the scales, for the method `trained`.

    Tables that stay float have their source's dtype.
    """
    state, scales = {}, {}
    modules = dict(model.named_modules())
    for name, tensor in model.state_dict().items():
        module = name.removesuffix(".weight")
        rounded = modules.get(module)
        if isinstance(rounded, FakeQuantLinear | FakeQuantEmbedding):
            scales[module] = rounded.scales.detach().cpu().numpy()
        elif module in (EMBEDDING, HEAD):
            tensor = tensor.to(_DTYPES[source.info(name).dtype])
        state[name] = tensor
    if source.config.tied:
        scales.pop(HEAD, None)
    model.save_pretrained(directory, state_dict=state)
    _write_scales(directory / SCALES, scales)
    _copy_companions(source, directory)


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Turn errors of PyTorch's and safetensors' writers into a RunError of one line."""
    try:
        yield
    except SafetensorError as error:
        raise RunError(f"{place}: cannot be written: {error}") from None
    except RuntimeError as error:
        if "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
            raise
        raise RunError(f"{place}: cannot be written", hint="try a disk with more room") from None


def _rotations(model: Any) -> Rotations:
    """Return the run-time rotation of the model's layers."""
    for module in model.modules():
        if isinstance(module, FakeQuantLinear) and module.rotation:
            return Rotations(("R4",), module.in_features)
    return Rotations()


def _copy_companions(source: Checkpoint, directory: Path) -> None:
    """Copy tokenizer, licence and the like from the source, in place of the files that transformers wrote."""
    names = find_companions(source.path)
    for name in names.values():
        (directory / name).unlink(missing_ok=True)
    copy_companions(source.path, directory, names)


def _write_scales(path: Path, scales: dict[str, np.ndarray]) -> None:
    writer = TensorWriter(path, {name: ("F32", values.shape) for name, values in scales.items()})
    try:
        for name, values in scales.items():
            writer.write(name, values)
        writer.finish()
    finally:
        writer.abandon()


def save_packed(
    model: Any, source: Checkpoint, name: str, out: Path, scheme: QuantScheme, work: Path,
    settings: dict[str, Any], overwrite: bool, extra: dict[str, bytes] | None = None,
) -> Summary:  # fmt: skip
    """Write the packed model with the codes that the fake-quantized model computes with.

    Args:
        name: what the user called the source.
        work: a directory for the float weights behind the codes, meanwhile.
        settings: of training; llamita.json records them.
        extra: the bytes of more files for the directory, by name.
    """
    folder = work / "trained"
    shutil.rmtree(folder, ignore_errors=True)  # a killed run may have left it
    folder.mkdir()
    save_trained(model, source, folder)
    trained = Checkpoint(folder)
    trained.rotations = _rotations(model)
    try:
        setup = Setup(settings=settings)
        return quantize(trained, name, out, scheme, "trained", setup, overwrite, origin=source, extra=extra)
    finally:
        trained.close()
