"""`llamita inspect`: show what a model directory holds."""

import math
import os
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from llamita.commands import console
from llamita.commands.options import Json, Model, Revision
from llamita.commands.sources import convert_first
from llamita.formats.gguf_parts import GgufModel, parts_of
from llamita.imports.detect import gguf_of
from llamita.imports.gguf_config import hf_config
from llamita.imports.names import is_hub_name
from llamita.imports.open import open_source
from llamita.models.checkpoint import Checkpoint
from llamita.models.config import ModelConfig
from llamita.models.families import FAMILIES, family_name
from llamita.models.layer_kinds import count_kinds
from llamita.models.names import expected_tensors
from llamita.models.packed import PackedModel
from llamita.numerics.scheme import QuantScheme
from llamita.system.files import read_json

_WORST = 5  # layers shown without --layers
_LONGEST_NAME = 80  # characters of a tokenizer's name

_Layers = Annotated[
    bool, typer.Option("--layers", help=f"Show the error of every layer, not of the worst {_WORST} only.")
]


def command(model: Model, revision: Revision = None, layers: _Layers = False, json: Json = False) -> None:
    """Show a model's shape, scheme, size, origin, and the errors of its layers.

    Example: llamita inspect my-model
    """
    values, scheme = _facts_of(model, json)
    if json:
        console.print_json(values)
        return
    rows = [[key.replace("_", " "), _text(value)] for key, value in _for_people(values).items()]
    console.print_table(model, ["what", "value"], rows)
    worst = sorted(values["layer_errors"].items(), key=lambda item: -item[1])
    if worst:
        listed = worst if layers else worst[:_WORST]
        kinds = {name: scheme.kind(name).name for name, _ in worst} if scheme else {}
        console.print_table(
            "relative squared error, worst first",
            ["layer", "stored as", "error"],
            [[name, kinds.get(name, ""), f"{error:.3e}"] for name, error in listed],
        )


def _facts_of(name: str, quiet: bool) -> tuple[dict[str, Any], QuantScheme | None]:
    """Return the facts about a model, and its scheme; of a GGUF only the header is read."""
    if is_hub_name(name):
        with import_module("llamita.imports.hub").described(name) as file:
            if gguf_of(file) is not None:
                return {**gguf_facts(file), "path": name}, None
    elif os.path.exists(name) and (gguf := gguf_of(Path(name))) is not None:
        return gguf_facts(gguf), None
    convert_first(name, quiet=quiet)
    source = open_source(name)
    assert isinstance(source, Checkpoint | PackedModel)
    try:
        return facts(source), source.scheme
    finally:
        source.close()


def gguf_facts(path: Path) -> dict[str, Any]:
    """Return what the header of a GGUF says, as JSON values."""
    file = GgufModel(path)
    try:
        sizes: Counter[str] = Counter()
        for tensor in file.tensors.values():
            sizes[tensor.kind] += tensor.stop - tensor.start
        files = [part.name for part in parts_of(path)]
        stored = hf_config(file)
        values = _shape_facts(path, stored, ModelConfig.from_hf(stored), files, sizes)
        words = file.values.get("tokenizer.ggml.pre")
        tokenizer = str(words)[:_LONGEST_NAME] if words else None
        return {**values, "scheme": None, "tokenizer": tokenizer, "layer_errors": {}}
    finally:
        file.close()


def facts(source: Checkpoint | PackedModel) -> dict[str, Any]:
    """Return what there is to know about an open model, as JSON values."""
    config = source.config
    sizes: Counter[str] = Counter()
    for file in source.files.values():
        for info in file.tensors.values():
            sizes[info.dtype] += info.stop - info.start
    values = {
        **_shape_facts(source.path, read_json(source.path, "config.json"), config, list(source.files), sizes),
        "scheme": source.scheme.to_dict() if source.scheme else None,
        "layers_by_kind": count_kinds(config, source.scheme) if source.scheme else None,
        "layer_errors": {},
    }
    if isinstance(source, PackedModel):
        metadata = source.metadata.to_dict()
        for key in ("llamita", "method", "settings", "seed", "rotations", "calibration", "source", "float_layers"):
            values[key] = metadata[key]
        values["relative_error"] = source.metadata.error.relative
        values["layer_errors"] = source.metadata.error.layers
    return values


def _shape_facts(
    path: Path, stored: dict[str, Any], config: ModelConfig, files: list[str], sizes: Counter[str]
) -> dict[str, Any]:
    """Return what a config says; `stored` is config.json as it is on disk, or what takes its place in a GGUF."""
    rope, is_stretched = config.rope, config.rope.kind != "default"
    return {
        "path": str(path),
        "model_type": stored["model_type"],
        "family": config.family,
        "weights": sum(math.prod(shape) for shape in expected_tensors(config).values()),
        "layers": config.layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "context": config.context,
        "window": {"positions": config.window, "layers": len(config.windowed)} if config.windowed else None,
        "rope": rope.kind,
        "rope_factor": rope.factor if is_stretched else None,
        "rope_original_context": rope.original_context if is_stretched else None,
        "tied": config.tied,
        "files": files,
        "tensor_bytes": sum(sizes.values()),
        "bytes_by_dtype": dict(sizes.most_common()),
    }


def _for_people(values: dict[str, Any]) -> dict[str, Any]:
    """Return the facts of the table, by row: some in words, without those that the model has none of."""
    model_type, family = values["model_type"], values["family"]
    name, rope, window = family_name(model_type) or model_type, values["rope"], values["window"]
    if values["rope_factor"] is not None:
        rope += f", factor {values['rope_factor']:g}, from {values['rope_original_context']:,} tokens"
    words = {
        "family": name if name == family else f"{name}, read as a {FAMILIES[family].classes}",
        "window": window and f"{window['positions']:,} positions, in {window['layers']} of {values['layers']} layers",
        "rope": rope,
    }
    if "source" in values:
        words |= {"source": values["source"]["name"], "rotations": _rotations(values["rotations"])}
    if values["scheme"]:  # layers of another kind are listed with the errors
        words["scheme"] = {key: value for key, value in values["scheme"].items() if key != "layers"}
    absent = {key for key in ("window", "layers_by_kind") if values.get(key) is None}
    left_out = {"layer_errors", "model_type", "rope_factor", "rope_original_context", *absent}
    return {key: value for key, value in (values | words).items() if key not in left_out}


def _rotations(rotations: list[dict[str, Any]]) -> str:
    """Return the names of rotations, with the size of the one that the engine applies at run time."""
    sizes = {r["name"]: f" of {r['size']:,} inputs at run time" for r in rotations if "size" in r}
    return ", ".join(r["name"] + sizes.get(r["name"], "") for r in rotations) or "none"


def _text(value: Any) -> str:
    """Return a value for people to read: mappings as `key value` pairs, large numbers with separators."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(_text(item) for item in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, str):
        return value if value.isprintable() else repr(value)  # no control sequences from a stranger's file
    return "none" if value is None else f"{value:.3e}" if isinstance(value, float) else str(value)
