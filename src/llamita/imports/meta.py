"""Meta's own checkpoints, consolidated.*.pth with params.json and tokenizer.model, as Hugging Face has them.

Large models are cut for tensor parallelism, a file a part: layers that write to many heads by rows, those
that read them by columns. Rows of q and k are in the order of Meta's rotary embedding, which turns pairs of
neighbours. Nothing in a .pth is run: torch.load takes tensors alone.
"""

import math
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llamita.errors import InputError, RunError
from llamita.imports import meta_quantized
from llamita.imports.detect import files_of
from llamita.imports.take_over import Imported, take_over
from llamita.imports.tokenizers import Converted, convert_tokenizer
from llamita.models.config import ModelConfig
from llamita.models.foreign_names import SCALED_ROPE, hf_order, meta_name
from llamita.models.names import expected_tensors
from llamita.models.packed_writer import copy_companions, find_companions, plan_shards, write_shards
from llamita.system.files import read_json, write_json
from llamita.system.progress import Progress

PARAMS = "params.json"
_APART = "Its adapters lie apart; without them it is not the model that was trained: run both with `--adapter`."
_BY_COLUMNS = ("attention.wo", "feed_forward.w2")
_DTYPES = {torch.bfloat16: ("BF16", torch.int16, "<u2"), torch.float16: ("F16", torch.int16, "<f2"),
           torch.float32: ("F32", torch.int32, "<f4")}  # fmt: skip
_SMALL_WIDTHS = (2048, 3072)  # of Llama 3.2 1B and 3B, which stretch by 32; Llama 3.1 stretches by 8
_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
_PARAMS = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier",
           "norm_eps",
           "rope_theta", "use_scaled_rope", "rope_scale_factor", "rope_scaling_factor", "max_seq_len",
           "max_batch_size", "model_parallel_size")  # fmt: skip


def convert(source: Path, directory: Path, progress: Progress = None) -> Imported:
    """Write a float checkpoint in Hugging Face's form, or a packed directory of a quantized release.

    Args:
        directory: exists, empty.

    Raises:
        InputError: a file is damaged, a tensor is missing or of another shape.
        RunError: a file cannot be read.
    """
    files = files_of(source)
    parts = [_load(path) for path in files if path.suffix == ".pth"]
    params, is_quantized = read_json(source, PARAMS), any(n.endswith(".scales") for n in parts[0])
    _check_names(params, parts, (*_PARAMS, *(meta_quantized.KEYS if is_quantized else ())))
    tokenizer = convert_tokenizer(source, directory)
    values = hf_config(params, parts, tokenizer)
    _copy_companions(source, directory)
    if not is_quantized:
        _write_floats(parts, values, directory, progress)
        return Imported()
    if len(parts) > 1:
        raise InputError(f"{source}", "a quantized release in one file", f"{len(parts)}")
    model = meta_quantized.MetaQuantized(source, files, params, values, parts[0])
    adapter = model.adapter()
    taken = take_over(model, directory, progress, None if adapter is None else _APART)
    return Imported(taken, adapter, layers=model.config.layers)


def _write_floats(parts: list[dict[str, Tensor]], values: dict[str, Any], directory: Path, progress: Progress) -> None:
    """Weights and config.json of a float checkpoint."""
    config = ModelConfig.from_hf(values)
    tensors = expected_tensors(config)
    names = {tensor: meta_name(tensor) for tensor in tensors}
    known = {*names.values(), "rope.freqs", *(["output.weight"] if config.tied else [])}
    for name in parts[0]:
        if name not in known:
            raise InputError(f"consolidated.00.pth: {name[:80]!r}", "a Llama's tensors alone")
    kind = _DTYPES[parts[0][names["model.norm.weight"]].dtype]
    shards = plan_shards({tensor: {tensor: (kind[0], shape)} for tensor, shape in tensors.items()})

    def pieces(tensor: str) -> list[np.ndarray]:
        return [_joined(parts, names[tensor], tensor, tensors[tensor], config, kind)]

    write_shards(directory, shards, pieces, progress)
    write_json(directory / "config.json", values)


def _copy_companions(source: Path, directory: Path) -> None:
    """Licence and the like; the tokenizer was converted."""
    made = {path.name for path in directory.iterdir()}
    companions = {old: new for old, new in find_companions(source).items() if new not in made}
    companions.pop("tokenizer.model", None)
    copy_companions(source, directory, companions)


def hf_config(params: dict[str, Any], parts: list[dict[str, Tensor]], tokenizer: Converted) -> dict[str, Any]:
    """config.json from params.json and what weights say.

    Raises:
        InputError: a key that changes the model and is not known here, or a value of another type.
    """
    first = parts[0]
    inner = len(first["layers.0.feed_forward.w1.weight"]) * len(parts)
    tied = "output.weight" not in first or all(
        part["output.weight"].shape == part["tok_embeddings.weight"].shape
        and torch.equal(part["output.weight"], part["tok_embeddings.weight"]) for part in parts
    )  # fmt: skip
    scaled = bool(params.get("use_scaled_rope"))
    told = params.get("vocab_size")  # -1 in Llama 2's: as many as the tokenizer has
    vocabulary = told if type(told) is int and told > 0 else tokenizer.tokens
    context = params.get("max_seq_len") or (131072 if scaled else 8192 if tokenizer.is_llama3 else 4096)
    values: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": params["dim"], "intermediate_size": inner, "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params.get("n_kv_heads") or params["n_heads"],
        "rms_norm_eps": params.get("norm_eps", 1e-5), "vocab_size": vocabulary,
        "tie_word_embeddings": tied, "max_position_embeddings": context,
        "rope_theta": params.get("rope_theta", 10000.0), "bos_token_id": tokenizer.bos,
        "eos_token_id": list(tokenizer.ends), "dtype": _NAMES[first["norm.weight"].dtype],
        "attention_bias": False, "mlp_bias": False,
    }  # fmt: skip
    if scaled:
        known = params.get("rope_scale_factor") or params.get("rope_scaling_factor")
        factor = known or (32.0 if params["dim"] in _SMALL_WIDTHS else 8.0)
        values["rope_scaling"] = {**SCALED_ROPE, "factor": factor}
    return values


