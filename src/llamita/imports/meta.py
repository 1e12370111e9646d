"""Read Meta's own checkpoints: consolidated.*.pth with params.json and tokenizer.model.

Large models are cut for tensor parallelism, a part a file: layers that write to many heads by rows, layers that read
them by columns. Rows of q and k are in the order of Meta's rotary embedding, which rotates pairs of neighbours.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llamita.errors import InputError, shown
from llamita.imports import meta_quantized
from llamita.imports.detect import files_of
from llamita.imports.import_codes import Imported, import_codes
from llamita.imports.tokenizers import Converted, convert_tokenizer
from llamita.imports.torch_files import FLOATS, bits_of, load_tensors
from llamita.models.config import ModelConfig
from llamita.models.foreign_names import SCALED_ROPE, hf_order, meta_name
from llamita.models.names import expected_tensors
from llamita.models.packed_writer import copy_companions, find_companions, plan_shards, write_shards
from llamita.system.files import read_json, write_json
from llamita.system.progress import Progress

PARAMS = "params.json"
_APART = "Its adapters are in a directory of their own. Give them with `--adapter`: the model was trained with them."
_BY_COLUMNS = ("attention.wo", "feed_forward.w2")
_SMALL_WIDTHS = (2048, 3072)  # of Llama 3.2 1B and 3B, which stretch by 32; Llama 3.1 stretches by 8
_PARAMS = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps",
           "rope_theta", "use_scaled_rope", "rope_scale_factor", "rope_scaling_factor", "max_seq_len",
           "max_batch_size", "model_parallel_size")  # fmt: skip


def convert(source: Path, directory: Path, progress: Progress = None) -> Imported:
    """Write a float checkpoint, or a packed model of a quantized release.

    Args:
        directory: exists, empty.

    Raises:
        InputError: a file is damaged, or a tensor is missing or has another shape.
        RunError: a file cannot be read.
    """
    files = files_of(source)
    parts = [load_tensors(path) for path in files if path.suffix == ".pth"]
    params, is_quantized = read_json(source, PARAMS), any(n.endswith(".scales") for n in parts[0])
    _check_names(params, parts, (*_PARAMS, *(meta_quantized.KEYS if is_quantized else ())))
    tokenizer = convert_tokenizer(source, directory)
    values = hf_config(params, parts, tokenizer)
    _copy_companions(source, directory)
    if not is_quantized:
        _write_floats(parts, values, directory, progress)
        return Imported()
    if len(parts) > 1:
        raise InputError(f"{source}", "a quantized release in one file", f"{len(parts)} files")
    model = meta_quantized.MetaQuantized(source, files, params, values, parts[0])
    adapter = model.adapter()
    codes = import_codes(model, directory, progress, None if adapter is None else _APART)
    return Imported(codes, adapter, layers=model.config.layers)


def _write_floats(parts: list[dict[str, Tensor]], values: dict[str, Any], directory: Path, progress: Progress) -> None:
    """Write weights and config.json of a float checkpoint."""
    config = ModelConfig.from_hf(values)
    tensors = expected_tensors(config)
    names = {tensor: meta_name(tensor) for tensor in tensors}
    known = {*names.values(), "rope.freqs", *(["output.weight"] if config.tied else [])}
    for name in parts[0]:
        if name not in known:
            raise InputError(f"consolidated.00.pth: {shown(name)}", "a Llama's tensors alone")
    dtype = parts[0]["norm.weight"].dtype
    shards = plan_shards({tensor: {tensor: (FLOATS[dtype][0], shape)} for tensor, shape in tensors.items()})
    write_shards(directory, shards, lambda tensor: [_joined(parts, tensor, tensors[tensor], config, dtype)], progress)
    write_json(directory / "config.json", values)


def _copy_companions(source: Path, directory: Path) -> None:
    """Copy the licence and the like; the tokenizer was converted."""
    made = {path.name for path in directory.iterdir()}
    companions = {old: new for old, new in find_companions(source).items() if new not in made}
    companions.pop("tokenizer.model", None)
    copy_companions(source, directory, companions)


def hf_config(params: dict[str, Any], parts: list[dict[str, Tensor]], tokenizer: Converted) -> dict[str, Any]:
    """Return config.json for params.json and the shapes of the weights."""
    first = parts[0]
    inner = len(first["layers.0.feed_forward.w1.weight"]) * len(parts)
    tied = "output.weight" not in first or all(
        part["output.weight"].shape == part["tok_embeddings.weight"].shape
        and torch.equal(part["output.weight"], part["tok_embeddings.weight"]) for part in parts
    )  # fmt: skip
    scaled = bool(params.get("use_scaled_rope"))
    vocabulary = params.get("vocab_size")
    if type(vocabulary) is not int or vocabulary <= 0:  # Llama 2 has -1: as many as the tokenizer
        vocabulary = tokenizer.tokens
    context = params.get("max_seq_len") or (131072 if scaled else 8192 if tokenizer.is_llama3 else 4096)
    values: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": params["dim"], "intermediate_size": inner, "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params.get("n_kv_heads") or params["n_heads"],
        "rms_norm_eps": params.get("norm_eps", 1e-5), "vocab_size": vocabulary,
        "tie_word_embeddings": tied, "max_position_embeddings": context,
        "rope_theta": params.get("rope_theta", 10000.0), "bos_token_id": tokenizer.bos,
        "eos_token_id": list(tokenizer.ends), "dtype": str(first["norm.weight"].dtype).removeprefix("torch."),
        "attention_bias": False, "mlp_bias": False,
    }  # fmt: skip
    if scaled:
        known = params.get("rope_scale_factor") or params.get("rope_scaling_factor")
        factor = known or (32.0 if params["dim"] in _SMALL_WIDTHS else 8.0)
        values["rope_scaling"] = {**SCALED_ROPE, "factor": factor}
    return values


def _check_names(params: dict[str, Any], parts: list[dict[str, Tensor]], known: tuple[str, ...]) -> None:
    """Raise InputError for anything that would change the model and is not known here."""
    for name in params:
        if name not in known:
            raise InputError(f"{PARAMS}: {shown(name, 40)}", f"Llama's keys ({', '.join(known)})")
    for name in ("dim", "n_layers", "n_heads"):
        if type(params.get(name)) is not int or params[name] < 1:
            raise InputError(f"{PARAMS}: {name}", "a whole number", shown(params.get(name)))
    if not {"tok_embeddings.weight", "layers.0.feed_forward.w1.weight", "norm.weight"} <= parts[0].keys():
        raise InputError("consolidated.00.pth", "Meta's names of a Llama's weights", "others")
    norm = parts[0]["norm.weight"].dtype  # the type of the whole checkpoint
    if norm not in FLOATS:
        raise InputError("consolidated.00.pth: norm.weight", "floats", f"{norm}")
    for number, part in enumerate(parts):
        if part.keys() != parts[0].keys():
            other = sorted(part.keys() ^ parts[0].keys())[0]
            raise InputError(f"consolidated.{number:02}.pth", "the names of the first part", other[:80])


def _joined(
    parts: list[dict[str, Tensor]], tensor: str, shape: tuple[int, ...], config: ModelConfig, dtype: torch.dtype
) -> np.ndarray:
    """Return a tensor of all parts, with its rows in Hugging Face's order; bf16 as its bits."""
    name = meta_name(tensor)
    lacking = [f"consolidated.{i:02}.pth" for i, part in enumerate(parts) if name not in part]
    if lacking:
        raise InputError(lacking[0], name, "none")
    pieces = [part[name] for part in parts]
    if any(piece.dtype != dtype for piece in pieces):
        raise InputError(name, f"{FLOATS[dtype][0]} as the others", f"{pieces[0].dtype}")
    whole = _whole(pieces, name, shape)
    if tuple(whole.shape) != shape:
        raise InputError(name, f"{shape} of {len(parts)} parts", f"{tuple(whole.shape)}")
    order = hf_order(tensor, config)
    return bits_of(whole if order is None else whole[torch.from_numpy(order)], name)


def _whole(pieces: list[Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    """Return the pieces joined by rows or by columns."""
    if len(pieces) == 1 or len(shape) == 1:  # every part has the whole vector
        return pieces[0]
    if any(piece.ndim != 2 for piece in pieces):
        raise InputError(name, "a matrix", f"{tuple(pieces[0].shape)}")
    by_columns = any(part in name for part in _BY_COLUMNS)
    if name.startswith("tok_embeddings"):  # Llama 2 cuts this one by columns, Llama 3 by rows
        by_columns = len(pieces[0]) == shape[0]
    if math.prod(pieces[0].shape) * len(pieces) != math.prod(shape):
        raise InputError(name, f"{shape} in {len(pieces)} parts", f"{tuple(pieces[0].shape)} in each")
    return torch.cat(pieces, dim=int(by_columns))
