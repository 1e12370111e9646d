"""Which forms of other tools are read, and by what."""

from pathlib import Path

from llamita.errors import InputError
from llamita.imports import detect
from llamita.imports.take_over import Imported
from llamita.system.extras import load_optional
from llamita.system.files import exists_in
from llamita.system.progress import Progress

# convert(source, directory, progress) -> Imported
_CONVERTERS = {
    detect.META: "llamita.imports.meta:convert",
    detect.GGUF: "llamita.imports.gguf:convert",
    detect.COMPRESSED_TENSORS: "llamita.imports.compressed_tensors:convert",
    detect.GPTQ: "llamita.imports.gptq:convert",
    detect.TORCHAO: "llamita.imports.torchao:convert",
}
_KNOWN = (
    "expected a directory with Meta's consolidated.*.pth and params.json, or of compressed-tensors, GPTQ or "
    "torchao, or a .gguf"
)
_LACKING = (
    "{source}: Meta's checkpoints need the package {{package}} to be read, which is missing; try pip install "
    "'llamita[torch]' (in a checkout '.[torch]')"
)


def convert(source: Path, directory: Path, progress: Progress = None) -> Imported:
    """Write a model of another form in ours: packed where its codes can be kept, else as Hugging Face has it.

    Args:
        directory: exists, empty.

    Raises:
        InputError: no such form, or it is damaged.
        RunError: what reads it is not installed, or a file cannot be read.
    """
    form = detect.form_of(source)
    if form is None:
        raise InputError(f"{source}: {_expected(source)}")
    if form == detect.META and not list(source.glob("consolidated.*.pth")):
        raise InputError(f"{source}", "consolidated.*.pth beside params.json, as Meta has them", "none")
    found = detect.gguf_of(source) or source
    return load_optional(_CONVERTERS[form], _LACKING.format(source=source))(found, directory, progress)


def _expected(source: Path) -> str:
    """What can be imported, and what is there instead."""
    if exists_in(source, "llamita.json"):
        return "expected another tool's model, got a packed directory, which every command takes as it is"
    method = detect.quantization_of(source).get("quant_method") if source.is_dir() else None
    if method is not None:
        known = ", ".join((detect.COMPRESSED_TENSORS, detect.GPTQ, detect.TORCHAO))
        return f"config.json: quant_method: expected {known}, got {repr(method)[:40]}; try its float source"
    if exists_in(source, "config.json"):
        return "expected another tool's model, got a float checkpoint; try llamita quantize"
    return f"{_KNOWN}, got {_what(source)}"


def _what(source: Path) -> str:
    """What is there that cannot be imported, and what to try."""
    if exists_in(source, "adapter_config.json"):
        return f"adapters; try --adapter {source} with their base"
    if exists_in(source, "model.pte"):
        return "an ExecuTorch program, which is not read back"
    if source.suffix in (".pth", ".safetensors", ".json"):
        return f"a file of one; try its directory, {source.parent}"
    return "another file" if source.is_file() else "a directory without" if source.is_dir() else "none"
