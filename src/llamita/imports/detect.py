"""Which form of another tool a model on disk has, by the names of its files and what config.json says."""

from pathlib import Path
from typing import Any

from llamita.errors import LlamitaError
from llamita.system.files import exists_in, read_json, safe_path

META, GGUF = "meta", "gguf"
COMPRESSED_TENSORS, GPTQ, TORCHAO = "compressed-tensors", "gptq", "torchao"
_METHODS = (COMPRESSED_TENSORS, GPTQ, TORCHAO)  # of quantization_config in config.json
_OLD_GPTQ = "quantize_config.json"
_MAGIC = b"GGUF"
_OURS = ("llamita.json", "llamita_training.json")


def form_of(source: Path) -> str | None:
    """The form of a model that is converted before use; None for ours, float checkpoints, anything else."""
    if gguf_of(source) is not None:
        return GGUF
    if not source.is_dir() or any(exists_in(source, name) for name in _OURS):
        return None
    if not exists_in(source, "config.json"):
        return META if exists_in(source, "params.json") else None
    method = quantization_of(source).get("quant_method")
    return method if isinstance(method, str) and method in _METHODS else None


def gguf_of(source: Path) -> Path | None:
    """The GGUF file that this is, or that a directory has as its only one, as `export` leaves it."""
    if source.is_dir():
        files = list(source.glob("*.gguf"))
        return files[0] if len(files) == 1 and not exists_in(source, "config.json") else None
    if not source.is_file():
        return None
    try:
        with source.open("rb") as file:
            return source if source.suffix == ".gguf" or file.read(len(_MAGIC)) == _MAGIC else None
    except OSError:  # told by what opens it next
        return source if source.suffix == ".gguf" else None


def quantization_of(source: Path) -> dict[str, Any]:
    """How config.json says that weights are quantized; empty where it says nothing, or cannot be read.

    What another program writes in the model's own type is left to the reader of packed directories. Older
    GPTQ checkpoints say it in a file of its own.
    """
    try:
        values = read_json(source, "config.json")
        found = values.get("quantization_config")
        if found is None and exists_in(source, _OLD_GPTQ):
            found = {"quant_method": GPTQ, **read_json(source, _OLD_GPTQ)}
    except LlamitaError:  # told by what opens it next
        return {}
    return found if isinstance(found, dict) and values.get("model_type") != "llamita" else {}


def files_of(source: Path) -> list[Path]:
    """The files that decide what a model of another form is; Meta's parts come first, in order."""
    gguf = gguf_of(source)
    if gguf is not None:
        return [gguf]
    if exists_in(source, "params.json") and not exists_in(source, "config.json"):
        tokenizer = "tokenizer.model" if exists_in(source, "tokenizer.model") else "tokenizer.json"
        weights = sorted(path.name for path in source.glob("consolidated.*.pth"))
        names = [*weights, "params.json", tokenizer]
    else:
        names = ["config.json", *sorted(path.name for path in source.glob("*.safetensors"))]
    return [safe_path(source, name) for name in names]


def has_adapters(source: Path) -> bool:
    """Whether adapters lie among the weights, as in Meta's QLoRA releases."""
    if form_of(source) != META:
        return False
    return read_json(source, "params.json").get("lora_args") is not None
