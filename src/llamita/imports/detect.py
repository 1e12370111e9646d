"""Detect another tool's format, by the names of a model's files and by config.json."""

from pathlib import Path
from typing import Any

from llamita.errors import LlamitaError
from llamita.formats.gguf_parts import parts_of
from llamita.models.families import PACKED
from llamita.models.float8 import is_float8
from llamita.system.files import exists_in, read_json, safe_path

META, GGUF, BIN = "meta", "gguf", "pytorch_model.bin"
COMPRESSED_TENSORS, GPTQ, TORCHAO, AWQ = "compressed-tensors", "gptq", "torchao", "awq"
_METHODS = (COMPRESSED_TENSORS, GPTQ, TORCHAO, AWQ)  # of quantization_config in config.json
_OLD_GPTQ = "quantize_config.json"
_BIN = "pytorch_model.bin"
_MAGIC = b"GGUF"
LINK = "gguf.json"  # names the file, in a directory whose weights are read from a GGUF
_OURS = ("llamita.json", "llamita_training.json")


def detect_format(source: Path) -> str | None:
    """Return the format of a model that has to be converted, None for packed models, float checkpoints and others."""
    if gguf_of(source) is not None:
        return GGUF
    if not source.is_dir() or any(exists_in(source, name) for name in _OURS):
        return None
    if not exists_in(source, "config.json"):
        return META if exists_in(source, "params.json") else None
    if bins_of(source) and not any(source.glob("*.safetensors")):
        return BIN
    quantization = quantization_of(source)
    if is_float8(quantization):  # floats in another coat: `Checkpoint` widens them
        return None
    method = quantization.get("quant_method")
    return method if isinstance(method, str) and method in _METHODS else None


def gguf_of(source: Path) -> Path | None:
    """Return `source` if it is a GGUF file, or the first one of a directory that has one model in that format alone."""
    if source.is_dir():
        files = sorted(source.glob("*.gguf"))
        is_one = len(files) == 1 or (files and parts_of(files[0]) == files)
        return files[0] if is_one and not exists_in(source, "config.json") else None
    if not source.is_file():
        return None
    try:
        with source.open("rb") as file:
            return source if source.suffix == ".gguf" or file.read(len(_MAGIC)) == _MAGIC else None
    except OSError:  # the next reader reports it
        return source if source.suffix == ".gguf" else None


def bins_of(source: Path) -> list[str]:
    """Return the names of a checkpoint's files of torch.save: pytorch_model.bin, or those of its index."""
    if exists_in(source, _BIN):
        return [_BIN]
    return sorted(path.name for path in source.glob("pytorch_model-*.bin"))


def quantization_of(source: Path) -> dict[str, Any]:
    """Return quantization_config of config.json; empty where there is none, or the file cannot be read.

    Older GPTQ checkpoints have it in a file of its own. One in a packed model is empty here: its own reader checks it.
    """
    try:
        values = read_json(source, "config.json")
        found = values.get("quantization_config")
        if found is None and exists_in(source, _OLD_GPTQ):
            found = {"quant_method": GPTQ, **read_json(source, _OLD_GPTQ)}
    except LlamitaError:  # the next reader reports it
        return {}
    is_ours = str(values.get("model_type")).startswith(PACKED)
    return found if isinstance(found, dict) and not is_ours else {}


def files_of(source: Path) -> list[Path]:
    """Return the files that decide what another tool's model is; Meta's parts come first, in order."""
    gguf = gguf_of(source)
    if gguf is not None:
        return parts_of(gguf)
    if exists_in(source, "params.json") and not exists_in(source, "config.json"):
        tokenizer = "tokenizer.model" if exists_in(source, "tokenizer.model") else "tokenizer.json"
        weights = sorted(path.name for path in source.glob("consolidated.*.pth"))
        names = [*weights, "params.json", tokenizer]
    elif detect_format(source) == BIN:
        names = ["config.json", *bins_of(source)]
    else:
        names = ["config.json", *sorted(path.name for path in source.glob("*.safetensors"))]
    return [safe_path(source, name) for name in names]


def has_adapters(source: Path) -> bool:
    """Return whether adapters are among the weights, as in Meta's QLoRA releases."""
    if detect_format(source) != META:
        return False
    return read_json(source, "params.json").get("lora_args") is not None
