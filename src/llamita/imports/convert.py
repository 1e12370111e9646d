"""Convert a model from any format that is known, by the function for that format."""

from pathlib import Path

from llamita.errors import InputError, shown
from llamita.imports import detect
from llamita.imports.import_codes import Imported
from llamita.models.float8 import is_float8, read_float8
from llamita.system.extras import load_optional
from llamita.system.files import exists_in
from llamita.system.progress import Progress

_CONVERTERS = {  # called as convert(source, directory, progress)
    detect.META: "llamita.imports.meta:convert",
    detect.GGUF: "llamita.imports.gguf:convert",
    detect.COMPRESSED_TENSORS: "llamita.imports.compressed_tensors:convert",
    detect.GPTQ: "llamita.imports.gptq:convert",
    detect.AWQ: "llamita.imports.gptq:convert",
    detect.TORCHAO: "llamita.imports.torchao:convert",
    detect.BIN: "llamita.imports.pytorch_bin:convert",
}
_LINKERS = {detect.GGUF: "llamita.imports.gguf:link"}  # called in the same way
_KNOWN = (
    "Meta's consolidated.*.pth with params.json, pytorch_model.bin, compressed-tensors, GPTQ, AWQ, torchao, or a .gguf"
)
_LACKING = (
    "{source}: weights of torch.save need the package {{package}} to be read, which is missing; try pip install "
    "'llamita[torch]' (in a checkout '.[torch]')"
)


def convert(source: Path, directory: Path, progress: Progress = None, *, may_link: bool = False) -> Imported:
    """Write a packed model where the codes of another tool's model can be kept, else a float checkpoint.

    Args:
        directory: exists, empty.
        may_link: leave the weights in the source where they can be read from there.

    Raises:
        InputError: the format is not known, or the model is damaged.
        RunError: the package that reads it is not installed, or a file cannot be read.
    """
    found = detect.detect_format(source)
    if found is None:
        raise _not_foreign(source)
    if found == detect.META and not list(source.glob("consolidated.*.pth")):
        raise InputError(f"{source}", "Meta's consolidated.*.pth next to params.json", "none")
    entry = load_optional((may_link and _LINKERS.get(found)) or _CONVERTERS[found], _LACKING.format(source=source))
    return entry(detect.gguf_of(source) or source, directory, progress)


def _not_foreign(source: Path) -> InputError:
    """Return the error for something that is no other tool's model, with what it is instead.

    Raises:
        InputError: FP8 of a kind that is not known.
    """
    expected = "another tool's model"
    if exists_in(source, "llamita.json"):
        return InputError(f"{source}", expected, "a packed model", "every command takes it as it is")
    quantization = detect.quantization_of(source) if source.is_dir() else {}
    if is_float8(quantization):
        read_float8(quantization)  # refuses what no command takes
        return InputError(f"{source}", expected, "a float checkpoint in FP8", "every command takes it as it is")
    method = quantization.get("quant_method")
    if method is not None:
        known = ", ".join((detect.COMPRESSED_TENSORS, detect.GPTQ, detect.AWQ, detect.TORCHAO))
        return InputError(f"{source}: config.json: quant_method", known, shown(method, 40), "try its float source")
    if exists_in(source, "config.json"):
        return InputError(f"{source}", expected, "a float checkpoint", "try llamita quantize")
    got, hint = _describe(source)
    return InputError(f"{source}", _KNOWN, got, hint)


def _describe(source: Path) -> tuple[str, str | None]:
    """Name what cannot be imported, with a hint."""
    if exists_in(source, "adapter_config.json"):
        return "adapters", f"try --adapter {source} with their base"
    if exists_in(source, "model.pte"):
        return "an ExecuTorch program, which cannot be read back", None
    if source.suffix in (".pth", ".safetensors", ".json"):
        return "one file of a model", f"try its directory, {source.parent}"
    if source.exists():
        return "another file" if source.is_file() else "a directory without", None
    return "no such file or directory", None
