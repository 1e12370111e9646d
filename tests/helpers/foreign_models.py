"""Tiny models in other tools' formats: Meta's, AutoGPTQ's, GGUF, and what `llamita export` writes."""

import base64
import json
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import run
from tiny import make_checkpoint, write_tokenizer

from llamita.formats.gguf import KINDS, GgufFile, write_gguf
from llamita.formats.safetensors import TensorFile, TensorWriter
from llamita.models.checkpoint import Checkpoint
from llamita.models.foreign_names import heads_of, meta_name, pair_order
from llamita.models.names import expected_tensors, linear_names
from llamita.numerics.affine import dequantize, round_weights, to_f32
from llamita.numerics.packing import pack_int4

BY_COLUMNS = ("o_proj", "down_proj")  # Meta cuts these by columns


def export(packed: Path, target: str, out: Path, *options: object) -> Path:
    """Export a packed model to another format; return what `import` takes of it."""
    pytest.importorskip("torch", reason="most formats are written by Torch")
    assert run("export", packed, "--to", target, "-o", out, *options) == 0
    return out / "model.gguf" if target == "gguf" else out


def write_arrays(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a safetensors file of these arrays, with their own types; uint16 is bf16."""
    names = {"<i4": "I32", "<i8": "I64", "|i1": "I8", "<f2": "F16", "<f4": "F32", "<u2": "BF16"}
    order = sorted(tensors, key=lambda name: -tensors[name].itemsize)
    writer = TensorWriter(path, {n: (names[tensors[n].dtype.str], tensors[n].shape) for n in order})
    for name in order:
        writer.write(name, tensors[name])
    writer.finish()


def as_bin(model: Path, shards: int = 1, **more: Any) -> Path:
    """Turn a checkpoint's safetensors into torch.save's files, with `more` tensors in the first."""
    torch = pytest.importorskip("torch", reason="such files are written by torch.save")
    file = TensorFile(model / "model.safetensors")
    tensors = {name: torch.from_numpy(np.array(to_f32(file.read(name)))).bfloat16() for name in file.tensors}
    file.close()
    (model / "model.safetensors").unlink()
    tensors |= more
    names = list(tensors)
    for number in range(shards):
        name = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{number + 1:05}-of-{shards:05}.bin"
        torch.save({tensor: tensors[tensor] for tensor in names[number::shards]}, model / name)
    return model


# ---- Meta ----------------------------------------------------------------------------------------


def write_ranks(directory: Path) -> None:
    """Write a tokenizer.model of Llama 3's kind: bytes alone, and a merge."""
    pieces = [*(bytes([byte]) for byte in range(256)), b"ab", b"cd"]
    lines = [base64.b64encode(piece).decode() + f" {rank}" for rank, piece in enumerate(pieces)]
    (directory / "tokenizer.model").write_text("\n".join(lines) + "\n")


def sentencepiece_model(pieces: int) -> bytes:
    """Return a model of SentencePiece's BPE kind: <unk>, <s>, </s>, bytes, then pairs."""
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    texts += [chr(97 + i % 26) * (1 + i // 26) for i in range(pieces - len(texts))]
    model = b""
    for rank, text in enumerate(texts):
        field = b"\x0a" + bytes([len(text.encode())]) + text.encode() + b"\x15" + struct.pack("<f", -rank)
        model += b"\x0a" + bytes([len(field)]) + field
    return model


def as_meta(source: Path, directory: Path, parts: int = 1, cuts_columns: bool = False, **params: Any) -> Path:
    """Write a checkpoint as Meta releases it, cut in parts.

    Args:
        cuts_columns: cut the embedding by columns, too.
        params: other values of params.json.
    """
    torch = pytest.importorskip("torch", reason="Meta's files are written by torch.save")
    checkpoint, config = Checkpoint(source), Checkpoint(source).config
    directory.mkdir(parents=True)
    states: list[dict[str, Any]] = [{} for _ in range(parts)]
    for tensor in expected_tensors(config):
        module = tensor.removesuffix(".weight")
        is_vector = len(expected_tensors(config)[tensor]) == 1
        bits = checkpoint.stored_vector(tensor) if is_vector else checkpoint.weight(module)
        values = torch.from_numpy(np.array(bits).view(np.int16)).view(torch.bfloat16)
        heads = heads_of(module, config)
        values = values if heads is None else values[torch.from_numpy(pair_order(len(values), heads))]
        by_columns = module.endswith(BY_COLUMNS) or (module == "model.embed_tokens" and cuts_columns)
        pieces = [values] * parts if is_vector else values.chunk(parts, dim=int(by_columns))
        for state, piece in zip(states, pieces, strict=True):
            state[meta_name(tensor)] = piece.clone()
    for i, state in enumerate(states):
        torch.save(state, directory / f"consolidated.{i:02}.pth")
    known = {"dim": config.hidden_size, "n_layers": config.layers, "n_heads": config.heads,
             "n_kv_heads": config.kv_heads, "norm_eps": config.norm_eps, "rope_theta": config.rope.theta,
             "vocab_size": config.vocab_size, "use_scaled_rope": config.rope.kind == "llama3"}  # fmt: skip
    (directory / "params.json").write_text(json.dumps(known | params))
    write_ranks(directory)
    return directory


# ---- GPTQ ----------------------------------------------------------------------------------------


def as_gptq(source: Path, directory: Path, group_size: int = 32, **changes: Any) -> dict[str, np.ndarray]:
    """Write a checkpoint as AutoGPTQ does, rounded to nearest; return the float weights to expect by module.

    Args:
        group_size: of the scales; -1 for one a row.
        changes: other values of the quantization_config.
    """
    checkpoint, config = Checkpoint(source), json.loads((source / "config.json").read_text())
    settings = {"quant_method": "gptq", "bits": 4, "group_size": group_size, "sym": True, "desc_act": False,
                "checkpoint_format": "gptq", **changes}  # fmt: skip
    zero = 7 if settings["checkpoint_format"] == "gptq" else 8
    tensors, weights = {}, {}
    for name in linear_names(checkpoint.config):
        values = to_f32(checkpoint.weight(name))
        size = values.shape[1] if group_size < 0 else group_size
        codes, scales, _ = round_weights(values, 4, size, "torchao")
        scales = scales.astype(np.float16)  # as it is stored
        weights[name] = dequantize(codes, scales.astype(np.float32))
        tensors[f"{name}.qweight"] = pack_int4(np.ascontiguousarray(codes)).T.copy()
        tensors[f"{name}.scales"] = np.ascontiguousarray(scales.T)
        tensors[f"{name}.qzeros"] = pack_int4(np.full((scales.shape[1], len(codes)), zero - 8, np.int8))
        tensors[f"{name}.g_idx"] = (np.arange(values.shape[1]) // size).astype(np.int32)
        tensors[f"{name}.bias"] = np.zeros(len(codes), np.float16)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = np.array(checkpoint.weight(name.removesuffix(".weight")))
    for name in checkpoint.files["model.safetensors"].tensors:
        if name.endswith("norm.weight"):
            tensors[name] = checkpoint.stored_vector(name).copy()
    directory.mkdir()
    write_arrays(directory / "model.safetensors", tensors)
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, directory)
    return weights


# ---- GGUF ----------------------------------------------------------------------------------------


def make_gguf_checkpoint(directory: Path, family: str = "llama32", **overrides: Any) -> Path:
    """Write a checkpoint that GGUF can hold: its tokenizer splits texts as GPT-2's does. Return its path."""
    path = make_checkpoint(directory / "model", family, **overrides)
    write_tokenizer(path, use_regex=True)
    return path


def write_in_blocks(source: Path, out: Path, kinds: Sequence[str]) -> dict[str, np.ndarray]:
    """Write a GGUF file with random blocks of these kinds in place of Q4_0; return the bytes of all tensors."""
    file, random = GgufFile(source), np.random.default_rng(0)
    tensors, data = {}, {}
    for name, tensor in file.tensors.items():
        tensors[name], data[name] = (tensor.kind, tensor.shape), file.read(name)
        if tensor.kind == "Q4_0":
            kind = kinds[len(data) % len(kinds)]
            _, weights, width = KINDS[kind]
            blocks = random.integers(0, 256, (tensor.shape[0], tensor.shape[1] // weights, width), dtype=np.uint8)
            _calm(kind, blocks)
            tensors[name], data[name] = (kind, tensor.shape), blocks.reshape(tensor.shape[0], -1)
    write_gguf(out, file.values, tensors, iter(data.items()))
    return data


def _calm(kind: str, blocks: np.ndarray) -> None:
    """Give random blocks (…, bytes) scales and minima of usual size."""
    pair = np.array([0.01, 0.02], "<f2").view(np.uint8)
    if kind == "MXFP4":
        blocks[..., 0] = 120  # the exponent of a scale
    elif kind in ("Q3_K", "Q6_K"):
        blocks[..., -2:] = pair[:2]
    elif kind == "Q2_K":
        blocks[..., -4:] = pair
    elif kind in ("Q4_1", "Q5_1", "Q4_K", "Q5_K"):
        blocks[..., :4] = pair
    else:
        blocks[..., :2] = pair[:2]


def write_parts(source: Path, directory: Path, **changes: Any) -> list[Path]:
    """Cut a GGUF file in three: metadata alone, then tensors, as gguf-split does with --no-tensor-first-split."""
    whole = GgufFile(source)
    directory.mkdir()
    names = list(whole.tensors)
    shares, paths = [[], names[:1], names[1:]], []
    for number, share in enumerate(shares):
        values = {"split.no": number, "split.count": 3, "split.tensors.count": len(names), **changes}
        values = {**whole.values, **values} if number == 0 else values
        tensors = {name: (whole.tensors[name].kind, whole.tensors[name].shape) for name in share}
        paths.append(directory / f"model-{number + 1:05}-of-00003.gguf")
        write_gguf(paths[-1], values, tensors, ((name, whole.read(name)) for name in share))
    return paths


def write_small_gguf(path: Path) -> Path:
    """Write a GGUF file with a value of each kind and two tensors; return its path."""
    values = {"a": 3, "b": 1.5, "c": True, "d": "text", "e": ["x", "yy"], "f": np.arange(3, dtype=np.int32)}
    tensors = {"one": ("F32", (3,)), "two": ("Q8_0", (2, 64))}
    blocks = np.arange(2 * 68, dtype=np.uint8).reshape(2, 68)
    write_gguf(path, values, tensors, iter([("one", np.ones(3, np.float32)), ("two", blocks)]))
    return path
