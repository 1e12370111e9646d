"""Damaged models of other tools: imported, or refused with one LlamitaError, in little time and memory.

Files are changed by bits, cut, and value by value where they have structure. 5,000 of each kind run with the
slow tests, some hundreds always.
"""

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from command import run
from damage import mutate_value, outcome, to_text
from families import FAMILIES, make_family, write_family_gguf
from foreign_models import (
    as_bin,
    as_gptq,
    as_meta,
    make_gguf_checkpoint,
    sentencepiece_model,
    write_in_blocks,
    write_parts,
)
from fp8_models import as_fp8
from tiny import SMALL, make_checkpoint

from llamita.imports.convert import convert
from llamita.imports.detect import BIN, detect_format, files_of
from llamita.imports.open import open_source
from llamita.models.checkpoint import Checkpoint
from llamita.models.names import expected_tensors
from llamita.models.weights import check_finite

pytest.importorskip("torch", reason="Meta's files are read by torch.load")

MOST_MEMORY = 64 << 20  # bytes beside the files'
WEIGHTS = "model.safetensors"
Mutation = Callable[[bytes, random.Random], bytes]


def flip(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, now and then the end cut off."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 2, 4, 16])):
        place = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(len(data), 4096))
        changed[place] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
    return bytes(changed[: rng.randrange(len(data))]) if rng.random() < 0.2 else bytes(changed)


def change_json(data: bytes, rng: random.Random) -> bytes:
    """A value of a JSON file changed."""
    return to_text(mutate_value(json.loads(data), rng), rng)