def _check_names(params: dict[str, Any], parts: list[dict[str, Tensor]], known: tuple[str, ...]) -> None:
    """See that nothing is there that would change the model and is not known here."""
    for name in params:
        if name not in known:
            raise InputError(f"{PARAMS}: {name[:40]!r}", f"Llama's keys ({', '.join(known)})")
    for name in ("dim", "n_layers", "n_heads"):
        if type(params.get(name)) is not int or params[name] < 1:
            raise InputError(f"{PARAMS}: {name}", "a whole number", f"{params.get(name)!r}")
    if not {"tok_embeddings.weight", "layers.0.feed_forward.w1.weight", "norm.weight"} <= parts[0].keys():
        raise InputError("consolidated.00.pth", "Meta's names of a Llama's weights", "others")
    norm = parts[0]["norm.weight"].dtype  # which says what the whole checkpoint is stored in
    if norm not in _DTYPES:
        raise InputError("consolidated.00.pth: norm.weight", "floats", f"{norm}")
    for number, part in enumerate(parts):
        if part.keys() != parts[0].keys():
            other = sorted(part.keys() ^ parts[0].keys())[0]
            raise InputError(f"consolidated.{number:02}.pth", "the names of the first part", f"{other[:80]}")


def _load(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, mapped."""
    try:
        _check_archive(path)
        with warnings.catch_warnings():  # what it says of a damaged file is not for our users
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except InputError:
        raise
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # Torch's loader fails in a dozen ways
        why = " ".join(str(error).split())[:120]
        raise InputError(f"{path.name}", f"a file of torch.save with tensors alone: {why}") from None
    if not isinstance(state, dict) or not state:
        raise InputError(f"{path.name}", "tensors by name", f"{type(state).__name__}")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or not _is_plain(tensor, path):
            raise InputError(f"{path.name}: {str(name)[:60]!r}", "a plain tensor of floats, as it lies in the file")
    return state


def _is_plain(tensor: Tensor, path: Path) -> bool:
    """Whether a tensor takes what it has in the file, and is of a type that is known."""
    if tensor.layout != torch.strided or tensor.dtype not in (*_DTYPES, torch.int8) or not tensor.ndim:
        return False
    held = tensor.untyped_storage().nbytes()  # a view of it may have any order, but not say a value twice
    return 0 not in tensor.stride() and tensor.nbytes <= held <= path.stat().st_size


def _check_archive(path: Path) -> None:
    """See that what lies in a file takes no more memory than the file."""
    if not zipfile.is_zipfile(path):  # of Torch before 1.6, whose tensors cannot be mapped
        raise InputError(f"{path.name}", "a file of torch.save", "another", "is it truncated?")
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if any(one.compress_type != zipfile.ZIP_STORED for one in members) or (
        sum(one.file_size for one in members) > path.stat().st_size
    ):
        raise InputError(f"{path.name}", "what torch.save stores", "something that was compressed")


def _joined(
    parts: list[dict[str, Tensor]], name: str, tensor: str, shape: tuple[int, ...], config: ModelConfig,
    kind: tuple[str, Any, str],
) -> np.ndarray:  # fmt: skip
    """A tensor of all parts, with its rows in Hugging Face's order, as bits of its type."""
    lacking = [f"consolidated.{i:02}.pth" for i, part in enumerate(parts) if name not in part]
    if lacking:
        raise InputError(f"{lacking[0]}", f"{name}", "none")
    pieces = [part[name] for part in parts]
    if any(piece.dtype not in _DTYPES or _DTYPES[piece.dtype] != kind for piece in pieces):
        raise InputError(f"{name}", f"{kind[0]} as the others", f"{pieces[0].dtype}")
    whole = _whole(pieces, name, shape)
    if tuple(whole.shape) != shape:
        raise InputError(f"{name}", f"{shape} of {len(parts)} parts", f"{tuple(whole.shape)}")
    order = hf_order(tensor, config)
    whole = whole if order is None else whole[torch.from_numpy(order)]
    return whole.contiguous().view(kind[1]).numpy().view(kind[2])


def _whole(pieces: list[Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    if len(pieces) == 1 or len(shape) == 1:  # vectors are in every part
        return pieces[0]
    if any(piece.ndim != 2 for piece in pieces):
        raise InputError(f"{name}", "a matrix", f"{tuple(pieces[0].shape)}")
    by_columns = any(part in name for part in _BY_COLUMNS)
    if name.startswith("tok_embeddings"):  # Llama 2 cuts it by columns, Llama 3 by rows
        by_columns = len(pieces[0]) == shape[0]
    if math.prod(pieces[0].shape) * len(pieces) != math.prod(shape):
        raise InputError(f"{name}", f"{shape} in {len(pieces)} parts", f"{tuple(pieces[0].shape)} in each")
    return torch.cat(pieces, dim=int(by_columns))
