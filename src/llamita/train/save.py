"""What training leaves on disk: a checkpoint, adapters in PEFT's form, or a packed directory."""

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
from llamita.models.packed_writer import copy_companions, find_companions
from llamita.numerics.rotations import Rotations
from llamita.numerics.scheme import QuantScheme
from llamita.quantize.pipeline import Summary, quantize
from llamita.system.staging import flush_files
from llamita.train.fake_quant import FakeQuantEmbedding, FakeQuantLinear

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_TABLES = ("model.embed_tokens", "lm_head")


def save_float(model: Any, source: Checkpoint, directory: Path) -> None:
    """The model as an ordinary checkpoint in its source's dtype, with tokenizer, licence and the like.

    Args:
        directory: exists, empty.
    """
    dtype = _DTYPES[source.info("model.embed_tokens.weight").dtype]
    shared = {f"{_TABLES[1]}.weight"} if source.config.tied else set()
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items() if name not in shared}
    model.save_pretrained(directory, state_dict=state)
    shutil.copyfile(source.path / "config.json", directory / "config.json")  # the architecture is the same
    _copy_companions(source, directory)
    flush_files(directory)


def save_adapters(model: Any, base: str, directory: Path) -> None:
    """Low-rank adapters in BF16, in the form of PEFT's own files.

    Args:
        model: PEFT's.
        base: the name of the model that they are for.
    """
    model.peft_config["default"].base_model_name_or_path = base
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    model.save_pretrained(directory, save_embedding_layers=False)
    card = directory / "README.md"
    if card.exists():  # PEFT's template, which says nothing
        card.unlink()
    flush_files(directory)


def save_trained(model: Any, source: Checkpoint, directory: Path) -> None:
    """The float weights behind the codes, in float32, and the scales: what `--method trained` reads.

    Tables that stay float have their source's dtype.
    """
    state, scales = {}, {}
    modules = dict(model.named_modules())
    for name, tensor in model.state_dict().items():
        module = name.removesuffix(".weight")
        rounded = modules.get(module)
        if isinstance(rounded, FakeQuantLinear | FakeQuantEmbedding):
            scales[module] = rounded.scales.detach().cpu().numpy()
        elif module in _TABLES:
            tensor = tensor.to(_DTYPES[source.info(name).dtype])
        state[name] = tensor
    if source.config.tied:
        scales.pop(_TABLES[1], None)
    model.save_pretrained(directory, state_dict=state)
    _write_scales(directory / SCALES, scales)
    _copy_companions(source, directory)


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Says in one line what the writers of PyTorch and safetensors tell with errors of their own."""
    try:
        yield
    except SafetensorError as error:
        raise RunError(f"{place}: cannot be written: {error}") from None
    except RuntimeError as error:
        if "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
            raise
        raise RunError(f"{place}: cannot be written; try a disk with more room") from None


def _rotations(model: Any) -> Rotations:
    """What its layers do at run time."""
    for module in model.modules():
        if isinstance(module, FakeQuantLinear) and module.online:
            return Rotations(("R4",), module.in_features)
    return Rotations()


def _copy_companions(source: Checkpoint, directory: Path) -> None:
    """Tokenizer, licence and the like as the source has them, in place of what transformers wrote."""
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
    """The packed directory with the codes that the fake-quantized model computes with.

    Args:
        name: what the user called the source.
        work: where the float weights behind the codes are kept meanwhile.
        settings: of training, which the directory records.
        extra: files to put beside the weights, by name.
    """
    folder = work / "trained"
    shutil.rmtree(folder, ignore_errors=True)  # a killed run's
    folder.mkdir()
    save_trained(model, source, folder)
    trained = Checkpoint(folder)
    trained.rotations = _rotations(model)
    try:
        setup = Setup(settings=settings)
        return quantize(trained, name, out, scheme, "trained", setup, overwrite, origin=source, extra=extra)
    finally:
        trained.close()