def change_header(data: bytes, rng: random.Random) -> bytes:
    """A value of a safetensors header changed, or bytes behind it."""
    if rng.random() < 0.2:
        return flip(data, rng)
    length = struct.unpack("<Q", data[:8])[0]
    change = reshape if rng.random() < 0.3 else change_json
    text = change(data[8 : 8 + length], rng)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def reshape(data: bytes, rng: random.Random) -> bytes:
    """A tensor of another shape or type that has as many bytes: the header agrees with the file."""
    header = json.loads(data)
    tensor = header[rng.choice([name for name in header if name != "__metadata__"])]
    size = tensor["data_offsets"][1] - tensor["data_offsets"][0]
    widths = {"I8": 1, "U8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F16": 2, "BF16": 2, "I32": 4, "F32": 4, "I64": 8}
    kind = rng.choice(list(widths))
    width = widths[kind]
    count = size // width
    if size % width == 0:
        tensor["dtype"] = kind
        shapes = [[count], [1, count], [count, 1], [1, 1, count], [count // 4, 4], [2, count // 2]]
        tensor["shape"] = rng.choice(shapes if count % 4 == 0 else shapes[:4])
    return json.dumps(header).encode()


def change_lines(data: bytes, rng: random.Random) -> bytes:
    """Lines of tiktoken's ranks exchanged, removed, repeated, or bytes changed."""
    lines = data.splitlines(keepends=True)
    one, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    match rng.randrange(4):
        case 0:
            lines[one], lines[other] = lines[other], lines[one]
        case 1:
            del lines[one]
        case 2:
            rank = rng.choice([b"-1", b"1e9", b"99999999999", b"x"])
            lines[one] = lines[other].split()[0] + b" " + rank + b"\n"
        case _:
            return flip(data, rng)
    return b"".join(lines)


def make(kind: str, directory: Path) -> tuple[Path, str, Mutation]:
    """A model of a kind: the source, the file of it that is to be damaged, and how."""
    if kind in ("pth", "params.json", "tiktoken", "quantized pth"):
        model = make_checkpoint(directory / "model", "llama3", vocab_size=514, **SMALL)
        source = as_meta(model, directory / "there")
        if kind == "quantized pth":
            tokenizer = (source / "tokenizer.model").read_bytes()
            assert run("quantize", model, "-o", directory / "packed", "--preset", "llama3.2") == 0
            shutil.rmtree(source)
            assert run("export", directory / "packed", "--to", "meta", "-o", source) == 0
            (source / "tokenizer.model").write_bytes(tokenizer)
        name = {"params.json": "params.json", "tiktoken": "tokenizer.model"}.get(kind, "consolidated.00.pth")
        return source, name, {"params.json": change_json, "tiktoken": change_lines}.get(kind, flip)
    if kind == "sentencepiece":
        model = make_checkpoint(directory / "model", "llama2", vocab_size=300, **SMALL)
        source = as_meta(model, directory / "there")
        (source / "tokenizer.model").write_bytes(sentencepiece_model(300))
        return source, "tokenizer.model", flip
    if kind in FAMILIES:
        pytest.importorskip("transformers", reason="makes the model")
        model = make_family(directory / "model", kind, **SMALL)
        return write_family_gguf(model, directory / "a.gguf"), "", flip
    model = make_gguf_checkpoint(directory, "llama3", **SMALL)
    if kind in FP8_FORMS:
        source = as_fp8(model, directory / "there", FP8_FORMS[kind])
        return (source, "config.json", change_json) if "config" in kind else (source, WEIGHTS, change_header)
    if kind == "bin":
        return as_bin(model), "pytorch_model.bin", flip
    if kind == "gptq":
        as_gptq(model, directory / "there")
        return directory / "there", WEIGHTS, change_header
    assert run("quantize", model, "-o", directory / "packed") == 0
    target = "gguf" if "gguf" in kind else "torchao" if kind == "torchao" else "compressed-tensors"
    flavor = ("--flavor", "vllm-cpu") if kind == "int-quantized" else ()
    assert run("export", directory / "packed", "--to", target, "-o", directory / "there", *flavor) == 0
    if kind == "gguf":
        return directory / "there" / "model.gguf", "", flip
    if kind == "gguf blocks":
        write_in_blocks(directory / "there" / "model.gguf", directory / "a.gguf", ["Q4_1", "Q5_0", "IQ4_NL", "MXFP4"])
        return directory / "a.gguf", "", flip
    if kind == "gguf part":
        parts = write_parts(directory / "there" / "model.gguf", directory / "parts")
        return directory / "parts", parts[1].name, flip
    name = "config.json" if kind == "config.json" else WEIGHTS
    return directory / "there", name, change_json if kind == "config.json" else change_header


FP8_FORMS = {"fp8": "fp8 block", "fp8 channel": "ct channel", "fp8 cast": "cast", "fp8 config.json": "ct block"}
KINDS = ["gguf", "gguf blocks", "gguf part", "bin", "pth", "quantized pth", "params.json", "tiktoken",
         "sentencepiece", "safetensors", "torchao", "int-quantized", "gptq", "config.json",
         "granite", "phi3, longrope", *FP8_FORMS]  # fmt: skip


@pytest.mark.parametrize("cases", [250, pytest.param(5000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_damaged_is_one_typed_error(tmp_path: Path, kind: str, cases: int) -> None:
    source, name, mutate = make(kind, tmp_path)
    path, refused = (source / name if name else source), 0
    good = path.read_bytes()
    if kind in FP8_FORMS:
        read_floats(source)
    else:
        convert(source, fresh(tmp_path / "first"))  # what is imported on first use
        assert open_source(tmp_path / "first")
    for case in range(cases):
        path.write_bytes(mutate(good, random.Random(case)))
        out, before = fresh(tmp_path / "out"), forget_peak()
        message = refusal(source, out, case, read_floats if kind in FP8_FORMS else None)
        refused += message is not None
        assert "\n" not in (message or ""), f"case {case}"
        grown = peak() - before
        assert grown <= MOST_MEMORY + path.stat().st_size, f"case {case}: {grown / 1e6:.0f} MB"
    assert refused > cases // 5


def refusal(source: Path, out: Path, case: int, read: Callable[[Path], None] | None) -> str | None:
    """What is said of a model that is refused when it is converted, or read as it is."""
    try:
        return outcome(lambda path: converted_here(source, path), out) if read is None else outcome(read, source)
    except Exception as problem:
        raise AssertionError(f"case {case}") from problem


def converted_here(source: Path, directory: Path) -> None:
    """Convert in this process, what has a process of its own, too: its memory and time are measured."""
    if detect_format(source) == BIN:
        from llamita.imports.pytorch_bin import write_safetensors  # needs Torch

        write_safetensors(source, files_of(source)[1:], directory, None)
    else:
        convert(source, directory)


def read_floats(source: Path) -> None:
    """Read every tensor of a float checkpoint."""
    checkpoint = Checkpoint(source)
    for tensor, shape in expected_tensors(checkpoint.config).items():
        read = checkpoint.vector(tensor) if len(shape) == 1 else checkpoint.weight(tensor.removesuffix(".weight"))
        check_finite(tensor, read)
        assert read.shape == shape


def fresh(directory: Path) -> Path:
    """The directory, empty."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    return directory


def forget_peak() -> int:
    """Begin to measure the peak of memory anew; bytes that are in use now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the kernel does not let a process forget its peak of memory")
    return _status("VmRSS")


def peak() -> int:
    """The most bytes of memory since `forget_peak`."""
    return _status("VmHWM")


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))
